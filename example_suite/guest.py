"""The example's guest: a tiny Linux with busybox and the QEMU guest agent.

It is built from the packages of the distribution underneath, Debian or Ubuntu, without root, and
kept in the user's cache. Tests, the example suite and the benchmarks share it. A machine starts it
by kernel, initrd and `root`, or from `disk` alone.

    python example_suite/guest.py       # builds it if needed, prints where it is
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import lzma
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import uuid as uuids
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from guest_images import EPOCH, copy_sparse, write_boot_disk, write_file_system
from guest_packages import GuestError, libraries, lists_stamp, run, unpack, versions

__all__ = ["Guest", "GuestError", "Network", "build", "copy_root", "domain_xml", "kvm_works"]

KERNEL_MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "ext4",
    "rtc_cmos",
    "button",
    "evdev",
)
NETWORK_MODULES = ("virtio_net",)
"""Loaded from the root file system, and only by machines that have a `Network`."""
# The last two, no random addresses and no self-tests of the cryptography, save a fifth of the boot.
KERNEL_OPTIONS = "no_timer_check tsc=reliable mitigations=off nokaslr cryptomgr.notests"
INITRAMFS_INIT = """\
#!/bin/sh
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod "/modules/$module"; done
mount_root() { mount -t ext4 /dev/vda1 /root || mount -t ext4 /dev/vda /root; }
tries=0
until mount_root 2>/dev/null; do
    [ $tries -lt 500 ] || exec sh
    tries=$((tries + 1))
    usleep 10000
done
mount -o move /dev /root/dev
exec switch_root /root /sbin/init
"""

PROBE_ANSWER = "user space runs here"
INITRAMFS_PROBE = f"""\
#!/bin/sh
echo {PROBE_ANSWER}
exec reboot -f
"""

GUEST_FILES = {
    "opt/abc": "123\n",
    "etc/hostname": "example\n",
    "etc/hosts": "127.0.0.1 localhost example\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/os-release": 'ID=kvmsnap-example\nNAME="kvmsnap example"\nVERSION_ID=1\n',
    "etc/profile": "export PS1='example:\\w# ' HOME=/root\ncd\n",
    "etc/inittab": """\
::sysinit:/etc/start
::once:/usr/bin/heartbeat
::once:/usr/sbin/acpid -f -l /dev/null
::respawn:/usr/sbin/start-agent
ttyS0::respawn:-/bin/sh
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/sync
""",
}

GUEST_SCRIPTS = {
    "etc/start": """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/shm /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t tmpfs shm /dev/shm
chmod 1777 /tmp /dev/shm
mount -o remount,rw /
hostname example
ip link set lo up
read -r line < /proc/cmdline
case $line in *kvmsnap.ip=*) start-network "$line" & ;; esac
""",
    # The ping has the host learn our address, as it does where somebody asks for one by DHCP.
    "usr/sbin/start-network": """\
#!/bin/sh
for word in $1; do
    case $word in
        kvmsnap.ip=*) address=${word#*=} ;;
        kvmsnap.key=*) key=${word#*=} ;;
    esac
done
for module in $(cat /usr/lib/network/order); do insmod "/usr/lib/network/$module"; done
ip address add "$address" dev eth0
ip link set eth0 up
mkdir -p -m 700 /root/.ssh /etc/dropbear
echo "ssh-ed25519 $key" > /root/.ssh/authorized_keys
ping -c 1 "${address%.*}.1" >/dev/null 2>&1 &
host_key=/etc/dropbear/host_key
[ -e "$host_key" ] || dropbearkey -t ed25519 -f "$host_key" >/dev/null 2>&1
exec dropbear -s -r "$host_key" -P /run/dropbear.pid
""",
    "usr/bin/heartbeat": """\
#!/bin/sh
while :; do sleep 1; done
""",
    # There is no udev to make /dev/virtio-ports, and a channel may be plugged in later.
    "usr/sbin/start-agent": """\
#!/bin/sh
wait=0.05
while :; do
    for port in /sys/class/virtio-ports/*; do
        [ -e "$port/name" ] && read -r name < "$port/name" || continue
        [ "$name" = org.qemu.guest_agent.0 ] || continue
        exec qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /run -f /run/qemu-ga.pid
    done
    sleep "$wait"
    read -r up _ < /proc/uptime
    [ "${up%.*}" -lt 20 ] || wait=1
done
""",
    # The agent calls `shutdown -h -P +0`, `-h -H +0` or `-h -r +0`. Busybox init, which is asked by
    # `poweroff` without -f, would take two seconds.
    "usr/sbin/shutdown": """\
#!/bin/sh
how=poweroff
for word; do
    case $word in
        -r) how=reboot ;;
        -H) how=halt ;;
        -P) how=poweroff ;;
    esac
done
sync
exec "$how" -f
""",
    "etc/acpi/PWRF/00000080": "#!/bin/sh\nexec /usr/sbin/shutdown -P\n",
}

GUEST_FOLDERS = (
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "root",
    "mnt",
    "var/tmp",
    "var/log",
    "usr/local/bin",
)


@dataclass(frozen=True)
class Guest:
    """Where the parts of a built guest are."""

    kernel: Path
    initrd: Path
    root: Path
    """The pristine raw ext4 image. Never boot it: use `copy_root`."""
    disk: Path
    """A pristine raw disk that boots by itself, by BIOS, and has the same in its one partition."""


@dataclass(frozen=True)
class Network:
    """A network card on a tap device of the host, and whom the guest lets in by ssh, as root."""

    tap: str
    address: str
    """Such as 10.9.8.2/24; the host has the one that ends in 1."""
    key: str
    """The long part of a public key of the kind ssh-ed25519."""


def build(say: Callable[[str], None] = lambda text: None) -> Guest:
    """Return the guest, building it first if the cache has none for these packages.

    `say` is told what is going on, only while building. Raises `GuestError` where it cannot be
    built. From the cache it takes milliseconds.
    """
    cache = _cache()
    stamp = cache / f"asked-{_digest(_source(), lists_stamp())}"
    if (found := _remembered(stamp)) is not None:
        return found
    try:
        packages = versions()
    except GuestError as error:
        newest = _newest(cache)
        if newest is None:
            raise
        say(f"{error}; using the guest built earlier, {newest.root.parent}")
        return newest
    folder = cache / f"guest-{_digest(_source(), *(f'{p}={v}' for p, v in packages.items()))}"
    with FileLock(cache / "build.lock"):
        if not folder.exists():
            _build_into(folder, list(packages), say)
        _write_atomically(stamp, folder.name)
    return _guest(folder)


def copy_root(guest: Guest, target: Path) -> Path:
    """Write a sparse raw copy of the guest's root image to `target`, and return `target`."""
    return _copy(guest.root, target)


def copy_disk(guest: Guest, target: Path) -> Path:
    """Write a sparse raw copy of the disk that boots by itself, and return `target`."""
    return _copy(guest.disk, target)


def _copy(image: Path, target: Path) -> Path:
    with target.open("wb") as copy:
        copy.truncate(image.stat().st_size)
        copy_sparse(image, copy)
    return target


def domain_xml(
    guest: Guest,
    name: str,
    disk: Path,
    *,
    disk_format: str = "raw",
    memory_mib: int = 128,
    console_log: Path | None = None,
    agent: bool = True,
    network: Network | None = None,
    kind: str | None = None,
    uuid: str | None = None,
) -> str:
    """Describe a machine for libvirt that boots `guest` from `disk`, a copy of its root.

    `kind` is libvirt's domain type, by default `kvm` where that works and else `qemu`. With
    `console_log`, all that the serial console prints is appended there. For a quick boot there is
    no network unless one is given, and no USB.
    """
    domain = ET.Element("domain", type=kind or ("kvm" if kvm_works() else "qemu"))
    _add(domain, "name", name)
    _add(domain, "uuid", uuid or str(uuids.uuid4()))
    _add(domain, "memory", str(memory_mib), unit="MiB")
    _add(domain, "vcpu", "1")
    system = _add(domain, "os")
    _add(system, "type", "hvm", arch="x86_64", machine="pc")
    _add(system, "kernel", str(guest.kernel))
    _add(system, "initrd", str(guest.initrd))
    words = f"console=ttyS0 root=/dev/vda {KERNEL_OPTIONS}"
    if network is not None:
        words += f" kvmsnap.ip={network.address} kvmsnap.key={network.key}"
    _add(system, "cmdline", words)
    _add(_add(domain, "features"), "acpi")
    _add(domain, "clock", offset="utc")
    for event, action in (("poweroff", "destroy"), ("reboot", "restart"), ("crash", "destroy")):
        _add(domain, f"on_{event}", action)
    devices = _add(domain, "devices")
    _add_devices(devices, disk, disk_format, console_log, agent)
    if network is not None:
        card = _add(devices, "interface", type="ethernet")
        _add(card, "target", dev=network.tap, managed="no")
        _add(card, "model", type="virtio")
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode") + "\n"


def _add_devices(
    devices: ET.Element, disk: Path, disk_format: str, console_log: Path | None, agent: bool
) -> None:
    drive = _add(devices, "disk", type="file", device="disk")
    _add(drive, "driver", name="qemu", type=disk_format)
    _add(drive, "source", file=str(disk))
    _add(drive, "target", dev="vda", bus="virtio")
    _add(devices, "controller", type="usb", model="none")
    serial = _add(devices, "serial", type="pty")
    if console_log is not None:
        _add(serial, "log", file=str(console_log), append="on")
    _add(serial, "target", port="0")
    if agent:
        channel = _add(devices, "channel", type="unix")
        _add(channel, "source", mode="bind")
        _add(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    # A screen without a display: enough for screenshots, and no port is opened.
    _add(_add(devices, "video"), "model", type="vga")
    _add(devices, "memballoon", model="none")


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    child = ET.SubElement(parent, tag, attributes)
    child.text = text
    return child


@functools.cache
def kvm_works() -> bool:
    """Tell whether KVM runs guests here, by running the example's kernel for a moment.

    Less is no proof: there are sandboxes where `/dev/kvm` runs a boot sector, but no Linux.
    Takes three seconds at most, once per process; builds the guest if the cache has none.
    """
    qemu = shutil.which("qemu-system-x86_64")
    if (
        qemu is None
        or platform.machine() != "x86_64"
        or not os.access("/dev/kvm", os.R_OK | os.W_OK)
    ):
        return False
    return _reaches_user_space(qemu, build(), "kvm")


def _reaches_user_space(qemu: str, guest: Guest, accelerator: str) -> bool:
    command = [
        qemu,
        "-accel",
        accelerator,
        "-machine",
        "pc",
        "-m",
        "128",
        "-nodefaults",
        "-no-reboot",
    ]
    command += ["-display", "none", "-serial", "stdio", "-kernel", str(guest.kernel)]
    command += ["-initrd", str(guest.initrd), "-append", "console=ttyS0 rdinit=/probe panic=-1"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=3, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return PROBE_ANSWER.encode() in done.stdout


# --- the cache ------------------------------------------------------------------------------------


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "pytest-kvmsnap"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _source() -> str:
    parts = sorted(Path(__file__).parent.glob("guest*.py"))
    return "\0".join(path.read_text(encoding="utf-8") for path in parts)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _remembered(stamp: Path) -> Guest | None:
    try:
        folder = stamp.with_name(stamp.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return _guest(folder) if folder.is_dir() else None


def _newest(cache: Path) -> Guest | None:
    folders = sorted(cache.glob("guest-*/"), key=lambda folder: folder.stat().st_mtime)
    return _guest(folders[-1]) if folders else None


def _guest(folder: Path) -> Guest:
    return Guest(folder / "kernel", folder / "initrd", folder / "root.raw", folder / "disk.raw")


def _write_atomically(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _build_into(folder: Path, packages: Sequence[str], say: Callable[[str], None]) -> None:
    """Build the guest in a private folder; then `folder` appears, complete or not at all."""
    say("building the example guest (once, about 10 seconds)")
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as work:
        unpacked = unpack(packages, Path(work), say)
        result = Path(work, "result")
        result.mkdir(mode=0o700)
        guest = _guest(result)
        release = _take_kernel(unpacked, guest.kernel)
        _write_initramfs(unpacked, release, guest.initrd)
        _write_images(unpacked, release, Path(work), guest)
        result.rename(folder)
    say(f"the example guest is in {folder}")


# --- the kernel and its initramfs -----------------------------------------------------------------


def _take_kernel(unpacked: Path, kernel: Path) -> str:
    """Copy the kernel and return its release, such as 6.1.0-9-cloud-amd64."""
    (image,) = (unpacked / "boot").glob("vmlinuz-*")
    shutil.copyfile(image, kernel)
    return image.name.removeprefix("vmlinuz-")


def _write_initramfs(unpacked: Path, release: str, initrd: Path) -> None:
    modules = list(_modules(unpacked, release, KERNEL_MODULES))
    archive = _Cpio()
    for folder in ("bin", "dev", "modules", "root"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("init", stat.S_IFREG | 0o755, INITRAMFS_INIT.encode())
    archive.add("probe", stat.S_IFREG | 0o755, INITRAMFS_PROBE.encode())
    archive.add("bin/busybox", stat.S_IFREG | 0o755, _busybox(unpacked).read_bytes())
    for applet in ("sh", "mount", "insmod", "cat", "usleep", "switch_root", "reboot"):
        archive.add(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    for name, code in modules:
        archive.add(f"modules/{name}", stat.S_IFREG | 0o644, code)
    order = "".join(f"{name}\n" for name, _ in modules)
    archive.add("modules/order", stat.S_IFREG | 0o644, order.encode())
    initrd.write_bytes(gzip.compress(archive.finish(), compresslevel=6, mtime=EPOCH))


def _modules(unpacked: Path, release: str, wanted: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield file name and code of kernel modules, each after those it depends on.

    What is built into this kernel is left out, and so is what the kernel package lacks.
    """
    (folder,) = (
        path for path in unpacked.glob(f"**/modules/{release}") if (path / "kernel").is_dir()
    )
    files = {_module_name(path.name): path for path in folder.rglob("*.ko*")}
    builtin = {_module_name(Path(line).name) for line in _lines(folder / "modules.builtin")}
    done: set[str] = set()

    def load(names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            if name in done or name in builtin or name not in files:
                continue
            done.add(name)
            code = _decompressed(files[name])
            needs = re.search(rb"\0depends=([^\0]*)\0", code)
            yield from load(_module_name(n) for n in needs[1].decode().split(",")) if needs else ()
            yield f"{name}.ko", code

    yield from load(wanted)


def _module_name(file_name: str) -> str:
    return file_name.partition(".")[0].replace("-", "_")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _decompressed(module: Path) -> bytes:
    # Busybox loads plain modules only, whatever the kernel could do.
    if module.suffix == ".xz":
        return lzma.decompress(module.read_bytes())
    if module.suffix == ".zst":
        plain = module.with_suffix("")
        run("zstd", "-q", "-d", str(module), "-o", str(plain))
        return plain.read_bytes()
    return module.read_bytes()


class _Cpio:
    """Writes a cpio archive of the "newc" kind, the one that kernels unpack."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        """Append one file, folder or symbolic link, owned by root."""
        self._count += 1
        path = name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, EPOCH, len(data), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        self._parts += [_padded(header + path), _padded(data)]

    def finish(self) -> bytes:
        """Return the whole archive."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


# --- the root file system -------------------------------------------------------------------------


def _write_images(unpacked: Path, release: str, work: Path, guest: Guest) -> None:
    tree = work / "root"
    _lay_out(tree)
    _add_busybox(unpacked, tree)
    _add_program(unpacked, tree, next(unpacked.glob("usr/*bin/qemu-ga")))
    _add_network(unpacked, release, tree)
    write_file_system(tree, work, guest.root)
    (tree / "boot").mkdir()
    shutil.copyfile(guest.kernel, tree / "boot/vmlinuz")
    shutil.copyfile(guest.initrd, tree / "boot/initrd")
    write_file_system(tree, work, work / "partition.raw")
    write_boot_disk(unpacked, work, work / "partition.raw", KERNEL_OPTIONS, guest.disk)


def _lay_out(tree: Path) -> None:
    for folder in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", *GUEST_FOLDERS):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    for texts, mode in ((GUEST_FILES, 0o644), (GUEST_SCRIPTS, 0o755)):
        for name, text in texts.items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            path.chmod(mode)
    (tree / "var/tmp").chmod(0o1777)


def _busybox(unpacked: Path) -> Path:
    return next(path for path in unpacked.glob("**/bin/busybox") if path.is_file())


def _add_busybox(unpacked: Path, tree: Path) -> None:
    busybox = _busybox(unpacked)
    shutil.copy(busybox, tree / "usr/bin/busybox")
    for applet in run(str(busybox), "--list-full").split():
        # All is merged into /usr: /sbin, where the agent looks for helpers, is a link to usr/sbin.
        path = tree / "usr" / Path(applet).relative_to("usr" if applet.startswith("usr/") else "")
        if path.name != "busybox" and path.parent.is_dir() and not path.exists():
            path.symlink_to("/usr/bin/busybox")
    # Debian's busybox has init, but lists no link for it.
    if not (tree / "usr/sbin/init").is_symlink():
        (tree / "usr/sbin/init").symlink_to("/usr/bin/busybox")


def _add_network(unpacked: Path, release: str, tree: Path) -> None:
    """Add what `start-network` needs: the modules that are not loaded yet, and dropbear."""
    folder = tree / "usr/lib/network"
    folder.mkdir()
    loaded = {name for name, _ in _modules(unpacked, release, KERNEL_MODULES)}
    modules = dict(_modules(unpacked, release, NETWORK_MODULES))
    missing = [name for name in modules if name not in loaded]
    for name in missing:
        (folder / name).write_bytes(modules[name])
    (folder / "order").write_text("".join(f"{name}\n" for name in missing), encoding="utf-8")
    for program in ("usr/sbin/dropbear", "usr/bin/dropbearkey"):
        _add_program(unpacked, tree, unpacked / program)


def _add_program(unpacked: Path, tree: Path, program: Path) -> None:
    """Copy a program and the shared libraries that it needs, nothing else of their packages."""
    shutil.copy(program, tree / "usr/sbin" / program.name)
    for library in libraries(unpacked, program):
        path = tree / _merged(library.relative_to(unpacked))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, path)
        path.chmod(0o755)


def _merged(path: Path) -> Path:
    return path if path.parts[0] == "usr" else Path("usr", path)


if __name__ == "__main__":
    try:
        print(build(lambda text: print(text, file=sys.stderr)).root.parent)
    except GuestError as error:
        sys.exit(f"guest.py: {error}")
