"""What stands in the way of throwaway machines on a golden image. Changes nothing."""

import os
import shutil
from pathlib import Path

from pytest_kvmsnap.errors import BlockedError, ConversionError, ImageError, UsageProblem
from pytest_kvmsnap.golden import Golden
from pytest_kvmsnap.machine import clone, clonexml, images, store
from pytest_kvmsnap.machine.clonexml import Parts
from pytest_kvmsnap.machine.libvirt_api import Hypervisor
from pytest_kvmsnap.sizes import mib

_NOBODY = "00000000-0000-4000-8000-000000000000"


def problems(golden: Golden, hypervisor: Hypervisor, ready: str | None) -> list[UsageProblem]:
    """Return all that is wrong with an image, its template and its host, with cures."""
    if hypervisor.kind != "QEMU" or not hypervisor.is_local:
        return [
            _blocked(
                golden,
                hypervisor,
                "throwaway machines need QEMU on this host, where their images are made",
                "give the URI of a local QEMU, such as qemu:///system, with --kvmsnap-uri",
            )
        ]
    return [*_image_problems(golden, hypervisor), *_machine_problems(golden, hypervisor, ready)]


def _image_problems(golden: Golden, hypervisor: Hypervisor) -> list[UsageProblem]:
    image = golden.image
    if not os.access(image, os.R_OK):
        return [_blocked(golden, hypervisor, "this user may not read it", f"chmod a+r {image}")]
    try:
        images.info(image, golden.format, in_use=False)
        if golden.format == "raw":
            images.check_raw_is_free(image)
    except ImageError as error:
        if "another process using the image" in error.why:
            return [
                _blocked(
                    golden,
                    hypervisor,
                    "another process is writing to it",
                    f"shut that machine down first; who it is: lsof {image}",
                )
            ]
        if not error.where:
            return [error]
        return [
            _blocked(
                golden,
                hypervisor,
                f"it cannot be read as {golden.format}, which its name says it is: {error.why}",
                f"name it by its format; is it damaged? qemu-img check -f {golden.format} {image}",
            )
        ]
    why = images.chain_problem(image, golden.format, golden.folders, in_use=False)
    cure = f"make one image of it: qemu-img convert -O qcow2 {image} …, or see --kvmsnap-image-path"
    return [_blocked(golden, hypervisor, why, cure)] if why is not None else []


def _machine_problems(
    golden: Golden, hypervisor: Hypervisor, ready: str | None
) -> list[UsageProblem]:
    if golden.template is None:
        return _built_in_problems(golden, hypervisor)
    try:
        template = golden.template.read_text()
        disks = clonexml.writable_disks(template)
        places = {number: Path("/") for number in range(len(disks))}
        parts = Parts("template", _NOBODY, Path("/"), places, golden.memory, golden.vcpus)
        clone.definition(hypervisor, golden, parts)
    except (OSError, ValueError) as error:
        return [
            _blocked(
                golden,
                hypervisor,
                f"its template {golden.template} cannot be used: {error}",
                "give a domain's XML: virsh dumpxml --inactive NAME",
            )
        ]
    assert ready in (None, "agent", "none")
    return [
        _blocked(
            golden,
            hypervisor,
            f"the disk {disk.target} of its template {golden.template} cannot be copied thinly:"
            f" {disk.path or 'it'} is no file here",
            "leave it out of the template, or make it <readonly/>",
        )
        for disk in disks[1:]
        if disk.kind != "file" or disk.path is None or not disk.path.is_file()
    ]


def _built_in_problems(golden: Golden, hypervisor: Hypervisor) -> list[UsageProblem]:
    if hypervisor.architecture == "x86_64":
        return []
    return [
        _blocked(
            golden,
            hypervisor,
            f"the built-in machine is for x86_64, and this host is {hypervisor.architecture}",
            "give a domain XML as template: kvm_golden(image, template=FILE)",
        )
    ]


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
