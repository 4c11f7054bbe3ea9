"""What tests came to, and on which machines, read from their reports.

That is done in the one process that has them all: under pytest-xdist in the controller.

What is told of a machine goes with a test's reports as `user_properties`, which JUnit's XML has
too: `kvmsnap_machine` begins what belongs to one machine, the others follow.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

MACHINE = "kvmsnap_machine"
EVIDENCE = "kvmsnap_evidence"
KEPT = "kvmsnap_kept"
_PREFIX = "kvmsnap_"
NAMES = frozenset(
    _PREFIX + name
    for name in (
        "machine",
        "snapshot",
        "image",
        "take_seconds",
        "revert_seconds",
        "ready_seconds",
        "wait_seconds",
        "evidence",
        "kept",
    )
)
"""All properties of ours; those of users are none of our business."""

_RESULTS = pytest.StashKey["Results"]()


@dataclass(frozen=True)
class Try:
    """One try of a test that used machines; `outcome` in pytest's words, or "rerun".

    `evidence` is the folder of what a failure left, empty where there is none.
    """

    test: str
    outcome: str
    machines: list[dict[str, Any]]
    evidence: str = ""


@dataclass
class _UnderWay:
    reports: list[tuple[str, str, bool]] = field(default_factory=list)
    properties: list[tuple[str, Any]] = field(default_factory=list)


class Results:
    """The tries of all tests that used machines, in the order of their ends."""

    def __init__(self) -> None:
        self.begun = time.time()
        self.tries: list[Try] = []
        self._under_way: dict[tuple[str, str], _UnderWay] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        key = (getattr(report, "worker_id", ""), report.nodeid)  # workers may run the same test
        if report.when == "setup":
            self._end(key)  # of a try whose teardown was not told (pytest-rerunfailures before 16)
        test = self._under_way.setdefault(key, _UnderWay())
        test.reports.append((report.when or "", report.outcome, hasattr(report, "wasxfail")))
        if any(name == MACHINE for name, _ in report.user_properties):
            test.properties = report.user_properties
        if report.when == "teardown":
            self._end(key)

    def end(self) -> None:
        """Take for ended what will not be heard of again."""
        for key in list(self._under_way):
            self._end(key)

    def _end(self, key: tuple[str, str]) -> None:
        test = self._under_way.pop(key, None)
        if test is not None and test.properties:
            machines = machines_of(test.properties)
            evidence = str(dict(test.properties).get(EVIDENCE, ""))
            self.tries.append(Try(key[1], outcome_of(test.reports), machines, evidence))


def listen(config: pytest.Config) -> Results:
    """Return the results of this run, which are gathered from the first call on."""
    if _RESULTS not in config.stash:
        config.stash[_RESULTS] = results = Results()
        config.pluginmanager.register(results, "kvmsnap-results")
    return config.stash[_RESULTS]


def results_of(config: pytest.Config) -> Results | None:
    """Return the results of this run, None where nobody listened."""
    return config.stash.get(_RESULTS, None)


def machines_of(properties: Iterable[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Return what is told of each machine; the names are those of the properties, shortened.

    What comes before all machines is of the first one.
    """
    machines: list[dict[str, Any]] = []
    begun: dict[str, Any] = {}
    for name, value in properties:
        if name == MACHINE:
            machines.append(begun if not machines else {})
        if name in NAMES and name != EVIDENCE:
            (machines[-1] if machines else begun)[name.removeprefix(_PREFIX)] = value
    return machines


def outcome_of(reports: Iterable[tuple[str, str, bool]]) -> str:
    """Return what a test came to, by phase, outcome and whether it was expected to fail."""
    came_to = "passed"
    for when, outcome, is_xfail in reports:
        if outcome == "rerun":
            return "rerun"
        if outcome == "failed" and came_to != "failed":
            came_to = "failed" if when == "call" else "error"
        elif outcome == "skipped" and came_to == "passed":
            came_to = "xfailed" if is_xfail else "skipped"
        elif outcome == "passed" and is_xfail and came_to == "passed":
            came_to = "xpassed"
    return came_to
