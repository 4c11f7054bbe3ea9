"""Snapshots of which one half is left: in the images alone, or known to libvirt alone.

Who is killed while a snapshot is taken or deleted leaves such, and so does libvirt before 10.9,
which forgets a snapshot of a running machine although QEMU failed to delete it.
"""

import contextlib
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path

from pytest_kvmsnap.errors import ImageError, SnapshotError
from pytest_kvmsnap.machine import domainxml, images
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.domainxml import DiskSource


def is_of_run(name: str, run: str) -> bool:
    """Tell whether a name is one that this run gave to a snapshot: no other run ever gives it."""
    return re.fullmatch(rf"kvmsnap-\w+(-\d+)?-{re.escape(run)}", name) is not None


def without_data(domain: Domain, names: Collection[str]) -> set[str]:
    """Return which of these snapshots no image holds; none where we may not look at all images."""
    if not names:
        return set()
    held = _contents(domain)
    if not held or len(held) < sum(disk.is_snapshotted for disk in _disks(domain)):
        return set()
    return set(names).difference(*held.values())


def remove(domain: Domain, description: str, is_ours: Callable[[str], bool]) -> None:
    """Remove the snapshots that only the images hold, and whose names `is_ours` tells.

    As far as we may look at the images. What cannot be removed stays: it takes space, and does no
    other harm. `description` is that of the run, should somebody see one on its way.
    """
    held = _contents(domain)
    known = {snapshot.name for snapshot in domain.snapshots()} if any(held.values()) else set()
    orphans: dict[str, list[Path]] = {}
    for image, names in held.items():
        for name in names:
            if name not in known and is_ours(name):
                orphans.setdefault(name, []).append(image)
    for name, images_with_it in orphans.items():
        if domain.is_active() or not _is_deleted_from(images_with_it, name):
            _delete_by_libvirt(domain, name, description)


def _disks(domain: Domain) -> list[DiskSource]:
    return domain.disks(inactive=not domain.is_active())


def _contents(domain: Domain) -> dict[Path, tuple[str, ...]]:
    """Return what snapshots the images hold that are files of this host, and that we may read."""
    held: dict[Path, tuple[str, ...]] = {}
    if domain.hypervisor.kind != "QEMU" or not domain.hypervisor.is_local:
        return held
    for disk in _disks(domain):
        is_qcow2 = disk.is_snapshotted and disk.format == "qcow2" and disk.kind == "file"
        if is_qcow2 and disk.path is not None:
            with contextlib.suppress(ImageError):
                held[disk.path] = images.info(disk.path, "qcow2", in_use=True).snapshots
    return held


def _is_deleted_from(paths: list[Path], name: str) -> bool:
    """Delete a snapshot from the images of a machine that is off; tell whether that went well."""
    try:
        for path in paths:
            images.delete_snapshot(path, name)
    except ImageError:  # we may read it, and not write it
        return False
    return True


def _delete_by_libvirt(domain: Domain, name: str, description: str) -> None:
    """Have libvirt delete a snapshot that it does not know: it is told of it first."""
    xml = domainxml.known_again(name, description, int(time.time()), domain.xml())
    with contextlib.suppress(SnapshotError):
        domain.redefine_snapshot(xml, current=False)
        try:
            domain.delete_snapshot(name)
        except SnapshotError:
            domain.forget_snapshot(name)
