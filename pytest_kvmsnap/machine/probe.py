"""Whether this libvirt can revert to a snapshot of a running machine: tried, on one of our own.

libvirt 11.2 and 11.3 as released start QEMU wrongly for it, and the revert fails with "writable but
does not support snapshots" (https://gitlab.com/libvirt/libvirt/-/issues/771). Distributions patch:
Debian's 11.3 can do it. So the version decides only whether to try.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
import weakref
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from pytest_kvmsnap.errors import ImageError, RevertError
from pytest_kvmsnap.machine import images
from pytest_kvmsnap.machine.libvirt_api import Hypervisor, libvirt

SUSPICIOUS = range(11_002_000, 11_004_000)

_known: weakref.WeakKeyDictionary[Hypervisor, str | None] = weakref.WeakKeyDictionary()


def revert_failure(hypervisor: Hypervisor, like: ET.Element) -> str | None:
    """Return how such a revert fails with this libvirt; None when it works, or was not tried.

    `like` is the definition of a machine that will be used: the one that is tried has its kind of
    emulator. Tried once per connection, and only with QEMU on this host.
    """
    if not is_suspicious(hypervisor):
        return None
    if hypervisor not in _known:
        _known[hypervisor] = _tried(hypervisor, like)
    return _known[hypervisor]


def is_suspicious(hypervisor: Hypervisor) -> bool:
    """Tell whether this libvirt may be one that cannot, and whether we can try."""
    is_tried = hypervisor.kind == "QEMU" and hypervisor.is_local
    return is_tried and hypervisor.version in SUSPICIOUS


def _tried(hypervisor: Hypervisor, like: ET.Element) -> str | None:
    """Snapshot a paused machine without an operating system, and revert it."""
    with (
        contextlib.suppress(OSError, ImageError),
        hypervisor.tolerating("cannot try whether this libvirt can revert"),
        _tiny_image() as image,
        _paused(hypervisor, image, like) as domain,
    ):
        snapshot = domain.snapshotCreateXML("<domainsnapshot/>")
        try:
            with hypervisor.telling("cannot revert", kind=RevertError):
                domain.revertToSnapshot(snapshot, libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE)
        except RevertError as error:
            return error.why
    return None  # also when it did not get as far as the revert


@contextlib.contextmanager
def _tiny_image() -> Iterator[Path]:
    """Make an image that QEMU may use, whoever it runs as, in a folder that only we may list."""
    place = os.environ.get("TMPDIR", "/var/tmp")  # noqa: S108 - a new folder of ours is made in it
    folder = Path(tempfile.mkdtemp(prefix="kvmsnap-probe-", dir=place))
    try:
        folder.chmod(0o711)
        image = folder / f"{secrets.token_hex(8)}.qcow2"
        images.create(image, "1M")
        image.chmod(0o666)
        yield image
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _paused(hypervisor: Hypervisor, image: Path, like: ET.Element) -> Iterator[libvirt.virDomain]:
    """Start a machine that never runs and has no definition, so that nothing of it can stay."""
    name = f"kvmsnap-probe-{secrets.token_hex(4)}"
    xml = definition(name, image, like)
    domain = hypervisor.connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
    try:
        yield domain
    finally:
        with contextlib.suppress(libvirt.libvirtError):  # a failed revert has ended it
            domain.destroy()


def definition(name: str, image: Path, like: ET.Element) -> str:
    """Return the XML of a machine with one disk, of the same kind of emulator as another one."""
    domain = ET.Element("domain", {"type": like.get("type", "qemu")})
    ET.SubElement(domain, "name").text = name
    ET.SubElement(domain, "memory", {"unit": "MiB"}).text = "32"
    system = ET.SubElement(domain, "os")
    kind = like.find("./os/type")
    ET.SubElement(system, "type", kind.attrib if kind is not None else {}).text = "hvm"
    devices = ET.SubElement(domain, "devices")
    emulator = like.findtext("./devices/emulator")
    if emulator:
        ET.SubElement(devices, "emulator").text = emulator
    disk = ET.SubElement(devices, "disk", {"type": "file", "device": "disk"})
    ET.SubElement(disk, "driver", {"name": "qemu", "type": "qcow2"})
    ET.SubElement(disk, "source", {"file": str(image)})
    ET.SubElement(disk, "target", {"dev": "vda", "bus": "virtio"})
    ET.SubElement(devices, "controller", {"type": "usb", "model": "none"})
    ET.SubElement(devices, "memballoon", {"model": "none"})
    return ET.tostring(domain, encoding="unicode")
