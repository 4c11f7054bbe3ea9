"""Room for a snapshot, looked at first: QEMU says "Input/output error" when it runs out."""

import os
import shutil
from pathlib import Path

from pytest_kvmsnap.errors import SnapshotError
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.sizes import mib


def check_space(domain: Domain) -> None:
    """Refuse to snapshot a running machine whose memory does not fit beside its image.

    Raises:
        SnapshotError: the disk is too full.
    """
    place = _memory_place(domain)
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
    place = _memory_place(domain)
    if place is not None and not error.cure:
        free = mib(shutil.disk_usage(place).free)
        error.cure = f"is the disk full? {free} are free in {place}"
    return error


def _memory_place(domain: Domain) -> Path | None:
    """Return the folder of the image that takes the memory: the first writable disk's (QEMU)."""
    if domain.hypervisor.kind != "QEMU" or not domain.hypervisor.is_local:
        return None
    for disk in domain.disks():
        if disk.is_snapshotted and disk.path is not None and disk.kind == "file":
            folder = disk.path.parent
            return folder if os.access(folder, os.R_OK | os.X_OK) else None
    return None
