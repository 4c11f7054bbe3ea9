"""What we read from, and change in, the XML of domains and snapshots. Pure: touches nothing."""

import contextlib
import datetime as dt
import io
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

AGENT_CHANNEL = "org.qemu.guest_agent.0"


@dataclass(frozen=True)
class DiskSource:
    """A disk as the definition has it. `format` is None when the definition names none.

    Where `has_backing` or `is_slice`, the definition says that the disk is more, or less, than its
    file.
    """

    target: str
    kind: str
    device: str
    path: Path | None
    format: str | None
    readonly: bool
    transient: bool = False
    shareable: bool = False
    encrypted: bool = False
    has_backing: bool = False
    is_slice: bool = False
    protocol: str | None = None

    @property
    def is_snapshotted(self) -> bool:
        """Whether an internal snapshot must hold this disk: writable and not empty."""
        return self.device in ("disk", "lun") and not self.readonly

    @property
    def is_raw(self) -> bool:
        return self.is_snapshotted and self.format == "raw"


@dataclass(frozen=True)
class Snapshot:
    """A snapshot as libvirt tells it; `state` in virsh's words ("running", "shut off", …).

    `created` is in UTC, to the second: that is all that libvirt keeps.
    """

    name: str
    state: str
    created: dt.datetime
    parent: str | None
    description: str
    internal: bool = True


def parsed(xml: str | ET.Element) -> ET.Element:
    """Return the root of an XML text; one that was parsed before is returned as it is."""
    return ET.fromstring(xml) if isinstance(xml, str) else xml


def disks(domain_xml: str | ET.Element, default_format: str | None = None) -> list[DiskSource]:
    """Return the disks of a definition, in its order.

    `default_format` stands for a missing `<driver type=…>`: QEMU domains mean `raw` by it
    (https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms).
    """
    return [
        _disk(element, default_format) for element in parsed(domain_xml).iterfind("./devices/disk")
    ]


def _disk(element: ET.Element, default_format: str | None) -> DiskSource:
    source, driver, target = (element.find(tag) for tag in ("source", "driver", "target"))
    path = None
    if source is not None:
        path = source.get("file") or source.get("dev") or source.get("dir")
    return DiskSource(
        target=(target.get("dev") if target is not None else None) or "?",
        kind=element.get("type", "file"),
        device=element.get("device", "disk"),
        path=Path(path) if path else None,
        format=(driver.get("type") if driver is not None else None) or default_format,
        readonly=element.find("readonly") is not None or element.get("device") == "cdrom",
        transient=element.find("transient") is not None,
        shareable=element.find("shareable") is not None,
        # libvirt writes it into the source by now, and reads both
        encrypted=any(element.find(f"{way}encryption") is not None for way in ("", "source/")),
        has_backing=element.find("backingStore/source") is not None,  # an empty one ends a chain
        is_slice=element.find("source/slices/slice") is not None,
        protocol=source.get("protocol") if source is not None else None,
    )


def written_images(domain_xml: str) -> list[Path]:
    """Return the images that a domain alone may use, since it writes to them or stands on them.

    What is beneath an image (`<backingStore>`) libvirt tells of running machines only.
    """
    found = []
    for element in ET.fromstring(domain_xml).iterfind("./devices/disk"):
        disk = _disk(element, None)
        if disk.path is not None and not disk.readonly and not disk.shareable:
            found.append(disk.path)
        for beneath in element.iterfind(".//backingStore/source"):
            place = beneath.get("file") or beneath.get("dev")
            if place:
                found.append(Path(place))
    return found


def with_qcow2(domain_xml: str, images: dict[str, Path]) -> str:
    """Return the definition with the disks (by target) switched to these qcow2 images."""
    keep_prefixes(domain_xml)
    root = ET.fromstring(domain_xml)
    for element in root.iterfind("./devices/disk"):
        target = element.find("target")
        image = images.get((target.get("dev") or "") if target is not None else "")
        source = element.find("source")
        if image is None or source is None:
            continue
        source.set("file", str(image))
        driver = element.find("driver")
        if driver is None:
            driver = ET.SubElement(element, "driver", {"name": "qemu"})
        driver.set("type", "qcow2")
    return ET.tostring(root, encoding="unicode")


def keep_prefixes(xml: str) -> None:
    """Have namespaces written with the prefixes that their owner knows, `qemu:` and the like."""
    for _, (prefix, uri) in ET.iterparse(io.StringIO(xml), events=["start-ns"]):
        with contextlib.suppress(ValueError):  # prefixes that ElementTree makes up itself
            ET.register_namespace(prefix, uri)


def name(domain_xml: str) -> str:
    """Return the domain's name."""
    return ET.fromstring(domain_xml).findtext("name", "")


def has_agent_channel(domain_xml: str | ET.Element) -> bool:
    """Tell whether the machine has the guest agent's virtio port."""
    targets = parsed(domain_xml).iterfind("./devices/channel/target")
    return any(target.get("name") == AGENT_CHANNEL for target in targets)


def sees_agent(domain_xml: str | ET.Element) -> bool:
    """Tell whether libvirt takes the agent for connected, by the live XML."""
    targets = parsed(domain_xml).iterfind("./devices/channel/target[@state='connected']")
    return any(target.get("name") == AGENT_CHANNEL for target in targets)


def has_9p(domain_xml: str | ET.Element) -> bool:
    """Tell whether the host shares a folder with the machine by 9p, QEMU's own way."""
    shared = parsed(domain_xml).iterfind("./devices/filesystem[@type='mount']")
    return any(each.find("./driver[@type='virtiofs']") is None for each in shared)


def has_network(domain_xml: str | ET.Element) -> bool:
    """Tell whether the machine has a network card, perhaps one of the host's."""
    devices = parsed(domain_xml).find("./devices")
    return devices is not None and any(
        devices.find(path) is not None for path in ("interface", "hostdev[@type='pci']")
    )


def macs(domain_xml: str) -> set[str]:
    """Return the hardware addresses of the network cards, in small letters."""
    cards = parsed(domain_xml).iterfind("./devices/interface/mac")
    return {card.get("address", "").lower() for card in cards}


def forwarded_port(domain_xml: str, port: int) -> tuple[str, int] | None:
    """Return address and port of the host that lead to a TCP port of the guest, if any do."""
    path = "./devices/interface[@type='user']/portForward[@proto='tcp']"
    for forward in parsed(domain_xml).iterfind(path):
        address = forward.get("address") or "127.0.0.1"
        ranges = [each for each in forward.iterfind("range") if each.get("exclude") != "yes"]
        if forward.find("range") is None:
            return address, port  # all are
        for each in ranges:
            start = int(each.get("start", "0"))
            length = int(each.get("end", start)) - start
            offset = port - int(each.get("to", start))
            if 0 <= offset <= length:
                return address, start + offset
    return None


def memory_bytes(domain_xml: str | ET.Element) -> int:
    """Return the memory that the machine has at most."""
    element = parsed(domain_xml).find("./memory")
    if element is None or not element.text:
        return 0
    units = {"b": 1, "k": 10, "m": 20, "g": 30, "t": 40}
    unit = element.get("unit", "KiB")
    if unit.lower() in ("b", "bytes"):
        return int(element.text)
    return int(element.text) << units[unit[0].lower()]  # libvirt itself always says KiB


def console_log(domain_xml: str) -> Path | None:
    """Return the file that the serial console is written to, when the definition names one."""
    root = ET.fromstring(domain_xml)
    for console in (*root.iterfind("./devices/serial"), *root.iterfind("./devices/console")):
        log, source = console.find("log"), console.find("source")
        if log is not None and log.get("file"):
            return Path(log.get("file", ""))
        if console.get("type") == "file" and source is not None and source.get("path"):
            return Path(source.get("path", ""))
    return None


def has_pty_console(domain_xml: str) -> bool:
    """Tell whether the console can be opened through libvirt."""
    devices = ET.fromstring(domain_xml).find("./devices")
    if devices is None:
        return False
    return any(
        element.get("type") == "pty"
        for tag in ("serial", "console")
        for element in devices.iterfind(tag)
    )


def snapshot_request(name: str, description: str, disk_targets: list[str]) -> str:
    """Return the XML that asks for an internal snapshot of these disks (and of the memory)."""
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "description").text = description
    if disk_targets:
        listed = ET.SubElement(root, "disks")
        for target in disk_targets:
            ET.SubElement(listed, "disk", {"name": target, "snapshot": "internal"})
    return ET.tostring(root, encoding="unicode")


def known_again(name: str, description: str, created: int, domain_xml: str) -> str:
    """Return the XML that has libvirt learn of an internal snapshot, which is in the images only.

    It is enough to have it deleted, and says nothing of a memory: nobody should revert to it.
    """
    keep_prefixes(domain_xml)
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "description").text = description
    ET.SubElement(root, "state").text = "shutoff"
    ET.SubElement(root, "creationTime").text = str(created)
    root.append(ET.fromstring(domain_xml))
    return ET.tostring(root, encoding="unicode")


def parents_first(xmls: Mapping[str, str], present: Collection[str]) -> Iterator[str]:
    """Yield the XML of snapshots, by name, in an order in which libvirt can learn of them.

    One whose parent is neither among them nor present is made a root.
    """
    left, there = dict(xmls), set(present)
    while left:
        for name, xml in list(left.items()):
            parent = snapshot(xml).parent
            if parent not in left:
                yield xml if parent is None or parent in there else _as_root(xml)
                there.add(name)
                del left[name]


def _as_root(snapshot_xml: str) -> str:
    keep_prefixes(snapshot_xml)
    root = ET.fromstring(snapshot_xml)
    for parent in root.findall("parent"):
        root.remove(parent)
    return ET.tostring(root, encoding="unicode")


def snapshot(snapshot_xml: str) -> Snapshot:
    """Read a snapshot from libvirt's XML."""
    root = ET.fromstring(snapshot_xml)
    state = root.findtext("state", "")
    parts = [root.find("memory"), *root.iterfind("./disks/disk")]
    return Snapshot(
        name=root.findtext("name", ""),
        state={"shutoff": "shut off"}.get(state, state),
        created=dt.datetime.fromtimestamp(int(root.findtext("creationTime", "0")), tz=dt.UTC),
        parent=root.findtext("parent/name"),
        description=root.findtext("description", ""),
        internal=not any(part is not None and part.get("snapshot") == "external" for part in parts),
    )
