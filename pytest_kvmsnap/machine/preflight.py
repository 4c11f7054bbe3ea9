"""What stands in the way of internal snapshots, told before the first test. Changes nothing."""

import os

from pytest_kvmsnap.errors import BlockedError, ImageError, SnapshotNotFoundError, UsageProblem
from pytest_kvmsnap.machine import domainxml, images
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.domainxml import DiskSource

OURS = "pytest-kvmsnap run "


def problems(domain: Domain, ready: str | None) -> list[UsageProblem]:
    """Return the blockers of a domain, raw disks left out: those are the conversion's business."""
    found = _definition_problems(domain, ready) + _foreign_run(domain)
    for disk in domain.disks(inactive=True):
        if disk.device != "floppy" and disk.path is not None and disk.kind == "file":
            found += _image_problems(domain, disk)
    return found


def _definition_problems(domain: Domain, ready: str | None) -> list[UsageProblem]:
    found: list[UsageProblem] = []
    edit = f"virsh -c {domain.hypervisor.uri} edit {domain.name}"
    if not domain.raw.isPersistent():
        found.append(
            _blocked(
                domain,
                "it is transient: libvirt keeps no definition of it to come back to",
                "define it: virsh dumpxml, then virsh define",
            )
        )
        return found
    xml = domain.xml(inactive=True)
    disks = domain.disks(inactive=True)
    if not any(disk.is_snapshotted for disk in disks):
        found.append(
            _blocked(
                domain,
                "it has no writable disk, and an internal snapshot lives in one",
                f"give it a qcow2 disk, if only a small one: {edit}",
            )
        )
    for disk in disks:
        if disk.transient:
            found.append(
                _blocked(
                    domain,
                    f"its disk {disk.target} is transient, which libvirt does not snapshot",
                    f"remove <transient/>: {edit}",
                )
            )
    if domain.has_managed_save():
        found.append(
            _blocked(
                domain,
                "it has a managed save: a revert would be undone by the stale memory in it",
                f"start it once so that it resumes (virsh -c {domain.hypervisor.uri} start"
                f" {domain.name}), or throw that state away with virsh managedsave-remove",
            )
        )
    if ready == "agent" and not domainxml.has_agent_channel(xml):
        found.append(
            _blocked(
                domain,
                "it has no guest agent channel, and ready=agent waits for the agent",
                f"add a channel with the target {domainxml.AGENT_CHANNEL}: {edit}; or give"
                " --kvmsnap-ready=none",
            )
        )
    return found


def _foreign_run(domain: Domain) -> list[UsageProblem]:
    """Return a problem for each snapshot of a run that no journal here knows.

    The journals of this host have been worked off before, so it is another host's run or another
    container's, and may be alive.
    """
    return [
        _blocked(
            domain,
            f"its snapshot {snapshot.name!r} belongs to another run: {snapshot.description}",
            "let that run end, or run pytest --kvmsnap-clean on its host; if it is dead for good:"
            f" virsh -c {domain.hypervisor.uri} snapshot-revert {domain.name} {snapshot.name}"
            " --force, then snapshot-delete",
        )
        for snapshot in domain.snapshots()
        if snapshot.description.startswith(OURS)
    ]


def _image_problems(domain: Domain, disk: DiskSource) -> list[UsageProblem]:
    """Return what is wrong with an image of a QEMU machine, as far as we may look at it."""
    path = disk.path
    if path is None or domain.hypervisor.kind != "QEMU" or not domain.hypervisor.is_local:
        return []
    try:
        path.stat()
    except PermissionError:
        return []  # libvirt may look although we may not
    except OSError as error:
        return [
            _blocked(
                domain,
                f"the image of its disk {disk.target} cannot be used: {error}",
                "put the file back, or change the definition:"
                f" virsh -c {domain.hypervisor.uri} edit {domain.name}",
            )
        ]
    if not disk.is_snapshotted:
        return []
    try:
        images.info(path, disk.format or "raw", in_use=domain.is_active())
        if disk.is_raw and not domain.is_active():
            images.check_raw_is_free(path)
    except ImageError as error:
        return [_unusable(domain, disk, error)] if "ermission denied" not in error.why else []
    return []


def _unusable(domain: Domain, disk: DiskSource, error: ImageError) -> UsageProblem:
    if "another process using the image" in error.why:
        return _blocked(
            domain,
            f"another process is using {disk.path} ({disk.target})",
            f"end it first; who it is: lsof {disk.path}",
        )
    if error.where:
        return _blocked(
            domain,
            f"its disk {disk.target}, {disk.path}, cannot be read as {disk.format}: {error.why}",
            f"is the format in the definition right? qemu-img check -f {disk.format} {disk.path}",
        )
    return error


def _blocked(domain: Domain, why: str, cure: str) -> BlockedError:
    return BlockedError(
        f"{domain.name} cannot be used for tests", where=domain.where, why=why, cure=cure
    )


def snapshot_problem(domain: Domain, name: str) -> UsageProblem | None:
    """Return why tests cannot start from this snapshot, None when they can."""
    snapshots = {snapshot.name: snapshot for snapshot in domain.snapshots()}
    what = f"there is no snapshot {name!r} of {domain.name}"
    if name not in snapshots:
        names = ", ".join(sorted(snapshots))
        return SnapshotNotFoundError(
            what,
            where=domain.where,
            cure=f"snapshots there: {names}"
            if names
            else "it has no snapshot at all: take one"
            f" with virsh snapshot-create-as {domain.name} {name}",
        )
    if not snapshots[name].internal:
        return SnapshotNotFoundError(
            f"tests cannot start from the snapshot {name!r} of {domain.name}",
            where=domain.where,
            why="it is an external one, and only internal ones can be reverted to again and again",
            cure=f"revert to it once by hand, then virsh snapshot-create-as {domain.name}",
        )
    if domain.hypervisor.kind != "QEMU" or not domain.hypervisor.is_local:
        return None
    missing = [disk.target for disk in _image_disks(domain) if name not in _names(domain, disk)]
    if not missing:
        return None
    return SnapshotNotFoundError(
        f"the data of the snapshot {name!r} of {domain.name} is gone",
        where=domain.where,
        why=f"libvirt knows it, but the image of {', '.join(missing)} does not hold it; a revert"
        " would kill the machine",
        cure=f"virsh snapshot-delete {domain.name} {name} --metadata, then take it anew",
    )


def _image_disks(domain: Domain) -> list[DiskSource]:
    disks = domain.disks(inactive=True)
    return [d for d in disks if d.is_snapshotted and d.format == "qcow2" and _may_read(d)]


def _names(domain: Domain, disk: DiskSource) -> tuple[str, ...]:
    assert disk.path is not None  # noqa: S101 - see _image_disks
    return images.info(disk.path, "qcow2", in_use=domain.is_active()).snapshots


def _may_read(disk: DiskSource) -> bool:
    return disk.path is not None and os.access(disk.path, os.R_OK)
