"""What stands in the way of internal snapshots, told before the first test. Changes nothing."""

import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from pytest_kvmsnap.errors import BlockedError, SnapshotNotFoundError, UsageProblem
from pytest_kvmsnap.machine import domainxml, images, probe, space
from pytest_kvmsnap.machine.blockers import (
    HAVE_IT_OFF,
    Blocker,
    definition_blockers,
    version_text,
)
from pytest_kvmsnap.machine.domain import UNMIGRATABLE, Domain
from pytest_kvmsnap.machine.domainxml import DiskSource, Snapshot
from pytest_kvmsnap.machine.imagecheck import image_blockers
from pytest_kvmsnap.machine.libvirt_api import Hypervisor

OURS = "pytest-kvmsnap run "


def problems(
    domain: Domain, ready: str | None, *, live: bool = True, may_try: bool = True
) -> list[UsageProblem]:
    """Return the blockers of a domain, raw disks left out: those are the conversion's business.

    `ready` and `live` are the options of these names; `may_try` allows to start a tiny machine of
    our own where only that tells whether this libvirt can do what it should. Of a running machine
    it is the live definition that counts, since that is what libvirt snapshots.
    """
    virsh, name = f"virsh -c {domain.hypervisor.uri}", domain.name
    if not domain.is_defined():
        transient = Blocker(
            "it is transient: libvirt keeps no definition of it to come back to",
            "define it: virsh dumpxml, then virsh define",
        )
        return [_blocked(domain, transient)]
    active = domain.is_active()
    root = domainxml.parsed(domain.xml(inactive=not active))
    default_format = "raw" if domain.hypervisor.kind == "QEMU" else None
    disks = domainxml.disks(root, default_format)
    snapshots = domain.snapshots()
    edit = f"{virsh} edit {name}"
    found = [
        *definition_blockers(
            root,
            edit=edit,
            libvirt_version=domain.hypervisor.version,
            ready=ready,
            live=active or live,
            off=not active or not live,
            default_format=default_format,
        ),
        *_kept_blockers(domain, snapshots, virsh),
        *image_blockers(domain, disks, {s.name for s in snapshots}, active=active, edit=edit),
    ]
    if ready == "ssh":
        found += ssh_blockers()
    if active and domain.has_job():  # most calls would wait for it
        found.append(_busy(domain, virsh))
    elif active:
        found += _running_blockers(domain, root, disks, virsh)
        found += space.space_blockers(domain, disks, domain.memory_in_use())
    elif live:
        memory = domainxml.memory_bytes(root)
        found += space.space_blockers(domain, disks, space.least_memory(memory))
    if (active or live) and may_try:
        found += libvirt_blockers(domain.hypervisor, root)
    return [_blocked(domain, each) if isinstance(each, Blocker) else each for each in found]


def _blocked(domain: Domain, blocker: Blocker) -> BlockedError:
    what = f"{domain.name} cannot be used for tests"
    return BlockedError(what, where=domain.where, why=blocker.why, cure=blocker.cure)


def _kept_blockers(domain: Domain, snapshots: Sequence[Snapshot], virsh: str) -> list[Blocker]:
    """Return what libvirt keeps of the machine that stands in the way: saves and snapshots."""
    found = []
    name = domain.name
    if domain.has_managed_save():
        found.append(
            Blocker(
                "it has a managed save: a revert would be undone by the stale memory in it",
                f"start it once so that it resumes ({virsh} start {name}), or throw that state away"
                " with virsh managedsave-remove",
            )
        )
    for snapshot in snapshots:
        if snapshot.description.startswith(OURS):
            # The journals of this host have been worked off before, so it is another host's run or
            # another container's, and may be alive.
            found.append(
                Blocker(
                    f"its snapshot {snapshot.name!r} belongs to another run:"
                    f" {snapshot.description}",
                    "let that run end, or run pytest --kvmsnap-clean on its host; if it is dead for"
                    " good, here: pytest --kvmsnap-clean --kvmsnap-force --kvmsnap-uri"
                    f" {domain.hypervisor.uri} --kvmsnap-domain {name} (by hand: {virsh}"
                    f" snapshot-revert {name} {snapshot.name} --force, then snapshot-delete)",
                )
            )
        elif not snapshot.internal:
            found.append(
                Blocker(
                    f"its snapshot {snapshot.name!r} is external, and libvirt does not keep it from"
                    " being ruined by internal ones: a revert to an older one writes into the image"
                    " beneath",
                    f"merge it into that image: {virsh} blockcommit {name} DISK --active --pivot,"
                    f" while the machine runs, then {virsh} snapshot-delete {name} {snapshot.name}"
                    " --metadata (from libvirt 9.9 on, snapshot-delete does both)",
                )
            )
    return found


def _busy(domain: Domain, virsh: str) -> Blocker:
    return Blocker(
        "libvirt is busy with it: it is just being saved, dumped, moved or snapshotted",
        f"let that end, or break it off by {virsh} domjobabort {domain.name}; what it is: {virsh}"
        f" domjobinfo {domain.name}",
    )


def _running_blockers(
    domain: Domain, root: ET.Element, disks: list[DiskSource], virsh: str
) -> list[Blocker]:
    """Return what goes on in a running machine that stands in the way."""
    job = f"{virsh} blockjob {domain.name}"
    found = [
        Blocker(
            f"its disk {target} is just being copied or merged (a block job)",
            f"let that end, or break it off by {job} {target} --abort; how far it is: {job}"
            f" {target} --info",
        )
        for target in domain.block_jobs(disks)
    ]
    if domain.hypervisor.kind == "QEMU" and domainxml.has_9p(root):
        found += [
            Blocker(f"QEMU cannot snapshot it while it runs: {reason}", UNMIGRATABLE)
            for reason in domain.migration_blockers()
        ]
    return found


def ssh_blockers() -> list[Blocker]:
    """Return a blocker when there is no SSH client, and it is to tell that machines are ready."""
    if shutil.which("ssh") is not None:
        return []
    return [
        Blocker(
            "ready=ssh needs the program ssh, and it is not there",
            "install openssh-client (Debian, Ubuntu) or openssh-clients (Fedora); or give"
            " --kvmsnap-ready=none",
        )
    ]


def libvirt_blockers(hypervisor: Hypervisor, root: ET.Element) -> list[Blocker]:
    """Return a blocker when this libvirt cannot revert to a snapshot of a running machine.

    `root` is the definition of one that will be used. See `probe`.
    """
    failure = probe.revert_failure(hypervisor, root)
    if failure is None:
        return []
    return [
        Blocker(
            f"the libvirt there, {version_text(hypervisor.version)}, cannot revert to a snapshot of"
            f" a running machine (tried on a tiny one): {failure}",
            f"update libvirt: 11.4 and newer can; {HAVE_IT_OFF}",
        )
    ]


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
    if not all(snapshot.internal for snapshot in snapshots.values()):
        return None  # its data may be in the image beneath; `problems` refuses the machine
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
