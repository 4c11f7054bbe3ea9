"""What the benchmarks of clean machines share: machines on a daemon of their own, and meters."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
for folder in ("example_suite", "tests"):
    sys.path.insert(0, str(ROOT / folder))
os.environ["LIBVIRT_LOG_OUTPUTS"] = "4:file:/dev/null"

import libvirt  # noqa: E402
import libvirt_qemu  # noqa: E402
from daemon import Daemon, running_daemon  # noqa: E402

import guest as guests  # noqa: E402
from lab import reap_orphans  # noqa: E402

PATIENCE = 120.0
"""Seconds after which a guest will not answer any more."""
BLOCK = 16
"""MiB of random data that fill a guest's memory again and again.

Copies are as good as new data: QEMU leaves a page out of a snapshot only where all of its bytes are
the same, and compresses nothing.
"""
TICK = os.sysconf("SC_CLK_TCK")
MIB = 2**20


class Site:
    """A libvirt daemon, a connection to it, and the image that all machines are thin copies of."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.uri = daemon.uri()
        self.connection = libvirt.open(self.uri)
        self.guest = guests.build()
        self.images = daemon.folder / "images"
        self.images.mkdir()
        self.base = self.images / "base.qcow2"
        call("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.guest.root, self.base)

    def make(self, name: str, memory: int = 128) -> "Box":
        """Define a machine with so many MiB, which is off."""
        box = Box(self, name)
        box.renew_disk()
        self.connection.defineXML(
            guests.domain_xml(self.guest, name, box.disk, disk_format="qcow2", memory_mib=memory)
        )
        return box

    def words(self) -> str:
        """Say what the figures were taken with."""
        qemu = subprocess.run(
            ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
        ).stdout.split()[3]
        number: int = self.connection.getLibVersion()
        version = f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
        engine = "KVM" if guests.kvm_works() else "software emulation (no KVM)"
        return (
            f"{os.cpu_count()} cores, {engine}, QEMU {qemu}, libvirt {version} (a daemon),"
            " a parent that reaps QEMU's orphans at once"
        )


def finish(found: dict[str, Any], begin: float, file: Path | None) -> None:
    """Say how long it took, and write what was found to a file, if one was named."""
    found["seconds"] = time.monotonic() - begin
    print(f"\n{found['seconds']:.0f} s in all")
    if file is not None:
        file.write_text(json.dumps(found, indent=1))


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """Have a daemon of which nothing is left afterwards, its machines included."""
    with reap_orphans(), running_daemon() as daemon:
        libvirt.registerErrorHandler(lambda *_: None, None)  # it prints each error otherwise
        yield Site(daemon)


class Box:
    """One machine with an agent."""

    def __init__(self, where: Site, name: str) -> None:
        self.site = where
        self.name = name
        self.disk = where.images / f"{name}.qcow2"

    @property
    def domain(self) -> libvirt.virDomain:
        """The domain, looked up afresh: the binding keeps what it knows of the process."""
        return self.site.connection.lookupByName(self.name)

    @property
    def pid(self) -> int | None:
        """The number of its QEMU process."""
        for file in (self.site.daemon.folder / "run").rglob(f"{self.name}.pid"):
            return int(file.read_text())
        return None

    def renew_disk(self) -> None:
        backing = ("-F", "qcow2", "-b", self.site.base)
        call("qemu-img", "create", "-q", "-f", "qcow2", *backing, self.disk)

    def start(self) -> None:
        self.domain.create()
        self.until_answered()

    def snapshot(self, name: str) -> libvirt.virDomainSnapshot:
        xml = f"<domainsnapshot><name>{name}</name></domainsnapshot>"
        return self.domain.snapshotCreateXML(xml, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC)

    def until_answered(self) -> None:
        """Wait until a command is done in the guest."""
        until_true(lambda: self.run("true") == 0, libvirt.libvirtError)

    def run(self, *command: str) -> int:
        """Run a command in the guest and return its exit status."""
        domain = self.domain

        def ask(request: str) -> str:
            answer: str = libvirt_qemu.qemuAgentCommand(domain, request, 30, 0)
            return answer

        return run_in_guest(ask, command)

    def spoil(self) -> None:
        """Leave a trace that a clean machine lacks."""
        self.run("touch", "/spoiled")

    def check_clean(self) -> None:
        assert self.run("test", "-e", "/spoiled") == 1, f"{self.name} is not clean"

    def fill(self, data: int) -> None:
        """Fill so many MiB of the memory with random data."""
        if not data:
            return
        script = f"""
            mount -t tmpfs -o size={data + 1}m data /mnt
            head -c {BLOCK}m /dev/urandom >/mnt/block
            for number in $(seq 2 {data // BLOCK}); do cat /mnt/block; done >/mnt/copies
        """
        assert self.run("sh", "-ec", script) == 0, "the guest's memory cannot be filled"

    def remove(self) -> None:
        domain = self.domain
        if domain.isActive():
            domain.destroy()
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
        self.disk.unlink()


def run_in_guest(ask: Callable[[str], str], command: tuple[str, ...]) -> int:
    """Run a command by an agent, looking for its end as often as the plugin does."""
    name, *words = command
    arguments = {"path": name, "arg": words, "capture-output": True}
    started = json.loads(ask(json.dumps({"execute": "guest-exec", "arguments": arguments})))
    look = json.dumps({"execute": "guest-exec-status", "arguments": started["return"]})
    pause = 0.003
    while True:
        status: dict[str, Any] = json.loads(ask(look))["return"]
        if status["exited"]:
            return int(status["exitcode"])
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def until_true(is_done: Callable[[], bool], *passing: type[Exception]) -> None:
    """Try again and again; what is raised meanwhile will pass."""
    end = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(*passing):
            if is_done():
                return
        assert time.monotonic() < end, "the guest does not answer"
        time.sleep(0.01)


def call(*command: str | Path) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return done.stdout.decode()


def timed(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def is_taken(option: str, folder: Path) -> bool:
    """Tell whether the plugin knows an option, in a folder without tests."""
    command = pytest_command(option, "--collect-only")
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    return done.returncode == 5  # no tests were found


@dataclass(frozen=True)
class Usage:
    """What processes used up: seconds of CPU, bytes given to write calls, bytes for the disk.

    The last counts a page of the host's cache only when it becomes dirty, so what is written again
    soon after is not in it.
    """

    cpu: float
    written: int
    dirtied: int

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.cpu + other.cpu, self.written + other.written, self.dirtied + other.dirtied
        )

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(
            self.cpu - other.cpu, self.written - other.written, self.dirtied - other.dirtied
        )


class Meter:
    """What one turn used up: a machine's QEMU, libvirt, and a process of pytest, or this one.

    This process adopts and reaps the QEMUs that end, and the kernel adds what a process used up to
    that of the one that reaps it. So the sum over the processes that are there never loses
    anything. The ticks of the CPU's times are 10 ms. Only the main thread of this process counts,
    not the one that looks for what is to be reaped.
    """

    def __init__(self, box: Box, process: int | None) -> None:
        self._box = box
        self._others = [box.site.daemon.pid, *([process] if process is not None else [])]
        self._first = box.pid
        if self._first is not None:
            Path(f"/proc/{self._first}/clear_refs").write_text("5")  # forget the peak
        self._before = self._sum()

    def _sum(self) -> Usage:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = time.thread_time() + children.ru_utime + children.ru_stime
        usage = Usage(cpu, *_io("self"))
        qemu = self._box.pid
        for pid in (*self._others, *([qemu] if qemu is not None else [])):
            usage += _usage(pid)
        return usage

    def read(self) -> dict[str, Any]:
        """Return what was used up since it was made, and the peak of the QEMU that runs now."""
        pid = self._box.pid
        if self._first is not None and pid != self._first:
            until_true(lambda: not Path(f"/proc/{self._first}").exists())
        used = self._sum() - self._before
        return {
            "cpu": used.cpu,
            "peak": _peak(pid) if pid is not None else 0,
            "written": used.written,
            "dirtied": used.dirtied,
            "same_process": pid == self._first,
        }


def _usage(pid: int) -> Usage:
    """Return what a process and those that it reaped used up."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = sum(int(word) for word in after_name[11:15])
    written, dirtied = _io(pid)
    return Usage(ticks / TICK, written, dirtied)


def _io(pid: int | str) -> tuple[int, int]:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    numbers = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return numbers["wchar"], numbers["write_bytes"]


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    words = next(line.split() for line in lines if line.startswith("VmHWM"))
    return int(words[1]) * 1024
