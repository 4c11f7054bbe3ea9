"""Reading and changing the XML of domains and snapshots."""

import datetime as dt
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.domainxml import DiskSource

ODD_NAMES = ["plain", "a & b", "a < b > c", 'quoted "name"', "grün ☃ 機", "it's", "]]>", "&amp;"]


def domain(devices: str = "", more: str = "", attributes: str = "type='kvm'") -> str:
    return (
        f"<domain {attributes}><name>box</name>{more}"
        f"<devices><emulator>/usr/bin/qemu</emulator>{devices}</devices></domain>"
    )


def only_disk(element: str, default: str | None = None) -> DiskSource:
    (disk,) = domainxml.disks(domain(element), default)
    return disk


# disks


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        (
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
            "<source file='/a.qcow2'/><target dev='vda' bus='virtio'/></disk>",
            DiskSource("vda", "file", "disk", Path("/a.qcow2"), "qcow2", readonly=False),
        ),
        (
            "<disk><driver type='raw'/><source file='/a'/><target dev='vda'/></disk>",
            DiskSource("vda", "file", "disk", Path("/a"), "raw", readonly=False),
        ),
        (
            "<disk type='file'><source file='/a'/><target dev='vda'/></disk>",
            DiskSource("vda", "file", "disk", Path("/a"), "raw", readonly=False),
        ),
        (
            "<disk type='file'><driver name='qemu'/><source file='/a'/><target dev='vda'/></disk>",
            DiskSource("vda", "file", "disk", Path("/a"), "raw", readonly=False),
        ),
        (
            "<disk type='block' device='lun'><driver type='raw'/><source dev='/dev/sdx'/>"
            "<target dev='sda'/></disk>",
            DiskSource("sda", "block", "lun", Path("/dev/sdx"), "raw", readonly=False),
        ),
        (
            "<disk type='dir'><driver type='fat'/><source dir='/d'/><target dev='vdb'/>"
            "<readonly/></disk>",
            DiskSource("vdb", "dir", "disk", Path("/d"), "fat", readonly=True),
        ),
        (
            "<disk type='network'><driver type='raw'/><source protocol='nbd' name='x'>"
            "<host name='h'/></source><target dev='vda'/></disk>",
            DiskSource(*("vda", "network", "disk", None, "raw"), readonly=False, protocol="nbd"),
        ),
        (
            "<disk type='volume'><driver type='qcow2'/><source pool='p' volume='v'/>"
            "<target dev='vda'/><shareable/></disk>",
            DiskSource("vda", "volume", "disk", None, "qcow2", readonly=False, shareable=True),
        ),
        (
            "<disk type='file'><driver type='qcow2'/><source file='/a'><encryption/></source>"
            "<target dev='vda'/></disk>",
            DiskSource("vda", "file", "disk", Path("/a"), "qcow2", readonly=False, encrypted=True),
        ),
        (
            "<disk type='file' device='cdrom'><driver type='raw'/><source file='/a.iso'/>"
            "<target dev='sda'/></disk>",
            DiskSource("sda", "file", "cdrom", Path("/a.iso"), "raw", readonly=True),
        ),
        (
            "<disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>",
            DiskSource("sda", "file", "cdrom", None, "raw", readonly=True),
        ),
        (
            "<disk type='file' device='floppy'><driver type='raw'/><source file='/f'/>"
            "<target dev='fda'/></disk>",
            DiskSource("fda", "file", "floppy", Path("/f"), "raw", readonly=False),
        ),
        (
            "<disk type='file'><driver type='qcow2'/><source file='/a'/><target dev='vda'/>"
            "<transient/></disk>",
            DiskSource("vda", "file", "disk", Path("/a"), "qcow2", readonly=False, transient=True),
        ),
        (
            "<disk type='file'><source file='/a'/></disk>",
            DiskSource("?", "file", "disk", Path("/a"), "raw", readonly=False),
        ),
    ],
    ids=[
        "qcow2",
        "no type",
        "no driver",
        "no format",
        "lun",
        "folder",
        "network",
        "volume that is shared",
        "encrypted",
        "cdrom",
        "empty cdrom",
        "floppy",
        "transient",
        "no target",
    ],
)
def test_a_disk_is_read(element: str, expected: DiskSource) -> None:
    assert only_disk(element, "raw") == expected


@pytest.mark.parametrize(
    ("more", "in_source", "is_true_of_it"),
    [
        ("", "", set()),
        ("<backingStore/>", "<slices/>", set()),
        ("<backingStore type='file'><source file='/b'/></backingStore>", "", {"has_backing"}),
        ("<encryption format='luks'/>", "", {"encrypted"}),
        ("", "<encryption format='luks'/>", {"encrypted"}),
        ("", "<slices><slice type='storage' offset='0' size='1'/></slices>", {"is_slice"}),
        ("<shareable/>", "", {"shareable"}),
    ],
)
def test_what_the_definition_says_beyond_the_file_is_read(
    more: str, in_source: str, is_true_of_it: set[str]
) -> None:
    disk = only_disk(
        f"<disk type='file'><source file='/a'>{in_source}</source><target dev='vda'/>{more}</disk>"
    )
    asked = ("has_backing", "encrypted", "is_slice", "shareable")
    assert {name for name in asked if getattr(disk, name)} == is_true_of_it


@pytest.mark.parametrize(
    ("attributes", "more", "is_snapshotted", "is_raw"),
    [
        ("device='disk'", "", True, True),
        ("", "", True, True),
        ("device='lun'", "", True, True),
        ("device='disk'", "<readonly/>", False, False),
        ("device='cdrom'", "", False, False),
        ("device='floppy'", "", False, False),
    ],
)
def test_writable_disks_are_snapshotted(
    attributes: str, more: str, is_snapshotted: bool, is_raw: bool
) -> None:
    disk = only_disk(
        f"<disk type='file' {attributes}><driver type='raw'/><source file='/a'/>"
        f"<target dev='vda'/>{more}</disk>"
    )
    assert (disk.is_snapshotted, disk.is_raw) == (is_snapshotted, is_raw)


def test_images_that_a_domain_needs_for_itself() -> None:
    beneath = "<backingStore type='file'><source file='/beneath'/><backingStore/></backingStore>"
    disks = [
        f"<disk type='file'><source file='/top'/>{beneath}</disk>",
        "<disk type='block'><source dev='/dev/sdx'/></disk>",
        "<disk type='file'><source file='/shared'/><shareable/></disk>",
        "<disk type='file'><source file='/read-only'/><readonly/></disk>",
        "<disk type='file' device='cdrom'><source file='/cdrom'/></disk>",
        "<disk type='network'><source protocol='nbd' name='x'/></disk>",
    ]
    found = domainxml.written_images(domain("".join(disks)))
    assert found == [Path("/top"), Path("/beneath"), Path("/dev/sdx")]


def test_without_a_default_no_format_is_guessed() -> None:
    disk = only_disk("<disk type='file'><source file='/a'/><target dev='vda'/></disk>")
    assert disk.format is None
    assert not disk.is_raw


def test_disks_come_in_the_order_of_the_definition() -> None:
    elements = "".join(f"<disk><target dev='{target}'/></disk>" for target in ("vdb", "sda", "vda"))
    assert [disk.target for disk in domainxml.disks(domain(elements))] == ["vdb", "sda", "vda"]


def test_disks_of_backing_chains_and_snapshots_are_no_disks_of_the_machine() -> None:
    element = (
        "<disk type='file'><driver type='qcow2'/><source file='/top'/>"
        "<backingStore type='file'><format type='raw'/><source file='/base'/></backingStore>"
        "<target dev='vda'/></disk>"
    )
    assert only_disk(element).path == Path("/top")


# with_qcow2

RICH = """<domain type="kvm" id="3" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
  <!-- ours -->
  <name>a &amp; b &lt; ü</name>
  <metadata>
    <app:data xmlns:app="http://example.org/app"><app:owner>QA &amp; co</app:owner></app:data>
  </metadata>
  <devices>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw" cache="none" discard="unmap"/>
      <source file="/images/one.raw" index="1"><seclabel model="dac" relabel="no"/></source>
      <target dev="vda" bus="virtio"/>
      <boot order="1"/>
      <address type="pci" domain="0x0000" bus="0x04" slot="0x00" function="0x0"/>
    </disk>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw"/>
      <source file="/images/two.raw"/>
      <target dev="vdb" bus="virtio"/>
    </disk>
    <disk type="file" device="cdrom"><target dev="sda"/></disk>
  </devices>
  <qemu:commandline><qemu:arg value="-foo"/></qemu:commandline>
</domain>"""


def test_only_file_and_format_of_the_named_disk_are_changed() -> None:
    changed = domainxml.with_qcow2(RICH, {"vda": Path("/images/ä & <one>.qcow2")})
    expected = ET.fromstring(RICH)
    source, driver = (expected.find(f"./devices/disk/{tag}") for tag in ("source", "driver"))
    assert source is not None
    assert driver is not None
    source.set("file", "/images/ä & <one>.qcow2")
    driver.set("type", "qcow2")
    assert same(changed, ET.tostring(expected, encoding="unicode"))


def same(one: str, other: str) -> bool:
    """Tell whether two documents mean the same, whatever their prefixes."""
    return ET.canonicalize(one, rewrite_prefixes=True) == ET.canonicalize(
        other, rewrite_prefixes=True
    )


def test_the_prefix_of_qemu_is_kept() -> None:
    changed = domainxml.with_qcow2(RICH, {"vda": Path("/x")})
    assert "<qemu:commandline>" in changed
    assert '<qemu:arg value="-foo"' in changed
    assert 'xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0"' in changed
    assert ">QA &amp; co<" in changed


def test_several_disks_are_switched_at_once() -> None:
    images = {"vda": Path("/1.qcow2"), "vdb": Path("/2.qcow2")}
    disks = domainxml.disks(domainxml.with_qcow2(RICH, images))
    assert [(disk.path, disk.format) for disk in disks] == [
        (Path("/1.qcow2"), "qcow2"),
        (Path("/2.qcow2"), "qcow2"),
        (None, None),
    ]


def test_a_disk_without_driver_gets_one() -> None:
    xml = domain("<disk type='file'><source file='/a'/><target dev='vda'/></disk>")
    (disk,) = domainxml.disks(domainxml.with_qcow2(xml, {"vda": Path("/a.qcow2")}))
    assert (disk.path, disk.format) == (Path("/a.qcow2"), "qcow2")


@pytest.mark.parametrize("images", [{}, {"vdz": Path("/x")}, {"sda": Path("/x")}])
def test_nothing_is_changed_when_no_such_disk_holds_an_image(images: dict[str, Path]) -> None:
    assert same(domainxml.with_qcow2(RICH, images), RICH)


def test_the_prefix_of_metadata_is_kept() -> None:
    written = domainxml.with_qcow2(RICH, {})
    assert "<app:data>" in written
    assert 'xmlns:app="http://example.org/app"' in written


# other things that are read


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_read(name: str) -> None:
    root = ET.Element("domain")
    ET.SubElement(root, "name").text = name
    assert domainxml.name(ET.tostring(root, encoding="unicode")) == name


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ("<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>", 1),
        (
            "<channel type='spicevmc'><target name='com.redhat.spice.0'/></channel>"
            "<channel type='unix'><source mode='bind'/>"
            "<target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
            1,
        ),
        ("<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.1'/></channel>", 0),
        ("<channel type='pty'/>", 0),
        ("<serial><target name='org.qemu.guest_agent.0'/></serial>", 0),
        ("", 0),
    ],
)
def test_the_agents_channel_is_found(devices: str, expected: int) -> None:
    assert domainxml.has_agent_channel(domain(devices)) == bool(expected)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ("<filesystem type='mount'><source dir='/x'/></filesystem>", True),
        ("<filesystem type='mount'><driver type='path'/></filesystem>", True),
        ("<filesystem type='mount'><driver type='virtiofs'/></filesystem>", False),
        ("", False),
    ],
)
def test_folders_that_are_shared_by_9p(devices: str, expected: bool) -> None:
    assert domainxml.has_9p(domain(devices)) == expected


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        ("<memory>1024</memory>", 2**20),
        ("<memory unit='KiB'>1024</memory>", 2**20),
        ("<memory unit='k'>1024</memory>", 2**20),
        ("<memory unit='MiB'>3</memory>", 3 * 2**20),
        ("<memory unit='G'>2</memory>", 2**31),
        ("<memory unit='TiB'>1</memory>", 2**40),
        ("<memory unit='b'>512</memory>", 512),
        ("<memory unit='bytes'>512</memory>", 512),
        ("<memory/>", 0),
        ("", 0),
    ],
)
def test_memory_is_read_in_all_units(element: str, expected: int) -> None:
    assert domainxml.memory_bytes(domain(more=element)) == expected


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ("<serial type='pty'><log file='/l' append='off'/></serial>", "/l"),
        ("<serial type='file'><source path='/f'/></serial>", "/f"),
        ("<serial type='file'><source path='/f'/><log file='/l'/></serial>", "/l"),
        ("<console type='pty'><log file='/c'/></console>", "/c"),
        ("<console type='file'><source path='/c'/></console><serial type='pty'/>", "/c"),
        (
            "<console type='pty'><log file='/c'/></console>"
            "<serial type='pty'><log file='/s'/></serial>",
            "/s",
        ),
        ("<serial type='pty'/>", None),
        ("<serial type='file'/>", None),
        ("<serial type='unix'><source path='/socket'/></serial>", None),
        ("<serial type='pty'><log/></serial>", None),
        ("", None),
    ],
)
def test_the_file_of_the_console_is_found(devices: str, expected: str | None) -> None:
    assert domainxml.console_log(domain(devices)) == (Path(expected) if expected else None)


@pytest.mark.parametrize(
    ("xml", "expected"),
    [
        (domain("<serial type='pty'/>"), True),
        (domain("<console type='pty'/>"), True),
        (domain("<serial type='file'/><console type='pty'/>"), True),
        (domain("<serial type='file'/>"), False),
        (domain("<channel type='pty'/>"), False),
        (domain(), False),
        ("<domain/>", False),
    ],
)
def test_a_console_that_can_be_opened_is_found(xml: str, expected: bool) -> None:
    assert domainxml.has_pty_console(xml) == expected


# snapshots


@pytest.mark.parametrize("text", ODD_NAMES)
def test_a_request_survives_a_parser_with_any_text(text: str) -> None:
    root = ET.fromstring(domainxml.snapshot_request(text, f"of {text}", ["vda", text]))
    assert root.findtext("name") == text
    assert root.findtext("description") == f"of {text}"
    assert [disk.attrib for disk in root.iterfind("./disks/disk")] == [
        {"name": "vda", "snapshot": "internal"},
        {"name": text, "snapshot": "internal"},
    ]


def test_a_request_without_disks_names_none() -> None:
    assert ET.fromstring(domainxml.snapshot_request("a", "b", [])).find("disks") is None


def snapshot_xml(body: str) -> str:
    return f"<domainsnapshot><name>it</name>{body}</domainsnapshot>"


def test_a_snapshot_is_read() -> None:
    xml = snapshot_xml(
        "<description>a &amp; b ü</description><state>running</state>"
        "<parent><name>older</name></parent><creationTime>1700000000</creationTime>"
        "<memory snapshot='internal'/><disks><disk name='vda' snapshot='internal'/></disks>"
        "<domain><name>other</name><description>of the domain</description></domain>"
    )
    snapshot = domainxml.snapshot(xml)
    assert (snapshot.name, snapshot.description) == ("it", "a & b ü")
    assert (snapshot.state, snapshot.parent, snapshot.internal) == ("running", "older", True)
    assert snapshot.created == dt.datetime(2023, 11, 14, 22, 13, 20, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("told", "state"),
    [("shutoff", "shut off"), ("running", "running"), ("paused", "paused"), ("disk-snapshot",) * 2],
)
def test_the_state_of_a_snapshot_is_in_virshs_words(told: str, state: str) -> None:
    assert domainxml.snapshot(snapshot_xml(f"<state>{told}</state>")).state == state


@pytest.mark.parametrize(
    ("body", "internal"),
    [
        ("<disks><disk name='vda' snapshot='external'><source file='/x'/></disk></disks>", False),
        ("<memory snapshot='external' file='/m'/>", False),
        ("<memory snapshot='no'/><disks><disk name='vda' snapshot='no'/></disks>", True),
        (
            "<disks><disk name='vda' snapshot='internal'/>"
            "<disk name='vdb' snapshot='external'/></disks>",
            False,
        ),
        ("", True),
    ],
)
def test_a_snapshot_with_an_external_part_is_external(body: str, internal: bool) -> None:
    assert domainxml.snapshot(snapshot_xml(body)).internal is internal


def test_a_snapshot_without_details_is_read_too() -> None:
    snapshot = domainxml.snapshot("<domainsnapshot/>")
    assert (snapshot.name, snapshot.state, snapshot.parent, snapshot.description) == (
        "",
        "",
        None,
        "",
    )
