"""What stands in the way of throwaway machines on a golden image. Changes nothing."""

import os
import shutil
from pathlib import Path

from pytest_kvmsnap.errors import BlockedError, ConversionError, ImageError, UsageProblem
from pytest_kvmsnap.golden import Golden
from pytest_kvmsnap.machine import clone, clonexml, domainxml, images, space, store
from pytest_kvmsnap.machine.accelerator import domain_type
from pytest_kvmsnap.machine.blockers import Blocker, definition_blockers
from pytest_kvmsnap.machine.clonexml import Parts
from pytest_kvmsnap.machine.libvirt_api import Hypervisor
from pytest_kvmsnap.machine.preflight import libvirt_blockers, ssh_blockers
from pytest_kvmsnap.sizes import mib

_NOBODY = "00000000-0000-4000-8000-000000000000"


def problems(
    golden: Golden, hypervisor: Hypervisor, ready: str | None, *, live: bool, may_try: bool = True
) -> list[UsageProblem]:
    """Return all that is wrong with an image, its template and its host, with cures.

    The rest is as for `preflight.problems`.
    """
    if hypervisor.kind != "QEMU" or not hypervisor.is_local:
        found: list[Blocker | ImageError] = [
            Blocker(
                "throwaway machines need QEMU on this host, where their images are made",
                "give the URI of a local QEMU, such as qemu:///system, with --kvmsnap-uri",
            )
        ]
    else:
        found = [*_image_blockers(golden)]
        found += _template_blockers(golden) if golden.template is not None else []
        if golden.template is None and hypervisor.architecture != "x86_64":
            found.append(
                Blocker(
                    "the built-in machine is for x86_64, and this host is"
                    f" {hypervisor.architecture}",
                    "give a domain XML as template: kvm_golden(image, template=FILE)",
                )
            )
        if not found:
            found += _machine_blockers(golden, hypervisor, ready, live=live, may_try=may_try)
    return [
        BlockedError(
            f"no machine can be made on the golden image {golden}",
            where=f"{golden.image} at {hypervisor.uri}",
            why=each.why,
            cure=each.cure,
        )
        if isinstance(each, Blocker)
        else each
        for each in found
    ]


def _image_blockers(golden: Golden) -> list[Blocker | ImageError]:
    image = golden.image
    if not os.access(image, os.R_OK):
        return [Blocker("this user may not read it", f"chmod a+r {image}")]
    try:
        images.info(image, golden.format, in_use=False)
        if golden.format == "raw":
            images.check_raw_is_free(image)
    except ImageError as error:
        if "another process using the image" in error.why:
            return [
                Blocker(
                    "another process is writing to it",
                    f"shut that machine down first; who it is: lsof {image}",
                )
            ]
        if not error.where:
            return [error]
        return [
            Blocker(
                f"it cannot be read as {golden.format}, which its name says it is: {error.why}",
                f"name it by its format; is it damaged? qemu-img check -f {golden.format} {image}",
            )
        ]
    why = images.chain_problem(image, golden.format, golden.folders, in_use=False)
    cure = f"make one image of it: qemu-img convert -f qcow2 -O qcow2 {image} NEW"
    cure += "; or name the folders of its backing files with --kvmsnap-image-path"
    return [Blocker(why, cure)] if why is not None else []


def _template_blockers(golden: Golden) -> list[Blocker]:
    try:
        _definition(golden, "qemu")
        further = clone.further_disks(golden)
    except (OSError, ValueError) as error:
        return [
            Blocker(
                f"its template {golden.template} cannot be used: {error}",
                "give a domain's XML: virsh dumpxml --inactive NAME",
            )
        ]
    return [
        Blocker(
            f"the disk {disk.target} of its template {golden.template} cannot be copied thinly:"
            f" {disk.path or 'it'} is no file here",
            "leave it out of the template, or make it <readonly/>",
        )
        for disk in further
        if disk.kind != "file" or disk.path is None or not disk.path.is_file()
    ]


def _machine_blockers(
    golden: Golden, hypervisor: Hypervisor, ready: str | None, *, live: bool, may_try: bool
) -> list[Blocker]:
    """Return what stands in the way of snapshots of the machine, which is there by its XML only."""
    root = domainxml.parsed(_definition(golden, domain_type(hypervisor)))
    found = definition_blockers(
        root,
        edit=f"edit {golden.template}" if golden.template else "give a template that has it",
        libvirt_version=hypervisor.version,
        ready=ready,
        live=live,
        off=True,
    )
    if ready == "ssh":
        found += ssh_blockers()
    if live:
        found += space.room_blockers(store.base(), space.least_memory(domainxml.memory_bytes(root)))
        found += libvirt_blockers(hypervisor, root) if may_try else []
    return found


def _definition(golden: Golden, domain_type: str) -> str:
    """Return the XML of a machine that is not made yet."""
    disks = clonexml.writable_disks(golden.template.read_text()) if golden.template else [None]
    overlays = {number: Path(f"/{number}.qcow2") for number in range(len(disks))}
    parts = Parts("new", _NOBODY, Path("/log"), overlays, golden.memory, golden.vcpus)
    return clone.definition(golden, domain_type, parts)


def conversion_problem(golden: Golden, convert: str) -> UsageProblem | None:
    """Return why a raw golden image, of which there is no qcow2 image yet, cannot become one."""
    try:
        size = images.space_needed(golden.image)
    except ImageError as error:
        return error
    if convert != "auto":
        return BlockedError(
            f"the golden image {golden} is raw, and machines on it need qcow2",
            where=str(golden.image),
            why=f"it would be converted, which takes up to {mib(size)} in {store.base()}, and"
            f" kvmsnap's option convert is {convert!r}",
            cure="let it be converted with --kvmsnap-convert=auto (the raw file stays)",
        )
    free = shutil.disk_usage(store.base()).free
    if size <= free:
        return None
    return ConversionError(
        f"not enough space to convert the golden image {golden}",
        where=str(store.base()),
        why=f"needs up to {mib(size)}, has {mib(free)}",
        cure="make room there, or name another folder by TMPDIR",
    )


def _blocked(golden: Golden, hypervisor: Hypervisor, why: str, cure: str) -> BlockedError:
    return BlockedError(
        f"no machine can be made on the golden image {golden}",
        where=f"{golden.image} at {hypervisor.uri}",
        why=why,
        cure=cure,
    )
