"""The images of the example's guest: a file system, and a disk with GRUB that boots by itself."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from guest_packages import GuestError, run, run_unpacked

FILE_SYSTEM_SIZE_MIB = 256
FILE_SYSTEM_ID = "5ec0ffee-0000-4000-8000-000000000abc"
EPOCH = 1_700_000_000
"""Time stamp of every file in the guest, so that two builds of the same packages are alike."""

SECTOR = 512
PARTITION_START = 1 << 20
"""In bytes. GRUB lies in the gap before it, as `grub-install` would put it there."""
# 16 bytes: bootable, of type 83 (Linux), with the highest CHS addresses, which nobody reads.
PARTITION = struct.Struct("<B3sB3sII")
CHS = b"\xfe\xff\xff"
DISK_ID = 0x5EC0FFEE
GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "linux16", "boot")
# `linux16` enters the kernel as BIOSes' boot loaders did; `linux` would clear all that the kernel
# unpacks itself into, which takes two seconds in software emulation.
GRUB_CONFIG = """\
linux16 /boot/vmlinuz console=ttyS0 root=/dev/vda1 {options}
initrd16 /boot/initrd
boot
"""


def write_file_system(tree: Path, work: Path, image: Path) -> None:
    """Write the files below `tree` into a new raw ext4 image, all of them root's."""
    for path in tree.rglob("*"):
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
    with image.open("wb") as file:
        file.truncate(FILE_SYSTEM_SIZE_MIB << 20)
    # Initialised at once, with few inodes: else the guest's kernel writes to its disk for a while.
    options = f"root_owner=0:0,lazy_itable_init=0,hash_seed={FILE_SYSTEM_ID}"
    command = [
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-N",
        "4096",
        "-J",
        "size=4",
        "-U",
        FILE_SYSTEM_ID,
    ]
    run(*command, "-E", options, "-d", str(tree), str(image), E2FSPROGS_FAKE_TIME=str(EPOCH))
    _give_to_root(tree, work, image)


def _give_to_root(tree: Path, work: Path, image: Path) -> None:
    """Make root the owner of every file in the image, whoever built it."""
    script = work / "owners"
    paths = [f"/{path.relative_to(tree)}" for path in sorted(tree.rglob("*"))]
    fields = [f"set_inode_field {path} {field} 0\n" for path in paths for field in ("uid", "gid")]
    script.write_text("".join(fields), encoding="utf-8")
    run("debugfs", "-w", "-f", str(script), str(image), E2FSPROGS_FAKE_TIME=str(EPOCH))


def write_boot_disk(
    unpacked: Path, work: Path, file_system: Path, kernel_options: str, disk: Path
) -> None:
    """Write a raw disk whose one partition is a copy of `file_system`, and which boots from it.

    GRUB for BIOSes lies before the partition and starts /boot/vmlinuz with /boot/initrd at once.
    """
    size = file_system.stat().st_size
    folder = unpacked / "usr/lib/grub/i386-pc"
    boot, core = (folder / "boot.img").read_bytes(), _grub(unpacked, work, kernel_options)
    if SECTOR + len(core) > PARTITION_START:
        raise GuestError(f"GRUB is too large for the gap before a partition: {len(core)} bytes")
    # boot.img loads what begins in the second sector, and that the sectors after it.
    partition = PARTITION.pack(0x80, CHS, 0x83, CHS, PARTITION_START // SECTOR, size // SECTOR)
    table = struct.pack("<IH", DISK_ID, 0) + partition + bytes(3 * PARTITION.size) + b"\x55\xaa"
    with disk.open("wb") as file:
        file.write(boot[: SECTOR - len(table)] + table + core)
        file.truncate(PARTITION_START + size)
        copy_sparse(file_system, file, PARTITION_START)


def _grub(unpacked: Path, work: Path, kernel_options: str) -> bytes:
    config, core = work / "grub.cfg", work / "core.img"
    config.write_text(GRUB_CONFIG.format(options=kernel_options), encoding="ascii")
    # The empty disk in the prefix stands for the one that the BIOS booted from.
    arguments = ["--format=i386-pc", f"--directory={unpacked / 'usr/lib/grub/i386-pc'}"]
    arguments += ["--prefix=(,msdos1)/boot", f"--config={config}", f"--output={core}"]
    run_unpacked(unpacked, unpacked / "usr/bin/grub-mkimage", *arguments, *GRUB_MODULES)
    return core.read_bytes()


def copy_sparse(source: Path, target: BinaryIO, start: int = 0) -> None:
    """Copy the parts of `source` that hold data into `target`, from its byte `start` on."""
    with source.open("rb") as file:
        for offset, length in _filled_parts(file.fileno()):
            file.seek(offset)
            target.seek(start + offset)
            target.write(file.read(length))


def _filled_parts(file: int) -> Iterator[tuple[int, int]]:
    """Yield start and length of the parts of a sparse file that hold data."""
    size, end = os.fstat(file).st_size, 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole up to the end
            return
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end - start
