"""Throwaway machines: thin overlays on a golden image, and a domain of its own on them."""

import contextlib
import os
import shutil
from pathlib import Path

from pytest_kvmsnap.errors import ImageError, MachineError
from pytest_kvmsnap.golden import Golden
from pytest_kvmsnap.machine import clonexml, images
from pytest_kvmsnap.machine.accelerator import domain_type
from pytest_kvmsnap.machine.clonexml import Parts
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.domainxml import DiskSource
from pytest_kvmsnap.machine.libvirt_api import libvirt


def definition(golden: Golden, domain_type: str, parts: Parts) -> str:
    """Return the domain XML of a throwaway machine; a template has its own `domain_type`.

    Raises:
        OSError, ValueError: the template cannot be used.
    """
    if golden.template is None:
        return clonexml.built_in(parts, domain_type)
    return clonexml.from_template(golden.template.read_text(), parts)


def make(domain: Domain, golden: Golden, base: Path, folder: Path) -> None:
    """Make the overlays in a new folder, and define a machine on them, which is off.

    `base` is the qcow2 image to lay the first one on: the golden image, or what a raw one became.

    Raises:
        MachineError: something of the golden image or the template changed since it was checked.
    """
    where = f"{golden.image} at {domain.hypervisor.uri}"
    try:
        folder.mkdir()
        folder.chmod(0o711)  # see the store
        if base != golden.image:  # it may be dropped when the raw image changes
            base = linked(base, folder)
        overlays = {}
        bases = [(base, "qcow2")]
        bases += [(disk.path, disk.format or "raw") for disk in further_disks(golden) if disk.path]
        for number, (backing, image_format) in enumerate(bases):
            overlays[number] = folder / f"disk{number}.qcow2"
            images.create_overlay(overlays[number], backing, image_format)
        parts = Parts(
            domain.name,
            domain.uuid,
            folder / "console.log",
            overlays,
            golden.memory,
            golden.vcpus,
        )
        xml = definition(golden, domain_type(domain.hypervisor), parts)
    except (ImageError, OSError, ValueError) as error:
        raise MachineError(
            "cannot make a throwaway machine on the golden image",
            where=where,
            why=error.why if isinstance(error, ImageError) else str(error),
            cure="was the image or the template changed or removed while the tests ran?",
        ) from None
    hypervisor = domain.hypervisor
    with hypervisor.telling("cannot define a throwaway machine on the golden image", where):
        domain.hypervisor.define(xml)


def further_disks(golden: Golden) -> list[DiskSource]:
    """Return a template's other writable disks: nobody may write into those either.

    Raises:
        OSError, ValueError: the template cannot be used.
    """
    if golden.template is None:
        return []
    return clonexml.writable_disks(golden.template.read_text())[1:]


def linked(image: Path, folder: Path) -> Path:
    """Give a machine a name of its own for a cached image, so that the cache may drop it."""
    base = folder / "base.qcow2"
    os.link(image, base)
    return base


def discard(domain: Domain, folder: Path) -> None:
    """Remove a throwaway machine and all that was made for it; a part that is gone is no error.

    Raises:
        MachineError: it cannot be removed.
    """
    if domain.hypervisor.lookup(domain.uuid) is not None:
        domain.destroy()
        flags = (
            libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        )
        with domain.telling("cannot remove a throwaway machine"):
            domain.raw.undefineFlags(flags)
    remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Remove the images of a throwaway machine."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
