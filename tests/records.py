"""What the processes of runs inside of tests did, in the one order of all of them.

The conftest RECORDS notes in one file the calls that change machines. Tests of the suite note when
they begin and end to use a machine, by the fixture `diary`.
"""

import itertools
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

RECORDS = '''
import os, time
import pytest
from pytest_kvmsnap.machine.domain import Domain

def note(machine, *words):
    """Add a line that is whole, whoever else writes."""
    with open("record", "a") as file:
        file.write(" ".join([str(os.getpid()), machine, *words]) + "\\n")

def _record(method, verb):
    original = getattr(Domain, method)
    def recording(self, *args, **kwargs):
        note(self.name, verb, *(arg for arg in args[:1] if isinstance(arg, str)))
        return original(self, *args, **kwargs)
    setattr(Domain, method, recording)

if not hasattr(Domain, "is_recorded"):
    Domain.is_recorded = True
    _record("take_snapshot", "take")
    _record("revert", "revert")
    _record("delete_snapshot", "delete")
    _record("start", "start")

@pytest.fixture
def diary(vm):
    """Note a use of the machine; it takes long enough for others to come and wait."""
    note(vm.name, "begin")
    time.sleep(0.1)
    yield
    note(vm.name, "end")
'''


class Entry(NamedTuple):
    """One line: `name` is the label of a snapshot of ours, such as "found"."""

    pid: int
    machine: str
    verb: str
    name: str


class Record:
    """What is noted in a folder."""

    def __init__(self, folder: "Path") -> None:
        self.entries = []
        for line in (folder / "record").read_text().splitlines():
            pid, machine, verb, *name = line.split()
            label = re.sub(r"kvmsnap-([\w-]+)-\w+", r"\1", " ".join(name))
            self.entries.append(Entry(int(pid), machine, verb, label))

    def count(self, verb: str, name: str = "", machine: str = "") -> int:
        """Return how often that was done, to one machine or to all."""
        found = [e for e in self.entries if (e.verb, e.name) == (verb, name)]
        return sum(machine in ("", entry.machine) for entry in found)

    def users(self, machine: str = "box") -> list[int]:
        """Return the processes whose tests used a machine, in order, each time once.

        Checks that nobody else did anything to it meanwhile.
        """
        users: list[int] = []
        user: int | None = None
        for entry in self.entries:
            if entry.machine != machine:
                continue
            assert user in (None, entry.pid), f"{entry} while {user} used it"
            if entry.verb == "begin":
                assert user is None
                user = entry.pid
                users.append(user)
            elif entry.verb == "end":
                user = None
        assert user is None
        return users

    @property
    def machines(self) -> set[str]:
        """The machines that tests used."""
        return {entry.machine for entry in self.entries if entry.verb == "begin"}


def turns(users: list[int]) -> int:
    """Return how often another process came next."""
    return sum(one != other for one, other in itertools.pairwise(users))
