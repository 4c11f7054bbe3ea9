"""Raw images become qcow2, since internal snapshots need it. The raw file is never touched."""

import contextlib
import os
import shlex
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_kvmsnap.errors import BlockedError, ConversionError, ImageError, UsageProblem
from pytest_kvmsnap.machine import domainxml, images, space
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.domainxml import DiskSource
from pytest_kvmsnap.sizes import mib


@dataclass(frozen=True)
class Conversion:
    """One raw disk and the qcow2 image that it becomes."""

    target: str
    raw: Path
    qcow2: Path
    temporary: Path


Plan = tuple[Domain, list[Conversion]]
"""All that must be converted before a domain can be snapshotted."""


def planned(domain: Domain, run: str) -> list[Conversion]:
    """Return what must be converted before the domain can be snapshotted."""
    conversions = []
    for disk in _raw_disks(domain):
        if disk.path is not None:
            qcow2 = disk.path.with_suffix(".qcow2")
            temporary = qcow2.with_name(f".{qcow2.name}.kvmsnap-{run}.tmp")
            conversions.append(Conversion(disk.target, disk.path, qcow2, temporary))
    return conversions


def _raw_disks(domain: Domain) -> list[DiskSource]:
    return [disk for disk in domain.disks(inactive=True) if disk.is_raw]


def problems(domain: Domain, conversions: list[Conversion], convert: str) -> list[UsageProblem]:
    """Return what stands in the way of one machine's conversions, with cures; looks only.

    Unless all its raw disks can be converted, none is: one that stays raw blocks snapshots too.
    """
    raw_disks = _raw_disks(domain)
    if not raw_disks:
        return []
    by_target = {conversion.target: conversion for conversion in conversions}
    disks = [(disk, by_target.get(disk.target)) for disk in raw_disks]
    if convert == "never":
        return [_unwanted(domain, disks, convert)]
    looks = (_problem(domain, disk, conversion) for disk, conversion in disks)
    found = [problem for problem in looks if problem is not None]
    return found if convert == "auto" else [_unwanted(domain, disks, convert), *found]


def _problem(
    domain: Domain, disk: DiskSource, conversion: Conversion | None
) -> UsageProblem | None:
    if conversion is None:
        return _blocked(
            domain,
            disk,
            "it is no file of this host, but a volume of a pool or on the network",
            f"copy it into a qcow2 file, and use that: {_edit(domain)}",
        )
    if not domain.hypervisor.is_local:
        return _blocked(
            domain,
            disk,
            "the image is on another host",
            f"convert it there: qemu-img convert -f raw -O qcow2 {conversion.raw}"
            f" {conversion.qcow2}, and switch the definition: {_edit(domain)}",
        )
    if domain.is_active():
        return _blocked(
            domain,
            disk,
            f"the machine is {domain.state()}, and only one that is off can be converted",
            f"shut it down first: virsh -c {domain.hypervisor.uri} shutdown {domain.name}",
        )
    return _definition_problem(domain, disk) or _file_problem(domain, disk, conversion)


def _definition_problem(domain: Domain, disk: DiskSource) -> UsageProblem | None:
    """Return why the disk is not what is in its file, or may not be a qcow2 image."""
    if disk.encrypted:
        return _blocked(
            domain,
            disk,
            "its definition says that it is encrypted, and its content is not copied in the clear",
            "put the machine on a qcow2 image that you made of it; qemu-img needs the key for that",
        )
    if disk.has_backing:
        return _blocked(
            domain,
            disk,
            "its definition names a backing file, which a raw image cannot have",
            f"is its format right? Correct it, or remove <backingStore>: {_edit(domain)}",
        )
    if disk.is_slice:
        return _blocked(
            domain,
            disk,
            "its definition says that only a slice of the file is the disk",
            f"copy that part into a file of its own, and use that: {_edit(domain)}",
        )
    if disk.shareable:
        return _blocked(
            domain,
            disk,
            "it is shareable, and libvirt shares raw images only",
            f"remove <shareable/> if one machine uses it: {_edit(domain)}",
        )
    return None


def _file_problem(domain: Domain, disk: DiskSource, conversion: Conversion) -> UsageProblem | None:
    raw, qcow2 = conversion.raw, conversion.qcow2
    try:
        mode = raw.stat().st_mode
    except PermissionError:
        return _forbidden(domain, disk, conversion)
    except OSError:
        return None  # told by the preflight, which looks at all images
    if not stat.S_ISREG(mode):
        return _blocked(
            domain,
            disk,
            "it is no file but a device, which cannot become a qcow2 image in place",
            "copy it into a file with qemu-img convert -f raw -O qcow2 and use that instead",
        )
    if raw == qcow2 or os.path.lexists(qcow2):
        return _blocked(
            domain,
            disk,
            f"{qcow2} exists already, and we overwrite nothing",
            "use that image in the definition if it is the right one, else move it away",
        )
    others = _other_users(domain, raw)
    if others:
        return _blocked(
            domain,
            disk,
            f"the domain {' and '.join(others)} uses the same file, and the two would part",
            "give each domain an image of its own, or convert by hand and change both definitions",
        )
    if not os.access(raw, os.R_OK) or not os.access(raw.parent, os.W_OK):
        return _forbidden(domain, disk, conversion)
    return None


def _forbidden(domain: Domain, disk: DiskSource, conversion: Conversion) -> UsageProblem:
    return _blocked(
        domain,
        disk,
        "this user may not read it, or may not write into its folder",
        "run once as a user who may, or: qemu-img convert -f raw -O qcow2"
        f" {conversion.raw} {conversion.qcow2}",
    )


def _edit(domain: Domain) -> str:
    return f"virsh -c {shlex.quote(domain.hypervisor.uri)} edit {shlex.quote(domain.name)}"


def _other_users(domain: Domain, raw: Path) -> list[str]:
    """Return the names of the other domains that use the file, by whatever path."""
    names = []
    for uuid, xml in domain.hypervisor.definitions():
        if uuid != domain.uuid:
            paths = (disk.path for disk in domainxml.disks(xml))
            if any(path is not None and _is_same_file(path, raw) for path in paths):
                names.append(domainxml.name(xml))
    return names


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one == other


def problems_together(plans: Sequence[Plan], *, live: bool) -> list[UsageProblem]:
    """Return what stands in the way of converting for several machines at once; looks only.

    With `live`, snapshots with the memory go into the images, and room is needed for one of each.
    """
    return _same_names(plans) or _too_large(plans, live=live)


def _same_names(plans: Sequence[Plan]) -> list[UsageProblem]:
    """Return a problem for each disk that would get the name of another one's image."""
    names = Counter(_resolved(c) for _, conversions in plans for c in conversions)
    return [
        _blocked(
            domain,
            disk,
            f"another raw disk would become {conversion.qcow2} too",
            "rename one of the two files, and change the definition",
        )
        for domain, conversions in plans
        for conversion in conversions
        for disk in _raw_disks(domain)
        if disk.target == conversion.target and names[_resolved(conversion)] > 1
    ]


def _resolved(conversion: Conversion) -> Path:
    return conversion.qcow2.parent.resolve() / conversion.qcow2.name


def _too_large(plans: Sequence[Plan], *, live: bool) -> list[UsageProblem]:
    """Return a problem for each file system that cannot take all the images that go there."""
    with_one = " with a snapshot of each machine" if live else ""
    found: list[UsageProblem] = []
    file_systems: dict[int, list[tuple[Domain, Conversion]]] = {}
    for domain, conversions in plans:
        for conversion in conversions:
            number = conversion.qcow2.parent.stat().st_dev
            file_systems.setdefault(number, []).append((domain, conversion))
    for together in file_systems.values():
        machines = " and ".join(dict.fromkeys(domain.name for domain, _ in together))
        folders = list(dict.fromkeys(conversion.qcow2.parent for _, conversion in together))
        try:
            size = sum(images.space_needed(conversion.raw) for _, conversion in together)
            size += sum(_memory(domain, conversion) for domain, conversion in together if live)
        except ImageError as error:
            found.append(error)
            continue
        free = shutil.disk_usage(folders[0]).free
        if size > free:
            found.append(
                ConversionError(
                    f"not enough space to convert the images of {machines}",
                    where=", ".join(map(str, folders)),
                    why=f"needs up to {mib(size)}{with_one}, has {mib(free)}",
                    cure="make room there, or move the raw image to a larger disk",
                )
            )
    return found


def _memory(domain: Domain, conversion: Conversion) -> int:
    """Return the bytes of a snapshot with the memory, if this image will take them."""
    first = next(disk for disk in domain.disks(inactive=True) if disk.is_snapshotted)
    if first.target != conversion.target:
        return 0
    return space.least_memory(domainxml.memory_bytes(domain.xml(inactive=True)))


def _blocked(domain: Domain, disk: DiskSource, why: str, cure: str) -> BlockedError:
    return BlockedError(
        f"the raw disk {disk.target} of {domain.name} cannot be converted to qcow2",
        where=", ".join([domain.where, *([str(disk.path)] if disk.path else [])]),
        why=why,
        cure=cure,
    )


def _unwanted(
    domain: Domain, disks: list[tuple[DiskSource, Conversion | None]], convert: str
) -> BlockedError:
    listed = "\n".join(_would(domain, disk, conversion) for disk, conversion in disks)
    return BlockedError(
        f"{domain.name} has raw disks, and internal snapshots need qcow2",
        where=domain.where,
        why=f"{listed}\nand kvmsnap's option convert is {convert!r}",
        cure="let them be converted with --kvmsnap-convert=auto (the raw files stay)",
    )


def _would(domain: Domain, disk: DiskSource, conversion: Conversion | None) -> str:
    """Return what a conversion would make of a disk, and the space that takes."""
    if conversion is None:
        return f"{disk.target}: no file of this host (cannot be converted)"
    size = ""
    if domain.hypervisor.is_local:
        try:
            size = f", and take up to {mib(images.space_needed(conversion.raw))}"
        except ImageError as error:
            size = f"; how large that is cannot be told: {error.why.strip()}"
    return f"{disk.target}: {conversion.raw} (would become {conversion.qcow2}{size})"


def perform(
    plans: Sequence[Plan], progress: Callable[[float], None], tell: Callable[[str], None]
) -> None:
    """Convert the images of all machines, then switch each definition, once; tell what was done.

    Each image grows under a temporary name beside its target, and all of them are complete and on
    disk before the first definition is switched. An image keeps its temporary name, as a second
    link, until the end: so whoever comes after a kill knows the image for ours, and each definition
    is as it was or switched as a whole. The raw files are only read.

    Raises:
        ConversionError: one failed; nothing is left of what was not switched before that.
    """
    with contextlib.ExitStack() as leftovers:
        for domain, conversions in plans:
            leftovers.callback(remove_leftovers, domain, conversions)
            for conversion in conversions:
                with _failing_as(domain, conversion):
                    # Before qemu-img, so that it is private from the start: that uses the umask.
                    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
                    os.close(os.open(conversion.temporary, flags, 0o600))
        _copy(plans, progress)
        for domain, conversions in plans:
            _switch(domain, conversions)
            for line in _done(domain, conversions):
                tell(line)


def _copy(plans: Sequence[Plan], progress: Callable[[float], None]) -> None:
    owners = {str(c.raw): (domain, c) for domain, conversions in plans for c in conversions}
    jobs = [(conversion.raw, conversion.temporary) for _, conversion in owners.values()]
    try:
        images.convert_all(jobs, progress)
    except ImageError as error:
        if error.where not in owners:  # qemu-img is missing, say
            raise
        raise _failed(*owners[error.where], error.why) from None


def _switch(domain: Domain, conversions: list[Conversion]) -> None:
    """Give the images their names, and the domain the images."""
    for conversion in conversions:
        with _failing_as(domain, conversion):
            like(conversion.raw, conversion.temporary)
            # without overwriting: this fails when somebody made the target meanwhile
            os.link(conversion.temporary, conversion.qcow2)
            images.flush(conversion.qcow2.parent)
    if domain.is_active():
        raise ConversionError(
            f"the disks of {domain.name} cannot be switched to qcow2",
            where=domain.where,
            why="somebody started the machine while its images were converted",
            cure="shut it down, and run again; it is as it was",
        )
    switched = {conversion.target: conversion.qcow2 for conversion in conversions}
    domain.hypervisor.define(domainxml.with_qcow2(domain.xml(inactive=True), switched))


def _done(domain: Domain, conversions: list[Conversion]) -> list[str]:
    lines = [
        f"converted {conversion.raw} to {conversion.qcow2.name}"
        f" ({mib(conversion.qcow2.stat().st_blocks * 512)}) and switched {domain.name} to it; the"
        " raw file stays"
        for conversion in conversions
    ]
    back = (
        f"back to raw: {_edit(domain)}, with the raw file in <source> and type='raw' in <driver>;"
        ' what to mind: "Raw images" in the README'
    )
    return [*lines, back]


@contextlib.contextmanager
def _failing_as(domain: Domain, conversion: Conversion) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failed(domain, conversion, str(error)) from None


def _failed(domain: Domain, conversion: Conversion, why: str) -> ConversionError:
    free = mib(shutil.disk_usage(conversion.raw.parent).free)
    return ConversionError(
        f"cannot convert the raw disk {conversion.target} of {domain.name} to qcow2",
        where=str(conversion.raw),
        why=why,
        cure=f"the raw image is untouched, and still in use; {free} are free beside it",
    )


def like(raw: Path, made: Path) -> None:
    """Give the new image mode and owner of the raw one, as far as we may, and put that on disk."""
    status = raw.stat()
    with contextlib.suppress(PermissionError):
        os.chown(made, status.st_uid, status.st_gid)
    made.chmod(status.st_mode & 0o777)
    images.flush(made)


def remove_leftovers(domain: Domain, conversions: list[Conversion]) -> None:
    """Remove the temporary names, and the images too unless the definition uses them by now.

    An image under its final name is ours when it is the same file as the temporary one.
    """
    is_defined = domain.hypervisor.lookup(domain.uuid) is not None
    used = {disk.path for disk in domain.disks(inactive=True)} if is_defined else set()
    for conversion in conversions:
        if os.path.lexists(conversion.temporary):
            images.end_writers(conversion.temporary)
            if conversion.qcow2 not in used and _is_same_file(
                conversion.qcow2, conversion.temporary
            ):
                conversion.qcow2.unlink()
            conversion.temporary.unlink()
