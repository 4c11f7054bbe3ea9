"""States that are kept for people, as snapshots that no run deletes but to make room for newer."""

import re
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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
