"""What in a definition stands in the way of internal snapshots. Pure: reads XML, asks nobody.

A snapshot is *live*, of a running or paused machine with its memory, or *off*. A machine that is
found off is snapshotted in both ways, unless the option live is "no"; one that is found running,
live only. The rules are those of libvirt's `qemuSnapshotPrepare`, `qemuMigrationSrcIsAllowed` and
of QEMU's migration blockers, in libvirt 9.0 and 11.3, QEMU 7.2 and 10.0.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import NamedTuple

from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.domainxml import DiskSource

# libvirt's versions, as it counts them
OFF_WITH_FLASH = 9_003_000  # takes off snapshots of machines that boot from flash
LIVE_WITH_FLASH = 10_010_000  # 10.9 takes live ones too, and 10.10 the way back
LIVE_WITH_VIRTIOFS = 10_004_000  # the first after virtiofsd 1.11, which can be snapshotted

HAVE_IT_OFF = "or have the machine off, and give --kvmsnap-live=no"


class Blocker(NamedTuple):
    """Why a machine cannot be used for tests, and what helps."""

    why: str
    cure: str


def definition_blockers(
    xml: str | ET.Element,
    *,
    edit: str,
    libvirt_version: int,
    ready: str | None,
    live: bool,
    off: bool,
    default_format: str | None = "raw",
) -> list[Blocker]:
    """Return what stands in the way in a definition.

    Of raw disks nothing is said: whether they can be converted is the conversion's business.

    `edit` tells people how to change the definition. `live` and `off` are the kinds of snapshots
    that will be taken. `default_format` stands for a missing `<driver type=…>`, as it does for
    `domainxml.disks`.
    """
    root = domainxml.parsed(xml)
    disks = domainxml.disks(root, default_format)
    found = []
    if not any(disk.is_snapshotted for disk in disks):
        found.append(
            Blocker(
                "it has no writable disk, and an internal snapshot lives in one",
                f"give it a qcow2 disk, if only a small one: {edit}",
            )
        )
    for disk in disks:
        found += _disk_blockers(disk, edit, live=live, off=off)
    found += _firmware_blockers(root, edit, libvirt_version, live=live, off=off)
    if live:
        for what, cure in _devices(root, libvirt_version):
            found.append(
                Blocker(
                    f"it has {what}, which cannot be snapshotted while it runs",
                    f"{cure}: {edit}; {HAVE_IT_OFF}",
                )
            )
    if off:
        found += _memory_blockers(root, edit)
    if ready == "agent" and not domainxml.has_agent_channel(root):
        found.append(
            Blocker(
                "it has no guest agent channel, and ready=agent waits for the agent",
                f"add a channel with the target {domainxml.AGENT_CHANNEL}: {edit}; or give"
                " --kvmsnap-ready=none",
            )
        )
    if ready == "ssh" and not domainxml.has_network(root):
        found.append(
            Blocker(
                "it has no network card, and ready=ssh waits for ssh",
                f"add an <interface>: {edit}; or give --kvmsnap-ready=none",
            )
        )
    return found


def _disk_blockers(disk: DiskSource, edit: str, *, live: bool, off: bool) -> Iterator[Blocker]:
    target = disk.target
    if not disk.is_snapshotted:
        if _is_written_floppy(disk) and disk.format not in ("qcow2", None):
            yield Blocker(
                f"its floppy disk {target} is writable, and internal snapshots need qcow2",
                f"take it out, or make it <readonly/>: {edit}",
            )
        return
    if not disk.is_raw:
        yield from _format_blockers(disk, edit, off=off)
    if disk.transient and live:
        yield Blocker(
            f"its disk {target} is transient, which libvirt does not snapshot",
            f"remove <transient/>: {edit}; {HAVE_IT_OFF}",
        )


def _format_blockers(disk: DiskSource, edit: str, *, off: bool) -> Iterator[Blocker]:
    target = disk.target
    if disk.encrypted:  # off: qemu-img has no key; live: QEMU aborts (7.2, 10.0)
        yield Blocker(
            f"its disk {target} is encrypted, and internal snapshots do not work with that",
            f"give it an image without <encryption>, and encrypt inside of the guest: {edit}",
        )
    elif disk.format not in ("qcow2", None):
        yield Blocker(
            f"its disk {target} has the format {disk.format}, and internal snapshots need qcow2",
            f"convert it: qemu-img convert -f {disk.format} -O qcow2 {disk.path or 'OLD'} NEW, and"
            f" use that instead: {edit}",
        )
    elif disk.kind == "network" and (off or disk.protocol == "nbd"):  # which cannot grow
        yield Blocker(
            f"its disk {target} is on the network ({disk.protocol}), where internal snapshots do"
            " not work",
            f"copy it into a qcow2 file of the machine's host, and use that instead: {edit}",
        )


def _is_written_floppy(disk: DiskSource) -> bool:
    """Tell whether libvirt snapshots this too: it leaves out drives that are empty or read-only."""
    return disk.device == "floppy" and not disk.readonly and disk.path is not None


def _firmware_blockers(
    root: ET.Element, edit: str, version: int, *, live: bool, off: bool
) -> Iterator[Blocker]:
    """Yield what keeps a machine from being snapshotted that boots from flash, which UEFI does.

    Flash that libvirt chooses by itself (`<os firmware='efi'>`) is in the definition from 9.2 on;
    before, libvirt does not see it there either, and snapshots the machine while it is off.
    """
    loader, nvram = root.find("./os/loader"), root.find("./os/nvram")
    in_flash = loader is not None and loader.get("type") == "pflash"
    by_itself = root.find("./os[@firmware='efi']") is not None
    if version >= LIVE_WITH_FLASH:
        if live and nvram is not None and nvram.get("format", "raw") != "qcow2":
            yield Blocker(
                "its UEFI keeps its settings (NVRAM) in a raw image, and internal snapshots need"
                " qcow2",
                f"convert that image by qemu-img convert -f raw -O qcow2 {nvram.text or 'OLD'} NEW,"
                f" and name the new one with <nvram format='qcow2'>: {edit}; {HAVE_IT_OFF}",
            )
    elif (live and (in_flash or by_itself)) or (off and in_flash and version < OFF_WITH_FLASH):
        lifted = f"; {HAVE_IT_OFF}" if by_itself or version >= OFF_WITH_FLASH else ""
        yield Blocker(
            f"it boots by UEFI from flash, which libvirt {version_text(version)} does not snapshot",
            "libvirt 10.10 or newer does, where the NVRAM is a qcow2 image; with this one, let it"
            f" boot by BIOS: {edit}{lifted}",
        )


_DEVICES = (
    ("./devices/sound[@model='usb']", "a USB sound card", "choose another model"),
    ("./devices/serial/target[@type='usb-serial']", "a USB serial port", "choose another type"),
    ("./devices/interface/model[@type='usb-net']", "a USB network card", "choose another model"),
    ("./devices/channel[@type='qemu-vdagent']", "a qemu-vdagent channel", "remove the channel"),
)


def _devices(root: ET.Element, version: int) -> Iterator[tuple[str, str]]:
    """Yield what QEMU cannot save the state of, and how to be without it."""
    yield from _devices_of_the_host(root, version)
    for path, what, cure in _DEVICES:
        if root.find(path) is not None:
            yield what, cure
    for element in root.iterfind("./devices/shmem"):
        if element.get("role") != "master":
            yield "shared memory whose master it is not", "remove the <shmem>, or role='master'"
    feature = root.find("./cpu/feature[@name='invtsc']")
    is_asked_for = feature is not None and feature.get("policy", "require") in ("require", "force")
    if is_asked_for and root.find("./clock/timer[@name='tsc'][@frequency]") is None:
        cure = "remove the feature, or fix the frequency by <timer name='tsc' frequency=…/>"
        yield "the processor's feature invtsc without a fixed frequency", cure


def _devices_of_the_host(root: ET.Element, version: int) -> Iterator[tuple[str, str]]:
    if version < LIVE_WITH_VIRTIOFS and (
        root.find("./devices/filesystem/driver[@type='virtiofs']") is not None
    ):
        cure = (
            "libvirt 10.4 or newer takes it, with QEMU 8.2 and virtiofsd 1.11 or newer; with this"
            " one, remove the <filesystem>"
        )
        yield "a folder that is shared by virtiofs", cure
    for element in root.iterfind("./devices/hostdev"):
        kind = element.get("type")
        if kind != "usb" and not _is_unplugged_for_it(element):  # QEMU opens USB devices again
            yield f"a device of the host ({kind})", "remove the <hostdev>"
    for element in root.iterfind("./devices/interface[@type='hostdev']"):
        if not _is_unplugged_for_it(element):
            yield "a network card of the host", "replace it by a virtio card"


def _is_unplugged_for_it(element: ET.Element) -> bool:
    return element.find("./teaming[@type='transient']") is not None


def _memory_blockers(root: ET.Element, edit: str) -> Iterator[Blocker]:
    for element in root.iterfind("./devices/memory"):
        is_kept = element.get("model") in ("nvdimm", "virtio-pmem")
        if is_kept and element.find("./target/readonly") is None:
            yield Blocker(
                "it has persistent memory, which a snapshot of a machine that is off leaves out",
                f"remove the <memory>: {edit}; or start the machine before the run, since a"
                " snapshot of a running one holds it (without --kvmsnap-live=no)",
            )


def version_text(version: int) -> str:
    """Return a version of libvirt as people write it."""
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"
