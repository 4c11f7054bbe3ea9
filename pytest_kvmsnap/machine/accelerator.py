"""Whether KVM runs guests: libvirt's word, and a proof where this user can have one.

A `/dev/kvm` that opens is not yet KVM that works. Some sandboxes have one that emulates: it boots a
machine, at a hundredth of the speed of QEMU's own emulation, so that no guest ever gets ready.
libvirt, which looks at what QEMU tells of itself, calls that KVM too.
"""

import functools
import json
import os
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Literal

from pytest_kvmsnap.machine.libvirt_api import Hypervisor

KVM = Path("/dev/kvm")
DEADLINE = 5.0
"""Seconds for the boot sector. KVM takes 0.2, QEMU's emulation 0.4, such a sandbox more than 60."""

_DISK_SIZE = 2**20  # SeaBIOS boots from no disk that is smaller than a cylinder
_LEFT = 0x2A  # what the boot sector writes to the exit port
_EXIT_STATUS = _LEFT << 1 | 1  # what isa-debug-exit makes of it: never 1, which is QEMU's failure
# Goes to 64-bit mode, where guests live, and does some counting there: it is the speed that tells.
_CODE = bytes.fromhex(
    "fa 31c0 8ed8 8ec0"  # cli; segments are 0
    "bf0010 b90018 fc f3ab"  # clear 0x1000 to 0x4000 for the page tables,
    "c70600100320 c70600200330 c70600308300"  # which map the first 2 MiB to themselves
    "66b820000000 0f22e0 66b800100000 0f22d8"  # cr4 = PAE; cr3 = 0x1000
    "66b9800000c0 0f32 80cc01 0f30"  # EFER |= LME
    "0f01167a7c 0f20c0 660d01000080 0f22c0"  # lgdt; cr0 |= PE | PG
    "ea577c0800"  # jump into the segment of 64-bit code
    "b980f0fa02 ffc9 75fc"  # count 50,000,000 down to 0
    "66baf400 b02a ee"  # write 0x2a to port 0xf4: QEMU exits
    "f4 ebfd"  # halt
    "0000000000000000 00000000009a2000"  # the segments: none, 64-bit code
    "0f006a7c0000"  # where they are: lgdt's operand
)
BOOT_SECTOR = _CODE.ljust(510, b"\0") + b"\x55\xaa"


@functools.cache
def domain_type(hypervisor: Hypervisor) -> Literal["kvm", "qemu"]:
    """Return libvirt's domain type for a new x86-64 machine: "kvm" where that works.

    libvirt's domain capabilities tell whether it may (https://libvirt.org/formatdomaincaps.html).
    On this host, and if this user may open /dev/kvm, that must be proven: a boot sector of ours
    has `DEADLINE` seconds. Asked once per hypervisor; without KVM it takes milliseconds.
    """
    emulator = _emulator(hypervisor)
    if emulator is None:
        return "qemu"
    if not hypervisor.is_local or not _opens(KVM):
        return "kvm"  # libvirt may use it although we may not, and we can only believe it
    booted = boots(emulator, "kvm")
    if booted or booted is None:
        return "kvm" if booted else "qemu"
    # Without KVM it must come: else this user cannot run the emulator, and that proved nothing.
    return "kvm" if boots(emulator, "tcg") is False else "qemu"


def _emulator(hypervisor: Hypervisor) -> str | None:
    """Return the path of the emulator that libvirt would use with KVM, None without KVM."""
    told = None
    with hypervisor.tolerating("cannot ask for the capabilities of the host"):
        told = hypervisor.connection.getDomainCapabilities(None, "x86_64", None, "kvm")
    if told is None:
        return None
    return ET.fromstring(told).findtext("path")


def _opens(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def boots(emulator: str, accelerator: str) -> bool | None:
    """Tell whether the boot sector runs to its end with this accelerator, `kvm` or `tcg`.

    None stands for one that was still running when its time was over.
    """
    with tempfile.NamedTemporaryFile(prefix="kvmsnap-boot-") as disk:
        disk.write(BOOT_SECTOR)
        disk.truncate(_DISK_SIZE)
        disk.flush()
        file = {"driver": "file", "filename": disk.name}
        drive = {"driver": "raw", "node-name": "disk", "read-only": True, "file": file}
        command = [emulator, "-accel", accelerator, "-machine", "q35"]
        command += ["-blockdev", json.dumps(drive), "-device", "virtio-blk,drive=disk"]
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
        command += ["-nodefaults", "-no-user-config", "-display", "none"]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=DEADLINE,
                check=False,
            )
        except subprocess.TimeoutExpired:  # which has killed it
            return None
        except OSError:
            return False
    return done.returncode == _EXIT_STATUS
