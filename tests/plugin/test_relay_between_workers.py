"""A machine goes from worker to worker of one run with its snapshots, and to other runs as found.

"Workers" are runs of their own with the variable by which those of one run of pytest-xdist know
each other, where a test must know who comes when.
"""

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import libvirt
import pytest
from notes import write
from records import RECORDS, Record, turns
from testdriver import Look

from pytest_kvmsnap.lab import journal as journals
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.lab.machine import Machine

if TYPE_CHECKING:
    from sharedhost import Run, SharedSuite
    from testdriver import Calls, Host, Suite

TESTRUN = "PYTEST_XDIST_TESTRUNUID"

# `await_waiters(2)` returns when so many queues are waited in. A test that asks for `handed_on`
# ends when another worker waits for the machine, unless all others have run all of their tests.
RELAY = """
import pathlib

def await_(met):
    for _ in range(3000):
        if met():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to that")

def waiters():
    return len(list(pathlib.Path({locks!r}).glob("*.next*.lock")))

def await_waiters(count):
    await_(lambda: waiters() == count)

def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        note("-", "finish")

@pytest.fixture
def handed_on(diary, pytestconfig):
    yield
    others = pytestconfig.workerinput["workercount"] - 1
    record = pathlib.Path("record")
    await_(lambda: waiters() or record.read_text().count(" finish") >= others)
"""


def write_suite(shared: "SharedSuite", tests: str, conftest: str = "") -> None:
    """Write tests that may use what the conftest has, by `from conftest import …`."""
    relay = RELAY.format(locks=str(shared.locks))
    write(shared, "from conftest import await_, await_waiters, note\n" + tests, RECORDS + relay)
    with (shared.pytester.path / "conftest.py").open("a") as file:
        file.write(conftest)


# workers of pytest-xdist


@pytest.mark.usefixtures("xdist")
@pytest.mark.parametrize(
    ("dist", "workers", "state"),
    [
        ("load", 2, "shut off"),
        ("loadscope", 2, "running"),
        ("loadfile", 2, "paused"),
        ("loadgroup", 2, "shut off"),
        ("worksteal", 3, "running"),
    ],
)
def test_all_workers_share_the_snapshots_of_the_first(
    shared: "SharedSuite", dist: str, workers: int, state: str
) -> None:
    shared.host.define(state=state)
    shared.host.snapshot("of the owner")
    before = shared.host.look()
    write_suite(shared, "")
    for name in ("one", "two"):
        tests = f"""
import pytest
from words import read, write

pytestmark = pytest.mark.xdist_group("{name}")

@pytest.mark.parametrize("number", range(5))
def test_machine(vm, handed_on, number):
    assert read(vm) == []
    write(vm, "dirt")
"""
        shared.pytester.makepyfile(**{f"test_{name}": tests})
    result = shared.run_apart(f"-n{workers}", f"--dist={dist}", "-vv")
    result.assert_outcomes(passed=10)
    record = Record(shared.pytester.path)
    users = record.users()
    assert len(users) == 10
    assert len(set(users)) == workers
    assert turns(users) >= 4
    was_up = state == "running"
    assert record.count("take", "found") == 1
    assert record.count("take", "base") == (not was_up)
    assert record.count("start") == (state == "shut off")
    reverts = [entry for entry in record.entries if entry.verb == "revert"]
    assert len(reverts) == (10 if was_up else 11), "one for each test, and one back to as found"
    assert shared.host.look() == before
    assert shared.left_over() == []
    assert "put box back" not in result.stdout.str() + result.stderr.str()


@pytest.mark.usefixtures("xdist")
def test_what_a_killed_worker_did_is_undone_by_the_next_one(shared: "SharedSuite") -> None:
    shared.host.define()
    before = shared.host.look()
    write_suite(
        shared,
        """
import os

@pytest.mark.parametrize("number", range(8))
def test_machine(vm, number):
    assert read(vm) == []
    write(vm, "dirt")
    if number == 2:
        await_waiters(1)
        os.kill(os.getpid(), 9)
""",
    )
    result = shared.run_apart("-n2")
    result.assert_outcomes(passed=7, failed=1)
    said = result.stdout.str() + result.stderr.str()
    assert said.count("put box back as found (shut off): a run ended without doing so") == 1
    assert Record(shared.pytester.path).count("take", "found") >= 2
    assert shared.host.look() == before
    assert shared.left_over() == []


# several runs, and workers that are runs of their own


class Processes:
    """Runs of a suite that are workers of runs by the name of these, or of none."""

    def __init__(self, shared: "SharedSuite", monkeypatch: pytest.MonkeyPatch) -> None:
        self.shared = shared
        self._monkeypatch = monkeypatch
        self._started: list[Run] = []

    def start(self, testrun: str, *args: str) -> "Run":
        if testrun:
            self._monkeypatch.setenv(TESTRUN, testrun)
        run = self.shared.start_run(*args)
        self._monkeypatch.delenv(TESTRUN, raising=False)
        self._started.append(run)
        return run

    def until(self, met: Callable[[], object]) -> None:
        """Wait, for as long as all that were started run."""
        while not met():
            assert all(run.process.poll() is None for run in self._started), "one has ended"
            time.sleep(0.02)

    def has_begun(self, run: "Run", machine: str = "box") -> bool:
        path = self.shared.pytester.path / "record"
        return path.exists() and f"{run.process.pid} {machine} begin" in path.read_text()


@pytest.fixture
def processes(shared: "SharedSuite", monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(shared, monkeypatch)


# Names that no other name is part of, since -k looks at the module's too.
TESTS = """
def test_alpha(vm, diary):
    assert read(vm) == []
    write(vm, "dirt")
    await_waiters({count})

def test_beta(vm, diary): assert read(vm) == []

def test_gamma(vm, diary):
    assert read(vm) == []
    (snapshot,) = vm.snapshots()
    assert snapshot.name.startswith("kvmsnap-found-")
"""


@pytest.mark.parametrize(("owner", "waiter"), [("", "one"), ("one", ""), ("one", "two")])
def test_a_run_that_waits_comes_next_whether_it_has_workers_or_not(
    processes: Processes, owner: str, waiter: str
) -> None:
    shared = processes.shared
    shared.host.define(state="running")
    before = shared.host.look()
    write_suite(shared, TESTS.format(count=1))
    first = processes.start(owner, "-k", "alpha or beta")
    processes.until(lambda: processes.has_begun(first))
    second = processes.start(waiter, "-k", "gamma")
    first.result().assert_outcomes(passed=2, deselected=1)
    result = second.result()
    result.assert_outcomes(passed=1, deselected=2)
    record = Record(shared.pytester.path)
    one, two = first.process.pid, second.process.pid
    assert record.users() == [one, two, one]
    assert record.count("take", "found") == 3
    result.stdout.no_fnmatch_line("*put box back*")
    assert shared.host.look() == before
    assert shared.left_over() == []


def test_a_run_that_waits_beside_a_worker_gets_the_machine_as_it_was_found(
    processes: Processes,
) -> None:
    shared = processes.shared
    shared.host.define(state="running")
    before = shared.host.look()
    write_suite(shared, TESTS.format(count=2))
    first = processes.start("one", "-k", "alpha")
    processes.until(lambda: processes.has_begun(first))
    others = [processes.start("one", "-k", "beta"), processes.start("", "-k", "gamma")]
    results = [run.result() for run in (first, *others)]
    for result in results:
        result.assert_outcomes(passed=1, deselected=2)
        result.stdout.no_fnmatch_line("*put box back*")
    record = Record(shared.pytester.path)
    assert len(record.users()) == 3
    assert record.count("take", "found") == 3
    assert shared.host.look() == before
    assert shared.left_over() == []


KILLING = """
from pytest_kvmsnap.lab.machine import Machine

if pathlib.Path("kill").exists():
    leave_clean = Machine.leave_clean

    def killing(self, made_by):
        is_clean = leave_clean(self, made_by)
        if pathlib.Path("kill").exists():
            pid, number = map(int, pathlib.Path("kill").read_text().split())
            pathlib.Path("kill").unlink()
            os.kill(pid, number)
            note("box", "left" if is_clean else "put back")
            status, tasks = (pathlib.Path(f"/proc/{pid}/{name}") for name in ("stat", "task"))
            # Its first thread may be dead while another one still holds its files open.
            await_(lambda: not status.exists() or ") Z " in status.read_text())
            await_(lambda: not tasks.exists() or len(list(tasks.iterdir())) <= 1)
        return is_clean

    Machine.leave_clean = killing
"""


@pytest.mark.parametrize(
    ("number", "tests", "count"),
    [
        (signal.SIGKILL, "alpha", 1),
        (signal.SIGKILL, "alpha or beta", 2),
        (signal.SIGINT, "alpha or beta", 2),
    ],
)
def test_what_was_left_for_one_who_never_came_is_put_back_by_the_last_one_out(
    processes: Processes, number: signal.Signals, tests: str, count: int
) -> None:
    shared = processes.shared
    shared.host.define()
    before = shared.host.look()
    write_suite(shared, TESTS.format(count=1), KILLING)
    kill = shared.pytester.path / "kill"
    kill.touch()
    first = processes.start("one", "-k", tests)
    processes.until(lambda: processes.has_begun(first))
    kill.unlink()  # it is for the first one
    second = processes.start("one", "-k", "gamma")
    draft = shared.pytester.path / "kill-draft"
    draft.write_text(f"{second.process.pid} {int(number)}")
    draft.rename(kill)
    first.result().assert_outcomes(passed=count, deselected=3 - count)
    second.result()
    record = Record(shared.pytester.path)
    assert record.count("left") == 1
    assert record.count("take", "found") == record.count("take", "base") == 1
    assert record.users() == [first.process.pid] * count
    assert shared.host.look() == before
    assert shared.left_over() == []


# circles

CROSSED = """
import os, pathlib

pytestmark = pytest.mark.kvm_domain(os.environ["MINE"])

def test_holds(module_vm):
    write(module_vm, "mine")
    pathlib.Path(os.environ["MINE"]).touch()
    await_(pathlib.Path(os.environ["OTHER"]).exists)

@pytest.mark.kvm_domain(os.environ["OTHER"])
def test_wants(module_vm, vm):
    assert (read(module_vm), read(vm)) == (["mine"], [])
"""


def test_of_two_runs_that_wait_for_each_other_one_fails_with_both_names(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time to wait is longer than a run may take here."""
    shared = processes.shared
    for name in ("web", "db"):
        shared.host.define(name, state="running")
    before = shared.host.looks()
    write_suite(shared, CROSSED)
    runs = []
    for mine, other in (("web", "db"), ("db", "web")):
        monkeypatch.setenv("MINE", mine)
        monkeypatch.setenv("OTHER", other)
        runs.append(processes.start("", "-v"))
    results = [run.result() for run in runs]
    number = 0 if results[0].ret else 1
    broken, mine, other = results[number], *(("web", "db") if number == 0 else ("db", "web"))
    broken.assert_outcomes(passed=1, errors=1)
    results[1 - number].assert_outcomes(passed=2)
    holder = runs[1 - number].process.pid
    broken.stdout.fnmatch_lines(
        [
            "*ERROR at setup of test_wants*",
            "this wait would never end*",
            f"*where: {other} at *",
            f"*why: *{other} is held by pid {holder} of *test_wants, who waits for {mine}",
            f"*ours: {mine}",
            "*cure: *",
        ]
    )
    assert shared.host.looks() == before
    assert shared.left_over() == []


OPPOSITE = """
import os, time

pytestmark = pytest.mark.kvm_domain(os.environ["{mine}"])

@pytest.fixture(scope="module")
def slow(module_vm): time.sleep(0.2)

@pytest.mark.kvm_domain(os.environ["{other}"])
def test_both(slow, vm, diary):
    assert read(vm) == []
    write(vm, "dirt")
"""


def test_runs_that_need_two_machines_in_opposite_order_do_not_get_stuck(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = processes.shared
    for name in ("web", "db"):
        shared.host.define(name, state="running")
    before = shared.host.looks()
    write_suite(shared, "")
    for number in range(4):
        tests = OPPOSITE.format(mine="ONE", other="TWO")
        head = "import pytest\nfrom words import read, write\n"
        shared.pytester.makepyfile(**{f"test_{number}": head + tests})
    runs = []
    for mine, other in (("web", "db"), ("db", "web")):
        monkeypatch.setenv("ONE", mine)
        monkeypatch.setenv("TWO", other)
        runs.append(processes.start(""))
    for run in runs:
        run.result().assert_outcomes(passed=4)
    record = Record(shared.pytester.path)
    assert [len(record.users(name)) for name in ("db", "web")] == [4, 4]
    assert shared.host.looks() == before
    assert shared.left_over() == []


PINNED = """
import time

@pytest.mark.kvm_domain("web")
def test_alpha(vm, diary):
    await_waiters(2)
    time.sleep(1)  # so that the one who waits looks for others who do

@pytest.mark.kvm_domain("db")
def test_beta(vm): pass

@pytest.mark.kvm_domain("db")
class TestBoth:
    @pytest.mark.kvm_domain("web")
    def test_gamma(self, class_vm, vm, diary): assert read(class_vm) == read(vm) == []
"""


def test_what_a_test_has_already_stays_its_own_while_it_waits_for_more(
    processes: Processes,
) -> None:
    """Else one who needs both could take that one, and they would wait for each other."""
    shared = processes.shared
    for name in ("web", "db"):
        shared.host.define(name, state="running")
    write_suite(shared, PINNED)
    holder = processes.start("", "-k", "alpha")
    processes.until(lambda: processes.has_begun(holder, "web"))
    first = processes.start("", "-k", "beta or gamma")
    processes.until(lambda: list(shared.locks.glob("*.next.lock")))
    second = processes.start("", "-k", "gamma")
    holder.result().assert_outcomes(passed=1, deselected=2)
    first.result().assert_outcomes(passed=2, deselected=1)
    second.result().assert_outcomes(passed=1, deselected=2)
    pids = [run.process.pid for run in (holder, first, second)]
    assert Record(shared.pytester.path).users("web") == pids
    assert shared.left_over() == []


# what a worker leaves for the next one, in this process


class LeftClean:
    """The machine `box` as a worker of the run "one" left it, for another that has waited for it.

    That it waited is a mock.
    """

    def __init__(self, suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch) -> None:
        self.suite = suite
        self.host = host
        self.before: Look
        self._monkeypatch = monkeypatch

    def make(self, state: str = "running", *args: str) -> None:
        self.host.define("other", state="running")
        self.host.define(state=state)
        self.before = self.host.look()
        self._monkeypatch.setenv(TESTRUN, "one")
        write(
            self.suite,
            """
def test_alpha(vm): write(vm, "dirt")

def test_beta(vm):
    assert (vm.state, read(vm)) == ("running", [])

@pytest.mark.kvm_domain("other")
def test_gamma(vm): pass
""",
        )
        with self._monkeypatch.context() as patch:
            patch.setattr(Lease, "is_wanted", lambda _: True)
            patch.setattr(Lease, "is_wanted_by_run_alone", lambda _: True)
            self.suite.run("-k", "alpha", *args).assert_outcomes(passed=1, deselected=2)
        (path,) = self.suite.locks.iterdir()
        journal = journals.load(path)
        assert journal is not None
        assert journal.clean is not None
        self.journal = journal

    def run(self, *args: str, testrun: str = "one", test: str = "beta") -> pytest.RunResult:
        """Run the test that comes next, of a worker of a run, or of one without workers."""
        self._monkeypatch.setenv(TESTRUN, testrun)
        result = self.suite.run("-k", test, *args)
        result.assert_outcomes(passed=1, deselected=2)
        assert self.host.look() == self.before
        assert self.suite.left_over() == []
        return result


@pytest.fixture
def left_clean(suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch) -> LeftClean:
    return LeftClean(suite, host, monkeypatch)


@pytest.mark.parametrize(
    ("state", "args", "first", "then"),
    [
        (
            "running",
            (),
            ["take found", "revert found"],
            ["revert found", "delete found"],
        ),
        (
            "shut off",
            (),
            ["take found", "start", "take base", "revert base"],
            ["revert base", "revert found", "delete base", "delete found"],
        ),
        (
            "shut off",
            ("--kvmsnap-live=no",),
            ["take found", "start", "revert found"],
            ["start", "revert found", "delete found"],
        ),
    ],
)
def test_it_is_taken_over_as_it_was_left(
    left_clean: LeftClean,
    calls: "Calls",
    state: str,
    args: tuple[str, ...],
    first: list[str],
    then: list[str],
) -> None:
    left_clean.make(state, *args)
    assert calls.log == first
    calls.log.clear()
    left_clean.run(*args).stdout.no_fnmatch_line("*put box back*")
    assert calls.log == then


def destroy(box: libvirt.virDomain) -> None:
    box.destroy()


def restart(box: libvirt.virDomain) -> None:
    box.destroy()
    box.create()


def suspend(box: libvirt.virDomain) -> None:
    box.suspend()


def redefine(box: libvirt.virDomain) -> None:
    flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
    nothing: Any = None
    box.setMetadata(libvirt.VIR_DOMAIN_METADATA_TITLE, "dirt", nothing, nothing, flags)


@pytest.mark.parametrize("touch", [destroy, restart, suspend, redefine])
def test_it_is_reverted_first_where_somebody_touched_it_meanwhile(
    left_clean: LeftClean, calls: "Calls", touch: Callable[[libvirt.virDomain], None]
) -> None:
    left_clean.make()
    touch(left_clean.host.domain())
    calls.log.clear()
    left_clean.run()
    assert calls.log == ["revert found", "revert found", "delete found"]


@pytest.mark.parametrize("label", ["found", "base"])
def test_it_is_put_back_first_where_somebody_deleted_a_snapshot_meanwhile(
    left_clean: LeftClean, calls: "Calls", label: str
) -> None:
    left_clean.make("shut off")
    box = left_clean.host.domain()
    if label == "found":
        box.destroy()  # as it was; else nobody could know
    (name,) = [name for name in box.snapshotListNames() if label in name]
    box.snapshotLookupByName(name).delete()
    calls.log.clear()
    result = left_clean.run()
    result.stdout.fnmatch_lines(["*put box back as found (shut off): a worker had left it clean*"])
    assert calls.log.count("take found") == calls.log.count("take base") == 1


@pytest.mark.parametrize(
    ("args", "testrun"),
    [
        (("--kvmsnap-live=no",), "one"),
        (("--kvmsnap-verify=state",), "one"),
        (("--kvmsnap-ready=none",), "one"),
        ((), "two"),
        ((), ""),
    ],
)
def test_it_is_put_back_for_workers_with_other_settings_and_for_other_runs(
    left_clean: LeftClean, calls: "Calls", args: tuple[str, ...], testrun: str
) -> None:
    left_clean.make()
    calls.log.clear()
    result = left_clean.run(*args, testrun=testrun)
    pid = left_clean.journal.pid
    result.stdout.fnmatch_lines(
        [
            "*put box back as found (running): a worker had left it clean for another one of its"
            f" run (pid {pid} *"
        ]
    )
    assert calls.count("take") >= 1


@pytest.mark.parametrize("args", [(), ("--kvmsnap-live=no",)])
def test_the_last_one_out_puts_it_back_whatever_it_worked_with_itself(
    left_clean: LeftClean, args: tuple[str, ...]
) -> None:
    left_clean.make()
    result = left_clean.run(*args, test="gamma")
    result.stdout.no_fnmatch_line("*put box back*")


def test_the_last_one_out_leaves_alone_what_is_not_its_runs_or_is_elsewhere(
    left_clean: LeftClean,
) -> None:
    left_clean.make()
    journal = left_clean.journal
    for testrun, uri in (("two", journal.uri), ("one", "test:///elsewhere")):
        journal.testrun, journal.uri = testrun, uri
        journal.save()
        result = left_clean.suite.run("-k", "gamma")
        result.assert_outcomes(passed=1, deselected=2)
        assert left_clean.suite.left_over() == [journal.path.name]
        assert left_clean.host.look() != left_clean.before
    journal.testrun, journal.uri = "one", left_clean.suite.uri
    journal.save()
    left_clean.run()


def test_clean_puts_it_back_and_sweeps_the_locks(left_clean: LeftClean) -> None:
    left_clean.make()
    (left_clean.suite.locks / "dead.next.lock").touch()
    result = left_clean.suite.run("--kvmsnap-clean")
    result.stdout.fnmatch_lines(
        ["*put box back as found*", "*removed 1 lock that dead runs left in *"]
    )
    assert left_clean.host.look() == left_clean.before
    assert left_clean.suite.left_over() == []


def test_it_is_not_left_clean_by_one_who_could_not_put_it_there(
    left_clean: LeftClean, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody touches the machine between the revert and the look at it."""
    leave_clean = Machine.leave_clean
    left = []

    def touching(self: Machine, made_by: list[Any]) -> bool:
        left_clean.host.domain().destroy()
        left.append(leave_clean(self, made_by))
        return left[-1]

    monkeypatch.setattr(Machine, "leave_clean", touching)
    with pytest.raises(ValueError, match="not enough values"):  # no journal
        left_clean.make()
    assert left == [False]
    assert left_clean.host.look() == left_clean.before
    assert left_clean.suite.left_over() == []


def test_the_journal_of_the_next_worker_names_itself(left_clean: LeftClean) -> None:
    left_clean.make()
    left_clean.journal.pid, left_clean.journal.test = 1, ""
    left_clean.journal.save()
    (left_clean.suite.pytester.path / "test_the_next_one.py").write_text(
        f"""
import json, os, pathlib

def test_next(vm):
    journal = json.loads(pathlib.Path({str(left_clean.journal.path)!r}).read_text())
    assert journal["pid"] == os.getpid() == {os.getpid()}
    assert journal["test"].endswith("::test_next")
    assert journal["run"] == {left_clean.journal.run!r}
    assert journal["clean"] is None
"""
    )
    result = left_clean.suite.run("test_the_next_one.py")
    result.assert_outcomes(passed=1)
    assert left_clean.host.look() == left_clean.before
