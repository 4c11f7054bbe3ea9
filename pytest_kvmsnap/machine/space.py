"""Room for a snapshot, looked at first: QEMU says "Input/output error" when it runs out."""

import os
import shutil
from pathlib import Path

from pytest_kvmsnap.errors import SnapshotError
from pytest_kvmsnap.machine.blockers import HAVE_IT_OFF, Blocker
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.domainxml import DiskSource
from pytest_kvmsnap.sizes import mib


def least_memory(memory: int) -> int:
    """Return what a live snapshot of a guest with that much memory takes at least, in bytes.

    For machines that are off, of which nobody knows how much they will use. Linux describes each
    page of 4 KiB by 64 bytes, free or not, so a 64th of the memory is in use as soon as it has
    booted. What else a tiny Linux had in use came to 74, 88, 88, 96 and 108 MiB (measured with 96,
    128, 256, 1024 and 4096 MiB of memory); 64 MiB of that, but half of a small memory at most, are
    counted here, so that nobody is refused who would have had room.
    """
    return memory // 64 + min(memory // 2, 64 * 2**20)


def space_blockers(domain: Domain, disks: list[DiskSource], needed: int) -> list[Blocker]:
    """Return a blocker when a live snapshot, which takes so many bytes, has no room."""
    place = _memory_place(domain, disks)
    return room_blockers(place, needed) if place is not None else []


def room_blockers(place: Path, needed: int) -> list[Blocker]:
    """Return a blocker when a folder has no room for a live snapshot of so many bytes."""
    free = shutil.disk_usage(place).free
    if needed <= free:
        return []
    return [
        Blocker(
            f"a snapshot of it while it runs takes about {mib(needed)} in {place}, where"
            f" {mib(free)} are free",
            f"make room there; {HAVE_IT_OFF}",
        )
    ]


def check_space(domain: Domain) -> None:
    """Refuse to snapshot a running machine whose memory does not fit beside its image.

    Raises:
        SnapshotError: the disk is too full.
    """
    place = _memory_place(domain, domain.disks())
    if place is None or not domain.is_active():
        return
    needed, free = domain.memory_in_use(), shutil.disk_usage(place).free
    if needed > free:
        raise SnapshotError(
            "there is no room for a snapshot of the running machine",
            where=domain.where,
            why=f"its memory takes up to {mib(needed)} in {place}, and {mib(free)} are free there",
            cure="make room there; or snapshot the machine while it is off: --kvmsnap-live=no",
        )


def explain(domain: Domain, error: SnapshotError) -> SnapshotError:
    """Add how much room there is to a failed snapshot."""
    place = _memory_place(domain, domain.disks())
    if place is not None and not error.cure:
        free = mib(shutil.disk_usage(place).free)
        error.cure = f"is the disk full? {free} are free in {place}"
    return error


def _memory_place(domain: Domain, disks: list[DiskSource]) -> Path | None:
    """Return the folder of the image that takes the memory: the first writable disk's (QEMU).

    None where we may not look, and for a raw one: whoever converts it looks for room for both.
    """
    if domain.hypervisor.kind != "QEMU" or not domain.hypervisor.is_local:
        return None
    for disk in disks:
        if disk.is_raw:
            return None
        if disk.is_snapshotted and disk.path is not None and disk.kind == "file":
            folder = disk.path.parent
            return folder if os.access(folder, os.R_OK | os.X_OK) else None
    return None
