"""When a revert inside QEMU is the same as libvirt's, from what QEMU and libvirt say.

Their answers are stand-ins, as they came from QEMU 7.2; the real tier has the true ones.
"""

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import libvirt
import pytest

from pytest_kvmsnap.errors import AgentError, ConnectionLostError, MachineError
from pytest_kvmsnap.lab import fast
from pytest_kvmsnap.lab.fast import FastReverts
from pytest_kvmsnap.machine import agentport, fast_revert
from pytest_kvmsnap.machine.domain import Outside
from pytest_kvmsnap.machine.fast_revert import Look

XML = """<domain><devices><channel type='unix'>
<target type='virtio' name='org.qemu.guest_agent.0'{state}/></channel></devices></domain>"""


def tag(name: str = "base", memory: int = 1000) -> dict[str, Any]:
    return {"id": "1", "name": name, "vm-state-size": memory, "date-sec": 5, "date-nsec": 6}


def drive(node: str, *tags: dict[str, Any], ro: bool = False, **more: Any) -> dict[str, Any]:
    image: dict[str, Any] = {"format": "qcow2", "actual-size": 5}
    if tags:
        image["snapshots"] = list(tags)
    inserted = {"node-name": node, "ro": ro, "image": image, "iops": 0} | more
    return {"device": "", "qdev": node, "io-status": "ok", "inserted": inserted}


class Box:
    """A running machine. What a test sets here is what libvirt and QEMU say of it."""

    def __init__(self) -> None:
        self.name = "box"
        self.where = "box at qemu:///system"
        self.hypervisor = SimpleNamespace(kind="QEMU", times_opened=1)
        self.number = 3
        self.power = "running"
        self.live = XML.format(state=" state='connected'")
        self.defined = "<domain/>"
        self.is_kept = True
        self.starts_by_itself = False
        self.is_saved = False
        self.at = "base"
        self.names = ["found", "base"]
        self.drives = [drive("one", tag())]
        self.devices = ["disk0"]
        self.jobs: list[dict[str, Any]] = []
        self.job_error: str | None = None
        self.status = "running"
        self.asked: list[tuple[str, Any]] = []
        self.refusals: dict[str, MachineError] = {}
        self.ports = 0

    def note_port(self) -> None:
        self.ports += 1

    def state(self) -> str:
        return self.power

    def outside(self) -> Outside:
        return Outside(
            self.power,
            self.number,
            self.live,
            self.defined,
            self.is_kept,
            self.starts_by_itself,
            self.at,
            self.is_saved,
            frozenset(self.names),
        )

    def within(self, _timeout: float, act: Any, _what: str) -> None:
        act()

    def monitored(self, commands: Any) -> list[Any]:
        return [self.monitor(*command) for command in commands]

    def monitor(self, command: str, arguments: Any = None) -> Any:
        self.asked.append((command, arguments))
        if command in self.refusals:
            raise self.refusals[command]
        if command == "query-block":
            return self.drives
        if command == "qom-list":
            anonymous = arguments["path"].endswith("anon")
            return [{"name": n, "type": "child<x>"} for n in self.devices if not anonymous]
        if command == "snapshot-load":
            job = {"id": arguments["job-id"], "status": "running"}
            self.jobs.append(job)
        elif command == "query-jobs":
            told = [dict(job) for job in self.jobs]
            for job in self.jobs:
                job["status"] = "concluded"
                if self.job_error:
                    job["error"] = self.job_error
            return told
        elif command == "job-dismiss":
            self.jobs = [job for job in self.jobs if job["id"] != arguments["id"]]
        elif command == "query-status":
            return {"status": self.status}
        return {}

    @property
    def loads(self) -> list[dict[str, Any]]:
        return [arguments for command, arguments in self.asked if command == "snapshot-load"]


def look(box: Box, reboots: int = 0) -> Look:
    watch: Any = SimpleNamespace(count=reboots)
    return fast_revert.look(box, "base", watch)  # type: ignore[arg-type]


@pytest.fixture
def box() -> Box:
    return Box()


@pytest.fixture
def told() -> list[str]:
    return []


class NoWatch:
    """In place of QEMU's event."""

    count = 0

    def __init__(self, _: object) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


@pytest.fixture
def reverts(box: Box, told: list[str], monkeypatch: pytest.MonkeyPatch) -> FastReverts:
    monkeypatch.setattr(fast, "Watch", NoWatch)
    monkeypatch.setattr(fast, "AgentPort", lambda box: SimpleNamespace(open=box.note_port))
    return FastReverts(box, told.append)  # type: ignore[arg-type]


# what must not have changed


def test_every_part_of_a_look_has_its_words() -> None:
    parts = {*Outside._fields, *Look._fields} - {"outside"}
    assert set(fast_revert._CHANGES) == parts


CHANGES: dict[str, tuple[str, Any]] = {
    "id": ("number", 4),
    "live": ("live", "<domain><devices><disk/></devices></domain>"),
    "inactive": ("defined", "<domain><vcpu/></domain>"),
    "persistent": ("is_kept", False),
    "autostart": ("starts_by_itself", True),
    "current": ("at", "found"),
    "managed_save": ("is_saved", True),
    "snapshots": ("names", ["found", "base", "more"]),
    "devices": ("devices", ["disk0", "extra"]),
    "drives": ("drives", [drive("one", tag(), iops=100)]),
    "tags": ("drives", [drive("one", tag(memory=1001))]),
    "jobs": ("jobs", [{"id": "copy"}]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_seen(box: Box, name: str) -> None:
    before = look(box)
    attribute, value = CHANGES[name]
    setattr(box, attribute, value)
    assert fast_revert.changes(before, look(box)) == [fast_revert._CHANGES[name]]


def test_another_connection_and_a_reboot_are_seen(box: Box) -> None:
    before = look(box)
    box.hypervisor.times_opened = 2
    words = fast_revert._CHANGES
    assert fast_revert.changes(before, look(box, 1)) == [words["times_opened"], words["reboots"]]


def test_what_a_guest_does_all_the_time_is_no_change(box: Box) -> None:
    before = look(box)
    box.live = XML.format(state=" state='disconnected'")
    box.drives = [drive("one", tag())]
    box.drives[0]["inserted"]["image"]["actual-size"] = 6
    box.drives[0]["io-status"] = "nospace"
    assert fast_revert.changes(before, look(box)) == []


@pytest.mark.parametrize(
    ("drives", "reason"),
    [
        ([drive("one", tag()), drive("two")], "not every writable drive holds"),
        ([drive("one", tag("other"))], "not every writable drive holds"),
        ([], "not every writable drive holds"),
        ([drive("one", tag(memory=0))], "holds no memory"),
        ([drive("one", tag()), drive("two", tag())], "holds no memory"),
    ],
)
def test_unfit_drives(box: Box, drives: list[Any], reason: str) -> None:
    box.drives = drives
    assert reason in (fast_revert.unfit(look(box)) or "")


def test_drives_that_need_no_snapshot(box: Box) -> None:
    box.drives = [drive("one", tag()), drive("cd", ro=True), {"device": "", "qdev": "empty"}]
    assert fast_revert.unfit(look(box)) is None


# the load


def test_load_names_every_writable_drive(box: Box, reverts: FastReverts, told: list[str]) -> None:
    box.drives = [drive("data", tag(memory=0)), drive("system", tag()), drive("cd", ro=True)]
    reverts.note("base")
    assert reverts.revert("base", 5)
    (load,) = box.loads
    job = load.pop("job-id")
    assert load == {"tag": "base", "vmstate": "system", "devices": ["data", "system"]}
    assert ("job-dismiss", {"id": job}) in box.asked
    assert box.jobs == []
    assert reverts.revert("base", 5), "as often as you like"
    assert told == []


@pytest.mark.parametrize("before", ["connected", "disconnected"])
@pytest.mark.parametrize("now", ["connected", "disconnected"])
def test_port_of_an_agent_that_there_is(
    box: Box, reverts: FastReverts, before: str, now: str
) -> None:
    box.live = XML.format(state=f" state='{before}'")
    reverts.note("base")
    box.live = XML.format(state=f" state='{now}'")
    assert reverts.revert("base", 5)
    assert box.ports == ("connected" in (before, now))


def test_libvirt_that_does_not_hear_of_it_is_left_to_force(
    box: Box, reverts: FastReverts, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_revert, "_SETTLING", 0.05)
    reverts.note("base")
    monkeypatch.setattr(box, "state", lambda: "paused")
    assert not reverts.revert("base", 5)
    assert told == ["box: reverted by force, not fast: libvirt did not hear that it runs"]


def test_forced_when_only_a_new_qemu_helps(box: Box, reverts: FastReverts) -> None:
    reverts.note("base")
    assert reverts.revert("base", 5)
    reverts.forget()
    assert not reverts.revert("base", 5)


@pytest.mark.parametrize(("error", "status"), [("Unknown section", "paused"), (None, "restore-vm")])
def test_failed_load_is_left_to_force(
    box: Box, reverts: FastReverts, told: list[str], error: str | None, status: str
) -> None:
    reverts.note("base")
    box.job_error, box.status = error, status
    assert not reverts.revert("base", 5)
    assert told == [f"box: reverted by force, not fast: {error or 'QEMU says: restore-vm'}"]
    assert not reverts.revert("base", 5), "who knows where it is until it was forced"
    assert len(box.loads) == 1


def test_qemu_without_the_command(box: Box, reverts: FastReverts, told: list[str]) -> None:
    why = "The command snapshot-load has not been found"
    box.refusals["snapshot-load"] = MachineError("QEMU did not do it", why=why)
    for _ in range(2):
        reverts.note("base")
        assert not reverts.revert("base", 5)
    assert told == [f"box: reverted by force, not fast: {why}"], "each reason once"


def test_lost_connection_is_no_reason(box: Box, reverts: FastReverts, told: list[str]) -> None:
    reverts.note("base")
    box.refusals["snapshot-load"] = ConnectionLostError("lost")
    with pytest.raises(ConnectionLostError):
        reverts.revert("base", 5)
    assert told == []
    box.refusals = {"query-block": ConnectionLostError("lost")}
    with pytest.raises(ConnectionLostError):
        reverts.note("base")


def test_change_is_told_and_left_to_force(box: Box, reverts: FastReverts, told: list[str]) -> None:
    reverts.note("base")
    box.starts_by_itself, box.number = True, 4
    assert not reverts.revert("base", 5)
    assert told == [
        "box: reverted by force, not fast: it is another QEMU process; its autostart flag changed"
    ]
    assert box.loads == []


def test_another_snapshot_is_libvirts_to_go_to(
    box: Box, reverts: FastReverts, told: list[str]
) -> None:
    reverts.note("base")
    assert not reverts.revert("found", 5)
    assert not reverts.revert("base", 5), "libvirt has been there meanwhile"
    assert told == []


def test_what_we_deleted_ourselves_is_no_change(box: Box, reverts: FastReverts) -> None:
    box.names.append("prepared")
    reverts.note("base")
    box.names.remove("prepared")
    reverts.deleted(["prepared"])
    assert reverts.revert("base", 5)


@pytest.mark.parametrize("power", ["shut off", "paused", "crashed"])
def test_machine_that_ran_is_left_to_force(
    box: Box, reverts: FastReverts, told: list[str], power: str
) -> None:
    reverts.note("base")
    box.power = power
    box.refusals["query-block"] = MachineError("cannot ask QEMU", why="domain is not running")
    assert not reverts.revert("base", 5)
    assert told == ["box: reverted by force, not fast: its state is another"]


@pytest.mark.parametrize("power", ["shut off", "paused"])
def test_machine_that_does_not_run_is_not_looked_at(
    box: Box, reverts: FastReverts, told: list[str], power: str
) -> None:
    box.power = power
    reverts.note("base")
    assert (box.asked, told) == ([], [])
    assert not reverts.revert("base", 5)


def test_machine_that_is_unfit_is_told(box: Box, reverts: FastReverts, told: list[str]) -> None:
    box.refusals["query-block"] = MachineError("cannot ask QEMU")
    reverts.note("base")
    box.refusals, box.drives = {}, [drive("one")]
    reverts.note("base")
    assert told == [
        "box: reverted by force, not fast: cannot ask QEMU",
        "box: reverted by force, not fast: not every writable drive holds the snapshot",
    ]


# the agent, while libvirt does not see it


class Guest:
    """The far end of the port: an agent that answers `guest-sync` once it listens."""

    def __init__(self) -> None:
        self.is_seen = False
        self.is_shut = False  # libvirt opens it for nobody
        self.is_alive = True  # the connection to libvirt
        self.deaf = 0  # requests that get lost
        self.sent: list[str] = []
        self.waiting = b""
        self.streams = 0
        self.looks = 0
        self.open = 0

    # in place of a domain

    where = "box"
    agent_port: Any = None
    hypervisor = SimpleNamespace(lost=lambda *words: ConnectionLostError(words[0]))

    @contextlib.contextmanager
    def telling(self, what: str, kind: type[MachineError]) -> Iterator[None]:
        try:
            yield
        except libvirt.libvirtError:
            raise kind(what) from None

    @property
    def raw(self) -> Any:
        connection = SimpleNamespace(newStream=self._new_stream, isAlive=lambda: self.is_alive)
        return SimpleNamespace(connect=lambda: connection, openChannel=self._open)

    def _open(self, *_: object) -> None:
        if self.is_shut:
            raise libvirt.libvirtError("Active channel stream exists for this domain")

    def sees_agent(self) -> bool:
        self.looks += 1
        return self.is_seen

    # in place of a stream

    def _new_stream(self, _flags: int) -> "Guest":
        self.streams += 1
        self.open += 1
        self.waiting = b""
        return self

    def send(self, data: bytes) -> int:
        request = json.loads(data)
        self.sent.append(request["execute"])
        if self.deaf:
            self.deaf -= 1
        elif request["execute"] == "guest-sync":
            number = request["arguments"]["id"]
            self.waiting += b'{"return": 1}\nrest of the past}\n{"return": %d}\n' % number
        elif request["execute"] == "guest-ping":
            self.waiting += b'{"return": {}}\n'
        elif request["execute"] in ("guest-end", "guest-interrupt"):
            self.waiting = request["execute"].removeprefix("guest-").encode()
        elif request["execute"] == "guest-die":
            self.is_alive = False
        return len(data)

    def recv(self, _size: int) -> bytes | int:
        if self.waiting == b"end":
            return b""
        if self.waiting == b"interrupt":
            self.waiting = b'{"return": "late"}\n'
            raise KeyboardInterrupt
        if not self.is_alive:
            raise libvirt.libvirtError("client socket is closed")
        chunk, self.waiting = self.waiting[:7], self.waiting[7:]
        return chunk or -2

    def abort(self) -> None:
        self.open -= 1


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    monkeypatch.setattr(agentport, "_SYNC", 0.01)
    monkeypatch.setattr(agentport, "_SECOND", 0.0)
    guest = Guest()
    agentport.AgentPort(guest).open()  # type: ignore[arg-type]
    yield guest
    if guest.agent_port is not None:
        guest.agent_port.close()
    assert guest.open == 0


PING = '{"execute": "guest-ping"}'


def test_talk_past_libvirt(guest: Guest) -> None:
    """Until the agent listens it gets nothing that it could do later."""
    guest.deaf = 2
    assert guest.agent_port.answer(PING, 5) == {"return": {}}
    assert guest.agent_port.answer(PING, 5) == {"return": {}}
    assert guest.sent == [*["guest-sync"] * 3, *["guest-ping"] * 2]
    assert guest.streams == 1


def test_ping_is_what_the_first_answer_is(guest: Guest) -> None:
    assert guest.agent_port.is_answered(5)
    assert guest.agent_port.is_answered(5)
    assert guest.sent == ["guest-sync"]
    guest.is_seen = True
    assert not guest.agent_port.is_answered(5)


def test_agent_is_libvirts_once_it_sees_it(guest: Guest) -> None:
    port = guest.agent_port
    assert port.answer(PING, 5) == {"return": {}}
    guest.is_seen = True
    assert port.answer(PING, 5) is None
    assert guest.open == 0
    assert port.answer(PING, 5) is None


def test_libvirt_is_not_asked_for_what_it_cannot_know_yet(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agentport, "_SECOND", 60.0)
    for _ in range(5):
        assert guest.agent_port.answer(PING, 5) == {"return": {}}
    assert guest.looks == 1


def test_port_is_let_go_of_when_nobody_asks(guest: Guest) -> None:
    port = guest.agent_port
    port.answer(PING, 5)
    guest.is_seen = True
    port.wait()
    assert guest.open == 0


def test_agent_that_only_seems_to_be_seen(guest: Guest) -> None:
    """libvirt learns a little later that the port was reset."""
    guest.is_seen = True
    assert guest.agent_port.answer(PING, 5) is None
    guest.is_seen = False
    assert guest.agent_port.answer(PING, 5) == {"return": {}}


def test_silent_agent_is_told_and_asked_anew(guest: Guest) -> None:
    guest.deaf = 100
    with pytest.raises(AgentError, match="did not do guest-sync"):
        guest.agent_port.answer(PING, 0.05)
    guest.deaf = 0
    with pytest.raises(AgentError, match="did not do guest-nothing"):
        guest.agent_port.answer('{"execute": "guest-nothing"}', 0.05)
    assert guest.open == 0, "what it still says is for nobody"
    assert guest.agent_port.answer(PING, 5) == {"return": {}}
    assert guest.streams == 3


def test_port_that_is_closed_by_the_other_side(guest: Guest) -> None:
    with pytest.raises(AgentError, match="was closed"):
        guest.agent_port.answer('{"execute": "guest-end"}', 5)


def test_port_that_libvirt_does_not_open_is_left_to_libvirt(guest: Guest) -> None:
    guest.is_shut = True
    assert guest.agent_port.answer(PING, 5) is None
    assert not guest.agent_port.is_answered(5)
    assert guest.agent_port.is_recent
    guest.is_shut, guest.open = False, 0
    assert guest.agent_port.is_answered(5)


def test_answer_that_nobody_waited_for_is_nobodys(guest: Guest) -> None:
    with pytest.raises(KeyboardInterrupt):
        guest.agent_port.answer('{"execute": "guest-interrupt"}', 5)
    assert guest.open == 0
    assert guest.agent_port.answer(PING, 5) == {"return": {}}


def test_libvirt_that_dies_in_a_command_is_a_lost_connection(guest: Guest) -> None:
    with pytest.raises(ConnectionLostError):
        guest.agent_port.answer('{"execute": "guest-die"}', 5)


def test_libvirt_that_died_since_is_asked_in_its_own_way(guest: Guest) -> None:
    guest.agent_port.answer(PING, 5)
    guest.is_alive = False
    assert guest.agent_port.answer(PING, 5) is None
    assert guest.open == 0


def test_nobody_sees_the_agent_for_ever(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agentport, "_LONGEST_GAP", 0.05)
    port = agentport.AgentPort(guest)  # type: ignore[arg-type]
    port.open()
    port._watch.join()
    assert port.answer(PING, 5) is None
