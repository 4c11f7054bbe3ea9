"""A machine that fails is quarantined, and what could not be undone is said and kept.

Mocks throughout: the test driver never fails.
"""

import base64
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import libvirt
import pytest
from testdriver import disk, fail_when

from pytest_kvmsnap.errors import (
    AgentError,
    AgentLostError,
    MachineError,
    RevertError,
    SnapshotError,
)
from pytest_kvmsnap.guest.canary import MEMORY
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.lab import machine
from pytest_kvmsnap.machine.domain import Domain

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite

AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
THREE_TESTS = """
    def test_one(vm): pass
    def test_two(vm): pass
    def test_three(vm): pass
    def test_without(): pass
"""


def revert_error(why: str = "the mock says so") -> RevertError:
    return RevertError("cannot revert to the snapshot", where="box", why=why)


def first_call() -> Callable[..., bool]:
    calls: list[object] = []
    return lambda *_: not calls and not calls.append(0)  # type: ignore[func-returns-value]


@pytest.mark.parametrize("state", ["running", "paused", "shut off"])
def test_a_failing_revert_is_an_error_of_the_test_and_the_next_ones_fail_at_once(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, calls: "Calls", state: str
) -> None:
    host.define(state=state)
    before = host.look()
    fail_when(monkeypatch, "revert", revert_error(), first_call())
    suite.write(THREE_TESTS)
    result = suite.run()
    result.assert_outcomes(passed=2, errors=3)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_one*",
            "cannot revert to the snapshot",
            "  where: box",
            "  why:   the mock says so",
            "*ERROR at setup of test_two*",
            "the machine is in quarantine, since it failed before",
            "  where: box at test:///default",
            "  why:   cannot revert to the snapshot",
            "           why:   the mock says so",
            "*ERROR at setup of test_three*",
            "the machine is in quarantine*",
        ]
    )
    assert "Traceback" not in result.stdout.str()
    assert host.look() == before, "it is put right at the end, where that works again"
    assert calls.count("take") == (1 if state == "running" else 2)


ONCE_MORE = {
    "running": ["take found", "revert found", "revert found", "delete found"],
    "shut off": [
        *["take found", "start", "revert found", "start", "take base"],
        *["revert base", "revert found", "delete base", "delete found"],
    ],
}


@pytest.mark.parametrize("found", ["running", "shut off"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_machine_whose_agent_libvirt_lost_is_put_back_once_more(
    suite: "Suite",
    host: "Host",
    calls: "Calls",
    monkeypatch: pytest.MonkeyPatch,
    found: str,
    times: int,
) -> None:
    """At the first way back of one that runs, at the first start of another."""
    host.define(state=found)
    before = host.look()
    error = AgentLostError("the machine did not get ready", where="box", why="the mock says so")
    waits = iter([None, *[error] * times] if found == "running" else [error] * times)

    original = Guest.wait_ready

    def losing(*args: Any) -> None:
        if lost := next(waits, None):
            raise lost
        original(*args)

    monkeypatch.setattr(Guest, "wait_ready", losing)
    suite.write("def test_one(vm): pass")
    result = suite.run()
    if times == 1:
        result.assert_outcomes(passed=1)
        assert calls.log == ONCE_MORE[found]
    else:
        result.assert_outcomes(errors=1, passed=1 if found == "running" else 0)
        result.stdout.fnmatch_lines(["the machine did not get ready", "*the mock says so"])
        assert calls.log.count("revert found") == (3 if found == "running" else 2)
    assert next(waits, None) is None
    assert host.look() == before


class Marks:
    """In place of the canary: what the guest was asked, which does nothing while it is lost."""

    log: ClassVar[list[str]] = []
    is_lost = False

    def __init__(self, *_: object) -> None: ...

    def plant(self) -> bool:
        return True

    def mark(self) -> bool:
        self.log.append("mark")
        return not Marks.is_lost

    def look(self, _: object) -> str:
        self.log.append("look")
        return ""


def test_a_lost_agent_costs_no_proof(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is lost while the machine boots; the marks of the test before are looked for then."""
    host.define("box", disk("/images/box.qcow2"), AGENT)
    waits = iter(["", "lost", ""])

    def losing(*_: object) -> None:
        Marks.is_lost = bool(next(waits))
        if Marks.is_lost:
            raise AgentLostError("the machine did not get ready")

    monkeypatch.setattr(Marks, "log", [])
    monkeypatch.setattr(machine, "Canary", Marks)
    monkeypatch.setattr(Guest, "wait_ready", losing)
    monkeypatch.setattr(Guest, "set_clock", lambda _: None)
    suite.write("def test_one(vm): pass\ndef test_two(vm): pass")
    result = suite.run("--kvmsnap-live=no")
    result.assert_outcomes(passed=2)
    assert Marks.log == ["mark", "look", "mark"]
    result.stdout.no_fnmatch_line("*marks of the proof*")


@pytest.mark.parametrize("option", ["-pno:terminal", "--no-summary"])
def test_what_could_not_be_put_back_is_said_where_there_is_no_summary(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    host.define(state="shut off")
    fail_when(monkeypatch, "revert", revert_error("for good"), lambda name, _: "found" in name)
    suite.write("def test_one(vm): pass")
    result = suite.run(option)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stderr.fnmatch_lines(["cannot revert to the snapshot", "*for good"])


def test_a_quarantined_machine_leaves_others_alone(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define("bad", state="running")
    host.define("good", state="running")
    before = host.looks()
    fail_when(monkeypatch, "revert", revert_error(), first_call())
    suite.write(
        """
        import pytest

        @pytest.mark.parametrize("vm", ["bad", "good", "bad", "good"], indirect=True)
        def test_machine(vm): pass
        """
    )
    suite.run(domain=None).assert_outcomes(passed=3, errors=2)
    assert host.looks() == before


def test_a_failing_snapshot_quarantines(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, calls: "Calls"
) -> None:
    host.define(state="running")
    before = host.look()
    error = SnapshotError("cannot take the snapshot", where="box", why="no room")
    fail_when(monkeypatch, "take_snapshot", error, lambda *_: True)
    suite.write(THREE_TESTS)
    result = suite.run()
    result.assert_outcomes(passed=1, errors=3)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at setup of test_one*",
            "cannot take the snapshot",
            "*ERROR at setup of test_two*",
            "the machine is in quarantine*",
            "  why:   cannot take the snapshot",
        ]
    )
    assert calls.snapshots == []
    assert host.look() == before
    assert suite.left_over() == []


@pytest.mark.parametrize("method", ["start", "resume"])
def test_a_machine_that_does_not_come_up_is_quarantined(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    host.define(state="shut off" if method == "start" else "paused")
    before = host.look()
    error = MachineError("cannot bring the machine up", where="box", why="no memory")
    fail_when(monkeypatch, method, error, lambda *_: True)
    suite.write(THREE_TESTS)
    suite.run().assert_outcomes(passed=1, errors=3)
    assert host.look() == before
    assert suite.left_over() == []


def test_a_machine_that_is_elsewhere_after_the_revert_is_quarantined(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt says that it reverted, and did nothing."""
    host.define(state="running")
    original = Domain.revert
    skipped = first_call()

    def lying(self: Domain, name: str, timeout: float) -> None:
        if not skipped():
            original(self, name, timeout)

    monkeypatch.setattr(Domain, "revert", lying)
    suite.write("def test_one(vm): vm.destroy()\ndef test_two(vm): pass")
    result = suite.run()
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(
        [
            "the machine is not where the revert to 'kvmsnap-found-*' should have brought it",
            "  where: box at test:///default",
            "  why:   it is shut off at *; expected running at 'kvmsnap-found-*'",
        ]
    )


def test_a_revert_beyond_its_timeout_ends_with_a_destroyed_machine(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, calls: "Calls"
) -> None:
    host.define(state="running")
    destroyed = threading.Event()
    original_revert = libvirt.virDomain.revertToSnapshot
    original_destroy = libvirt.virDomain.destroy
    stuck = first_call()

    def stuck_revert(self: libvirt.virDomain, *args: Any) -> int:
        if stuck():
            assert destroyed.wait(60)
        return original_revert(self, *args)

    def destroy(self: libvirt.virDomain) -> int:
        destroyed.set()
        return original_destroy(self)

    monkeypatch.setattr(libvirt.virDomain, "revertToSnapshot", stuck_revert)
    monkeypatch.setattr(libvirt.virDomain, "destroy", destroy)
    suite.write(THREE_TESTS)
    result = suite.run("--kvmsnap-revert-timeout=0.2")
    result.assert_outcomes(passed=2, errors=3)
    result.stdout.fnmatch_lines(
        [
            "cannot revert to the snapshot 'kvmsnap-found-*'",
            "  where: box at test:///default",
            "  why:   it took more than 0.2 s; the machine was destroyed",
            "  cure:  give it more time with --kvmsnap-revert-timeout",
        ]
    )
    assert calls.count("destroy") == 1


# the end of the run


def test_a_machine_that_cannot_be_left_as_found_is_told_and_remembered(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define(state="running")
    before = host.look()
    error = SnapshotError("cannot delete the snapshot", where="box", why="the mock says so")
    suite.write("def test_one(vm): pass")
    with monkeypatch.context() as patched:
        fail_when(patched, "delete_snapshot", error, lambda *_: True)
        result = suite.run()
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["=* pytest-kvmsnap *=", "cannot delete the snapshot"])
    assert [name.partition(".")[2] for name in suite.left_over()] == ["json"]
    result = suite.run()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["kvmsnap: put box back as found (running): *"])
    assert host.look() == before
    assert suite.left_over() == []


def test_a_failing_end_does_not_hide_another_status(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define(state="running")
    error = SnapshotError("cannot delete the snapshot", where="box", why="the mock says so")
    fail_when(monkeypatch, "delete_snapshot", error, lambda *_: True)
    suite.write("def test_one(vm): raise KeyboardInterrupt")
    assert suite.run().ret == pytest.ExitCode.INTERRUPTED


def test_one_machine_that_fails_at_the_end_does_not_keep_the_next_from_its_end(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define("one", state="running")
    host.define("two", state="running")
    before = host.look("two")
    error = SnapshotError("cannot delete the snapshot", where="one", why="the mock says so")
    fail_when(monkeypatch, "delete_snapshot", error, first_call())
    suite.write(
        """
        import pytest

        @pytest.mark.parametrize("vm", ["one", "two"], indirect=True)
        def test_machine(vm): pass
        """
    )
    assert suite.run(domain=None).ret == pytest.ExitCode.TESTS_FAILED
    assert host.look("two") == before


@pytest.mark.parametrize("snapshots", [["precious", "current"], ["precious"]])
@pytest.mark.parametrize("state", ["running", "shut off"])
def test_a_snapshot_of_the_owner_that_a_test_deleted_is_told_at_the_end(
    suite: "Suite", host: "Host", state: str, snapshots: list[str]
) -> None:
    host.define(state=state)
    for name in snapshots:
        host.snapshot(name)
    suite.write("def test_one(vm): vm.delete_snapshot('precious')")
    result = suite.run()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "=* pytest-kvmsnap *=",
            "the machine could not be left as it was found",
            "  where: box at test:///default",
            "*these snapshots are gone: precious*",
            "  cure:  *--kvmsnap-clean*",
        ]
    )


def test_a_test_that_deletes_our_snapshot_is_told_by_its_teardown(
    suite: "Suite", host: "Host"
) -> None:
    host.define(state="running")
    suite.write("def test_one(vm): vm.delete_snapshot(vm.current_snapshot)\ndef test_two(vm): pass")
    result = suite.run()
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["cannot revert to the snapshot 'kvmsnap-found-*'"])
    assert "Traceback" not in result.stdout.str()


# the proof by the guest, with a guest that is scripted


AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


class StubGuest:
    """What the canary asks of the guest. `reverts` tells whether marks vanish with a revert."""

    def __init__(self, *, reverts: bool = True, takes_marks: bool = True) -> None:
        self.marked = False
        self.reverts = reverts
        self.takes_marks = takes_marks
        self.looks = 0
        self.planted = 0
        self.removed = 0

    def command(self, _agent: object, name: str, arguments: Any = None, **_: Any) -> Any:
        if name == "guest-exec":
            self.did = self._run(arguments["arg"])
            return {"pid": 7}
        if name == "guest-exec-status":
            status, said = self.did
            data = base64.b64encode(said.encode()).decode()
            return {"exited": True, "exitcode": status, "err-data": data}
        return {}

    def _run(self, arguments: list[str]) -> tuple[int, str]:
        """Return the status of a script, and what it says on its standard error."""
        script = "".join(arguments)
        if "if=/dev/zero" in script:
            self.planted += 1
        elif "umask" in script:
            self.marked = self.takes_marks
            return (0, "") if self.takes_marks else (1, "Read-only file system")
        elif "echo --" in script:
            self.looks += 1
            return 0, "--\n" if self.marked else f"cannot open {MEMORY}: No such file\n--\n"
        self.removed += "rm -f" in script
        return 0, ""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "StubGuest":
        from pytest_kvmsnap.guest.agent import Agent

        revert = Domain.revert

        def reverting(domain: Domain, name: str, timeout: float) -> None:
            revert(domain, name, timeout)
            self.marked = self.marked and not self.reverts

        monkeypatch.setattr(Agent, "command", lambda *a, **k: self.command(*a, **k))  # noqa: PLW0108
        monkeypatch.setattr(Domain, "revert", reverting)
        return self


def define_with_agent(host: "Host", state: str = "running") -> None:
    from testdriver import disk

    host.define("box", disk("/images/box.qcow2"), AGENT, state=state)


@pytest.mark.parametrize("state", ["running", "paused", "shut off"])
def test_each_revert_is_proven_by_the_guest(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    guest = StubGuest().install(monkeypatch)
    define_with_agent(host, state)
    before = host.look()
    suite.write(THREE_TESTS)
    result = suite.run()
    result.assert_outcomes(passed=4)
    assert guest.planted == 1
    assert guest.looks == 3
    assert guest.removed == (1 if state == "running" else 0)
    assert "by power state" not in result.stdout.str()
    assert host.look() == before


def test_a_mark_that_is_still_there_after_a_revert_is_an_error(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    StubGuest(reverts=False).install(monkeypatch)
    define_with_agent(host)
    suite.write(THREE_TESTS)
    result = suite.run()
    result.assert_outcomes(passed=2, errors=3)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_one*",
            "the revert did not bring the machine back",
            "*a mark made right before it was not gone after it; memory: /run/*.canary is still*",
        ]
    )


def test_a_guest_that_takes_no_marks_is_told_at_the_end(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = StubGuest(takes_marks=False).install(monkeypatch)
    define_with_agent(host)
    suite.write(THREE_TESTS)
    result = suite.run()
    result.assert_outcomes(passed=4)
    assert result.ret == 0
    assert guest.looks == 0
    result.stdout.fnmatch_lines(["box: after 3 tests the guest could not take or look for*"])
    result.stdout.fnmatch_lines(["*proven by power state and current snapshot alone: *::test_one*"])


def test_verify_state_asks_the_guest_for_nothing(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = StubGuest().install(monkeypatch)
    define_with_agent(host)
    suite.write(THREE_TESTS)
    result = suite.run("--kvmsnap-verify=state")
    result.assert_outcomes(passed=4)
    assert (guest.planted, guest.looks, guest.removed) == (0, 0, 0)
    assert "by power state" not in result.stdout.str()


def test_a_guest_that_never_gets_ready_is_told_and_quarantined(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_kvmsnap.guest.agent import Agent

    def silent(self: Agent, name: str, *_: Any, **__: Any) -> None:
        raise AgentError("the guest agent did not do it", why="not connected")

    monkeypatch.setattr(Agent, "command", silent)
    define_with_agent(host, "shut off")
    before = host.look()
    suite.write(THREE_TESTS)
    result = suite.run("--kvmsnap-ready-timeout=0.1")
    result.assert_outcomes(passed=1, errors=3)
    result.stdout.fnmatch_lines(
        [
            "the machine did not get ready",
            "  where: box at test:///default",
            "  why:   waited 0.1 s for the guest agent to answer (state: running)",
            "*nothing is known of its console",
            "  cure:  *--kvmsnap-ready=none*--kvmsnap-ready-timeout",
            "the machine is in quarantine*",
        ]
    )
    assert host.look() == before
