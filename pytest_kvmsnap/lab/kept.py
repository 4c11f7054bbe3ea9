"""States that are kept for people, as snapshots that no run deletes but to make room for newer."""

import itertools
import re
import shlex
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from pytest_kvmsnap.errors import KvmsnapError
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.ledger import Ledger
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.domainxml import Snapshot

PREFIX = "kvmsnap-kept-"
_DESCRIPTION = "pytest-kvmsnap kept this: "


@dataclass(frozen=True)
class Kept:
    """A kept state: the machine, the snapshot, and the test that left it so.

    `clone` is the folder of a throwaway machine, which stays with it.
    """

    domain: Domain
    snapshot: str
    test: str
    clone: Path | None = None

    def lines(self) -> list[str]:
        """Return what brings it back, and away, to be typed."""
        uri, name = self.domain.hypervisor.uri, self.domain.name
        virsh, machine = f"virsh -c {shlex.quote(uri)}", shlex.quote(name)
        pytest = f"pytest --kvmsnap-uri {shlex.quote(uri)} --kvmsnap-domain {machine}"
        drop = f"{virsh} snapshot-delete {machine} {self.snapshot}"
        if self.clone is not None:
            undefine = f"{virsh} undefine {machine} --snapshots-metadata"
            drop = f"{undefine} && rm -r {shlex.quote(str(self.clone))}"
        return [
            f"{name}: kept as left by {self.test}; go there, start there, or drop it by",
            f"  {virsh} snapshot-revert {machine} {self.snapshot}",
            f"  {pytest} --kvmsnap-snapshot {self.snapshot} {shlex.quote(self.test)}",
            f"  {drop}",
        ]


class Keeper:
    """Keeps states of one machine, `most` at a time. `kept` are those that this run kept."""

    def __init__(self, domain: Domain, journal: Journal, ledger: Ledger, most: int) -> None:
        self.kept: list[Kept] = []
        self._domain = domain
        self._journal = journal
        self._ledger = ledger
        self._most = most

    def make_room(self, in_use: Collection[str]) -> list[str]:
        """Delete the oldest ones, so that one more may come; return which went.

        Raises:
            SnapshotError: one cannot be deleted.
        """
        others = [each for each in self._domain.snapshots() if each.name not in in_use]
        gone = [each.name for each in surplus(others, self._most - 1)]
        for name in gone:
            # First: whoever comes after a kill must not look for what is gone.
            self._journal.kept.pop(name, None)
            if self._journal.found is not None:
                self._journal.found.snapshots.pop(name, None)
            self._journal.save()
            self._domain.delete_snapshot(name)
            self.kept = [kept for kept in self.kept if kept.snapshot != name]
            self._ledger.kept = [kept for kept in self._ledger.kept if kept != name]
        return gone

    def keep(self, test: str) -> Snapshot:
        """Keep the machine as it is now.

        Raises:
            MachineError: the snapshot could not be taken.
        """
        name = self._unused(name_for(test))
        self._journal.kept[name] = ""
        self._journal.save()
        try:
            taken = self._domain.take_snapshot(name, description_for(test))
            self._journal.kept[name] = self._domain.snapshot_xmls().get(name, "")
        except KvmsnapError:
            self._journal.kept.pop(name)
            raise
        finally:
            self._journal.save()
        self.kept.append(Kept(self._domain, name, test, self._journal.clone))
        self._ledger.kept.append(name)
        return taken

    def _unused(self, name: str) -> str:
        present = self._domain.snapshot_names()
        further = itertools.count(2)
        chosen = name
        while chosen in present:
            chosen = f"{name}-{next(further)}"
        return chosen


def name_for(test: str) -> str:
    """Return a name for the state that a test left, which says when that was."""
    last = test.rpartition("::")[2] or test
    label = re.sub(r"\W+", "_", last, flags=re.ASCII).strip("_")[:40]
    return f"{PREFIX}{label}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"


def description_for(test: str) -> str:
    return f"{_DESCRIPTION}{test}"


def surplus(snapshots: Iterable[Snapshot], most: int) -> list[Snapshot]:
    """Return which of some kept states are to go when there may be so many, the oldest first."""
    kept = sorted(filter(is_kept, snapshots), key=lambda snapshot: snapshot.created)
    return kept[: max(len(kept) - most, 0)]


def is_kept(snapshot: Snapshot) -> bool:
    """Tell whether a snapshot is one that we kept for people, in this run or an earlier one."""
    return snapshot.name.startswith(PREFIX) and snapshot.description.startswith(_DESCRIPTION)
