"""Raw images become qcow2, since internal snapshots need it. The raw file is never touched."""

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_kvmsnap.errors import BlockedError, ConversionError, ImageError, UsageProblem
from pytest_kvmsnap.machine import domainxml, images
from pytest_kvmsnap.machine.domain import Domain


@dataclass(frozen=True)
class Conversion:
    """One raw disk and the qcow2 image that it becomes."""

    target: str
    raw: Path
    qcow2: Path
    temporary: Path


def planned(domain: Domain, run: str) -> list[Conversion]:
    """Return what must be converted before the domain can be snapshotted."""
    conversions = []
    for disk in domain.disks(inactive=True):
        if disk.is_raw and disk.path is not None:
            qcow2 = disk.path.with_suffix(".qcow2")
            temporary = qcow2.with_name(f".{qcow2.name}.kvmsnap-{run}.tmp")
            conversions.append(Conversion(disk.target, disk.path, qcow2, temporary))
    return conversions


def problems(domain: Domain, conversions: list[Conversion], convert: str) -> list[UsageProblem]:
    """Return what stands in the way of the conversions, with cures; looks only."""
    if not conversions:
        return []
    if convert != "auto":
        return [_unwanted(domain, conversions, convert)]
    if not domain.hypervisor.is_local:
        return [
            _blocked(
                domain,
                conversion,
                "the image is on another host",
                f"convert it there: qemu-img convert -f raw -O qcow2 {conversion.raw}"
                f" {conversion.qcow2}, and switch the definition with virsh edit {domain.name}",
            )
            for conversion in conversions
        ]
    if domain.is_active():
        return [
            _blocked(
                domain,
                conversion,
                f"the machine is {domain.state()}, and only one that is off can be converted",
                f"shut it down first: virsh -c {domain.hypervisor.uri} shutdown {domain.name}",
            )
            for conversion in conversions
        ]
    targets = [conversion.qcow2 for conversion in conversions]
    found = [
        _same_target(domain, conversion)
        if targets.count(conversion.qcow2) > 1
        else _problem(domain, conversion)
        for conversion in conversions
    ]
    return [problem for problem in found if problem is not None] or _space(domain, conversions)


def _problem(domain: Domain, conversion: Conversion) -> UsageProblem | None:
    raw, qcow2 = conversion.raw, conversion.qcow2
    try:
        mode = raw.stat().st_mode
    except PermissionError:
        return _forbidden(domain, conversion)
    except OSError:
        return None  # told by the preflight, which looks at all images
    if not stat.S_ISREG(mode):
        return _blocked(
            domain,
            conversion,
            "it is no file but a device, which cannot become a qcow2 image in place",
            "copy it into a file with qemu-img convert -f raw -O qcow2 and use that instead",
        )
    if raw == qcow2 or os.path.lexists(qcow2):
        return _blocked(
            domain,
            conversion,
            f"{qcow2} exists already, and we overwrite nothing",
            "use that image in the definition if it is the right one, else move it away",
        )
    others = _other_users(domain, raw)
    if others:
        return _blocked(
            domain,
            conversion,
            f"the domain {' and '.join(others)} uses the same file, and the two would part",
            "give each domain an image of its own, or convert by hand and change both definitions",
        )
    if not os.access(raw, os.R_OK) or not os.access(raw.parent, os.W_OK):
        return _forbidden(domain, conversion)
    return None


def _forbidden(domain: Domain, conversion: Conversion) -> UsageProblem:
    return _blocked(
        domain,
        conversion,
        "this user may not read it, or may not write into its folder",
        "run once as a user who may, or: qemu-img convert -f raw -O qcow2"
        f" {conversion.raw} {conversion.qcow2}",
    )


def _same_target(domain: Domain, conversion: Conversion) -> UsageProblem:
    return _blocked(
        domain,
        conversion,
        f"another of its disks would become {conversion.qcow2} too",
        "rename one of the two files, and change the definition",
    )


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


def _space(domain: Domain, conversions: list[Conversion]) -> list[UsageProblem]:
    """Return a problem for each folder that cannot take all the images that go into it."""
    needed: dict[Path, int] = {}
    try:
        for conversion in conversions:
            folder = conversion.qcow2.parent
            needed[folder] = needed.get(folder, 0) + images.space_needed(conversion.raw)
    except ImageError as error:
        return [error]
    return [
        ConversionError(
            f"not enough space to convert the images of {domain.name}",
            where=str(folder),
            why=f"needs up to {mib(size)}, has {mib(shutil.disk_usage(folder).free)}",
            cure="make room there, or move the raw image to a larger disk",
        )
        for folder, size in needed.items()
        if size > shutil.disk_usage(folder).free
    ]


def _blocked(domain: Domain, conversion: Conversion, why: str, cure: str) -> BlockedError:
    return BlockedError(
        f"the raw disk {conversion.target} of {domain.name} cannot be converted to qcow2",
        where=f"{domain.where}, {conversion.raw}",
        why=why,
        cure=cure,
    )


def _unwanted(domain: Domain, conversions: list[Conversion], convert: str) -> BlockedError:
    listed = "\n".join(f"{c.target}: {c.raw} (would become {c.qcow2})" for c in conversions)
    return BlockedError(
        f"{domain.name} has raw disks, and internal snapshots need qcow2",
        where=domain.where,
        why=f"{listed}\nand kvmsnap's option convert is {convert!r}",
        cure="let them be converted with --kvmsnap-convert=auto (the raw files stay)",
    )


def perform(
    domain: Domain, conversions: list[Conversion], progress: Callable[[Conversion, float], None]
) -> list[str]:
    """Convert the images, then switch the definition once; return a line for each.

    Each image grows under a temporary name beside its target and is compared with the raw one. It
    keeps that name, as a second link, until the definition is switched: so whoever comes after a
    kill knows the image for ours, and the definition and the raw files are as they were.

    Raises:
        ConversionError: one failed; nothing of it is left.
    """
    done = []
    try:
        for conversion in conversions:
            done.append(_convert(domain, conversion, progress))
        for conversion in conversions:
            _give_name(conversion)
        switched = {conversion.target: conversion.qcow2 for conversion in conversions}
        domain.hypervisor.define(domainxml.with_qcow2(domain.xml(inactive=True), switched))
    finally:
        remove_leftovers(domain, conversions)
    return done


def _convert(
    domain: Domain, conversion: Conversion, progress: Callable[[Conversion, float], None]
) -> str:
    start = time.monotonic()
    what = f"cannot convert the raw disk {conversion.target} of {domain.name} to qcow2"
    # Made first, so that it is private from the start: qemu-img would use the umask.
    os.close(os.open(conversion.temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        images.to_qcow2(
            conversion.raw, conversion.temporary, lambda percent: progress(conversion, percent)
        )
        if not images.is_same(conversion.raw, conversion.temporary):
            raise ConversionError(
                what, where=str(conversion.raw), why="the copy differs: something wrote meanwhile"
            )
    except ImageError as error:
        free = mib(shutil.disk_usage(conversion.raw.parent).free)
        raise ConversionError(
            what,
            where=str(conversion.raw),
            why=error.why,
            cure=f"the raw image is untouched; {free} are free beside it",
        ) from None
    like(conversion.raw, conversion.temporary)
    seconds = time.monotonic() - start
    size = mib(conversion.temporary.stat().st_blocks * 512)
    return (
        f"converted {conversion.raw} to {conversion.qcow2.name} ({size} in {seconds:.1f} s) and"
        f" switched {domain.name} to it; the raw file stays"
    )


def like(raw: Path, made: Path) -> None:
    """Give the new image mode and owner of the raw one, as far as we may, and put it on disk."""
    status = raw.stat()
    with contextlib.suppress(PermissionError):
        os.chown(made, status.st_uid, status.st_gid)
    made.chmod(status.st_mode & 0o777)
    descriptor = os.open(made, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _give_name(conversion: Conversion) -> None:
    """Rename without overwriting: a link fails when somebody made the target meanwhile."""
    try:
        os.link(conversion.temporary, conversion.qcow2)
    except OSError as error:
        raise ConversionError(
            f"cannot give the converted image its name {conversion.qcow2}",
            where=str(conversion.raw),
            why=str(error),
            cure="the raw image is untouched and still in use",
        ) from None


def remove_leftovers(domain: Domain, conversions: list[Conversion]) -> None:
    """Remove the temporary names, and the images too unless the definition uses them by now.

    An image under its final name is ours when it is the same file as the temporary one.
    """
    is_defined = domain.hypervisor.lookup(domain.uuid) is not None
    used = {disk.path for disk in domain.disks(inactive=True)} if is_defined else set()
    for conversion in conversions:
        if os.path.lexists(conversion.temporary):
            if conversion.qcow2 not in used and _is_same_file(
                conversion.qcow2, conversion.temporary
            ):
                conversion.qcow2.unlink()
            conversion.temporary.unlink()


def mib(size: int) -> str:
    """Return a size for people."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"
