"""Telling people something under pytest-xdist, whose workers have no voice of their own.

A usage error that is raised in a worker becomes an internal error without its text. So a worker
hands the message to the controller and has no tests, and the controller prints it, once. What is to
be said at the end of the run goes the same way.
"""

import os
from typing import Any
from urllib.parse import urlsplit

import pytest

from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.settings import HOOK, Settings

_OUTPUT = "kvmsnap_problem"
_WORDS = "kvmsnap_words"
_FAILED = "kvmsnap_failed"
_ACCOUNT = "kvmsnap_account"
_PROBLEMS = pytest.StashKey[list[str]]()
_CLOSING = pytest.StashKey[list[str]]()
_FAILURE = pytest.StashKey[bool]()
_ACCOUNTS = pytest.StashKey[list[dict[str, Any]]]()


def is_worker(config: pytest.Config) -> bool:
    """Tell whether this process is a worker of pytest-xdist."""
    return hasattr(config, "workerinput")


def workers(config: pytest.Config) -> int:
    """Return how many workers this run has; 1 without pytest-xdist."""
    count: int = getattr(config, "workerinput", {}).get("workercount", 1)
    return count


def stay_in_one_process(config: pytest.Config) -> None:
    """Have pytest-xdist, where it is installed, start no workers: there are no tests for them."""
    if hasattr(config.option, "dist"):
        config.option.dist = "no"
        config.option.numprocesses = None
        config.option.tx = []


def refuse_shared_root(config: pytest.Config, settings: Settings) -> None:
    """Refuse an embedded libvirt that several workers would open, which serves one process only.

    The hook may give each worker a root of its own.

    Raises:
        ConfigError: that is so.
    """
    count = workers(config)
    uri = settings.uri or os.environ.get("LIBVIRT_DEFAULT_URI", "")
    is_of_hook = settings.origins.get("uri", "").endswith(HOOK)
    if count > 1 and urlsplit(uri).path == "/embed" and not is_of_hook:
        raise ConfigError(
            f"{count} workers of pytest-xdist cannot share {uri}",
            why="an embedded libvirt serves one process",
            cure=f"run without -n, use a libvirt daemon, or let the hook {HOOK} give each worker a"
            " root of its own",
        )


def hand_over(session: pytest.Session, problem: str) -> None:
    """In a worker: give the message to the controller, and run nothing."""
    _output(session.config)[_OUTPUT] = problem
    session.items.clear()


def hand_over_words(config: pytest.Config, words: list[str], *, failed: bool) -> None:
    """In a worker: let the controller say this at the end of the run, and fail where we did."""
    _output(config)[_WORDS] = words
    _output(config)[_FAILED] = failed


def hand_over_account(config: pytest.Config, account: dict[str, Any]) -> None:
    """In a worker: give the controller what our machines cost, in lists, numbers and texts."""
    _output(config)[_ACCOUNT] = account


def _output(config: pytest.Config) -> dict[str, Any]:
    output: dict[str, Any] = getattr(config, "workeroutput")  # noqa: B009 - of pytest-xdist
    return output


def take_over(node: Any) -> None:
    """In the controller: keep what a worker handed over, each problem once."""
    output: dict[str, Any] = getattr(node, "workeroutput", {})
    problem: str | None = output.get(_OUTPUT)
    problems = node.config.stash.setdefault(_PROBLEMS, [])
    if problem is not None and problem not in problems:
        problems.append(problem)
    node.config.stash.setdefault(_CLOSING, []).extend(output.get(_WORDS, []))
    if output.get(_FAILED):
        node.config.stash[_FAILURE] = True
    if _ACCOUNT in output:
        node.config.stash.setdefault(_ACCOUNTS, []).append(output[_ACCOUNT])


def handed_over(config: pytest.Config) -> list[str]:
    """In the controller: return what the workers handed over."""
    return config.stash.get(_PROBLEMS, [])


def words_of_workers(config: pytest.Config) -> list[str]:
    """In the controller: return what the workers would say at the end of the run."""
    return config.stash.get(_CLOSING, [])


def accounts_of_workers(config: pytest.Config) -> list[dict[str, Any]]:
    """In the controller: return what the machines of the workers cost."""
    return config.stash.get(_ACCOUNTS, [])


def has_failed(config: pytest.Config) -> bool:
    """In the controller: tell whether a worker could not leave its machines as they were found."""
    return config.stash.get(_FAILURE, False)
