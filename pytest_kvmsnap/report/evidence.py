"""What can be seen of a machine when a test has failed, in files, before it is put back."""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pytest_kvmsnap.errors import KvmsnapError, MachineError
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.machine import qemulog
from pytest_kvmsnap.machine.calls import Call

NOTES = "not-collected.txt"

_EACH = (
    10.0  # seconds for one kind of evidence; a machine that hangs may keep libvirt from answering
)
_ALL = 30.0  # seconds for all of a machine
_GUEST = 8  # seconds for the guest to answer
_TAIL = 256 * 1024  # bytes of a log
_CONSOLE = 8 * 2**20  # characters of a console
_LONGEST = 80  # characters of a folder's name, without what makes it unique

# Once around: the agent keeps 16 MiB of output, and a journal may hold far more. The lines that
# `journalctl` finds are those of this boot.
_GUEST_LOG = """
if [ -n "$(journalctl -q -n 1 2>/dev/null)" ]; then
    echo "journal of this boot, its end:"
    journalctl -q -b --no-pager -n 4000 -o short-precise
else
    echo "messages of the kernel, their end:"
    dmesg
fi 2>&1 | tail -c "$1"
"""


def folder_for(base: Path, test: str) -> Path:
    """Make a new folder for a test: a name that is safe everywhere, and nobody else's.

    The digits at its end tell tests apart whose names look alike without special characters.
    """
    plain = re.sub(r"[^\w.-]+", "-", test, flags=re.ASCII).strip("-.")
    if len(plain) > _LONGEST:
        plain = plain[-_LONGEST:].lstrip("-.")  # the name of the test, rather than of folders
    name = f"{plain}-{hashlib.sha256(test.encode()).hexdigest()[:6]}"
    number = 1
    while True:
        folder = base / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # of another run, or another try of this one
            number += 1
        else:
            return folder


class Collector:
    """Collects what can be seen, each on its own: `notes` are what could not be had, and why."""

    def __init__(self, machine_name: str, folder: Path) -> None:
        self.machine_name = machine_name
        self.folder = folder
        self.files: list[str] = []
        self.notes: list[str] = []
        self._end = time.monotonic() + _ALL
        self._is_over = False

    def machine(self, guest: Guest) -> None:
        """Collect all of a machine's."""
        if guest.domain.hypervisor.is_away:
            self.notes.append("all: the connection to libvirt is broken")
            return
        self.file("screen", partial(_screen, guest, self.folder))
        self.file("console", partial(_console, guest, self.folder))
        self.file("definition", partial(_definition, guest, self.folder))
        self.file("guest's log", partial(_guest_log, guest, self.folder))
        self.file("QEMU's log", partial(_qemu_log, guest, self.folder))

    def while_it_lasts(self, on_use: Callable[[], None]) -> Callable[[], None]:
        """Return what is to be called at each use of a machine: it is no use when this is over."""

        def use() -> None:
            if self._is_over:
                raise MachineError("the time to collect what a test left is over")
            on_use()

        return use

    def file(self, what: str, collect: Callable[[], str]) -> None:
        """Collect one kind, by a function that returns the name of its file."""
        self.attempt(what, lambda: self.files.append(collect()))

    def attempt(self, what: str, collect: Callable[[], None]) -> None:
        """Try to collect something, within its time; note why that failed."""
        left = min(_EACH, self._end - time.monotonic())
        if left <= 0:
            self.notes.append(f"{what}: the others took too long")
            return
        call = Call(collect)
        if not call.ended_within(left):
            self.notes.append(f"{what}: it took more than {left:.0f} s")
            return
        try:
            call.raise_error()
        except KvmsnapError as error:
            self.notes.append(f"{what}: {error.what}" + (f": {error.why}" if error.why else ""))
        except BaseException as error:  # noqa: BLE001 - of the call: it must not hide the test's
            self.notes.append(f"{what}: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Write down what could not be had, and see what others added."""
        self._is_over = True
        with contextlib.suppress(OSError):
            added = (path.name for path in self.folder.iterdir() if path.is_file())
            self.files += sorted(set(added).difference(self.files))
            if self.notes:
                text = "".join(f"{note}\n" for note in self.notes)
                (self.folder / NOTES).write_text(text, encoding="utf-8")


def _screen(guest: Guest, folder: Path) -> str:
    picture, kind = guest.domain.screenshot()
    name = f"screen.{kind}"
    (folder / name).write_bytes(picture)
    return name


def _console(guest: Guest, folder: Path) -> str:
    said = guest.domain.console.said()
    if said is None:
        raise guest.domain.console.unheard("nothing is known of it")
    if len(said) > _CONSOLE:
        said = f"[{len(said) - _CONSOLE} characters before this are left out]\n{said[-_CONSOLE:]}"
    (folder / "console.log").write_text(said, encoding="utf-8", newline="")
    return "console.log"


def _definition(guest: Guest, folder: Path) -> str:
    # without the secrets: passwords of screens are none of what is passed around
    (folder / "domain.xml").write_text(guest.domain.xml(secrets=False), encoding="utf-8")
    return "domain.xml"


def _guest_log(guest: Guest, folder: Path) -> str:
    (folder / "guest.log").write_bytes(guest.shell(_GUEST_LOG, str(_TAIL), timeout=_GUEST))
    return "guest.log"


def _qemu_log(guest: Guest, folder: Path) -> str:
    place = qemulog.place_of(guest.domain)
    if place is None:
        raise MachineError("it is on another host, or no machine of QEMU's")
    with place.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        (folder / "qemu.log").write_bytes(file.read())
    return "qemu.log"
