"""Machines on a daemon of the tests' own, which several processes use at the same time."""

import contextlib
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import QUIET, Machine, Suite
from daemon import Daemon
from sharedhost import Run

import guest as guests
from lab import Lab

PATIENCE = 120
"""Seconds after which something that was awaited will not come; mostly it takes less than one."""


class DaemonLab(Lab):
    """The machines of a daemon. Their images are thin copies of one."""

    def __init__(self, daemon: Daemon, guest: guests.Guest) -> None:
        super().__init__(daemon.folder)
        self.daemon = daemon
        self.uri = daemon.uri()
        self.images.mkdir()
        self._guest = guest
        self._base = self.images / "base.qcow2"
        _qemu_img("convert", "-f", "raw", "-O", "qcow2", str(guest.root), str(self._base))

    def make(self, name: str) -> "SharedMachine":
        """Define a machine that is off."""
        disk = self.images / f"{name}.qcow2"
        _qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(self._base), str(disk))
        machine = SharedMachine(self, name, disk)
        xml = disk.with_suffix(".xml")
        xml.write_text(guests.domain_xml(self._guest, name, disk, disk_format="qcow2"))
        machine.define(xml)
        machine.uuid = machine.virsh("domuuid")
        machine.as_made = machine.definition
        return machine

    def discard(self, machine: "SharedMachine") -> None:
        """Remove a machine, whatever a test made of it."""
        virsh = ["virsh", "-q", "-c", self.uri]
        for name in (machine.uuid, machine.name):
            for command, *options in (
                ("destroy",),
                ("undefine", "--snapshots-metadata", "--managed-save"),
            ):
                words = [*virsh, command, name, *options]
                subprocess.run(words, capture_output=True, env=QUIET, check=False)
        machine.disk.unlink(missing_ok=True)


class SharedMachine(Machine):
    """One machine of a daemon as somebody outside of the runs sees and handles it."""

    uuid = ""
    as_made = ""

    def differences(self) -> list[str]:
        """Return how a machine is not as it was made."""
        found: dict[str, tuple[object, object]] = {
            "state": (self.state, "shut off"),
            "snapshots": (self.snapshots, []),
            "definition": (self.definition, self.as_made),
        }
        if self.disk.exists():
            found["in the image"] = (self.image_snapshots(), [])
            found["disk"] = (self._compared(), "Images are identical.")
        return [f"{what}: {now}" for what, (now, then) in found.items() if now != then]

    def _compared(self) -> str:
        """Say how the disk differs from the image that it was a thin copy of at first."""
        images = [str(self.disk.with_name("base.qcow2")), str(self.disk)]
        command = ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", *images]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


class DaemonSuite(Suite):
    """A suite whose runs share the machines of a daemon."""

    @property
    def folder(self) -> Path:
        """Where the tests are run: what they write, `file` finds."""
        return self._pytester.path

    def file(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()

    def start_run(self, *extra: str, before: Sequence[str] = ()) -> Run:
        """Start a run that goes on beside the test; `before` is a command that is to run it."""
        return Run(self._pytester, self.arguments(*extra), before)

    def left_over(self) -> list[str]:
        """Return the locks and journals that are there."""
        return sorted(path.name for path in self.locks.glob("*"))


@contextlib.contextmanager
def at_sign(sign: Path, answer: Callable[[], None]) -> Iterator[None]:
    """Do something whenever a test makes the file `sign`, and remove the file when it is done."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            if sign.exists():
                answer()
                sign.unlink()

    watcher = threading.Thread(target=watch, name="watcher")
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def await_file(path: Path) -> None:
    """Wait until a test made a file."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < end, f"there is no {path}"
        time.sleep(0.02)


OTHER_USER = 65534
"""Nobody's number, as good as any."""


@contextlib.contextmanager
def another_user(suite: DaemonSuite, lab: DaemonLab) -> Iterator[list[str]]:
    """Let another user work with the daemon; for root.

    Gives a command that runs another one as that user, in the suite's folder. What only root may
    reach, such as a Python in /root, is shown there in place of the folder that keeps others out:
    in a mount namespace, so nowhere else.
    """
    os.chown(lab.daemon.socket, OTHER_USER, 0)
    lab.folder.chmod(0o711)
    suite.folder.chmod(0o777)
    checkout = Path(__file__).parents[2]
    needed = {Path(sys.base_prefix), Path(sys.prefix), checkout, suite.folder}
    hidden = {path: closed for path in needed if (closed := _closed_above(path)) is not None}
    side = lab.folder / "side"
    script = ["set -e"]
    for number, path in enumerate(hidden):
        (side / str(number)).mkdir(parents=True, exist_ok=True)
        script.append(shlex.join(["mount", "-n", "--rbind", str(path), f"{side}/{number}"]))
    for closed in sorted(set(hidden.values())):
        script.append(
            shlex.join(["mount", "-n", "-t", "tmpfs", "-o", "mode=755", "t", str(closed)])
        )
    for number, path in enumerate(hidden):
        script.append(shlex.join(["mkdir", "-p", str(path)]))
        script.append(shlex.join(["mount", "-n", "--rbind", f"{side}/{number}", str(path)]))
    script += [f"cd {shlex.quote(str(suite.folder))}", 'exec "$@"']
    apart = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(script), "sh"]
    user = str(OTHER_USER)
    yield [*apart, "setpriv", "--reuid", user, "--regid", user, "--clear-groups"]
    lab.folder.chmod(0o700)
    os.chown(lab.daemon.socket, 0, 0)


def _closed_above(path: Path) -> Path | None:
    """Return the outermost folder on the way to a path that others may not enter."""
    for folder in reversed(path.resolve().parents):
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


def _qemu_img(*arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], stdin=subprocess.DEVNULL, check=True)
