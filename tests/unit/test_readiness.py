"""Waiting for a machine, with the last words of its console, and setting its clock."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from localguest import WHERE
from testdriver import disk

from pytest_kvmsnap.errors import AgentError, AgentLostError, NotReadyError
from pytest_kvmsnap.guest import clock, ready
from pytest_kvmsnap.guest.agent import Agent
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import connect

if TYPE_CHECKING:
    from localguest import LocalGuest
    from testdriver import Host

AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


class Box:
    """A running domain, to be defined with a console of one's choice."""

    def __init__(self, host: "Host") -> None:
        self._host = host
        self._hypervisor = connect("test:///default")

    def define(self, *devices: str, state: str = "running") -> Domain:
        raw = self._host.define("box", disk("/x.qcow2"), *devices, state=state)
        return Domain(self._hypervisor, raw.UUIDString(), "box")

    def close(self) -> None:
        self._hypervisor.close()


@pytest.fixture
def box(host: "Host") -> Iterator[Box]:
    box = Box(host)
    yield box
    box.close()


@pytest.mark.parametrize(
    ("devices", "wanted", "means"),
    [
        ([AGENT], None, "agent"),
        ([], None, "none"),
        ([AGENT], "none", "none"),
        ([], "agent", "agent"),
    ],
)
def test_the_agent_is_waited_for_where_there_is_a_channel(
    box: Box, devices: list[str], wanted: Any, means: str
) -> None:
    assert ready.means_of(box.define(*devices), wanted) == means


def test_a_machine_that_answers_is_ready(box: Box, local_guest: "LocalGuest") -> None:
    ready.wait_ready(box.define(), "agent", 60)
    assert local_guest.log == ["guest-ping"]


def test_without_means_nothing_is_asked(box: Box, local_guest: "LocalGuest") -> None:
    local_guest.refusals = {"guest-ping": "not connected"}
    ready.wait_ready(box.define(), "none", 60)
    assert local_guest.log == []


def test_a_machine_that_answers_late_is_ready(
    box: Box, local_guest: "LocalGuest", monkeypatch: pytest.MonkeyPatch
) -> None:
    silences = iter([AgentError("", why="not connected")] * 3)
    monkeypatch.setattr(Agent, "silence", lambda self: next(silences, None))
    ready.wait_ready(box.define(), "agent", 60)
    assert next(silences, None) is None


class Clock:
    """A second passes between two looks at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now

    def sleep(self, seconds: float) -> None: ...


@pytest.mark.parametrize("lost", [2, 3])
def test_an_agent_that_libvirt_lost_is_waited_for_a_short_time(
    box: Box, local_guest: "LocalGuest", monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """A guest that reboots opens its port anew; else nothing but a new start brings it back."""
    monkeypatch.setattr(ready, "time", Clock())
    why = "QEMU guest agent is not available due to an error"
    silences = [*["not connected"] * 5, *[why] * lost, "not connected", why, why]
    told = iter([AgentError("", why=each, cure="revert") for each in silences])
    monkeypatch.setattr(Agent, "silence", lambda self: next(told, None))
    domain = box.define()
    if lost == 2:
        ready.wait_ready(domain, "agent", 60)
        return
    with pytest.raises(AgentLostError) as caught:
        ready.wait_ready(domain, "agent", 60)
    assert caught.value.why == f"libvirt lost the guest agent: {why}"
    assert (caught.value.where, caught.value.cure) == (WHERE, "revert")


def test_a_machine_that_never_answers_is_told_with_its_last_words(
    box: Box, local_guest: "LocalGuest", tmp_path: Path
) -> None:
    log = tmp_path / "console.log"
    log.write_text("".join(f"line {number}\r\n" for number in range(20)) + "Kernel panic\x07\n\n")
    local_guest.refusals = {"guest-ping": "not connected"}
    domain = box.define(f"<serial type='pty'><log file='{log}'/></serial>")
    with pytest.raises(NotReadyError, match="the machine did not get ready") as caught:
        ready.wait_ready(domain, "agent", 0.05)
    error = caught.value
    assert error.where == "box at test:///default"
    assert error.why.startswith("waited 0.05 s for the guest agent to answer (state: running)\n")
    assert "its console said last:\n| line 6\n| line 7\n" in error.why
    assert error.why.endswith("| line 19\n| Kernel panic")
    assert "--kvmsnap-ready=none" in error.cure
    assert "--kvmsnap-ready-timeout" in error.cure


def test_a_machine_without_a_console_is_told_as_such(box: Box, local_guest: "LocalGuest") -> None:
    local_guest.refusals = {"guest-ping": "not connected"}
    with pytest.raises(NotReadyError) as caught:
        ready.wait_ready(box.define(), "agent", 0.05)
    assert caught.value.why.endswith("nothing is known of its console")


def test_a_machine_that_goes_off_is_not_waited_for(box: Box, local_guest: "LocalGuest") -> None:
    local_guest.refusals = {"guest-ping": "not connected"}
    with pytest.raises(NotReadyError) as caught:
        ready.wait_ready(box.define(state="shut off"), "agent", 600)
    assert caught.value.why.startswith("the machine went off while it was booting (state: shut")


# the clock


@pytest.mark.parametrize(
    ("refusals", "asked"),
    [
        ({}, ["guest-set-time"]),
        ({"guest-set-time": "no hwclock"}, ["guest-set-time", "guest-exec", "guest-exec-status"]),
        (
            {"guest-set-time": "no hwclock", "guest-exec": "disabled"},
            ["guest-set-time", "guest-exec"],
        ),
    ],
)
def test_the_clock_is_set_by_the_agent_else_by_date_and_else_not_at_all(
    box: Box,
    local_guest: "LocalGuest",
    monkeypatch: pytest.MonkeyPatch,
    refusals: dict[str, str],
    asked: list[str],
) -> None:
    monkeypatch.setattr("pytest_kvmsnap.guest.clock.time.time", lambda: 1700000000.25)
    monkeypatch.setattr("pytest_kvmsnap.guest.clock.time.time_ns", lambda: 1700000000250000000)
    local_guest.replies = {
        "guest-set-time": {},
        "guest-exec": {"pid": 1},
        "guest-exec-status": {"exited": True, "exitcode": 0},
    }
    local_guest.refusals = refusals
    clock.set_clock(box.define())
    assert local_guest.log == asked
    assert local_guest.requests[0]["arguments"] == {"time": 1700000000250000000}
    if len(asked) > 1:
        ran = local_guest.requests[1]["arguments"]
        assert (ran["path"], ran["arg"]) == ("date", ["-s", "@1700000000"])


@pytest.mark.parametrize(
    ("words", "exact", "set_otherwise"),
    [(["exact"], True, 0), (["rounded"], False, 0), (["failed"], True, 1), ([""], True, 1)],
)
def test_the_clock_is_set_along_with_another_command(
    box: Box, monkeypatch: pytest.MonkeyPatch, words: list[str], exact: bool, set_otherwise: int
) -> None:
    """A guest whose `date` takes no fractions is not asked to a second time."""
    otherwise: list[object] = []
    monkeypatch.setattr(clock, "set_clock", otherwise.append)
    monkeypatch.setattr("pytest_kvmsnap.guest.clock.time.time", lambda: 1700000000.75)
    ours = clock.Clock(box.define())
    assert ours.script()[1] == ["1700000000.750", "1700000001"]
    for word in words:
        ours.heard(word)
    assert ours.script()[1] == ["1700000000.750" if exact else "1700000001", "1700000001"]
    assert len(otherwise) == set_otherwise


@pytest.mark.parametrize("takes_fractions", [True, False])
def test_the_script_says_how_it_set_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes_fractions: bool
) -> None:
    date = tmp_path / "date"
    refusal = "" if takes_fractions else "case $2 in *.*) exit 1 ;; esac; "
    date.write_text(f'#!/bin/sh\n{refusal}echo "$@" > "{tmp_path}/set"\n')
    date.chmod(0o755)
    script = clock._SET + 'echo "$@"'
    command = ["/bin/sh", "-c", script, "sh", "1.5", "2", "what follows"]
    said = subprocess.run(
        command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert said.stdout.split("\n")[0] == ("exact" if takes_fractions else "rounded")
    assert said.stdout.split("\n")[1] == "what follows"
    assert (tmp_path / "set").read_text() == f"-s @{'1.5' if takes_fractions else '2'}\n"
