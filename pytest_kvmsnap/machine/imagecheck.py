"""What about its images stands in the way of using a machine. Looks only, once at each image."""

import re
import shlex
from pathlib import Path

from pytest_kvmsnap.errors import ImageError
from pytest_kvmsnap.machine import domainxml, images
from pytest_kvmsnap.machine.blockers import Blocker
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.domainxml import DiskSource
from pytest_kvmsnap.machine.images import ImageInfo

# What a dead run of ours left, killed while it took a snapshot: no name is ever used twice.
_OURS = re.compile(r"kvmsnap-\w+(-\d+)?-[0-9a-f]{8}")


def image_blockers(
    domain: Domain, disks: list[DiskSource], known: set[str], *, active: bool, edit: str
) -> list[Blocker | ImageError]:
    """Return what is wrong with the images of a machine, as far as we may look at them.

    `known` are the names of the snapshots that libvirt knows.
    """
    found: list[Blocker | ImageError] = [*_shared_blockers(domain, disks)]
    if domain.hypervisor.kind != "QEMU" or not domain.hypervisor.is_local:
        return found
    for disk in disks:
        if disk.device != "floppy" and disk.path is not None and disk.kind == "file":
            found += _image_blockers(disk, disk.path, known, active=active, edit=edit)
    return found


def _image_blockers(
    disk: DiskSource, path: Path, known: set[str], *, active: bool, edit: str
) -> list[Blocker | ImageError]:
    try:
        path.stat()
    except PermissionError:
        return []  # libvirt may look although we may not
    except OSError as error:
        return [
            Blocker(
                f"the image of its disk {disk.target} cannot be used: {error}",
                f"put the file back, or change the definition: {edit}",
            )
        ]
    if not disk.is_snapshotted:
        return []
    try:
        told = images.info(path, disk.format or "raw", in_use=active)
        if disk.is_raw and not active:
            images.check_raw_is_free(path)
    except ImageError as error:
        return [_unusable(disk, path, error)] if "ermission denied" not in error.why else []
    return [*_content_blockers(disk, path, told, known)]


def _unusable(disk: DiskSource, path: Path, error: ImageError) -> Blocker | ImageError:
    if "another process using the image" in error.why:
        return Blocker(
            f"another process is using {path} ({disk.target})",
            f"end it first; who it is: lsof {path}",
        )
    if error.where:
        return Blocker(
            f"its disk {disk.target}, {path}, cannot be read as {disk.format}: {error.why}",
            f"is the format in the definition right? qemu-img check -f {disk.format} {path}",
        )
    return error


def _content_blockers(
    disk: DiskSource, path: Path, told: ImageInfo, known: set[str]
) -> list[Blocker]:
    found = []
    quoted = shlex.quote(str(path))
    if told.data_file is not None:
        found.append(
            Blocker(
                f"its disk {disk.target} keeps its data outside of the qcow2 image, in"
                f" {told.data_file}, and internal snapshots do not work with that",
                f"convert it, which takes the data in: qemu-img convert -f qcow2 -O qcow2 {quoted}"
                " NEW",
            )
        )
    unknown = [name for name in told.snapshots if name not in known and not _OURS.fullmatch(name)]
    if unknown:
        found.append(
            Blocker(
                f"the image of its disk {disk.target} holds snapshots that libvirt does not know:"
                f" {', '.join(unknown)}",
                "libvirt would overwrite one without a word when another of its name is taken"
                f" (before 10.9). With the machine off: qemu-img snapshot -l {quoted} lists them,"
                " -d NAME deletes one; or tell libvirt of it with virsh snapshot-create --redefine",
            )
        )
    return found


def _shared_blockers(domain: Domain, disks: list[DiskSource]) -> list[Blocker]:
    """Return a blocker for each other domain that writes to one of the images, or stands on it.

    Whether it runs or not: what one of the two writes, the other one's next run has not seen, and
    after a revert the image is not what it knows. Raw images are the conversion's business.
    """
    is_local = domain.hypervisor.is_local
    ours = {
        _identity(disk.path, is_local): disk
        for disk in disks
        if disk.is_snapshotted and disk.path is not None and not disk.is_raw
    }
    if not ours:
        return []
    found = []
    for uuid, xml in domain.hypervisor.definitions():
        if uuid == domain.uuid:
            continue
        theirs = {_identity(path, is_local) for path in domainxml.written_images(xml)}
        for identity in ours.keys() & theirs:
            found.append(
                Blocker(
                    f"the domain {domainxml.name(xml)} uses the image of its disk"
                    f" {ours[identity].target} too: {ours[identity].path}",
                    "give each domain an image of its own (a qcow2 image with this one as its"
                    " backing file is enough, once nobody writes to this one), or undefine the one"
                    " that is not needed",
                )
            )
    return found


def _identity(path: Path, is_local: bool) -> tuple[int, int] | Path:
    """Return what is the same for all paths to a file; the path itself where we may not look."""
    if is_local:
        try:
            status = path.stat()
            return status.st_dev, status.st_ino
        except OSError:
            pass
    return path
