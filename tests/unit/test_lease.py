"""One process owns a machine at a time, by a lock that dies with it."""

import contextlib
import os
import pwd
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap.errors import LeaseError
from pytest_kvmsnap.lab import locks
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.lab.locks import folder_for, folders
from pytest_kvmsnap.lab.waiting import Wait
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import connect

if TYPE_CHECKING:
    from testdriver import Host

# Takes the lease beside argv[1], writes a journal there, and holds it until its input ends.
HOLDER = """
import sys
from pathlib import Path
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.lease import Lease

path = Path(sys.argv[1])
lease = Lease(path)
assert lease.try_take()
if "journal" in sys.argv:
    journal = Journal(path, "run", "uri", "box", "uuid")
    journal.test = "test_x.py::test_y"
    journal.save()
print("held", flush=True)
sys.stdin.read()
if "release" in sys.argv:
    lease.release()
"""


class Holder:
    """A process that holds a lease."""

    def __init__(self, path: Path, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"held\n"

    def end(self) -> None:
        self.process.communicate()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "machine.json"


@pytest.fixture
def lease(path: Path) -> Iterator[Lease]:
    lease = Lease(path)
    yield lease
    lease.release()


def quiet(_: str) -> None:
    """Hear nothing."""


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_two_processes_do_not_hold_it_at_once(path: Path, lease: Lease) -> None:
    holder = Holder(path, "release")
    assert not lease.try_take()
    holder.end()
    assert lease.try_take()


def test_it_dies_with_its_owner(path: Path, lease: Lease) -> None:
    holder = Holder(path, "journal")
    assert not lease.try_take()
    holder.kill()
    assert lease.try_take()
    assert path.exists(), "the journal stays for whoever comes next"


def test_it_is_not_inherited_by_a_child(path: Path, lease: Lease) -> None:
    assert lease.try_take()
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        lease.release()
        other = Lease(path)
        taken = other.try_take()
        other.release()
        child.kill()
    assert taken


def test_waiting_ends_when_the_owner_dies(path: Path, lease: Lease) -> None:
    holder = Holder(path, "journal")
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        holder.kill()

    lease.take("box at uri", 60, tell)
    assert len(told) == 1
    assert told[0].startswith(f"waiting for box at uri, held by pid {holder.process.pid} of ")
    assert told[0].endswith(", in test_x.py::test_y")


def test_waiting_too_long_names_the_owner(path: Path, lease: Lease) -> None:
    holder = Holder(path, "journal")
    with pytest.raises(LeaseError, match="the machine belongs to another process") as caught:
        lease.take("box at uri", 0.1, quiet)
    assert caught.value.where == "box at uri"
    assert f"waited 0.1 s for pid {holder.process.pid} of " in caught.value.why
    assert "--kvmsnap-lock-timeout" in caught.value.cure
    holder.end()


def test_an_owner_without_a_journal_is_told_as_such(path: Path, lease: Lease) -> None:
    holder = Holder(path)
    with pytest.raises(LeaseError) as caught:
        lease.take("box", 0.1, quiet)
    assert caught.value.why == "waited 0.1 s for a process that has just taken it"
    holder.end()


def test_an_owner_with_a_journal_that_we_cannot_read_is_told_as_such(
    path: Path, lease: Lease
) -> None:
    holder = Holder(path)
    path.write_text("{")
    with pytest.raises(LeaseError) as caught:
        lease.take("box", 0.1, quiet)
    user = pwd.getpwuid(os.getuid()).pw_name
    assert caught.value.why == f"waited 0.1 s for a process of the user {user}"
    holder.end()


# files


def test_the_locks_file_goes_with_the_lease(path: Path) -> None:
    lease = Lease(path)
    assert lease.try_take()
    assert names(path.parent) == ["machine.lock"]
    lease.release()
    assert names(path.parent) == []


def test_the_locks_file_goes_and_what_must_be_undone_stays(path: Path) -> None:
    lease = Lease(path)
    assert lease.try_take()
    Journal(path, "run", "uri", "box", "uuid").save()
    lease.release()
    assert names(path.parent) == ["machine.json"]


def test_it_can_be_taken_again_after_its_release(path: Path, lease: Lease) -> None:
    for _ in range(2):
        assert lease.try_take()
        lease.release()


def test_a_lock_whose_file_was_removed_meanwhile_excludes_others_all_the_same(
    path: Path, lease: Lease
) -> None:
    """We remove the file at the release, while others may have it open."""
    holder = Holder(path, "release")
    assert not lease.try_take()
    holder.end()
    assert lease.try_take()
    other = Lease(path)
    assert not other.try_take()


def test_a_release_leaves_the_lock_of_the_next_one_alone(path: Path, lease: Lease) -> None:
    """Ours removes the file first; somebody may make and lock another before the rest is done."""
    assert lease.try_take()
    path.with_suffix(".lock").unlink()
    following = Lease(path)
    assert following.try_take()
    lease._lock._lock.release()
    assert not Lease(path).try_take()
    following.release()


def test_a_lock_is_private(path: Path, lease: Lease) -> None:
    assert lease.try_take()
    assert path.with_suffix(".lock").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("target", ["precious", "nowhere"])
def test_a_link_in_the_place_of_the_lock_is_refused(path: Path, lease: Lease, target: str) -> None:
    precious = path.with_name("precious")
    precious.write_text("precious")
    lock = path.with_suffix(".lock")
    lock.symlink_to(path.with_name(target))
    with pytest.raises(LeaseError, match="cannot use the lock") as caught:
        lease.take("box", 1, quiet)
    assert str(lock) in caught.value.what
    assert "--kvmsnap-lock-dir" in caught.value.cure
    assert precious.read_text() == "precious"
    assert not path.with_name("nowhere").exists()
    lock.unlink()


def test_a_folder_in_the_place_of_the_lock_is_refused(path: Path, lease: Lease) -> None:
    path.with_suffix(".lock").mkdir()
    with pytest.raises(LeaseError, match="cannot use the lock"):
        lease.take("box", 1, quiet)


# folders


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(locks, "_SHARED", tmp_path / "run" / "shared")
    return tmp_path


@pytest.mark.parametrize(
    "uri", ["test:///default", "qemu:///session", "qemu:///embed?root=/x", "qemu+ssh://h/session"]
)
def test_the_folder_of_other_uris_is_the_users_own(
    home: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    folder = folder_for(uri, None)
    assert folder == home / ".local/state/pytest-kvmsnap"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_folder_follows_xdg(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    assert folder_for("test:///default", None) == home / "state" / "pytest-kvmsnap"


def test_the_session_of_root_is_the_daemon_of_the_system(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert folder_for("qemu:///session", None) == home / "run" / "shared"


@pytest.mark.parametrize("uri", ["qemu:///system", "qemu+ssh://host/system", "xen:///system"])
def test_the_folder_of_system_uris_is_shared_and_sticky(home: Path, uri: str) -> None:
    folder = folder_for(uri, None)
    assert folder == home / "run" / "shared"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    assert folders() == [folder, home / ".local/state/pytest-kvmsnap"]


def test_the_shared_folder_is_not_opened_up_through_a_link(home: Path) -> None:
    private = home / "private"
    private.mkdir(mode=0o700)
    (home / "run").mkdir(exist_ok=True)
    (home / "run" / "shared").symlink_to(private)
    with pytest.raises(LeaseError, match=r"cannot use .*shared for locks"):
        folder_for("qemu:///system", None)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


def test_locks_in_the_shared_folder_can_be_opened_by_everyone(home: Path) -> None:
    lease = Lease(folder_for("qemu:///system", None) / "machine.json")
    umask = os.umask(0o077)
    try:
        assert lease.try_take()
        mode = (home / "run/shared/machine.lock").stat().st_mode
    finally:
        os.umask(umask)
        lease.release()
    assert stat.S_IMODE(mode) == 0o666


@pytest.mark.parametrize("uri", ["qemu:///system", "test:///default"])
def test_a_folder_that_is_named_is_used_for_all(home: Path, uri: str) -> None:
    wanted = home / "deep" / "locks"
    assert folder_for(uri, wanted) == wanted
    assert stat.S_IMODE(wanted.stat().st_mode) == 0o700


def test_a_folder_that_exists_keeps_its_mode(home: Path) -> None:
    wanted = home / "locks"
    wanted.mkdir(mode=0o755)
    folder_for("test:///default", wanted)
    assert stat.S_IMODE(wanted.stat().st_mode) == 0o755


def make_file(folder: Path) -> None:
    folder.touch()


def make_link(folder: Path) -> None:
    folder.with_name("elsewhere").mkdir()
    folder.symlink_to(folder.with_name("elsewhere"))


@pytest.mark.parametrize("make", [make_file, make_link])
def test_a_folder_that_cannot_be_used_is_told(home: Path, make: object) -> None:
    assert callable(make)
    make(home / "locks")
    with pytest.raises(LeaseError, match=r"cannot use .*locks for locks") as caught:
        folder_for("test:///default", home / "locks")
    assert caught.value.why
    assert "--kvmsnap-lock-dir" in caught.value.cure


# which lock


def test_a_machine_has_the_same_lock_whatever_its_name_is(host: "Host", tmp_path: Path) -> None:
    uuid = host.define().UUIDString()
    hypervisor = connect("test:///default")
    one, renamed, other = (
        Lease.of(Domain(hypervisor, *it), tmp_path).journal_path
        for it in [(uuid, "box"), (uuid, "renamed"), (uuid[::-1], "box")]
    )
    hypervisor.close()
    assert one == renamed != other
    assert one.parent == tmp_path
    assert one.suffix == ".json"


# taking turns


def test_nobody_waits_for_it_at_first(lease: Lease) -> None:
    assert lease.try_take()
    assert not lease.is_wanted()


def test_its_owner_sees_that_somebody_waits_and_that_one_comes_next(path: Path) -> None:
    lease = Lease(path)
    assert lease.try_take()
    with waiting(path) as other:
        while not lease.is_wanted():
            assert other.poll() is None
        lease.release()
        lease.take("box", 60, quiet)  # which waits for the other one
        lease.release()
        assert other.stdout is not None
        assert other.stdout.read() == "had it\n"
    assert names(path.parent) == ["log"]
    assert (path.parent / "log").read_text() == "other\n"


# Waits for the lease beside argv[1], and writes into a log while it has it.
WAITER = """
import sys
from pathlib import Path
from pytest_kvmsnap.lab.lease import Lease

path = Path(sys.argv[1])
lease = Lease(path)
lease.take("box", 60, lambda _: None)
path.with_name("log").write_text("other\\n")
lease.release()
print("had it")
"""


@contextlib.contextmanager
def waiting(path: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", WAITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
    assert process.returncode == 0


def test_waiting_begins_anew_with_another_owner(path: Path) -> None:
    wait = Wait("box", 0.01, quiet)
    for pid in (1, 2, 3):
        Journal(path, "run", "uri", "box", "uuid", pid=pid).save()
        wait.go_on([path])
    with pytest.raises(LeaseError):
        wait.go_on([path])


@pytest.mark.parametrize(("ours", "waits"), [("same", True), ("other", False), ("", False)])
def test_waiting_begins_anew_with_each_test_of_another_worker_of_the_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, ours: str, waits: bool
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "same")
    journal = Journal(path, "run", "uri", "box", "uuid", test="test_one")
    journal.save()
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", ours)
    wait = Wait("box", 0.01, quiet)
    wait.go_on([path])
    journal.test = "test_two"
    journal.save()
    if waits:
        wait.go_on([path])
    else:
        with pytest.raises(LeaseError):
            wait.go_on([path])


def test_who_only_looks_waits_for_others_who_look_and_not_for_a_run(path: Path) -> None:
    first = Lease(path)
    assert first.try_take()
    other = Lease(path)
    assert not other.take_unless_in_use(0.2)
    Journal(path, "run", "uri", "box", "uuid").save()
    assert not other.take_unless_in_use(3600)
    first.release()
    assert other.take_unless_in_use(0.2)
    other.release()
