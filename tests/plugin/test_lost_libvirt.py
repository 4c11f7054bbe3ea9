"""libvirt is gone for a moment, or for good: a test fails with the reason, and the next is clean.

Mocks throughout, since the test driver cannot get lost. Daemons that are really killed are in
tests/real.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import libvirt
import pytest
from testdriver import disk, fail_when

from pytest_kvmsnap.errors import ConnectionLostError
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.lab import machine
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import Hypervisor

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite

AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
MESS = "vm.snapshot('mess'); vm.destroy()"
CLEAN = "assert [s.name for s in vm.snapshots() if s.name == 'mess'] == []"
TWO_TESTS = f"def test_one(vm): {CLEAN}; {MESS}\ndef test_two(vm): {CLEAN}; {MESS}"


def lost(what: str = "cannot do it") -> ConnectionLostError:
    return ConnectionLostError(what, where="box", why="the mock says so")


def first(times: int, calls: Callable[..., bool] = lambda *_: True) -> Callable[..., bool]:
    """Tell of the first calls of some kind."""
    left = iter(range(times))
    return lambda *args: calls(*args) and next(left, None) is not None


@pytest.mark.parametrize("found", ["running", "paused", "shut off"])
@pytest.mark.parametrize("times", [1, 2])
def test_loss_in_the_way_back(
    suite: "Suite",
    host: "Host",
    calls: "Calls",
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    found: str,
) -> None:
    host.define(state=found)
    before = host.look()
    fail_when(monkeypatch, "revert", lost("cannot revert"), first(times))
    suite.write(TWO_TESTS)
    result = suite.run()
    result.assert_outcomes(passed=2, errors=times - 1)
    if times == 2:
        result.stdout.fnmatch_lines(
            ["*ERROR at teardown of test_one*", "cannot revert", "*where: box", "*the mock says so"]
        )
    assert "quarantine" not in result.stdout.str()
    assert host.look() == before
    assert suite.left_over() == []


@pytest.mark.parametrize(
    ("method", "found"),
    [
        *[("take_snapshot", found) for found in ("running", "paused", "shut off")],
        *[("fingerprint", found) for found in ("running", "paused", "shut off")],
        *[("snapshot_xmls", found) for found in ("running", "paused", "shut off")],
        ("start", "shut off"),
        ("resume", "paused"),
    ],
)
@pytest.mark.parametrize("turn", range(3))
def test_loss_before_or_in_a_test(
    suite: "Suite",
    host: "Host",
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    found: str,
    turn: int,
) -> None:
    """Wherever it is, the test under way fails at most, and the machine is never to blame."""
    host.define(state=found)
    before = host.look()
    turns = iter(range(100))
    fail_when(monkeypatch, method, lost(), lambda *_: next(turns) == turn)
    suite.write(TWO_TESTS)
    result = suite.run()
    outcomes = result.parseoutcomes()
    assert outcomes.pop("passed") >= 1
    assert sum(outcomes.values()) <= 1
    assert "quarantine" not in result.stdout.str()
    assert host.look() == before
    assert suite.left_over() == []


def test_next_test_trusts_nothing(
    suite: "Suite", host: "Host", calls: "Calls", monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define(state="running")
    original, is_first = machine.Machine._bring_up, first(1)

    def losing(self: machine.Machine, snapshot: str) -> None:
        if is_first():
            raise lost()
        original(self, snapshot)

    monkeypatch.setattr(machine.Machine, "_bring_up", losing)
    suite.write("def test_one(vm): pass\ndef test_two(vm): pass")
    suite.run().assert_outcomes(passed=1, errors=1)
    assert calls.log == ["take found", "revert found", "revert found", "delete found"]


@pytest.mark.parametrize("left", ["paused", "shut off"])
def test_machine_that_was_found_running_is_waited_for_again(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """libvirt dies before the first snapshot is taken."""
    host.define(state="running")
    before = host.look()
    is_first = first(1)

    def dying(guest: Guest) -> None:
        raw = guest.domain.raw
        if is_first():
            raw.suspend() if left == "paused" else raw.destroy()
            raise lost()
        assert guest.domain.state() == "running"

    monkeypatch.setattr(Guest, "wait_ready", dying)
    suite.write(TWO_TESTS)
    suite.run().assert_outcomes(passed=1, errors=1)
    assert host.look() == before


@pytest.mark.parametrize("left", ["running", "paused", "shut off"])
@pytest.mark.parametrize("stands", [True, False])
def test_machine_that_was_found_running_runs_on(
    suite: "Suite",
    host: "Host",
    monkeypatch: pytest.MonkeyPatch,
    left: str,
    stands: bool,
) -> None:
    """libvirt dies while it takes the first snapshot: the guest stands still, or QEMU is ended."""
    host.define(state="running")
    before = host.look()
    original = Domain.take_snapshot
    is_first = first(1)

    def dying(self: Domain, *args: Any) -> object:
        if not is_first():
            return original(self, *args)
        if stands:
            original(self, *args)
        if left == "paused":
            self.raw.suspend()
        elif left == "shut off":
            self.raw.destroy()
        raise lost()

    monkeypatch.setattr(Domain, "take_snapshot", dying)
    suite.write(TWO_TESTS)
    suite.run().assert_outcomes(passed=1, errors=1)
    assert host.look() == before
    assert suite.left_over() == []


@pytest.mark.parametrize("left", ["paused", "shut off"])
def test_machine_runs_on_at_the_end_too(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """libvirt was away for as long as the tests ran."""
    host.define(state="running")
    before = host.look()

    def dying(self: Domain, *_: object) -> None:
        self.raw.suspend() if left == "paused" else self.raw.destroy()
        monkeypatch.setattr(Hypervisor, "is_away", True, raising=False)
        raise lost()

    monkeypatch.setattr(Domain, "take_snapshot", dying)
    monkeypatch.setattr(machine.Machine, "_go_on", once_in_vain(machine.Machine._go_on))
    suite.write("def test_one(vm): pass")
    suite.run().assert_outcomes(errors=1)
    assert host.look() == before
    assert suite.left_over() == []


def once_in_vain(original: Callable[..., None]) -> Callable[..., None]:
    is_first = first(2)  # before the snapshot, and after it was lost

    def go_on(self: object) -> None:
        if is_first():
            raise_if_halted(self)
        else:
            original(self)

    return go_on


def raise_if_halted(of: Any) -> None:
    if of._is_halted:
        raise lost()


PREPARED = f"""
import pytest

@pytest.fixture(scope="module")
def prepared(module_vm):
    module_vm.snapshot("prepared")

def test_one(prepared, vm): assert "prepared" in str(vm.snapshots()); {CLEAN}; {MESS}
def test_two(prepared, vm): assert "prepared" in str(vm.snapshots()); {CLEAN}; {MESS}
"""


@pytest.mark.parametrize("where", ["prepared", "kvmsnap-prepared"])
def test_preparation_that_the_loss_interrupts_is_made_again(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In the fixture itself, where pytest would repeat the error, and when it is kept."""
    host.define(state="running")
    before = host.look()
    is_there = first(1, lambda name, *_: name.startswith(where))
    fail_when(monkeypatch, "take_snapshot", lost(), is_there)
    suite.write(PREPARED)
    result = suite.run()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at setup of test_one*"])
    assert host.look() == before


def test_what_a_wide_fixture_holds_is_not_given_up(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be kept while another test is to start from a clean machine."""
    host.define(state="running")
    before = host.look()
    is_there = first(1, lambda name, *_: "-held-" in name)
    fail_when(monkeypatch, "take_snapshot", lost(), is_there)
    suite.write(
        f"""
        def test_one(module_vm): module_vm.snapshot("mine")
        def test_two(vm): {CLEAN}
        def test_three(module_vm): assert "mine" in str(module_vm.snapshots())
        def test_four(vm): {CLEAN}
        def test_five(module_vm): assert "mine" in str(module_vm.snapshots())
        """
    )
    result = suite.run()
    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at setup of test_two*"])
    assert host.look() == before


@pytest.mark.parametrize("left", ["paused", "shut off"])
def test_what_it_holds_runs_on(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    host.define(state="running")
    original = Domain.take_snapshot
    is_there = first(1, lambda name, *_: "-held-" in name)

    def dying(self: Domain, *args: Any) -> object:
        if not is_there(*args):
            return original(self, *args)
        self.raw.suspend() if left == "paused" else self.raw.destroy()
        raise lost()

    monkeypatch.setattr(Domain, "take_snapshot", dying)
    suite.write(
        """
        def test_one(module_vm): pass
        def test_two(vm): pass
        def test_three(module_vm): assert module_vm.state == "running"
        """
    )
    suite.run().assert_outcomes(passed=2, errors=1)


@pytest.mark.parametrize("method", ["delete_snapshot", "set_autostart", "snapshot_xmls"])
@pytest.mark.parametrize("times", [1, 2])
def test_loss_at_the_end_of_the_run(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, method: str, times: int
) -> None:
    host.define(state="shut off")
    before = host.look()
    is_first = first(times, lambda *_: is_at_end)
    fail_when(monkeypatch, method, lost(), is_first)
    close, is_at_end = machine.Machine.close, False

    def closing(self: machine.Machine) -> None:
        nonlocal is_at_end
        is_at_end = True
        close(self)

    monkeypatch.setattr(machine.Machine, "close", closing)
    suite.write("def test_one(vm): pass")
    result = suite.run()
    result.assert_outcomes(passed=1)
    if times == 2:
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines(["*the mock says so", "*pytest --kvmsnap-clean*"])
        assert len(suite.left_over()) == 1
        suite.run("--kvmsnap-clean")
    assert host.look() == before
    assert suite.left_over() == []


def test_loss_in_the_tidying_up_is_healed(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, calls: "Calls"
) -> None:
    host.define(state="running")
    before = host.look()
    is_there = first(1, lambda name, *_: "-held-" in name)
    fail_when(monkeypatch, "delete_snapshot", lost(), is_there)
    suite.write("def test_one(module_vm): pass\ndef test_two(vm): pass")
    suite.run().assert_outcomes(passed=2)
    assert calls.count("delete") == 2
    assert host.look() == before


# the proof


class Marks:
    """In place of the canary, which loses the connection in some of its turns."""

    turns: ClassVar[list[str]] = []
    log: ClassVar[list[str]] = []

    def __init__(self, *_: object) -> None: ...

    def plant(self) -> bool:
        return True

    def _take_turn(self, what: str) -> None:
        self.log.append(what)
        if self.turns and self.turns[0] == what:
            self.turns.pop(0)
            raise lost(f"cannot {what}")

    def mark(self) -> bool:
        self._take_turn("mark")
        return True

    def look(self, _: object) -> str:
        self._take_turn("look")
        return ""


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Marks, "turns", [])
    monkeypatch.setattr(Marks, "log", [])
    monkeypatch.setattr(machine, "Canary", Marks)
    monkeypatch.setattr(Guest, "wait_ready", lambda *_: None)
    monkeypatch.setattr(Guest, "set_clock", lambda _: None)
    monkeypatch.setattr("pytest_kvmsnap.lab.restore._tidy_guest", lambda *_: None)


@pytest.mark.parametrize(
    ("turns", "log"),
    [
        ([], ["mark", "look"]),
        (["mark"], ["mark", "mark", "look"]),
        (["look"], ["mark", "look", "look"]),
        (["mark", "look"], ["mark", "mark", "look", "look"]),
        (["mark", "mark"], ["mark", "mark", "mark", "look"]),
        (["look", "look"], ["mark", "look", "look", "mark", "look"]),
    ],
)
def test_loss_costs_no_proof(
    suite: "Suite", host: "Host", marks: None, turns: list[str], log: list[str]
) -> None:
    """What is lost twice is proven before the next test starts."""
    host.define("box", disk("/images/box.qcow2"), AGENT, state="running")
    Marks.turns += turns
    suite.write("def test_one(vm): pass\ndef test_two(vm): pass")
    result = suite.run()
    twice = len(turns) == 2 and turns[0] == turns[1]
    result.assert_outcomes(passed=2, errors=1 if twice else 0)
    assert Marks.log == [*log, "mark", "look"]
    result.stdout.no_fnmatch_line("*marks of the proof*")


def test_loss_before_the_marks_costs_no_proof(
    suite: "Suite", host: "Host", marks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define("box", disk("/images/box.qcow2"), AGENT, state="running")
    original = machine.Machine._mark
    is_marking = False

    def marking(self: machine.Machine) -> object:
        nonlocal is_marking
        is_marking = True
        try:
            return original(self)
        finally:
            is_marking = False

    monkeypatch.setattr(machine.Machine, "_mark", marking)
    fail_when(monkeypatch, "state", lost(), first(1, lambda *_: is_marking))
    suite.write("def test_one(vm): pass")
    result = suite.run()
    result.assert_outcomes(passed=1)
    assert Marks.log == ["mark", "look"]
    result.stdout.no_fnmatch_line("*marks of the proof*")


# it stays away


def test_tests_fail_at_once_while_it_is_away(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define(state="running")
    before = host.look()
    original: Callable[[Hypervisor], libvirt.virConnect] = Hypervisor.connection.fget  # type: ignore[attr-defined]
    tries: list[str] = []

    def connection(self: Hypervisor) -> libvirt.virConnect:
        if getattr(libvirt, "is_away"):  # noqa: B009 - it has it just now
            tries.append("")
            self.is_away = True
            raise lost("it is lost and cannot be opened again")
        self.is_away = False
        return original(self)

    monkeypatch.setattr(Hypervisor, "connection", property(connection))
    monkeypatch.setattr(libvirt, "is_away", False, raising=False)
    suite.write(
        """
        import libvirt

        def test_one(vm): libvirt.is_away = True; vm.state
        def test_two(vm): pass
        def test_three(vm): pass
        def test_four(): libvirt.is_away = False
        def test_five(vm): pass
        """
    )
    result = suite.run()
    result.assert_outcomes(passed=2, failed=1, errors=3)
    result.stdout.fnmatch_lines(["*ERROR at setup of test_three*", "it is lost and cannot*"])
    assert len(tries) == 4, "one a test, and one for the way back"
    assert "quarantine" not in result.stdout.str()
    assert "libvirtError" not in result.stdout.str()
    assert host.look() == before
    assert suite.left_over() == []
