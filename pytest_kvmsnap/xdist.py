"""Telling people of wrong use under pytest-xdist, whose workers have no voice of their own.

A usage error that is raised in a worker becomes an internal error without its text. So a worker
hands the message to the controller and has no tests, and the controller prints it, once.
"""

from typing import Any

import pytest

from pytest_kvmsnap.errors import ConfigError

_OUTPUT = "kvmsnap_problem"
_PROBLEMS = pytest.StashKey[list[str]]()


def is_worker(config: pytest.Config) -> bool:
    """Tell whether this process is a worker of pytest-xdist."""
    return hasattr(config, "workerinput")


def refuse_several_workers(config: pytest.Config) -> None:
    """Refuse to run with workers that would wait for each other's machine.

    Raises:
        ConfigError: there is more than one worker.
    """
    count = getattr(config, "workerinput", {}).get("workercount", 1)
    if count > 1:
        raise ConfigError(
            f"{count} workers of pytest-xdist cannot share machines yet",
            why="a machine belongs to one process until that ends, and the others would wait",
            cure="run tests with machines in one process: without -n, or with -n 1",
        )


def hand_over(session: pytest.Session, problem: str) -> None:
    """In a worker: give the message to the controller, and run nothing."""
    output: dict[str, Any] = getattr(session.config, "workeroutput")  # noqa: B009 - of pytest-xdist
    output[_OUTPUT] = problem
    session.items.clear()


def take_over(node: Any) -> None:
    """In the controller: keep what a worker handed over, each message once."""
    problem: str | None = getattr(node, "workeroutput", {}).get(_OUTPUT)
    problems = node.config.stash.setdefault(_PROBLEMS, [])
    if problem is not None and problem not in problems:
        problems.append(problem)


def handed_over(config: pytest.Config) -> list[str]:
    """In the controller: return what the workers handed over."""
    return config.stash.get(_PROBLEMS, [])
