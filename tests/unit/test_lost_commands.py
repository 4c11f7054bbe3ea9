"""A command whose agent, guest or machine goes from under it: what is told, and that it ends."""

import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import libvirt_qemu
import pytest
from localguest import WHERE, LocalGuest, NoDomain

from pytest_kvmsnap.errors import AgentError
from pytest_kvmsnap.guest import fate
from pytest_kvmsnap.guest.agent import Agent, Finished
from pytest_kvmsnap.guest.output import KEPT, run_whole

GONE = "Guest agent is not responding: Guest agent disappeared while executing command"
UNKNOWN = "internal error: unable to execute QEMU agent command 'guest-exec-status': Invalid"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fate, "_BACK", 0.2)
    monkeypatch.setattr(fate, "_GOING_OFF", 0.2)
    monkeypatch.setattr(fate, "_LOOK", 0.01)


def lost(agent: Agent, command: list[str] | None = None, timeout: float = 60) -> AgentError:
    with pytest.raises(AgentError) as caught:
        agent.run(command or ["sleep", "600"], timeout=timeout)
    assert caught.value.where == WHERE
    assert caught.value.cure
    return caught.value


@pytest.fixture
def forgetful(local_guest: LocalGuest) -> LocalGuest:
    """An agent that was started anew: it knows no command of before."""
    local_guest.refusals = {"guest-exec-status": UNKNOWN}
    return local_guest


def uptime(local_guest: LocalGuest, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agent, "read", lambda *_: iter([f"{seconds} 1.0\n".encode()]))


def test_an_agent_that_was_started_anew(
    agent: Agent, forgetful: LocalGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    uptime(forgetful, 5000, monkeypatch)
    error = lost(agent, ["sh", "-c", "kill x"])
    assert error.what == "the command was lost: sh -c 'kill x'"
    assert "the guest agent was started anew" in error.why
    assert UNKNOWN in error.why


def test_a_guest_that_rebooted(
    agent: Agent, forgetful: LocalGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    uptime(forgetful, -1, monkeypatch)
    error = lost(agent)
    assert "the guest rebooted while the command ran" in error.why
    assert "vm.reboot" in error.cure


def test_a_machine_that_went_off(agent: Agent, no_domain: NoDomain, forgetful: LocalGuest) -> None:
    no_domain.seen = [False]
    no_domain.states = ["in shutdown", "in shutdown", "in shutdown", "shut off"]
    error = lost(agent)
    assert "the machine went off while the command ran (state: shut off)" in error.why


def test_a_machine_that_was_paused(
    agent: Agent, no_domain: NoDomain, forgetful: LocalGuest
) -> None:
    no_domain.states = ["paused"]
    assert "the machine does not run any more (state: paused)" in lost(agent).why


def test_an_agent_that_does_not_come_back(
    agent: Agent, no_domain: NoDomain, local_guest: LocalGuest
) -> None:
    local_guest.refusals = {"guest-exec-status": GONE, "guest-ping": GONE}
    no_domain.seen = [False]
    assert "the guest agent is gone" in lost(agent).why


def test_a_guest_that_hangs_is_asked_no_longer_than_the_command_may_take(
    agent: Agent, local_guest: LocalGuest
) -> None:
    silent = "Guest agent is not responding: Guest agent not available for now"
    local_guest.refusals = {"guest-exec-status": silent, "guest-ping": silent}
    assert "the guest does not answer any more" in lost(agent, timeout=3).why
    asked = dict(zip(local_guest.log, local_guest.timeouts, strict=True))
    assert asked["guest-exec-status"] == 3 + 10
    assert asked["guest-ping"] <= 5
    lost(agent, timeout=600)
    assert max(local_guest.timeouts) == 30


def test_an_agent_that_goes_while_it_is_given_the_command(
    agent: Agent, local_guest: LocalGuest, no_domain: NoDomain
) -> None:
    local_guest.refusals = {"guest-exec": GONE}
    no_domain.states = ["shut off"]
    assert "the machine went off" in lost(agent).why


def test_an_agent_that_libvirt_does_not_see_for_a_moment_costs_nothing(
    agent: Agent, no_domain: NoDomain, local_guest: LocalGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = local_guest.answer
    refused: list[str] = []

    def answer_late(domain: object, request: str, timeout: int, flags: int) -> str:
        if "status" in request and len(refused) < 1:
            refused.append(request)
            raise libvirt.libvirtError(GONE)
        return answer(domain, request, timeout, flags)

    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", answer_late)
    no_domain.seen = [False, False, True]
    assert agent.run(["echo", "out"]) == Finished(0, b"out\n", b"")
    assert refused


def test_more_than_libvirt_takes_is_told(agent: Agent, local_guest: LocalGuest) -> None:
    why = "No complete agent response found in 10485760 bytes: Numerical result out of range"
    local_guest.refusals = {"guest-exec-status": why}
    error = lost(agent, ["dmesg"])
    assert error.what == "the output is longer than libvirt takes (7.5 MiB): dmesg"
    assert "text=False" in error.cure


# output of any length


@pytest.fixture
def no_rest() -> Iterator[None]:
    before = set(Path("/tmp").glob(".kvmsnap-output-*"))
    yield
    assert set(Path("/tmp").glob(".kvmsnap-output-*")) <= before


@pytest.mark.usefixtures("no_rest")
@pytest.mark.parametrize("size", [0, 1, KEPT - 1, KEPT, KEPT + 1, 10_485_760])
def test_both_streams_arrive_whole(agent: Agent, tmp_path: Path, size: int) -> None:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    (tmp_path / "data").write_bytes(data)
    script = 'cat "$0"; tail -c +2 "$0" >&2; exit 3'
    done = run_whole(agent, ["sh", "-c", script, str(tmp_path / "data")])
    assert done == Finished(3, data, data[1:])


def test_what_comes_with_the_status_is_less_than_libvirt_takes(
    agent: Agent, local_guest: LocalGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = local_guest._guest_exec_status
    longest: list[int] = []

    def note(pid: int) -> dict[str, object]:
        told = status(pid)
        longest.append(len(str(told)))
        return told

    monkeypatch.setattr(local_guest, "_guest_exec_status", note)
    run_whole(agent, ["sh", "-c", "head -c 9000000 /dev/zero; head -c 9000000 /dev/zero >&2"])
    assert 8_000_000 < max(longest) < 10 * 2**20


@pytest.mark.usefixtures("no_rest")
def test_a_command_is_itself_with_its_output_kept(agent: Agent) -> None:
    assert run_whole(agent, ["sh", "-c", "kill -9 $$"]).status == -9
    assert run_whole(agent, ["sh", "-c", "umask; ls /proc/self/fd"]).stdout.split() == [
        *run_whole(agent, ["sh", "-c", "umask"]).stdout.split(),
        *agent.run(["sh", "-c", "ls /proc/self/fd"]).stdout.split(),
    ]
    assert run_whole(agent, ["cat"], stdin=b"in\0").stdout == b"in\0"
    assert run_whole(agent, ["sh", "-c", "exit 127"]).status == 127
    with pytest.raises(AgentError, match="did not do guest-exec"):
        run_whole(agent, ["no-such-command"])


@pytest.mark.usefixtures("no_rest")
def test_what_a_command_left_that_took_too_long_is_removed(agent: Agent) -> None:
    begin = time.monotonic()
    with pytest.raises(Exception, match="timed out"):
        run_whole(agent, ["sh", "-c", "head -c 9000000 /dev/zero; sleep 600"], timeout=1)
    assert time.monotonic() - begin < 60
