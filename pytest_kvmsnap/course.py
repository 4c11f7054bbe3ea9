"""What has happened in each test so far, and on which machines."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_kvmsnap.golden import Golden
    from pytest_kvmsnap.lab.machine import Machine
    from pytest_kvmsnap.lab.savepoints import Savepoints
    from pytest_kvmsnap.markers import Request
    from pytest_kvmsnap.pools import Pool
    from pytest_kvmsnap.vm import VM

_COURSE = pytest.StashKey["Course"]()


@dataclass
class Course:
    """What has happened in a test so far.

    `is_in_test` tells that its wide fixtures are set up and nothing is torn down. `vms` are the
    machines that `vm` gave, `entered` those that were brought to where the test starts. `starts`
    are all that it works on, in whatever state they are, with the snapshots that it started from;
    empty until that is known; `broken` those of them that had failed before. `is_in_call` tells
    that the test itself runs, `has_failed` that its set-up or call failed.
    """

    is_in_test: bool = False
    vms: "dict[Request, VM]" = field(default_factory=dict)
    entered: "dict[str | Pool | Golden, Savepoints]" = field(default_factory=dict)
    starts: "dict[Machine, str]" = field(default_factory=dict)
    broken: "set[Machine]" = field(default_factory=set)
    is_in_call: bool = False
    has_failed: bool = False

    def works_on(self, machine: "Machine") -> None:
        if machine not in self.starts:
            self.starts[machine] = ""
            if machine.has_failed:
                self.broken.add(machine)


def begin(item: pytest.Item) -> None:
    """Note that a test, or another try of it, begins."""
    item.stash[_COURSE] = Course()


def has_begun(item: pytest.Item) -> bool:
    """Tell whether anybody listened when a test was set up."""
    return _COURSE in item.stash


def course_of(item: pytest.Item) -> Course:
    """Return the course of a test; of one whose set-up nobody heard it begins in the test."""
    return item.stash.setdefault(_COURSE, Course(is_in_test=True))


def machines_after(item: pytest.Item, report: pytest.TestReport) -> "dict[Machine, str]":
    """Return the machines that a test, or what was set up for it, worked on; note its outcome.

    With the snapshots that it started from, empty if it did not come to that. Those that were in
    quarantine before are left out: what they show is not of this test.
    """
    course = item.stash.get(_COURSE, None)
    if course is None:
        return {}
    course.has_failed = course.has_failed or report.failed  # a subtest of it, perhaps
    return {each: start for each, start in course.starts.items() if each not in course.broken}


def is_over(item: pytest.Item) -> bool:
    """Tell whether the call of a test is over, of which a report is made: no subtest's, then."""
    return not item.stash[_COURSE].is_in_call


def has_failed(item: pytest.Item) -> bool:
    """Tell whether the set-up, the call or a subtest of a test failed, in this try."""
    return item.stash[_COURSE].has_failed
