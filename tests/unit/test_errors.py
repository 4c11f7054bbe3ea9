"""Messages have a place, a cause and a cure, and several are told at once."""

import importlib
import inspect

import pytest

import pytest_kvmsnap
from pytest_kvmsnap import errors
from pytest_kvmsnap.errors import (
    AgentError,
    BlockedError,
    ConfigError,
    KvmsnapError,
    MachineError,
    UsageProblem,
    merged,
)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({}, "it failed"),
        ({"where": "box"}, "it failed\n  where: box"),
        ({"why": "so"}, "it failed\n  why:   so"),
        ({"cure": "pay"}, "it failed\n  cure:  pay"),
        (
            {"where": "box", "why": "so", "cure": "pay"},
            "it failed\n  where: box\n  why:   so\n  cure:  pay",
        ),
        ({"why": "one\ntwo\n"}, "it failed\n  why:   one\n         two"),
        ({"why": "  \n"}, "it failed\n  why:   "),
    ],
)
def test_the_text_has_a_line_for_each_part_that_is_there(parts: dict[str, str], text: str) -> None:
    error = KvmsnapError("it failed", **parts)
    assert str(error) == text
    assert error.what == "it failed"
    assert error.args == ("it failed",)


def test_parts_may_be_added_on_the_way_up() -> None:
    error = AgentError("it failed")
    error.what, error.cure = "cannot open the file", "look"
    assert str(error) == "cannot open the file\n  cure:  look"


def test_one_problem_stays_as_it_is() -> None:
    problem = BlockedError("one")
    assert merged([problem]) is problem


def test_several_problems_become_one_message_in_their_order() -> None:
    problem = merged([BlockedError("one", why="so"), ConfigError("two")])
    assert str(problem) == (
        "2 problems must be solved before the first test can run\n\none\n  why:   so\n\ntwo"
    )
    assert type(problem) is UsageProblem


def test_every_error_belongs_to_one_of_the_two_families() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        if kind is not KvmsnapError:
            assert issubclass(kind, UsageProblem) != issubclass(kind, MachineError)
        assert inspect.getdoc(kind)


# the package


@pytest.mark.parametrize("name", pytest_kvmsnap.__all__)
def test_public_names_can_be_imported(name: str) -> None:
    module = importlib.import_module("pytest_kvmsnap")
    assert getattr(module, name).__name__ == name


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'pytest_kvmsnap' has no attribute 'nonsense'"):
        _ = pytest_kvmsnap.nonsense
