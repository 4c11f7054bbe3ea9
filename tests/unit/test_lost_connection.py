"""The connection to libvirt breaks: it is opened again, and what broke with it is told.

The connections are mocks here, with the errors of libvirt 9.0. A daemon that is really killed is in
tests/real.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import libvirt
import libvirt_qemu
import pytest

from pytest_kvmsnap.errors import AgentError, ConnectionLostError, MachineError, RevertError
from pytest_kvmsnap.guest import agent as agents
from pytest_kvmsnap.guest.agent import Agent
from pytest_kvmsnap.machine import domain as domains
from pytest_kvmsnap.machine import libvirt_api
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import Hypervisor, connect

URI = "qemu+unix:///system?socket=/run/x"
RPC, QEMU = libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_QEMU
SYSTEM, INTERNAL = libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_INTERNAL_ERROR
RESET = "Cannot recv data: Connection reset by peer"
REFUSED = "Failed to connect socket to '/run/x': Connection refused"


def error_of_libvirt(message: str, domain: int = RPC, code: int = SYSTEM) -> libvirt.libvirtError:
    error = libvirt.libvirtError(message)
    error.err = (code, domain, message, 2, "", None, None, 0, 0)
    return error


class Box:
    """Stands in for a domain. Each call takes the next of `script`: an error, or None."""

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self.script: list[libvirt.libvirtError | None] = []
        self.states = [libvirt.VIR_DOMAIN_RUNNING]
        self.controls: list[int] = []

    def connect(self) -> "Connection":
        return self._connection

    def _next(self) -> None:
        self._connection.step()
        error = self.script.pop(0) if self.script else None
        if error is not None:
            raise error

    def name(self) -> str:
        self._next()
        return "box"

    def UUIDString(self) -> str:
        self._next()
        return "1-2-3"

    def XMLDesc(self, flags: int) -> str:
        self._next()
        return "<domain/>"

    def state(self) -> list[int]:
        self._next()
        return [self.states.pop(0) if len(self.states) > 1 else self.states[0], 0]

    def controlInfo(self) -> list[int]:
        if not self.controls:
            raise error_of_libvirt("not supported", QEMU, libvirt.VIR_ERR_NO_SUPPORT)
        return [self.controls.pop(0), 0, 0]

    def isActive(self) -> int:
        self._next()
        return 1

    def isPersistent(self) -> int:
        self._next()
        return 1

    def create(self) -> None:
        self._next()

    destroy = create

    def reboot(self, flags: int) -> None:
        self._next()

    def blockJobInfo(self, target: str) -> dict[str, int]:
        self._next()
        return {}

    def listAllSnapshots(self, flags: int) -> list[Any]:
        self._next()
        return []

    def snapshotLookupByName(self, name: str) -> str:
        self._next()
        return name

    def revertToSnapshot(self, snapshot: str, flags: int) -> None:
        self._next()


class Connection:
    """Stands in for a connection. It breaks in the call that comes after `breaks_after` others."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.is_alive = True
        self.breaks_after = breaks_after
        self.keepalives: list[tuple[int, int]] = []
        self.calls = 0
        self.box = Box(self)
        self.watches: dict[int, Callable[..., None]] = {}

    def step(self) -> None:
        self.calls += 1
        if not self.is_alive:
            raise error_of_libvirt("internal error: client socket is closed", code=INTERNAL)
        if self.breaks_after is not None and self.calls > self.breaks_after:
            self.is_alive = False
            raise error_of_libvirt(RESET)

    def isAlive(self) -> int:
        return int(self.is_alive)

    def close(self) -> int:
        self.is_alive = False
        return 0

    def setKeepAlive(self, interval: int, count: int) -> int:
        self.keepalives.append((interval, count))
        return 0

    def newStream(self, _: int) -> object:
        raise error_of_libvirt("no console here")

    def getURI(self) -> str:
        return URI

    def getType(self) -> str:
        return "QEMU"

    def getHostname(self) -> str:
        return "host"

    def getInfo(self) -> list[Any]:
        self.step()
        return ["x86_64", 1024, 8]

    def getLibVersion(self) -> int:
        self.step()
        return 9000000

    def listAllDomains(self) -> list[Box]:
        return [self.box]

    def lookupByName(self, name: str) -> Box:
        self.step()
        if name != "box":
            raise error_of_libvirt("Domain not found", QEMU, libvirt.VIR_ERR_NO_DOMAIN)
        return self.box

    def lookupByUUIDString(self, uuid: str) -> Box:
        return self.lookupByName("box" if uuid == "1-2-3" else uuid)

    def getDomainCapabilities(self, *_: object) -> str:
        self.step()
        return "<domainCapabilities><path>/bin/false</path></domainCapabilities>"

    def domainEventRegisterAny(
        self, box: Box, event: int, callback: Callable[..., None], opaque: object
    ) -> int:
        self.watches[7] = callback
        return 7

    def domainEventDeregisterAny(self, watch: int) -> None:
        del self.watches[watch]
        self.step()


class Clock:
    """Passes only when somebody sleeps; `at` has what happens then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at: dict[float, Callable[[], object]] = {}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in [when for when in self.at if when <= self.now]:
            self.at.pop(when)()


class Libvirt:
    """What `libvirt.open` returns or raises, in turn; the last one for good."""

    def __init__(self) -> None:
        self.answers: list[Connection | libvirt.libvirtError] = [Connection()]
        self.asked: list[str | None] = []

    def open(self, uri: str | None) -> Connection:
        self.asked.append(uri)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, libvirt.libvirtError):
            raise answer
        return answer


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Libvirt:
    there = Libvirt()
    monkeypatch.setattr(libvirt, "open", there.open)
    return there


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (libvirt_api, domains, agents):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def hypervisor(there: Libvirt, clock: Clock) -> Iterator[Hypervisor]:
    hypervisor = connect(URI)
    yield hypervisor
    hypervisor.close()


@pytest.fixture
def box(hypervisor: Hypervisor) -> Domain:
    return Domain(hypervisor, "1-2-3", "box")


def current(hypervisor: Hypervisor) -> Connection:
    return cast(Connection, hypervisor._connection)


# between two calls


def test_a_connection_that_lives_is_kept(hypervisor: Hypervisor, there: Libvirt) -> None:
    assert hypervisor.names() == hypervisor.names() == ["box"]
    assert there.asked == [URI]
    assert current(hypervisor).keepalives == [(5, 5)]
    assert not hypervisor.was_reopened_within(60)


def test_one_that_broke_meanwhile_is_opened_again(
    hypervisor: Hypervisor, there: Libvirt, clock: Clock, box: Domain
) -> None:
    old = weakref.ref(current(hypervisor))
    there.answers = [new := Connection()]
    current(hypervisor).is_alive = False
    assert box.state() == "running"
    assert current(hypervisor) is new
    assert there.asked == [URI, URI]
    assert new.keepalives == [(5, 5)]
    assert hypervisor.was_reopened_within(1)
    clock.sleep(2)
    assert not hypervisor.was_reopened_within(1)
    gc.collect()
    assert old() is None, "who keeps it keeps a socket"


def test_a_uri_that_libvirt_chose_is_opened_again(there: Libvirt, clock: Clock) -> None:
    hypervisor = connect(None)
    current(hypervisor).is_alive = False
    there.answers = [Connection()]
    hypervisor.names()
    hypervisor.close()
    assert there.asked == [None, URI]


@pytest.mark.parametrize("uri", ["test:///default", "test:///default?x=1"])
def test_a_driver_in_this_process_has_no_keepalive_and_needs_none(uri: str) -> None:
    hypervisor = connect(uri)
    before = hypervisor.connection
    hypervisor.names()
    assert hypervisor.connection is before
    hypervisor.close()


def test_threads_share_one_new_connection(
    hypervisor: Hypervisor, there: Libvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revert runs in a thread of its own. None gets it before libvirt knows its machines."""
    current(hypervisor).is_alive = False
    there.answers = [new := Connection()]
    begun, gate = threading.Event(), threading.Event()

    def listed(_: Connection) -> list[Box]:
        begun.set()
        assert gate.wait(60)
        return []

    monkeypatch.setattr(Connection, "listAllDomains", listed)
    got: list[object] = []
    threads = [threading.Thread(target=lambda: got.append(hypervisor.connection)) for _ in "123"]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
        thread.join(0.1)
    assert got == []
    gate.set()
    for thread in threads:
        thread.join(60)
    assert got == [new] * 3
    assert there.asked == [URI, URI]


# it stays away


def test_a_daemon_that_is_restarted_is_waited_for(
    hypervisor: Hypervisor, there: Libvirt, clock: Clock
) -> None:
    current(hypervisor).is_alive = False
    there.answers = [error_of_libvirt(REFUSED)] * 8 + [Connection()]
    hypervisor.names()
    pauses = [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert clock.now == pytest.approx(sum(pauses))


def test_one_that_stays_away_costs_only_the_first_a_wait(
    hypervisor: Hypervisor, there: Libvirt, clock: Clock
) -> None:
    current(hypervisor).is_alive = False
    there.answers = [error_of_libvirt(REFUSED)]
    for tried in ("for 30 s", "once more", "once more"):
        with pytest.raises(ConnectionLostError) as caught:
            hypervisor.names()
        assert caught.value.what == f"the connection to {URI} is lost and cannot be opened again"
        assert "--kvmsnap-clean" in caught.value.cure
        assert caught.value.why == f"tried {tried}: {REFUSED}"
        assert 29 < clock.now < 31
    before = len(there.asked)
    there.answers = [Connection()]
    assert hypervisor.names() == ["box"]
    assert len(there.asked) == before + 1
    current(hypervisor).is_alive = False
    there.answers = [error_of_libvirt(REFUSED)]
    with pytest.raises(ConnectionLostError, match="opened again") as caught:
        _ = hypervisor.connection
    assert caught.value.why == f"tried for 30 s: {REFUSED}"
    assert clock.now > 58, "the next loss is another one"


def test_one_that_hangs_is_waited_for_once(
    hypervisor: Hypervisor, there: Libvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that is stopped takes the connection and does not answer."""
    gate, opened = threading.Event(), Connection()
    asked: list[str] = []

    def hang(uri: str) -> Connection:
        asked.append(uri)
        assert gate.wait(60)
        return opened

    monkeypatch.setattr(libvirt, "open", hang)
    monkeypatch.setattr(libvirt_api, "_PATIENCE", 0.05)
    monkeypatch.setattr(libvirt_api, "_ONE_TRY", 600)
    current(hypervisor).is_alive = False
    for tried in ("for 0.05 s", "once more", "once more"):
        with pytest.raises(ConnectionLostError) as caught:
            _ = hypervisor.connection
        assert caught.value.why == f"tried {tried}: no answer"
        monkeypatch.setattr(libvirt_api, "_PATIENCE", 600)
    gate.set()
    end = threading.Event()
    while hypervisor._opening is not None and not hypervisor._opening.done():
        end.wait(0.01)
    assert hypervisor.connection is cast(object, opened)
    assert asked == [URI]


# in a call


def fail(
    hypervisor: Hypervisor, box: Domain, error: libvirt.libvirtError, *, is_alive: bool = False
) -> None:
    with box.telling("cannot do it", RevertError):
        current(hypervisor).is_alive = is_alive
        raise error


LOSSES = {
    "reset": (RESET, RPC, SYSTEM),
    "end": ("End of file while reading data: Input/output error", RPC, SYSTEM),
    "closed": ("internal error: client socket is closed", RPC, INTERNAL),
    "closed, by another": ("internal error: client socket is closed", QEMU, INTERNAL),
    "hung": ("internal error: connection closed due to keepalive timeout", RPC, INTERNAL),
}


@pytest.mark.parametrize(("message", "domain", "code"), LOSSES.values(), ids=LOSSES)
def test_a_call_that_the_loss_interrupts_tells_it(
    hypervisor: Hypervisor, box: Domain, message: str, domain: int, code: int
) -> None:
    with pytest.raises(ConnectionLostError) as caught:
        fail(hypervisor, box, error_of_libvirt(message, domain, code))
    error = caught.value
    assert (error.what, error.where) == ("cannot do it", f"box at {URI}")
    assert error.why == f"the connection to libvirt broke: {message}"
    assert "the next test connects again" in error.cure
    assert error.__suppress_context__, "libvirt's own error is no news"


@pytest.mark.parametrize(
    ("message", "domain", "is_alive"),
    [
        ("internal error: unknown procedure: 999", RPC, True),
        ("Requested operation is not valid", QEMU, True),
        ("Requested operation is not valid", QEMU, False),
    ],
)
def test_what_the_far_side_refuses_is_no_loss(
    hypervisor: Hypervisor, box: Domain, message: str, domain: int, is_alive: bool
) -> None:
    with pytest.raises(RevertError) as caught:
        fail(hypervisor, box, error_of_libvirt(message, domain), is_alive=is_alive)
    assert caught.value.why == message


def test_a_loss_is_told_though_another_thread_has_connected_again(
    hypervisor: Hypervisor, there: Libvirt, box: Domain
) -> None:
    there.answers = [Connection()]

    def lose() -> None:
        with box.telling("cannot do it"):
            current(hypervisor).is_alive = False
            hypervisor.names()
            raise error_of_libvirt(RESET)

    with pytest.raises(ConnectionLostError):
        lose()


def test_what_may_be_refused_may_not_be_lost(hypervisor: Hypervisor) -> None:
    def try_it() -> None:
        with hypervisor.tolerating("cannot do it"):
            current(hypervisor).box.name()

    current(hypervisor).box.script = [error_of_libvirt("not supported", QEMU)]
    try_it()
    current(hypervisor).breaks_after = 1
    with pytest.raises(ConnectionLostError):
        try_it()


READS: dict[str, Callable[[Hypervisor], object]] = {
    "architecture": lambda h: h.architecture,
    "cores": lambda h: h.cores,
    "version": lambda h: h.version,
    "find": lambda h: h.find("box"),
    "lookup": lambda h: h.lookup("1-2-3") is not None,
    "lookup of none": lambda h: h.lookup("gone") is None,
    "definitions": lambda h: h.definitions(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_changes_nothing_is_asked_once_more(
    hypervisor: Hypervisor, there: Libvirt, read: Callable[[Hypervisor], object]
) -> None:
    expected = read(hypervisor)
    assert expected
    current(hypervisor).breaks_after = current(hypervisor).calls
    there.answers = [Connection()]
    assert read(hypervisor) == expected
    assert len(there.asked) == 2


def test_what_is_lost_twice_is_told(hypervisor: Hypervisor, there: Libvirt) -> None:
    current(hypervisor).breaks_after = current(hypervisor).calls
    there.answers = [Connection(breaks_after=0)]
    with pytest.raises(ConnectionLostError, match="cannot ask for libvirt's version"):
        _ = hypervisor.version


def test_a_domain_that_vanishes_is_left_out_of_the_definitions(hypervisor: Hypervisor) -> None:
    assert hypervisor.definitions() == [("1-2-3", "<domain/>")]
    gone = error_of_libvirt("Domain not found", QEMU, libvirt.VIR_ERR_NO_DOMAIN)
    current(hypervisor).box.script = [gone]
    assert hypervisor.definitions() == []


# right after it


@pytest.mark.parametrize(
    ("states", "controls", "waited"),
    [
        ([libvirt.VIR_DOMAIN_RUNNING], [], 0),
        ([libvirt.VIR_DOMAIN_NOSTATE] * 3 + [libvirt.VIR_DOMAIN_RUNNING], [], 3),
        ([libvirt.VIR_DOMAIN_RUNNING], [libvirt.VIR_DOMAIN_CONTROL_OCCUPIED] * 2, 2),
        ([libvirt.VIR_DOMAIN_RUNNING], [libvirt.VIR_DOMAIN_CONTROL_JOB], 0),
        ([libvirt.VIR_DOMAIN_NOSTATE], [], 200),
    ],
    ids=["settled", "no state", "occupied", "somebody's job", "never settles"],
)
def test_a_libvirt_that_starts_is_waited_for_until_it_knows_its_machines(
    hypervisor: Hypervisor,
    there: Libvirt,
    clock: Clock,
    states: list[int],
    controls: list[int],
    waited: int,
) -> None:
    new = Connection()
    new.box.states, new.box.controls = states, controls
    there.answers = [new]
    current(hypervisor).is_alive = False
    _ = hypervisor.connection
    assert round(clock.now / 0.05) == waited


def test_one_that_breaks_meanwhile_is_not_waited_for(
    hypervisor: Hypervisor, there: Libvirt, clock: Clock
) -> None:
    new = Connection(breaks_after=1)
    new.box.states = [libvirt.VIR_DOMAIN_NOSTATE]
    there.answers = [new, Connection()]
    current(hypervisor).is_alive = False
    assert hypervisor.names() == ["box"]
    assert clock.now < 1
    assert len(there.asked) == 3


NOT_CONNECTED = "Guest agent is not responding: QEMU guest agent is not connected"


@pytest.mark.parametrize("new", ["libvirt", "revert", "nothing"])
def test_an_agent_that_a_new_libvirt_has_not_yet_is_asked_again(
    hypervisor: Hypervisor,
    there: Libvirt,
    clock: Clock,
    box: Domain,
    monkeypatch: pytest.MonkeyPatch,
    new: str,
) -> None:
    """Or one that libvirt lost sight of by a revert inside QEMU."""
    answers: list[object] = [error_of_libvirt(NOT_CONNECTED, QEMU)] * 3 + ['{"return": {}}']

    def answer(*_: object) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", answer)
    if new == "revert":
        port: Any = SimpleNamespace(is_recent=True, answer=lambda *_: None)
        box.agent_port = port
    elif new == "libvirt":
        current(hypervisor).is_alive = False
        there.answers = [Connection()]
    if new != "nothing":
        assert Agent(box).command("guest-ping") == {}
    else:
        with pytest.raises(AgentError, match="guest-ping") as caught:
            Agent(box).command("guest-ping")
        assert "is qemu-guest-agent installed" in caught.value.cure
        assert len(answers) == 3


def test_it_is_not_asked_for_ever(
    hypervisor: Hypervisor,
    there: Libvirt,
    clock: Clock,
    box: Domain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise error_of_libvirt(NOT_CONNECTED, QEMU)

    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", refuse)
    current(hypervisor).is_alive = False
    there.answers = [Connection()]
    with pytest.raises(AgentError):
        Agent(box).command("guest-ping")
    assert 4 < clock.now < 6


def test_another_refusal_is_told_at_once(
    hypervisor: Hypervisor,
    there: Libvirt,
    clock: Clock,
    box: Domain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A command that was begun is not repeated."""
    asked: list[object] = []

    def refuse(*_: object) -> None:
        asked.append(0)
        raise error_of_libvirt("Guest agent is not responding: agent command timed out", QEMU)

    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", refuse)
    current(hypervisor).is_alive = False
    there.answers = [Connection()]
    with pytest.raises(AgentError):
        Agent(box).command("guest-ping")
    assert len(asked) == 1


@pytest.mark.parametrize("call", ["command", "silence"])
def test_a_command_that_the_loss_interrupts_is_not_sent_again(
    hypervisor: Hypervisor, box: Domain, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Nobody knows whether the guest has done it."""
    asked: list[object] = []

    def lose(*_: object) -> None:
        asked.append(0)
        current(hypervisor).is_alive = False
        raise error_of_libvirt(RESET)

    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", lose)
    with pytest.raises(ConnectionLostError, match="the guest agent did not do guest-"):
        Agent(box).command("guest-exec") if call == "command" else Agent(box).silence()
    assert len(asked) == 1


# one machine


def breaks_at(hypervisor: Hypervisor, calls: int) -> None:
    connection = current(hypervisor)
    connection.breaks_after = connection.calls + calls


@pytest.mark.parametrize("act", ["start", "destroy"])
def test_a_change_that_the_loss_interrupts_is_told(
    hypervisor: Hypervisor, there: Libvirt, box: Domain, act: str
) -> None:
    breaks_at(hypervisor, 1)
    there.answers = [Connection()]
    with pytest.raises(ConnectionLostError, match=f"cannot {act} the machine"):
        getattr(box, act)()
    assert there.asked == [URI]
    getattr(box, act)()
    assert there.asked == [URI, URI]


def test_a_machine_that_cannot_be_destroyed_is_told(
    hypervisor: Hypervisor, clock: Clock, box: Domain
) -> None:
    current(hypervisor).box.script = [error_of_libvirt("it does not die", QEMU)]
    with pytest.raises(MachineError, match="cannot destroy the machine") as caught:
        box.destroy()
    assert caught.value.why == "it does not die"
    assert clock.now > 10


def test_a_revert_that_the_loss_interrupts_is_told(hypervisor: Hypervisor, box: Domain) -> None:
    breaks_at(hypervisor, 2)
    with pytest.raises(ConnectionLostError, match="cannot revert to the snapshot 'base'"):
        box.revert("base", 60)


def test_a_reboot_that_nobody_can_tell_of_any_more(
    hypervisor: Hypervisor, clock: Clock, box: Domain
) -> None:
    """The event comes by the connection that is gone."""
    old = current(hypervisor)
    clock.at[0.2] = old.close
    with pytest.raises(ConnectionLostError, match="cannot reboot the machine") as caught:
        box.reboot(60, by_agent=False)
    assert "did not tell that it rebooted" in caught.value.why
    assert clock.now < 1
    assert not old.watches


def test_a_reboot_that_was_told(hypervisor: Hypervisor, clock: Clock, box: Domain) -> None:
    connection = current(hypervisor)
    clock.at[0.2] = lambda: [tell() for tell in connection.watches.values()]
    box.reboot(60, by_agent=False)
    assert not connection.watches


def test_a_block_job_is_not_overlooked(
    hypervisor: Hypervisor, box: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make the revert fail, on the new connection."""
    disk = cast(Any, type("Disk", (), {"target": "vda"}))
    current(hypervisor).box.script = [error_of_libvirt("not supported", QEMU)]
    assert box.block_jobs([disk]) == []
    breaks_at(hypervisor, 1)
    with pytest.raises(ConnectionLostError):
        box.block_jobs([disk])


def test_the_definition_is_looked_for_by_connections_that_break(
    hypervisor: Hypervisor, box: Domain
) -> None:
    assert box.is_defined()
    assert not Domain(hypervisor, "gone", "gone").is_defined()
    breaks_at(hypervisor, 1)
    with pytest.raises(ConnectionLostError):
        box.is_defined()


TAKING = "invalid argument: name in virGetDomainSnapshot must not be NULL"


@pytest.mark.parametrize("listing", ["snapshots", "snapshot_xmls"])
def test_the_snapshots_are_listed_when_the_one_that_is_being_taken_stands(
    hypervisor: Hypervisor, clock: Clock, box: Domain, listing: str
) -> None:
    taking = error_of_libvirt(TAKING, QEMU, libvirt.VIR_ERR_INVALID_ARG)
    current(hypervisor).box.script = [taking] * 4
    assert not getattr(box, listing)()
    assert clock.now == pytest.approx(0.4)


def test_they_are_not_waited_for_for_ever(
    hypervisor: Hypervisor, clock: Clock, box: Domain
) -> None:
    current(hypervisor).box.script = [error_of_libvirt(TAKING, QEMU)] * 1000
    with pytest.raises(MachineError, match="cannot list the snapshots"):
        box.snapshots()
    assert 30 < clock.now < 31


def test_another_failure_of_the_list_is_told_at_once(
    hypervisor: Hypervisor, clock: Clock, box: Domain
) -> None:
    current(hypervisor).box.script = [error_of_libvirt("no", QEMU)]
    with pytest.raises(MachineError, match="cannot list the snapshots"):
        box.snapshots()
    assert clock.now == 0
