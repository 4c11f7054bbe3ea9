"""Definitions of throwaway machines: what they have, and what of a template they must not share."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pytest_kvmsnap.machine import clonexml, domainxml
from pytest_kvmsnap.machine.clonexml import Parts

UUID = "5ec0ffee-0000-4000-8000-000000000abc"
LOG = Path("/clones/a b/console.log")
DISK, SECOND = Path("/clones/a b/disk0 ü.qcow2"), Path("/clones/a b/disk1.qcow2")


def parts(memory: int | None = None, vcpus: int | None = None) -> Parts:
    return Parts("clone", UUID, LOG, {0: DISK, 1: SECOND}, memory, vcpus)


def built_in(kind: str = "qemu", **more: int) -> ET.Element:
    return ET.fromstring(clonexml.built_in(parts(**more), kind))


def from_template(devices: str, more: str = "", **changes: int) -> ET.Element:
    template = (
        "<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
        "<name>theirs</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>"
        f"<memory unit='KiB'>8192</memory><currentMemory>4096</currentMemory><vcpu>2</vcpu>{more}"
        f"<devices>{devices}</devices>"
        "<qemu:commandline><qemu:arg value='-foo'/></qemu:commandline></domain>"
    )
    return ET.fromstring(clonexml.from_template(template, parts(**changes)))


THEIRS = (
    "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>"
    "<source file='/theirs.img'/><target dev='vda' bus='virtio'/></disk>"
)


def attributes(root: ET.Element, path: str) -> list[dict[str, str]]:
    return [element.attrib for element in root.iterfind(path)]


# the built-in machine


@pytest.mark.parametrize("kind", ["kvm", "qemu"])
def test_the_built_in_machine_has_what_a_guest_needs_and_no_more(kind: str) -> None:
    root = built_in(kind)
    assert root.get("type") == kind
    (disk,) = domainxml.disks(ET.tostring(root, encoding="unicode"))
    assert (disk.path, disk.format, disk.target) == (DISK, "qcow2", "vda")
    assert attributes(root, "./devices/disk/driver") == [
        {"name": "qemu", "type": "qcow2", "discard": "unmap"}
    ]
    assert domainxml.has_agent_channel(ET.tostring(root, encoding="unicode"))
    assert attributes(root, "./devices/serial/log") == [{"file": str(LOG), "append": "on"}]
    assert root.findtext("./devices/rng/backend") == "/dev/urandom"
    assert root.find("./genid") is not None
    assert (root.findtext("./name"), root.findtext("./uuid")) == ("clone", UUID)
    for kind_of_device in ("interface", "graphics", "video", "hostdev", "filesystem"):
        assert root.find(f"./devices/{kind_of_device}") is None
    assert "invtsc" not in ET.tostring(root, encoding="unicode")


def test_the_built_in_machine_has_a_size_unless_told_otherwise() -> None:
    assert (built_in().findtext("./memory"), built_in().findtext("./vcpu")) == (str(2**30), None)
    told = built_in(memory=2**31, vcpus=3)
    assert [(m.text, m.get("unit")) for m in told.iterfind("./memory")] == [(str(2**31), "b")]
    assert told.findtext("./vcpu") == "3"


# templates


def test_a_template_becomes_a_machine_of_its_own() -> None:
    root = from_template(THEIRS)
    assert root.get("id") is None
    assert [e.text for e in root.iterfind("./name")] == ["clone"]
    assert [e.text for e in root.iterfind("./uuid")] == [UUID]
    assert [e.text for e in root.iterfind("./genid")] == [None]
    assert (root.findtext("./memory"), root.findtext("./vcpu")) == ("8192", "2")
    assert root.find("{http://libvirt.org/schemas/domain/qemu/1.0}commandline") is not None


def test_the_prefixes_that_libvirt_knows_are_kept() -> None:
    template = (
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
        f"<devices>{THEIRS}</devices><qemu:commandline/></domain>"
    )
    assert "<qemu:commandline" in clonexml.from_template(template, parts())


def test_size_and_processors_of_the_marker_replace_those_of_the_template() -> None:
    cpu = "<cpu mode='host-model'><topology sockets='2' cores='1' threads='1'/><numa/></cpu>"
    root = from_template(THEIRS, cpu + "<maxMemory slots='4'>99</maxMemory>", memory=2**31, vcpus=5)
    assert [e.text for e in root.iterfind("./memory")] == [str(2**31)]
    assert [e.text for e in root.iterfind("./vcpu")] == ["5"]
    assert root.find("./currentMemory") is root.find("./maxMemory") is None
    assert [(e.tag, len(e)) for e in root.iterfind("./cpu")] == [("cpu", 0)]


def test_the_first_disk_is_replaced_and_keeps_its_place() -> None:
    disk = (
        "<disk type='network' device='lun' snapshot='external'><driver type='raw' cache='none'/>"
        "<auth username='u'/><source protocol='rbd' name='x'><host name='h'/></source>"
        "<encryption format='luks'/><backingStore/><shareable/><transient/>"
        "<target dev='sda' bus='scsi'/><serial>abc</serial></disk>"
    )
    cdrom = "<disk type='file' device='cdrom'><target dev='sdb'/><readonly/></disk>"
    root = from_template(cdrom + disk)
    replaced = root.findall("./devices/disk")[1]
    assert replaced.attrib == {"type": "file", "device": "disk"}
    assert {child.tag for child in replaced} == {"driver", "source", "target", "serial"}
    assert replaced.find("./source").attrib == {"file": str(DISK)}  # type: ignore[union-attr]
    assert replaced.find("./driver").attrib == {  # type: ignore[union-attr]
        "name": "qemu",
        "type": "qcow2",
        "cache": "none",
        "discard": "unmap",
    }


def test_no_disk_of_the_template_is_written_to() -> None:
    second = THEIRS.replace("vda", "vdb").replace("theirs", "second")
    read_only = THEIRS.replace("vda", "vdc").replace("</disk>", "<readonly/></disk>")
    root = from_template(THEIRS + read_only + second)
    files = [disk.path for disk in domainxml.disks(ET.tostring(root, encoding="unicode"))]
    assert files == [DISK, Path("/theirs.img"), SECOND]


@pytest.mark.parametrize(
    "graphics",
    [
        "<graphics type='vnc' port='5900' autoport='no' listen='0.0.0.0'/>",
        "<graphics type='vnc' websocket='5700' socket='/x'><listen type='socket'/></graphics>",
        "<graphics type='spice' tlsPort='1'><listen type='network' network='n'/></graphics>",
        "<graphics type='vnc'><listen type='address' address='::'/><listen/></graphics>",
    ],
)
def test_screens_are_on_loopback_alone(graphics: str) -> None:
    root = from_template(THEIRS + graphics)
    (found,) = root.iterfind("./devices/graphics")
    assert found.attrib == {"type": found.get("type"), "autoport": "yes"}
    assert attributes(root, "./devices/graphics/listen") == [
        {"type": "address", "address": "127.0.0.1"}
    ]


def test_a_screen_without_a_port_stays_as_it_is() -> None:
    root = from_template(THEIRS + "<graphics type='egl-headless'><gl rendernode='/d'/></graphics>")
    assert attributes(root, "./devices/graphics") == [{"type": "egl-headless"}]


def test_addresses_and_places_of_the_other_machine_are_left_out() -> None:
    root = from_template(
        THEIRS + "<interface type='user'><mac address='52:54:00:00:00:01'/><target dev='tap0'/>"
        "<model type='virtio'/></interface>"
        "<channel type='unix'><source mode='bind' path='/theirs'/><target name='a'/></channel>"
        "<channel type='spicevmc'><target name='s'/></channel>"
        "<vsock><cid auto='no' address='3'/></vsock>"
        "<serial type='file'><source path='/theirs.log'/><target port='0'/></serial>"
        "<serial type='tcp'><source mode='bind' host='0.0.0.0' service='4'/>"
        "<protocol type='raw'/></serial>"
        "<console type='pty' tty='/dev/pts/1'><source path='/dev/pts/1'/></console>",
        "<os><loader type='pflash'>/fw</loader><nvram template='/t'>/theirs.fd</nvram></os>",
    )
    text = ET.tostring(root, encoding="unicode")
    for theirs in ("52:54", "tap0", "/theirs", "0.0.0.0", "pts", 'address="3"', "protocol"):
        assert theirs not in text
    assert attributes(root, "./devices/vsock/cid") == [{"auto": "yes"}]
    assert attributes(root, "./os/nvram") == [{"template": "/t"}]
    logs = attributes(root, "./devices/serial/log") + attributes(root, "./devices/console/log")
    assert logs == [{"file": str(LOG), "append": "on"}]
    assert {e.get("type") for e in root.iterfind("./devices/serial")} == {"pty"}
    assert len(root.findall("./devices/channel")) == 2


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("no XML", "it is no XML: "),
        ("<domain>", "it is no XML: "),
        ("", "it is no XML: "),
        ("<network/>", "its root is <network>, not <domain>"),
        ("<domain/>", "it has no writable disk"),
        (
            "<domain><devices><disk device='cdrom'/><disk><readonly/></disk></devices></domain>",
            "it has no writable disk",
        ),
    ],
)
def test_what_is_no_template_is_told(template: str, why: str) -> None:
    for call in (clonexml.writable_disks, lambda text: clonexml.from_template(text, parts())):
        with pytest.raises(ValueError, match=why):
            call(template)


def test_the_disks_that_need_an_overlay_are_told() -> None:
    second = THEIRS.replace("vda", "vdb").replace("type='raw'", "type='qcow2'")
    disks = clonexml.writable_disks(f"<domain><devices>{THEIRS}{second}</devices></domain>")
    assert [(disk.target, disk.format) for disk in disks] == [("vda", "raw"), ("vdb", "qcow2")]
