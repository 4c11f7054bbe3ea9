"""The example's guest: a tiny Linux with busybox and the QEMU guest agent.

It is built from the packages of the distribution underneath, Debian or Ubuntu, without root, and
kept in the user's cache. Tests, the example suite and the benchmarks share it.

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

ROOT_SIZE_MIB = 256
KERNEL_MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "ext4",
    "rtc_cmos",
    "button",
    "evdev",
)
# Both distributions' names for "the newest kernel for virtual machines".
KERNEL_PACKAGES = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}
APT_LISTS = Path("/var/lib/apt/lists")
# The root account of APT would otherwise complain that it cannot enter our private folder.
APT = ("-q", "-o", "APT::Sandbox::User=root")
FILE_SYSTEM_ID = "5ec0ffee-0000-4000-8000-000000000abc"
EPOCH = 1_700_000_000
"""Time stamp of every file in the guest, so that two builds of the same packages are alike."""

INITRAMFS_INIT = """\
#!/bin/sh
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod "/modules/$module"; done
tries=0
until [ -b /dev/vda ] || [ $tries -ge 500 ]; do tries=$((tries + 1)); usleep 10000; done
mount -t ext4 /dev/vda /root || exec sh
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


class GuestError(RuntimeError):
    """The example's guest cannot be built here; says why and what to do instead."""


@dataclass(frozen=True)
class Guest:
    """Where the parts of a built guest are."""

    kernel: Path
    initrd: Path
    root: Path
    """The pristine raw ext4 image. Never boot it: use `copy_root`."""


def build(say: Callable[[str], None] = lambda text: None) -> Guest:
    """Return the guest, building it first if the cache has none for these packages.

    `say` is told what is going on, only while building. Raises `GuestError` where it cannot be
    built. From the cache it takes milliseconds.
    """
    cache = _cache()
    stamp = cache / f"asked-{_digest(_source(), _lists_stamp())}"
    if (found := _remembered(stamp)) is not None:
        return found
    try:
        versions = _versions(_kernel_package())
    except GuestError as error:
        newest = _newest(cache)
        if newest is None:
            raise
        say(f"{error}; using the guest built earlier, {newest.root.parent}")
        return newest
    folder = cache / f"guest-{_digest(_source(), *(f'{p}={v}' for p, v in versions.items()))}"
    with FileLock(cache / "build.lock"):
        if not folder.exists():
            _build_into(folder, list(versions), say)
        _write_atomically(stamp, folder.name)
    return _guest(folder)


def copy_root(guest: Guest, target: Path) -> Path:
    """Write a sparse raw copy of the guest's root image to `target`, and return `target`."""
    with guest.root.open("rb") as source, target.open("wb") as copy:
        size = os.fstat(source.fileno()).st_size
        copy.truncate(size)
        for start, length in _filled_parts(source.fileno(), size):
            source.seek(start)
            copy.seek(start)
            copy.write(source.read(length))
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
    kind: str | None = None,
    uuid: str | None = None,
) -> str:
    """Describe a machine for libvirt that boots `guest` from `disk`, a copy of its root.

    `kind` is libvirt's domain type, by default `kvm` where that works and else `qemu`. With
    `console_log`, all that the serial console prints is appended there. For a quick boot there is
    no network and no USB.
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
    _add(
        system, "cmdline", "console=ttyS0 root=/dev/vda no_timer_check tsc=reliable mitigations=off"
    )
    _add(_add(domain, "features"), "acpi")
    _add(domain, "clock", offset="utc")
    for event, action in (("poweroff", "destroy"), ("reboot", "restart"), ("crash", "destroy")):
        _add(domain, f"on_{event}", action)
    _add_devices(_add(domain, "devices"), disk, disk_format, console_log, agent)
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
    return Path(__file__).read_text(encoding="utf-8")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _lists_stamp() -> str:
    """Return a text that changes when APT learns of other packages.

    To ask APT itself takes most of a second.
    """
    try:
        lists = sorted(path for path in APT_LISTS.iterdir() if "_Packages" in path.name)
        return "\n".join(f"{path.name} {path.stat().st_mtime_ns}" for path in lists)
    except OSError:
        return ""


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
    return Guest(folder / "kernel", folder / "initrd", folder / "root.raw")


def _write_atomically(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _build_into(folder: Path, packages: Sequence[str], say: Callable[[str], None]) -> None:
    """Build the guest in a private folder; then `folder` appears, complete or not at all."""
    say("building the example guest (once, about 10 seconds)")
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as work:
        unpacked = _unpack([*packages, *_library_packages()], Path(work), say)
        result = Path(work, "result")
        result.mkdir(mode=0o700)
        guest = _guest(result)
        release = _take_kernel(unpacked, guest.kernel)
        _write_initramfs(unpacked, release, guest.initrd)
        _write_root(unpacked, Path(work), guest.root)
        result.rename(folder)
    say(f"the example guest is in {folder}")


# --- packages -------------------------------------------------------------------------------------


def _run(*command: str, cwd: Path | None = None, **environment: str) -> str:
    """Run a tool and return what it printed.

    Raises `GuestError` with the tool's complaint if it fails, or is missing.
    """
    # ordinary users of Debian do not have the folders of mke2fs on their path
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            check=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"LC_ALL": "C", "PATH": path} | environment,
        )
    except FileNotFoundError:
        raise GuestError(f"{command[0]} is needed to build the example guest; install it") from None
    except subprocess.CalledProcessError as error:
        raise GuestError(f"{' '.join(command[:4])} … failed: {error.stderr.strip()}") from error
    return done.stdout


def _kernel_package() -> str:
    """Return the name of the package that depends on this distribution's newest kernel."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    families = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    package = next((KERNEL_PACKAGES[name] for name in families if name in KERNEL_PACKAGES), None)
    if package is None or shutil.which("dpkg-deb") is None:
        raise GuestError(
            "the example guest is built from Debian or Ubuntu packages; run the suite on your own"
            " machine with --kvmsnap-uri and --kvmsnap-domain"
        )
    architecture = _run("dpkg", "--print-architecture").strip()
    if architecture != "amd64":
        raise GuestError(
            f"the example guest is built for amd64 only, not for {architecture}; run the suite on"
            " your own machine with --kvmsnap-uri and --kvmsnap-domain"
        )
    return package


def _versions(kernel: str) -> dict[str, str]:
    """Ask APT for the packages that the guest is made of and their candidate versions."""
    shown = _show(kernel, "busybox-static", "qemu-guest-agent")
    versions = {name: fields["Version"] for name, fields in shown.items()}
    names = _kernel_parts(shown[kernel])
    # Ubuntu keeps the modules in a package of their own, on which the image depends.
    names += [part for image in _show(*names).values() for part in _kernel_parts(image)]
    del versions[kernel]
    return versions | dict.fromkeys(names, shown[kernel]["Version"])


def _kernel_parts(fields: dict[str, str]) -> list[str]:
    return re.findall(r"\blinux-(?:image|modules)-\d[^\s,|]*", fields.get("Depends", ""))


def _show(*packages: str) -> dict[str, dict[str, str]]:
    """Return the control fields of the candidates of `packages`, by package name."""
    text = _run("apt-cache", "show", "--no-all-versions", *packages)
    records = [
        dict(re.findall(r"^(\S+): (.*)$", record, re.MULTILINE)) for record in text.split("\n\n")
    ]
    found = {fields["Package"]: fields for fields in records if fields}
    if missing := [name for name in packages if name not in found]:
        raise GuestError(f"APT knows no {', '.join(missing)}; apt-get update, then try again")
    return found


def _library_packages() -> list[str]:
    """Return the packages that may hold the shared libraries of the agent."""
    options = [f"--no-{kind}" for kind in ("pre-depends", "recommends", "suggests", "conflicts")]
    options += [f"--no-{kind}" for kind in ("breaks", "replaces", "enhances")]
    text = _run("apt-cache", "depends", "--recurse", *options, "qemu-guest-agent")
    return sorted(set(re.findall(r"^(?:lib|zlib)[^\s:]*$", text, re.MULTILINE)))


def _unpack(packages: Sequence[str], work: Path, say: Callable[[str], None]) -> Path:
    archives, unpacked = work / "archives", work / "unpacked"
    archives.mkdir()
    say(f"downloading {len(packages)} packages")
    _run("apt-get", *APT, "download", *packages, cwd=archives)
    for archive in sorted(archives.glob("*.deb")):
        _run("dpkg-deb", "-x", str(archive), str(unpacked))
    return unpacked


# --- the kernel and its initramfs -----------------------------------------------------------------


def _take_kernel(unpacked: Path, kernel: Path) -> str:
    """Copy the kernel and return its release, such as 6.1.0-9-cloud-amd64."""
    (image,) = (unpacked / "boot").glob("vmlinuz-*")
    shutil.copyfile(image, kernel)
    return image.name.removeprefix("vmlinuz-")


def _write_initramfs(unpacked: Path, release: str, initrd: Path) -> None:
    modules = list(_modules(unpacked, release))
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


def _modules(unpacked: Path, release: str) -> Iterator[tuple[str, bytes]]:
    """Yield file name and code of the kernel modules, each after those it depends on.

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

    yield from load(KERNEL_MODULES)


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
        _run("zstd", "-q", "-d", str(module), "-o", str(plain))
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


def _write_root(unpacked: Path, work: Path, image: Path) -> None:
    tree = work / "root"
    _lay_out(tree)
    _add_busybox(unpacked, tree)
    _add_agent(unpacked, tree)
    for path in tree.rglob("*"):
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
    with image.open("wb") as file:
        file.truncate(ROOT_SIZE_MIB << 20)
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
    _run(*command, "-E", options, "-d", str(tree), str(image), E2FSPROGS_FAKE_TIME=str(EPOCH))
    _give_to_root(tree, work, image)


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
    for applet in _run(str(busybox), "--list-full").split():
        # All is merged into /usr: /sbin, where the agent looks for helpers, is a link to usr/sbin.
        path = tree / "usr" / Path(applet).relative_to("usr" if applet.startswith("usr/") else "")
        if path.name != "busybox" and path.parent.is_dir() and not path.exists():
            path.symlink_to("/usr/bin/busybox")
    # Debian's busybox has init, but lists no link for it.
    if not (tree / "usr/sbin/init").is_symlink():
        (tree / "usr/sbin/init").symlink_to("/usr/bin/busybox")


def _add_agent(unpacked: Path, tree: Path) -> None:
    """Copy the agent and the shared libraries that it needs, nothing else of their packages."""
    agent = next(path for path in unpacked.glob("usr/*bin/qemu-ga"))
    shutil.copy(agent, tree / "usr/sbin/qemu-ga")
    for library in _libraries(unpacked, agent):
        path = tree / _merged(library.relative_to(unpacked))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, path)
        path.chmod(0o755)


def _libraries(unpacked: Path, program: Path) -> list[Path]:
    """Let the unpacked dynamic loader find the libraries of `program` among the unpacked files."""
    loader = next(path for path in unpacked.glob("**/lib64/ld-linux-x86-64.so.2"))
    folders = {path.parent for path in unpacked.glob("**/*-linux-gnu/lib*.so.*")}
    search = ":".join(str(folder) for folder in sorted(folders))
    options = ["--inhibit-cache", "--library-path", search]
    listed = _run(str(loader), *options, "--list", str(program))
    found = [Path(path) for path in re.findall(r"=> (/\S+)", listed)]
    if strange := [path.name for path in found if unpacked not in path.parents]:
        raise GuestError(f"no package of the agent's dependencies holds {', '.join(strange)}")
    return [*(path for path in found if path.name != loader.name), loader]


def _merged(path: Path) -> Path:
    return path if path.parts[0] == "usr" else Path("usr", path)


def _give_to_root(tree: Path, work: Path, image: Path) -> None:
    """Make root the owner of every file in the image, whoever built it."""
    script = work / "owners"
    paths = [f"/{path.relative_to(tree)}" for path in sorted(tree.rglob("*"))]
    fields = [f"set_inode_field {path} {field} 0\n" for path in paths for field in ("uid", "gid")]
    script.write_text("".join(fields), encoding="utf-8")
    _run("debugfs", "-w", "-f", str(script), str(image), E2FSPROGS_FAKE_TIME=str(EPOCH))


def _filled_parts(file: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and length of the parts of a sparse file that hold data."""
    end = 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole up to the end
            return
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end - start


if __name__ == "__main__":
    try:
        print(build(lambda text: print(text, file=sys.stderr)).root.parent)
    except GuestError as error:
        sys.exit(f"guest.py: {error}")
