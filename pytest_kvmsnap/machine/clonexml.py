"""Definitions of throwaway machines: a built-in one, or one like somebody's domain. Pure."""

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from pytest_kvmsnap.machine import domainxml

_LOOPBACK = "127.0.0.1"
_PORTS = ("port", "tlsPort", "websocket", "socket")
_BUILT_IN_MEMORY = 2**30


@dataclass(frozen=True)
class Parts:
    """What makes a machine one of its own.

    `overlays` are its disk images, by the place of the disk among the definition's; `memory`
    (bytes) and `vcpus` are None where the template decides.
    """

    name: str
    uuid: str
    console_log: Path
    overlays: dict[int, Path]
    memory: int | None = None
    vcpus: int | None = None


def built_in(parts: Parts, domain_type: str) -> str:
    """Return a machine for images that boot by BIOS: x86-64, one disk, no network, no graphics.

    The console goes into a log, the guest agent has its channel, random numbers come from the host,
    and a revert shows in the generation ID (https://libvirt.org/formatdomain.html#genid).
    """
    root = ET.Element("domain", {"type": domain_type})
    os = _add(root, "os")
    _add(os, "type", "hvm", arch="x86_64", machine="q35")
    _add(os, "boot", dev="hd")
    features = _add(root, "features")
    _add(features, "acpi")
    _add(features, "apic")
    # Neither has the invariant time stamp counter, which would block snapshots.
    if domain_type == "kvm":
        _add(root, "cpu", mode="host-passthrough", migratable="on")
    else:
        _add(root, "cpu", mode="maximum")
    _add(root, "clock", offset="utc")
    devices = _add(root, "devices")
    disk = _add(devices, "disk", type="file", device="disk")
    _add(disk, "target", dev="vda", bus="virtio")
    serial = _add(devices, "serial", type="pty")
    _add(serial, "target", port="0")
    channel = _add(devices, "channel", type="unix")
    _add(channel, "target", type="virtio", name=domainxml.AGENT_CHANNEL)
    rng = _add(devices, "rng", model="virtio")
    _add(rng, "backend", "/dev/urandom", model="random")
    _make_own(root, parts)
    if parts.memory is None:
        _set(root, "memory", str(_BUILT_IN_MEMORY), unit="b")
    return ET.tostring(root, encoding="unicode")


def from_template(template: str, parts: Parts) -> str:
    """Return a domain's XML as a machine of its own, with nothing that only one machine can have.

    Raises:
        ValueError: it is no domain's XML, or has no disk to replace.
    """
    root = _parse(template)
    root.attrib.pop("id", None)  # of a running domain's XML
    _give_up_what_is_shared(root)
    _make_own(root, parts)
    return ET.tostring(root, encoding="unicode")


def writable_disks(template: str) -> list[domainxml.DiskSource]:
    """Return the disks of a template that need an overlay, the one for the image first.

    Raises:
        ValueError: it is no domain's XML, or has no disk to replace.
    """
    _parse(template)
    return [disk for disk in domainxml.disks(template, "raw") if disk.is_snapshotted]


def _parse(template: str) -> ET.Element:
    try:
        domainxml.keep_prefixes(template)
        root = ET.fromstring(template)
    except ET.ParseError as error:
        raise ValueError(f"it is no XML: {error}") from None
    if root.tag != "domain":
        raise ValueError(f"its root is <{root.tag}>, not <domain>")
    if not _disks(root):
        raise ValueError("it has no writable disk that the image could replace")
    return root


def _disks(root: ET.Element) -> list[ET.Element]:
    return [
        disk
        for disk in root.iterfind("./devices/disk")
        if disk.get("device", "disk") in ("disk", "lun") and disk.find("readonly") is None
    ]


def _give_up_what_is_shared(root: ET.Element) -> None:
    """Remove addresses and places that two machines cannot both have; libvirt makes new ones."""
    for graphics in root.iterfind("./devices/graphics"):
        _listen_on_loopback(graphics)
    for interface in root.iterfind("./devices/interface"):
        _remove(interface, "mac", "target")
    for channel in root.iterfind("./devices/channel"):
        if channel.get("type") == "unix":
            _remove(channel, "source")
    for cid in root.iterfind("./devices/vsock/cid"):
        cid.attrib.clear()
        cid.set("auto", "yes")
    for nvram in root.iterfind("./os/nvram"):
        nvram.text = None
        _remove(nvram, "source")


def _make_own(root: ET.Element, parts: Parts) -> None:
    """Give it a name, a UUID, a generation ID, disks and a console of its own."""
    _set(root, "name", parts.name)
    _set(root, "uuid", parts.uuid)
    _set(root, "genid", None)
    if parts.memory is not None:
        _remove(root, "currentMemory", "maxMemory")
        _set(root, "memory", str(parts.memory), unit="b")
    if parts.vcpus is not None:
        _remove(root, "vcpus")
        _set(root, "vcpu", str(parts.vcpus))
        topology = root.find("./cpu")
        if topology is not None:
            _remove(topology, "topology", "numa")
    for place, disk in enumerate(_disks(root)):
        _replace_image(disk, parts.overlays[place])
    consoles = [*root.iterfind("./devices/serial"), *root.iterfind("./devices/console")]
    for number, console in enumerate(consoles):
        _remove(console, "log", "source", "protocol")
        console.attrib.pop("tty", None)
        console.set("type", "pty")
        if number == 0:
            _add(console, "log", file=str(parts.console_log), append="on")


def _replace_image(disk: ET.Element, image: Path) -> None:
    _remove(disk, "source", "backingStore", "mirror", "auth", "encryption")
    _remove(disk, "shareable", "transient", "reservations")
    disk.set("type", "file")
    disk.set("device", "disk")
    disk.attrib.pop("snapshot", None)
    driver = disk.find("driver")
    if driver is None:
        driver = _add(disk, "driver")
    driver.attrib.update(name="qemu", type="qcow2", discard="unmap")
    _add(disk, "source", file=str(image))


def _listen_on_loopback(graphics: ET.Element) -> None:
    if graphics.get("type") not in ("vnc", "spice", "rdp"):
        return
    for attribute in (*_PORTS, "listen"):
        graphics.attrib.pop(attribute, None)
    _remove(graphics, "listen")
    graphics.set("autoport", "yes")
    _add(graphics, "listen", type="address", address=_LOOPBACK)


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _set(root: ET.Element, tag: str, text: str | None, **attributes: str) -> None:
    """Give an element this content, whatever there was."""
    _remove(root, tag)
    element = ET.Element(tag, attributes)
    element.text = text
    root.insert(0, element)


def _remove(parent: ET.Element, *tags: str) -> None:
    for tag in tags:
        for element in parent.findall(tag):
            parent.remove(element)
