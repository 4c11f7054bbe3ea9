"""A place for the example's machines: libvirt inside of the test process, no daemon, no set-up.

`qemu:///embed?root=…` runs libvirt's QEMU driver in the process that opens it. All that it needs,
definitions, sockets and logs, stays below one private folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import guest as guests

# What a daemon would write into its log, an embedded libvirt says on our stderr, "tainted" at each
# start. It reads this when it is imported, which a conftest does after us. Set it to see the log.
os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", "4:file:/dev/null")

MARKER = ".kvmsnap-lab"
LONGEST_ROOT = 27
"""In bytes. A socket's path has 107 at most, and libvirt adds up to 80 for the agent's:
`/lib/qemu/channel/target/domain-ID-NAME/org.qemu.guest_agent.0`, 20 of them from the name."""

# Without a log daemon and without changes to owners, which need rights that a container lacks.
QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
remember_owner = 0
dynamic_ownership = 0
namespaces = []
"""
# Else libvirt as root runs QEMU as another user, who reads neither our folder nor /dev/kvm.
QEMU_CONF_ROOT = 'user = "root"\ngroup = "root"\n'

PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37


class LabError(RuntimeError):
    """The lab cannot be opened or used; says why and what to do."""


class Lab:
    """A private root folder of libvirt, and the machines in it. Made by `open_lab`.

    As a context manager it removes itself at the end. Add machines before the process connects to
    `uri` for the first time: libvirt reads their definitions when it starts, and only then.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"qemu:///embed?root={urllib.parse.quote(str(folder))}"
        self.images = folder / "images"

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def add_machine(
        self,
        name: str,
        *,
        guest: guests.Guest | None = None,
        disk_format: str = "raw",
        memory_mib: int = 128,
        console_log: Path | None = None,
        agent: bool = True,
        network: guests.Network | None = None,
        kind: str | None = None,
    ) -> Path:
        """Define the example's guest as machine `name` on a new disk; return the disk's path.

        A machine of that name is replaced, with its disk and its snapshots. Raises `LabError` if
        it runs.
        """
        guest = guest or guests.build()
        self._forget(name)
        disk = self.images / f"{name}.{disk_format}"
        _copy_as(guest, disk, disk_format)
        xml = guests.domain_xml(
            guest,
            name,
            disk,
            disk_format=disk_format,
            memory_mib=memory_mib,
            console_log=console_log,
            agent=agent,
            network=network,
            kind=kind,
        )
        # A file, since a connection would hold this root until the end of the process, and needs
        # an event loop from then on; both are the plugin's to choose.
        _write(self._definition(name), xml)
        return disk

    def add_snapshot(self, name: str, snapshot: str) -> None:
        """Take snapshot `snapshot` of machine `name`, which is off and on a qcow2 disk.

        What libvirt keeps about a snapshot differs between its versions, so libvirt itself writes
        it, in a process of its own: some tenths of a second, in a new lab some seconds. Raises
        `LabError` if it fails, as it does while another process, or this one, is connected.
        """
        command = [sys.executable, __file__, self.uri, name, snapshot]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            cause = done.stderr.strip().rpartition("\n")[2]  # above it is the traceback
            cause = cause or f"its process ended with {done.returncode}"
            raise LabError(f"snapshot {snapshot!r} of {name!r} failed: {cause}")

    def remove(self) -> None:
        """End the machines that still run here, and delete the lab's folder.

        Raises `LabError` if the folder is not one that `open_lab` made.
        """
        if not (self.folder / MARKER).is_file():
            raise LabError(f"{self.folder} has no {MARKER}: not a lab, so it stays")
        for pid_file in (self.folder / "run" / "qemu").glob("*.pid"):
            if pid_file.name != "driver.pid":
                self._end(pid_file)
        shutil.rmtree(self.folder)

    def _end(self, pid_file: Path) -> None:
        """Kill a QEMU, unless its number is meanwhile that of a process of other people."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
            pid = int(pid_file.read_text(encoding="ascii"))
            process = os.pidfd_open(pid)
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if os.fsencode(self.folder / "lib" / "qemu") in command:
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    select.select([process], [], [], 10)
            finally:
                os.close(process)

    def _definition(self, name: str) -> Path:
        return self.folder / "etc" / "qemu" / f"{name}.xml"

    def _forget(self, name: str) -> None:
        if (self.folder / "run" / "qemu" / f"{name}.xml").exists():
            raise LabError(
                f"machine {name!r} in {self.folder} runs, or its last run was cut short;"
                f" end it (virsh -c '{self.uri}' destroy {name}), or remove the lab"
            )
        self._definition(name).unlink(missing_ok=True)
        for kept in ("snapshot", "checkpoint"):
            shutil.rmtree(self.folder / "lib" / "qemu" / kept / name, ignore_errors=True)


def open_lab(folder: Path | None = None) -> Lab:
    """Make a lab in `folder`, or find the one there; by default one per user, and per worker.

    Raises `LabError` if the folder is not ours alone, holds other things, or has too long a path.
    """
    folder = _default_folder() if folder is None else folder.absolute()
    if len(os.fsencode(folder)) > LONGEST_ROOT:
        raise LabError(f"{folder} is too long for sockets: {LONGEST_ROOT} bytes at most")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)
    marker = folder / MARKER
    if not marker.exists():
        if any(folder.iterdir()):
            raise LabError(f"{folder} holds other things; name an empty or a new folder")
        marker.touch()
    lab = Lab(folder)
    lab.images.mkdir(exist_ok=True)
    (folder / "etc" / "qemu").mkdir(parents=True, exist_ok=True)
    _write(folder / "etc" / "qemu.conf", QEMU_CONF + (QEMU_CONF_ROOT if os.geteuid() == 0 else ""))
    return lab


def _default_folder() -> Path:
    worker = os.environ.get("PYTEST_XDIST_WORKER")  # an embedded libvirt serves one process
    name = f"kvmsnap-{os.geteuid()}" + (f"-{worker}" if worker else "")
    return Path(tempfile.gettempdir(), name)


def _check_private(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise LabError(f"{folder} is no folder; remove it, or name another")
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise LabError(
            f"{folder} is open to others (owner {found.st_uid}); remove it, or name another"
        )


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _copy_as(guest: guests.Guest, disk: Path, disk_format: str) -> None:
    if disk_format == "raw":
        guests.copy_root(guest, disk)
        return
    command = ["qemu-img", "convert", "-f", "raw", "-O", disk_format, str(guest.root), str(disk)]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)


@contextlib.contextmanager
def reap_orphans(interval: float = 0.01) -> Iterator[None]:
    """Collect dead QEMU processes at once, for the time of the context.

    libvirt's QEMU is nobody's child, and where PID 1 collects late (some containers), it lingers
    as a zombie for which libvirt waits: each revert takes 1.4 s longer. So this process adopts its
    orphans, and a thread looks for dead QEMUs among them every `interval` seconds. Children that
    were started here, by `subprocess` or by libvirt itself, are left to those who wait for them.
    """
    before = _subreaper()
    _set_subreaper(1)
    leaving = threading.Event()
    thread = threading.Thread(
        target=_reap_until, args=(leaving, interval), name="kvmsnap-reaper", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        _set_subreaper(before)
        # The thread ends after the last machine: those that still run stay adopted, and if nobody
        # collected them, libvirt would wait 40 s for each.
        leaving.set()


def _reap_until(leaving: threading.Event, interval: float) -> None:
    # Orphans go to the main thread of the process that adopts them.
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    running = True
    while running or not leaving.is_set():
        time.sleep(interval)
        adopted = [
            pid for pid in children.read_text(encoding="ascii").split() if _is_adopted_machine(pid)
        ]
        # all of them first: one that lives must not keep those behind it waiting
        reaped = [_reaped(int(pid)) for pid in adopted]
        running = not all(reaped)


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return True


def _is_adopted_machine(pid: str) -> bool:
    """Tell whether `pid` is a QEMU of another session than ours: libvirt detached it."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    name, _, rest = line.partition("(")[2].rpartition(")")
    session = rest.split()[3]
    return name.startswith("qemu-system") and int(session) != os.getsid(0)


def _subreaper() -> int:
    value = ctypes.c_int()
    _prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(value))
    return value.value


def _set_subreaper(value: int) -> None:
    _prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(value))


def _prctl(option: int, argument: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _take_snapshot(uri: str, name: str, snapshot: str) -> None:
    import libvirt

    libvirt.virEventRegisterDefaultImpl()
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            libvirt.virEventRunDefaultImpl()

    libvirt.virEventAddTimeout(50, lambda *_: None, None)
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    connection = libvirt.open(uri)
    description = ET.Element("domainsnapshot")
    ET.SubElement(description, "name").text = snapshot
    xml = ET.tostring(description, encoding="unicode")
    connection.lookupByName(name).snapshotCreateXML(xml, 0)
    connection.close()
    stop.set()
    thread.join()  # in libvirt at the end of the process it could crash that


if __name__ == "__main__":
    _take_snapshot(*sys.argv[1:])
