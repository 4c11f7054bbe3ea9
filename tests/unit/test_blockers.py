"""What in a definition stands in the way of snapshots, as a pure reading of its XML."""

import pytest

from pytest_kvmsnap.machine.blockers import Blocker, definition_blockers, version_text

V9_0, V9_3, V10_4, V10_9, V10_10 = 9_000_000, 9_003_000, 10_004_000, 10_009_000, 10_010_000
QCOW2 = "<driver name='qemu' type='qcow2'/>"
RAW = "<driver name='qemu' type='raw'/>"


def a_disk(inner: str, *, target: str = "vdb", kind: str = "file", device: str = "disk") -> str:
    return f"<disk type='{kind}' device='{device}'>{inner}<target dev='{target}'/></disk>"


GOOD = a_disk(QCOW2 + "<source file='/images/box.qcow2'/>", target="vda")


def blockers(
    *devices: str,
    system: str = "",
    more: str = "",
    version: int = V9_0,
    live: bool = True,
    off: bool = True,
    ready: str | None = None,
) -> list[Blocker]:
    """Return the blockers of a machine with one good disk and whatever is given."""
    system = system or "<os><type>hvm</type></os>"
    xml = f"<domain>{system}{more}<devices>{GOOD}{''.join(devices)}</devices></domain>"
    return definition_blockers(
        xml, edit="EDIT", libvirt_version=version, ready=ready, live=live, off=off
    )


def test_a_plain_machine_has_none() -> None:
    assert blockers(ready="none") == []


def test_every_cure_says_how_to_change_the_definition() -> None:
    found = blockers(*(xml for xml, *_ in DISKS.values()), *LIVE_ONLY.values(), more=INVTSC)
    assert len(found) == len(DISKS) + len(LIVE_ONLY) + 1
    assert [each for each in found if "EDIT" not in each.cure] == []


# disks

FILE = "<source file='/images/data'/>"
DISKS = {
    "vmdk": (
        a_disk("<driver type='vmdk'/>" + FILE),
        "its disk vdb has the format vmdk, and internal snapshots need qcow2",
        "qemu-img convert -f vmdk -O qcow2 /images/data NEW",
    ),
    "encrypted": (
        a_disk(QCOW2 + FILE + "<encryption format='luks'/>"),
        "its disk vdb is encrypted, and internal snapshots do not work with that",
        "without <encryption>",
    ),
    "encrypted, the modern way": (
        a_disk(QCOW2 + "<source file='/x'><encryption format='luks'/></source>"),
        "its disk vdb is encrypted, and internal snapshots do not work with that",
        "without <encryption>",
    ),
    "floppy": (
        a_disk(RAW + FILE, target="fda", device="floppy"),
        "its floppy disk fda is writable, and internal snapshots need qcow2",
        "<readonly/>",
    ),
    "floppy without a format": (
        a_disk(FILE, target="fda", device="floppy"),
        "its floppy disk fda is writable, and internal snapshots need qcow2",
        "<readonly/>",
    ),
}


@pytest.mark.parametrize("kind", DISKS)
@pytest.mark.parametrize(("live", "off"), [(True, True), (True, False), (False, True)])
def test_a_disk_that_cannot_be_snapshotted_in_any_way(kind: str, live: bool, off: bool) -> None:
    xml, why, cure = DISKS[kind]
    (blocker,) = blockers(xml, live=live, off=off)
    assert blocker.why == why
    assert cure in blocker.cure


GOOD_DISKS = {
    "raw": a_disk(RAW + FILE),
    "raw by default": a_disk(FILE),
    "raw, and the conversion refuses it": a_disk(RAW + "<source pool='p' volume='v'/><shareable/>"),
    "raw, and the conversion leaves it as it is": a_disk(RAW + FILE + "<encryption/>"),
    "qcow2 volume": a_disk(QCOW2 + "<source pool='default' volume='data'/>", kind="volume"),
    "qcow2 on a block device": a_disk(QCOW2 + "<source dev='/dev/sdx'/>", kind="block"),
    "read-only": a_disk("<driver type='vmdk'/><readonly/>" + FILE),
    "read-only and encrypted": a_disk(QCOW2 + "<readonly/><encryption format='luks'/>" + FILE),
    "cdrom": a_disk(RAW + FILE, device="cdrom"),
    "network cdrom": a_disk(RAW + "<source protocol='http'/>", device="cdrom", kind="network"),
    "empty floppy": a_disk(RAW, target="fda", device="floppy"),
    "read-only floppy": a_disk(RAW + "<readonly/>" + FILE, target="fda", device="floppy"),
    "qcow2 floppy": a_disk(QCOW2 + FILE, target="fda", device="floppy"),
    "not to be snapshotted, says its owner": GOOD.replace("<disk", "<disk snapshot='no'"),
}


@pytest.mark.parametrize("kind", GOOD_DISKS)
def test_a_disk_that_is_no_blocker(kind: str) -> None:
    assert blockers(GOOD_DISKS[kind]) == []


@pytest.mark.parametrize(
    ("protocol", "live", "off", "refused"),
    [
        ("nbd", True, True, True),
        ("nbd", True, False, True),
        ("gluster", True, True, True),
        ("gluster", False, True, True),
        ("gluster", True, False, False),
    ],
)
def test_a_qcow2_disk_on_the_network(protocol: str, live: bool, off: bool, refused: bool) -> None:
    xml = a_disk(QCOW2 + f"<source protocol='{protocol}' name='x'/>", kind="network")
    whys = [blocker.why for blocker in blockers(xml, live=live, off=off)]
    told = f"its disk vdb is on the network ({protocol}), where internal snapshots do not work"
    assert whys == ([told] if refused else [])


@pytest.mark.parametrize("driver", [QCOW2, RAW])
@pytest.mark.parametrize("live", [True, False])
def test_a_transient_disk_is_in_the_way_of_snapshots_with_the_memory(
    driver: str, live: bool
) -> None:
    found = blockers(a_disk(driver + FILE + "<transient/>"), live=live)
    assert [each.why for each in found] == (
        ["its disk vdb is transient, which libvirt does not snapshot"] if live else []
    )


def test_where_no_format_has_a_meaning_none_is_missed() -> None:
    """As with the test driver, which knows no default."""
    xml = f"<domain><devices>{a_disk(FILE)}</devices></domain>"
    options = {"edit": "", "libvirt_version": V9_0, "ready": None, "live": True, "off": True}
    assert definition_blockers(xml, default_format=None, **options) == []  # type: ignore[arg-type]


# firmware

FLASH = "<loader readonly='yes' type='pflash'>/code.fd</loader>"
NVRAM = "<nvram>/vars.fd</nvram>"
FIRMWARE = {
    "chosen by libvirt": "<os firmware='efi'><type>hvm</type></os>",
    "stateless": f"<os><type>hvm</type>{FLASH}</os>",
    "raw": f"<os><type>hvm</type>{FLASH}{NVRAM}</os>",
    "qcow2": f"<os><type>hvm</type>{FLASH}<nvram format='qcow2'>/vars.qcow2</nvram></os>",
}
OLD, RAW_NVRAM = "it boots by UEFI from flash, which libvirt", "its UEFI keeps its settings (NVRAM)"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        # by the firmware: what is said of snapshots with the memory, and of those while it is off
        (V9_0, {"chosen by libvirt": (OLD, ""), "raw": (OLD, OLD), "qcow2": (OLD, OLD)}),
        (V9_3, {"chosen by libvirt": (OLD, ""), "raw": (OLD, ""), "qcow2": (OLD, "")}),
        (V10_9, {"stateless": (OLD, ""), "raw": (OLD, ""), "qcow2": (OLD, "")}),
        (V10_10, {"chosen by libvirt": ("", ""), "raw": (RAW_NVRAM, ""), "qcow2": ("", "")}),
        (V10_10, {"stateless": ("", "")}),
    ],
)
def test_uefi(version: int, expected: dict[str, tuple[str, str]]) -> None:
    for firmware, (live, off) in expected.items():
        for kind, told in (("live", live), ("off", off)):
            found = blockers(
                system=FIRMWARE[firmware], version=version, live=kind == "live", off=kind == "off"
            )
            assert [each.why.startswith(told) for each in found] == ([True] if told else [])


def test_uefi_names_the_libvirt_that_lifts_it() -> None:
    (blocker,) = blockers(system=FIRMWARE["raw"], version=V9_0)
    assert blocker.why == "it boots by UEFI from flash, which libvirt 9.0.0 does not snapshot"
    assert blocker.cure.startswith("libvirt 10.10 or newer does, where the NVRAM is a qcow2 image")
    assert "--kvmsnap-live=no" not in blocker.cure, "it would be refused as well"
    (blocker,) = blockers(system=FIRMWARE["raw"], version=V9_3)
    assert "--kvmsnap-live=no" in blocker.cure


def test_bios_from_a_rom_is_fine() -> None:
    rom = "<os><type>hvm</type><loader type='rom'>/bios.bin</loader></os>"
    assert blockers(system=rom) == []


# devices

LIVE_ONLY = {
    "a folder that is shared by virtiofs": (
        "<filesystem type='mount'><driver type='virtiofs'/><source dir='/x'/></filesystem>"
    ),
    "a device of the host (pci)": "<hostdev mode='subsystem' type='pci'/>",
    "a device of the host (mdev)": "<hostdev mode='subsystem' type='mdev'/>",
    "a device of the host (scsi)": "<hostdev mode='subsystem' type='scsi'/>",
    "a network card of the host": "<interface type='hostdev'/>",
    "shared memory whose master it is not": "<shmem name='x'><model type='ivshmem-plain'/></shmem>",
    "a USB sound card": "<sound model='usb'/>",
    "a USB serial port": "<serial type='pty'><target type='usb-serial'/></serial>",
    "a USB network card": "<interface type='user'><model type='usb-net'/></interface>",
    "a qemu-vdagent channel": "<channel type='qemu-vdagent'/>",
}
INVTSC = "<cpu><feature policy='require' name='invtsc'/></cpu>"


@pytest.mark.parametrize("what", LIVE_ONLY)
@pytest.mark.parametrize("live", [True, False])
def test_a_device_that_cannot_be_snapshotted_while_it_runs(what: str, live: bool) -> None:
    found = blockers(LIVE_ONLY[what], live=live)
    assert [each.why for each in found] == (
        [f"it has {what}, which cannot be snapshotted while it runs"] if live else []
    )
    assert [each for each in found if "--kvmsnap-live=no" not in each.cure] == []


@pytest.mark.parametrize(
    "fine",
    [
        "<hostdev mode='subsystem' type='usb'/>",
        "<hostdev mode='subsystem' type='pci'><teaming type='transient' persistent='x'/></hostdev>",
        "<interface type='hostdev'><teaming type='transient' persistent='x'/></interface>",
        "<shmem name='x' role='master'><model type='ivshmem-plain'/></shmem>",
        "<filesystem type='mount'><source dir='/x'/></filesystem>",
        "<sound model='ich9'/>",
        "<serial type='pty'><target type='isa-serial'/></serial>",
        "<channel type='spicevmc'/>",
        "<interface type='vhostuser'/>",
        "<tpm model='tpm-tis'><backend type='emulator'/></tpm>",
        "<memory model='dimm'/>",
        "<memory model='nvdimm'><target><readonly/></target></memory>",
    ],
)
def test_a_device_that_is_no_blocker(fine: str) -> None:
    assert blockers(fine) == []


@pytest.mark.parametrize(("version", "count"), [(V10_4 - 1, 1), (V10_4, 0)])
def test_a_newer_libvirt_may_take_virtiofs(version: int, count: int) -> None:
    virtiofs = LIVE_ONLY["a folder that is shared by virtiofs"]
    assert len(blockers(virtiofs, version=version)) == count


@pytest.mark.parametrize(
    ("policy", "timer", "refused"),
    [
        ("policy='require'", "", True),
        ("policy='force'", "<timer name='tsc' mode='native'/>", True),
        ("", "<timer name='rtc' frequency='1'/>", True),
        ("policy='require'", "<timer name='tsc' frequency='2000000000'/>", False),
        ("policy='disable'", "", False),
        ("policy='forbid'", "", False),
        ("policy='optional'", "", False),
    ],
)
def test_invtsc(policy: str, timer: str, refused: bool) -> None:
    cpu = f"<cpu><feature {policy} name='invtsc'/></cpu><clock>{timer}</clock>"
    found = blockers(more=cpu)
    assert ["invtsc without a fixed frequency" in each.why for each in found] == [True] * refused
    assert blockers(more=cpu, live=False) == []


@pytest.mark.parametrize("model", ["nvdimm", "virtio-pmem"])
@pytest.mark.parametrize("off", [True, False])
def test_persistent_memory_is_left_out_of_snapshots_while_it_is_off(model: str, off: bool) -> None:
    found = blockers(f"<memory model='{model}'><target/></memory>", off=off)
    assert [each.why for each in found] == (
        ["it has persistent memory, which a snapshot of a machine that is off leaves out"]
        if off
        else []
    )


# the agent


@pytest.mark.parametrize(
    ("ready", "channel", "refused"),
    [
        ("agent", "", True),
        ("agent", "<channel><target name='org.qemu.guest_agent.0'/></channel>", False),
        ("none", "", False),
        (None, "", False),
    ],
)
def test_the_agent_needs_its_channel(ready: str | None, channel: str, refused: bool) -> None:
    whys = [blocker.why for blocker in blockers(channel, ready=ready)]
    told = "it has no guest agent channel, and ready=agent waits for the agent"
    assert whys == ([told] if refused else [])


def test_versions_are_written_as_people_do() -> None:
    assert [version_text(v) for v in (V9_0, V10_10, 11_003_001)] == ["9.0.0", "10.10.0", "11.3.1"]
