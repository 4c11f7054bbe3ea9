"""Preparations: the wide fixtures that make states, and what is said where pytest hides one."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap import run
from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.markers import Request, requests_of
from pytest_kvmsnap.usage import is_ours

if TYPE_CHECKING:
    from pytest_kvmsnap.settings import Settings
    from pytest_kvmsnap.usage import Definition


def prepared_by(
    item: pytest.Item, definition: "Definition", ours: "Iterable[Definition]", settings: "Settings"
) -> dict[Request, str]:
    """Return which machines a fixture prepares that asks for these of ours.

    None unless it is a preparation.
    """
    if definition.scope == "function" or is_ours(definition):
        return {}
    return requests_of(item, {each.scope for each in ours}, settings)


def hidden(fixture: str, asked_for: str) -> ConfigError:
    return ConfigError(
        f"the fixture {fixture!r} uses the machine of {asked_for!r} without naming it",
        why="what it does to the machine could be neither kept for its tests nor undone",
        cure=f"name {asked_for} among the arguments of {fixture}",
    )


def too_late(fixture: str, request: Request, by: str, where: str) -> ConfigError:
    return ConfigError(
        f"the fixture {fixture!r} prepares the machine {str(request.machine)!r}, which {by!r} uses"
        " already",
        where=where,
        cure=f"name {fixture} among the arguments of the test or fixture that asks for it late (by"
        " getfixturevalue, or in an override), before others: then it comes first",
    )


@contextlib.contextmanager
def unset_on_error(definition: "Definition", request: pytest.FixtureRequest) -> Iterator[None]:
    """Tell an error of ours, and leave the fixture as if its set-up had never begun."""
    try:
        with run.told():
            yield
    except BaseException as error:
        unset(definition, request, error)
        raise


def unset(definition: "Definition", request: pytest.FixtureRequest, error: BaseException) -> None:
    """Let the next test set up a fixture anew whose set-up ended with an error."""
    definition.cached_result = (None, definition.cache_key(request), (error, None))  # type: ignore[arg-type]
    definition.finish(request)  # type: ignore[arg-type]


def made_for_others(fixture: str, where: str) -> ConfigError:
    return ConfigError(
        f"the fixture {fixture!r} was made for other tests, on a machine in another state than this"
        " test's",
        where=where,
        cure="name it among the arguments of the test, or in usefixtures, rather than to ask for it"
        " by getfixturevalue: then it is made anew",
    )
