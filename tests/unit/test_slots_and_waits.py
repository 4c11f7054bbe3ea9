"""A cap on reverts, the queues for machines, and waits that would never end."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_kvmsnap.errors import LeaseError
from pytest_kvmsnap.lab import locks
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.lease import Lease, take_first_free
from pytest_kvmsnap.lab.locks import Lock, folder_for
from pytest_kvmsnap.lab.slots import Slots
from pytest_kvmsnap.lab.waiting import Wait, circle, is_to_yield


def quiet(_: str) -> None:
    """Hear nothing."""


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# slots

# Notes in a log when it gets one of argv[2] slots in the folder argv[1], and when it lets it go.
SLOT_USER = """
import sys, time
from pathlib import Path
from pytest_kvmsnap.lab.slots import Slots

folder, count = Path(sys.argv[1]), int(sys.argv[2])
slots = Slots(folder, "host", count, lambda _: None)

def note(what):
    with (folder / "log").open("a") as log:
        log.write(what)

print("ready", flush=True)
sys.stdin.readline()
for _ in range(8):
    with slots.one():
        note("(")
        time.sleep(0.01)
        note(")")
"""

# Holds the first of the slots in the folder argv[1] until it is killed.
SLOT_HOLDER = """
import sys
from pathlib import Path
from pytest_kvmsnap.lab.slots import Slots

with Slots(Path(sys.argv[1]), "host", 1, lambda _: None).one():
    print("held", flush=True)
    sys.stdin.read()
"""


def started(source: str, *args: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", source, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the only slot."""
    with started(SLOT_HOLDER, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("count", [1, 2])
def test_there_are_never_more_at_once_than_slots(tmp_path: Path, count: int) -> None:
    processes = [started(SLOT_USER, tmp_path, count) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    at_once, most = 0, 0
    for what in (tmp_path / "log").read_text():
        at_once += 1 if what == "(" else -1
        most = max(most, at_once)
    assert (tmp_path / "log").read_text().count("(") == 24
    assert most <= count
    assert names(tmp_path) == ["log"]


def test_the_slot_of_a_process_that_was_killed_is_free_again(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    (lock,) = tmp_path.glob("*.lock")
    assert Lock(lock).is_taken()
    holder.kill()
    holder.wait()
    with Slots(tmp_path, "host", 1, pytest.fail).one():
        assert Lock(lock).is_taken()
    assert names(tmp_path) == []


def test_who_waits_for_a_slot_is_told_so(
    tmp_path: Path, holder: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is a mock, by which every look takes a second."""
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        if len(told) == 2:
            holder.kill()
            holder.wait()

    seconds = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(seconds)))
    with Slots(tmp_path, "host", 1, tell).one():
        assert len(told) == 2
    assert "waiting for one of 1 reverts or boots to end" in told[0]
    assert "--kvmsnap-max-concurrent" in told[0]


def test_other_hosts_have_slots_of_their_own(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    assert holder.poll() is None
    with Slots(tmp_path, "another host", 1, pytest.fail).one():
        assert len(list(tmp_path.glob("slot-*.lock"))) == 2


def test_one_process_may_have_several_slots(tmp_path: Path) -> None:
    several = Slots(tmp_path, "host", 2, pytest.fail)
    with several.one(), several.one():
        assert len(names(tmp_path)) == 2
    with pytest.raises(ValueError, match="in it"), several.one():
        raise ValueError("in it")
    assert names(tmp_path) == []


# queues


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "machine.json"


LeaseIn = Callable[[str], Lease]


@pytest.fixture
def lease_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> LeaseIn:
    """Make a lease as processes of different runs have it; "" is one without workers."""

    def lease_in(testrun: str) -> Lease:
        if testrun:
            monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", testrun)
        else:
            monkeypatch.delenv("PYTEST_XDIST_TESTRUNUID", raising=False)
        return Lease(path)

    return lease_in


@pytest.mark.parametrize(
    ("owner", "waiters", "alone"),
    [
        ("", [""], False),
        ("", ["one"], False),
        ("one", [""], False),
        ("one", ["one"], True),
        ("one", ["two"], False),
        ("one", ["one", "two"], False),
        ("one", ["one", ""], False),
        ("", ["", "one"], False),
    ],
)
def test_an_owner_sees_who_waits_and_whether_only_workers_of_its_own_run_do(
    lease_in: LeaseIn, owner: str, waiters: list[str], alone: bool
) -> None:
    held = lease_in(owner)
    assert held.try_take()
    assert not held.is_wanted()
    assert not held.is_wanted_by_run_alone()
    waiting = [lease_in(waiter) for waiter in waiters]
    for each in waiting:
        assert not each.try_next()
    assert held.is_wanted()
    assert held.is_wanted_by_run_alone() == alone
    assert held.is_wanted(), "to look changes nothing"
    for each in waiting:
        each.not_next()
    assert not held.is_wanted()
    held.release()


@pytest.mark.parametrize("run", ["", "one"])
def test_of_one_run_one_waits_in_the_queue_and_the_others_behind_it(
    path: Path, lease_in: LeaseIn, run: str
) -> None:
    held, first, second, other = (lease_in(each) for each in (run, run, run, "another"))
    assert held.try_take()
    assert first.queue()
    assert not second.queue()
    assert other.queue()
    assert len(list(path.parent.glob("*.next*.lock"))) == 2
    held.release()
    assert not second.try_next()
    assert first.try_next()
    first.not_next()
    assert not second.try_next(), "it is the first one's"
    assert second.queue()
    for each in (first, second, other):
        each.not_next()
        each.release()
    assert names(path.parent) == []


@pytest.mark.parametrize("waiter", ["", "one", "two"])
@pytest.mark.parametrize("owner", ["", "one"])
def test_who_gave_it_up_does_not_come_before_who_waits(
    lease_in: LeaseIn, owner: str, waiter: str
) -> None:
    held, waiting = lease_in(owner), lease_in(waiter)
    assert held.try_take()
    assert not waiting.try_next()
    held.release()
    assert not held.try_unless_wanted()
    assert waiting.try_next()
    waiting.not_next()
    waiting.release()
    assert held.try_unless_wanted()
    held.release()


def test_who_died_waiting_is_not_waited_for(lease_in: LeaseIn, path: Path) -> None:
    held = lease_in("one")
    assert held.try_take()
    path.with_name("machine.next-0a1b2c3d.lock").touch()
    assert not held.is_wanted()
    held.release()
    assert names(path.parent) == []


def test_a_queue_that_is_none_is_not_waited_in(lease_in: LeaseIn, path: Path) -> None:
    held = lease_in("")
    assert held.try_take()
    path.with_name("machine.next-0a1b2c3d.lock").mkdir()
    path.with_name("another.next.lock").touch()
    assert not held.is_wanted()
    held.release()


# several machines


def never(_: object) -> None:
    raise AssertionError("it waited")


@pytest.mark.parametrize("taken", [set[int](), {0}, {0, 1}, {1}])
def test_the_first_free_one_is_taken_without_waiting_for_any(
    tmp_path: Path, taken: set[int]
) -> None:
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    others = [Lease(paths[number]) for number in taken]
    assert all(other.try_take() for other in others)
    leases = [Lease(path) for path in paths]
    wait = Wait("any", 60, never, never)
    free = take_first_free(leases, wait)
    assert leases.index(free) == min({0, 1, 2} - taken)
    assert len(names(tmp_path)) == len(taken) + 1, "there is no queue, and no other is taken"
    for each in (*others, free):
        each.release()


@pytest.mark.parametrize("freed", [0, 1])
def test_when_all_are_taken_the_one_that_gets_free_serves(tmp_path: Path, freed: int) -> None:
    paths = [tmp_path / f"{number}.json" for number in range(2)]
    others = [Lease(path) for path in paths]
    assert all(other.try_take() for other in others)
    looks = []

    def meanwhile(wanted: object) -> None:
        looks.append(wanted)
        assert all(other.is_wanted() for other in others)
        others[freed].release()

    leases = [Lease(path) for path in paths]
    free = take_first_free(leases, Wait("any", 60, quiet, meanwhile))
    assert leases.index(free) == freed
    assert looks[0] == paths
    assert not any(other.is_wanted() for other in others), "nobody waits any more"
    for each in (*others, free):
        each.release()
    assert names(tmp_path) == []


def test_who_gives_up_waiting_leaves_the_queues(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.json" for number in range(2)]
    others = [Lease(path) for path in paths]
    assert all(other.try_take() for other in others)
    for number, path in enumerate(paths):
        Journal(path, "run", "uri", f"box-{number}", "uuid").save()
    with pytest.raises(LeaseError) as caught:
        take_first_free([Lease(path) for path in paths], Wait("any of them", 0.01, quiet))
    assert caught.value.where == "any of them"
    assert caught.value.why.count("pid ") == 1, "the owner of both is named once"
    assert not any(other.is_wanted() for other in others)
    for other in others:
        other.release()


def test_it_is_told_for_whom_one_waits_at_growing_intervals(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is a mock, by which every step takes a second."""
    seconds = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr("time.sleep", quiet)
    told: list[str] = []
    wait = Wait("box", 10_000, told.append)
    Journal(path, "run", "uri", "box", "uuid").save()
    counts = []
    for _ in range(100):
        wait.go_on([path])
        counts.append(len(told))
    assert [counts.index(count) for count in range(1, 6)] == [1, 5, 13, 29, 61]


# waits that would never end


class Waits:
    """Journals of processes that wait for machines while they keep others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, machine: str) -> Path:
        return self.folder / f"{machine}.json"

    def add(self, keeps: str, waits_for: str, pid: int = 1) -> None:
        """Let a process keep a machine and wait for any of others, named by a letter each."""
        wanted = [f"{machine}.json" for machine in waits_for]
        Journal(
            self.path(keeps), "run", "uri", keeps, "uuid", pid=pid, host="host", waits_for=wanted
        ).save()

    def circle(self, wanted: str, kept: str) -> str:
        """Return which machines of others belong to a circle with us."""
        found = circle([self.path(w) for w in wanted], [self.path(k) for k in kept])
        return "".join(sorted(journal.name for journal in found))


@pytest.fixture
def waits(tmp_path: Path) -> Waits:
    return Waits(tmp_path)


# what others keep and wait for; what we want and keep; who is in a circle with us
CIRCLES: list[tuple[dict[str, str], str, str, str]] = [
    # two processes
    ({}, "b", "a", ""),
    ({"b": ""}, "b", "a", ""),
    ({"b": "a"}, "b", "a", "b"),
    ({"b": "a"}, "b", "", ""),
    ({"b": "c"}, "b", "a", ""),
    ({"b": "a", "c": "a"}, "b", "a", "b"),
    ({"b": "x"}, "b", "ax", "b"),
    # three in a circle, and a chain that ends with one who works
    ({"b": "c", "c": "a"}, "b", "a", "bc"),
    ({"b": "c", "c": ""}, "b", "a", ""),
    ({"b": "c", "c": "d", "d": "a"}, "b", "a", "bcd"),
    # we want any of several
    ({"b": "a", "c": ""}, "bc", "a", ""),
    ({"b": "a"}, "bc", "a", ""),
    ({"b": "a", "c": "a"}, "bc", "a", "bc"),
    ({"b": "c", "c": "a"}, "bc", "a", "bc"),
    # others want any of several
    ({"b": "ac", "c": ""}, "b", "a", ""),
    ({"b": "ca", "c": "a"}, "b", "a", "bc"),
    ({"b": "ac", "c": "b"}, "b", "a", "bc"),
    ({"b": "ca", "c": "b"}, "b", "a", "bc"),
    # a circle of others, which is theirs to break
    ({"b": "c", "c": "b"}, "b", "a", ""),
    ({"b": "b"}, "b", "a", ""),
    ({"b": "c", "c": "b", "d": "a"}, "bd", "a", ""),
]


@pytest.mark.parametrize(("others", "wanted", "kept", "found"), CIRCLES)
def test_a_circle_is_read_from_the_journals(
    waits: Waits, others: dict[str, str], wanted: str, kept: str, found: str
) -> None:
    for keeps, waits_for in others.items():
        waits.add(keeps, waits_for)
    assert waits.circle(wanted, kept) == found


def test_nothing_is_known_beyond_a_journal_that_cannot_be_read(waits: Waits) -> None:
    waits.add("b", "c")
    waits.path("c").write_text("{")
    assert waits.circle("b", "a") == ""
    assert waits.circle("c", "a") == ""
    waits.path("c").unlink()
    waits.add("c", "a")
    assert waits.circle("b", "a") == "bc"


@pytest.mark.parametrize("machines", ["abc", "abcd"])
def test_one_of_a_circle_gives_way(
    waits: Waits, monkeypatch: pytest.MonkeyPatch, machines: str
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "host")
    following = dict(zip(machines, machines[1:] + machines[0], strict=True))
    for pid, (keeps, wants) in enumerate(following.items()):
        waits.add(keeps, wants, pid=100 - pid)
    yields = []
    for pid, (keeps, wants) in enumerate(following.items()):
        monkeypatch.setattr("os.getpid", lambda pid=pid: 100 - pid)
        others = circle([waits.path(wants)], [waits.path(keeps)])
        assert len(others) == len(machines) - 1
        yields.append(is_to_yield(others))
    assert yields == [True] + [False] * (len(machines) - 1)


def test_one_gives_way_where_one_of_the_circle_waits_for_any_of_several(
    waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them see it, wherever they look from."""
    monkeypatch.setattr("socket.gethostname", lambda: "host")
    all_waits = {"a": ("b", 3), "b": ("ac", 1), "c": ("b", 2)}
    for keeps, (wants, pid) in all_waits.items():
        waits.add(keeps, wants, pid=pid)
    yields = {}
    for keeps, (wants, pid) in all_waits.items():
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        others = circle([waits.path(machine) for machine in wants], [waits.path(keeps)])
        assert len(others) == 2
        yields[keeps] = is_to_yield(others)
    assert yields == {"a": True, "b": False, "c": False}


def test_of_two_hosts_the_later_name_gives_way(
    waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits.add("b", "a", pid=9)
    others = circle([waits.path("b")], [waits.path("a")])
    monkeypatch.setattr("os.getpid", lambda: 1)
    monkeypatch.setattr("socket.gethostname", lambda: "zoo")
    assert is_to_yield(others)
    monkeypatch.setattr("socket.gethostname", lambda: "ant")
    assert not is_to_yield(others)


# what dead runs leave


def test_locks_of_the_dead_are_removed_and_those_of_the_living_stay(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    (living,) = names(tmp_path)
    for name in ("machine.lock", "machine.next.lock", "machine.next-0a1b2c3d.lock", "slot-x.lock"):
        (tmp_path / name).touch()
    (tmp_path / "machine.json").write_text("{}")
    (tmp_path / "folder.lock").mkdir()
    told: list[str] = []
    locks.sweep(tmp_path, told.append)
    assert holder.poll() is None
    assert names(tmp_path) == sorted(["folder.lock", "machine.json", living])
    assert told == [f"removed 4 locks that dead runs left in {tmp_path}"]


def test_where_there_are_no_locks_of_the_dead_nothing_is_said(tmp_path: Path) -> None:
    locks.sweep(tmp_path, pytest.fail)
    locks.sweep(tmp_path / "nowhere", pytest.fail)
    (tmp_path / "x.lock").touch()
    told: list[str] = []
    locks.sweep(tmp_path, told.append)
    assert told == [f"removed 1 lock that dead runs left in {tmp_path}"]


# folders in which somebody else may put something in place of our files


@pytest.mark.parametrize(
    ("mode", "refused"),
    [(0o700, False), (0o755, False), (0o777, True), (0o1777, False), (0o773, True), (0o772, True)],
)
def test_a_folder_of_ours_where_everybody_may_replace_files_is_refused(
    tmp_path: Path, mode: int, refused: bool
) -> None:
    folder = tmp_path / "locks"
    folder.mkdir()
    folder.chmod(mode)
    if not refused:
        assert folder_for("test:///default", folder) == folder
        return
    with pytest.raises(LeaseError, match=r"cannot use .*locks for locks") as caught:
        folder_for("test:///default", folder)
    assert "not sticky: chmod +t" in caught.value.why
    assert "--kvmsnap-lock-dir" in caught.value.cure


@pytest.mark.parametrize(("mode", "refused"), [(0o777, True), (0o755, True), (0o1777, False)])
def test_a_folder_of_another_user_is_refused_unless_it_is_sticky(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, refused: bool
) -> None:
    folder = tmp_path / "locks"
    folder.mkdir()
    folder.chmod(mode)
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        us = os.geteuid()
        monkeypatch.setattr("os.geteuid", lambda: us + 1)
    if not refused:
        assert folder_for("test:///default", folder) == folder
        return
    with pytest.raises(LeaseError) as caught:
        folder_for("test:///default", folder)
    assert "it belongs to another user" in caught.value.why


def test_a_folder_of_root_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        monkeypatch.setattr("os.geteuid", lambda: 12345)
        assert folder_for("test:///default", tmp_path) == tmp_path
    else:
        locks._check(Path("/tmp"))  # which is root's, and sticky
