"""The canary's scripts, run by this computer's shell on files that stand for the guest's."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap.guest import canary as canaries
from pytest_kvmsnap.guest.agent import Agent
from pytest_kvmsnap.guest.canary import Canary
from pytest_kvmsnap.guest.clock import Clock

if TYPE_CHECKING:
    from localguest import LocalGuest

# Not every file system of a test's folder takes O_DIRECT; the real tier has one that does.
DD = """#!/bin/sh
for word; do
    shift
    case $word in *flag=direct) ;; *) set -- "$@" "$word" ;; esac
done
PATH=${PATH#*:} exec dd "$@"
"""


class Disks:
    """The two files, and a state of theirs to come back to."""

    def __init__(self, folder: Path) -> None:
        self.memory = folder / "memory"
        self.disk = folder / "disk"

    def save(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (self.memory, self.disk) if path.exists()}

    def revert(self, path: Path, saved: dict[Path, bytes]) -> None:
        path.unlink(missing_ok=True)
        if path in saved:
            path.write_bytes(saved[path])


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disks:
    disks = Disks(tmp_path)
    monkeypatch.setattr(canaries, "MEMORY", str(disks.memory))
    monkeypatch.setattr(canaries, "DISK", str(disks.disk))
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "dd").write_text(DD)
    (binaries / "dd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:/usr/bin:/bin")
    return disks


@pytest.fixture
def canary(agent: Agent, disks: Disks) -> Canary:
    return Canary(agent, "token-1")


class UnsetClock(Clock):
    """A clock that is left alone: it is this computer's."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def script(self) -> tuple[str, list[str]]:
        return "echo $1; shift 1\n", ["left-alone"]

    def heard(self, word: str) -> None:
        self.words.append(word)


@pytest.fixture
def clock() -> UnsetClock:
    return UnsetClock()


def test_a_whole_revert_is_believed(canary: Canary, clock: UnsetClock, disks: Disks) -> None:
    assert canary.plant()
    saved = disks.save()
    assert saved == {disks.disk: bytes(4096)}
    assert canary.mark()
    assert disks.memory.read_text() == "token-1\n"
    assert disks.disk.read_bytes() == b"token-1".ljust(4096, b"\0")
    disks.revert(disks.memory, saved)
    disks.revert(disks.disk, saved)
    assert canary.look(clock) == ""
    assert clock.words == ["left-alone"]


def test_a_revert_without_the_memory_is_found_out(
    canary: Canary, clock: UnsetClock, disks: Disks
) -> None:
    canary.plant()
    saved = disks.save()
    canary.mark()
    disks.revert(disks.disk, saved)
    assert canary.look(clock) == f"memory: {disks.memory} is still there"


def test_a_revert_without_the_disk_is_found_out(
    canary: Canary, clock: UnsetClock, disks: Disks
) -> None:
    canary.plant()
    saved = disks.save()
    canary.mark()
    disks.revert(disks.memory, saved)
    assert canary.look(clock) == f"disk: {disks.disk} still has the mark"


def test_the_mark_of_another_revert_is_no_mark(
    canary: Canary, clock: UnsetClock, agent: Agent, disks: Disks
) -> None:
    """As after a test from a named snapshot, whose disk holds what an earlier run left."""
    disks.disk.write_bytes(b"token-0".ljust(4096, b"\0"))
    assert canary.look(clock) == ""


def test_a_block_that_was_never_there_is_gone(canary: Canary, clock: UnsetClock) -> None:
    assert canary.look(clock) == ""


def test_the_block_is_overwritten_in_place(canary: Canary, disks: Disks) -> None:
    canary.plant()
    before = disks.disk.stat().st_ino
    disks.disk.write_bytes(bytes(8192))
    canary.mark()
    assert disks.disk.stat().st_ino == before
    assert disks.disk.stat().st_size == 8192


def test_an_error_other_than_absence_proves_nothing(
    canary: Canary, clock: UnsetClock, disks: Disks
) -> None:
    disks.memory.symlink_to(disks.memory)
    said = canary.look(clock)
    assert said is not None
    assert said.startswith("memory: ")
    assert "ymbolic" in said


def test_a_disk_that_cannot_be_read_proves_nothing(
    canary: Canary, clock: UnsetClock, disks: Disks
) -> None:
    disks.disk.mkdir()
    said = canary.look(clock)
    assert said is not None
    assert said.startswith("disk: ")


def test_a_disk_that_was_not_read_proves_nothing(
    canary: Canary, clock: UnsetClock, disks: Disks, tmp_path: Path
) -> None:
    (tmp_path / "bin" / "dd").write_text("#!/bin/sh\nkill -9 $$\n")
    disks.disk.write_bytes(bytes(4096))
    assert canary.look(clock) == "disk: dd ended with the status -9"


def test_another_file_that_is_missing_proves_nothing(
    canary: Canary, clock: UnsetClock, disks: Disks, local_guest: "LocalGuest"
) -> None:
    said = base64.b64encode(b"sh: getcwd: No such file or directory\n--\n").decode()
    local_guest.replies = {
        "guest-exec": {"pid": 1},
        "guest-exec-status": {"exited": True, "exitcode": 0, "err-data": said},
    }
    assert canary.look(clock) == "memory: sh: getcwd: No such file or directory"


def test_a_guest_that_cannot_write_takes_no_marks(canary: Canary, disks: Disks) -> None:
    disks.disk.mkdir()
    assert not canary.plant()
    assert not canary.mark()


@pytest.mark.parametrize("command", ["guest-exec", "guest-exec-status"])
def test_a_guest_that_runs_nothing_neither_marks_nor_looks(
    canary: Canary, clock: UnsetClock, local_guest: "LocalGuest", command: str
) -> None:
    local_guest.refusals = {command: "disabled"}
    assert not canary.plant()
    assert not canary.mark()
    assert canary.look(clock) is None
    canary.remove()


def test_a_guest_whose_shell_is_broken_neither_marks_nor_looks(
    canary: Canary, clock: UnsetClock, local_guest: "LocalGuest"
) -> None:
    local_guest.replies = {
        "guest-exec": {"pid": 1},
        "guest-exec-status": {"exited": True, "exitcode": 127},
    }
    assert not canary.mark()
    assert canary.look(clock) is None


def test_removing_removes_the_block(canary: Canary, disks: Disks) -> None:
    canary.plant()
    canary.remove()
    assert not disks.disk.exists()
    canary.remove()
