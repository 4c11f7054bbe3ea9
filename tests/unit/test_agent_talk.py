"""The guest agent: processes and files, and what is said when it refuses."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap.errors import AgentError
from pytest_kvmsnap.guest.agent import CHUNK, READ, Agent, Finished

if TYPE_CHECKING:
    from localguest import LocalGuest

WHERE = "box at test:///default"


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


# processes


@pytest.mark.parametrize(
    ("command", "finished"),
    [
        (["true"], Finished(0, b"", b"")),
        (["sh", "-c", "echo out; echo err >&2; exit 7"], Finished(7, b"out\n", b"err\n")),
        (["printf", "\\377\\000\\n"], Finished(0, b"\xff\0\n", b"")),
        (["sh", "-c", "kill -9 $$"], Finished(-signal.SIGKILL, b"", b"")),
    ],
    ids=["nothing", "both streams", "bytes", "signal"],
)
def test_a_command_is_run_and_waited_for(
    agent: Agent, command: list[str], finished: Finished
) -> None:
    assert agent.run(command) == finished


def test_input_and_environment_are_passed_on(agent: Agent) -> None:
    done = agent.run(["sh", "-c", 'cat; printf "%s" "$A"'], stdin=b"in\0", environment=["A=a=b"])
    assert done.stdout == b"in\0a=b"


def test_a_command_need_not_read_its_input(agent: Agent) -> None:
    more_than_a_pipe_holds = b"x" * 200_000
    assert agent.run(["true"], stdin=more_than_a_pipe_holds) == Finished(0, b"", b"")


def test_a_command_that_cannot_be_started_is_told(agent: Agent) -> None:
    with pytest.raises(AgentError, match="the guest agent did not do guest-exec") as caught:
        agent.run(["/nonexistent/command"])
    assert caught.value.where == WHERE
    assert "No such file" in caught.value.why


def test_a_command_beyond_its_timeout_is_killed_with_all_that_it_started(
    agent: Agent, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 600 & echo $! >> {pids}; (echo $$ >> {pids}; sleep 601)"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        agent.run(["sh", "-c", script], timeout=0.5)
    assert caught.value.cmd == ["sh", "-c", script]
    assert caught.value.timeout == 0.5
    for pid in pids.read_text().split():
        end = time.monotonic() + 10  # the signal is sent by now, but a busy computer takes a moment
        while is_running(int(pid)) and time.monotonic() < end:
            time.sleep(0.01)
        assert not is_running(int(pid))


def is_running(pid: int) -> bool:
    """Tell whether a process is there, and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def test_a_timeout_is_told_even_if_the_command_cannot_be_killed(
    agent: Agent, local_guest: "LocalGuest", monkeypatch: pytest.MonkeyPatch
) -> None:
    start = agent._start
    started: list[object] = []

    def start_once(*args: object, **more: object) -> int:
        if started:
            raise AgentError("no more")
        started.append(args)
        return start(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(agent, "_start", start_once)
    with pytest.raises(subprocess.TimeoutExpired):
        agent.run(["sleep", "600"], timeout=0.01)


@pytest.mark.parametrize("key", ["out-truncated", "err-truncated"])
def test_truncated_output_is_an_error(agent: Agent, local_guest: "LocalGuest", key: str) -> None:
    local_guest.replies = {
        "guest-exec": {"pid": 7},
        "guest-exec-status": {"exited": True, "exitcode": 0, "out-data": "eA==", key: True},
    }
    with pytest.raises(AgentError, match=r"longer than the guest agent keeps .*: dmesg") as caught:
        agent.run(["dmesg"])
    assert caught.value.where == WHERE
    assert "vm.get" in caught.value.cure


def test_a_command_without_a_status_at_all_did_not_succeed(
    agent: Agent, local_guest: "LocalGuest"
) -> None:
    local_guest.replies = {"guest-exec": {"pid": 7}, "guest-exec-status": {"exited": True}}
    assert agent.run(["true"]).status < 0


# refusals


@pytest.mark.parametrize(
    ("why", "cure"),
    [
        ("The command guest-exec has been disabled for this instance", "allow guest-exec in the"),
        ("Command guest-exec has been disabled: the command is not allowed", "allow guest-exec in"),
        ("The command guest-exec has not been found", "block-rpcs, allow-rpcs"),
        ("QEMU guest agent is not connected", "is qemu-guest-agent installed and running"),
        ("argument unsupported: QEMU guest agent is not configured", "org.qemu.guest_agent.0"),
        ("Guest agent command failed: Input/output error", ""),
    ],
)
def test_a_refusal_is_told_with_its_cure(
    agent: Agent, local_guest: "LocalGuest", why: str, cure: str
) -> None:
    local_guest.refusals = {"guest-exec": why}
    with pytest.raises(AgentError, match="the guest agent did not do guest-exec") as caught:
        agent.run(["true"])
    assert (caught.value.where, caught.value.why) == (WHERE, why)
    assert cure in caught.value.cure
    assert bool(cure) == bool(caught.value.cure)


@pytest.mark.parametrize(
    ("refusals", "why"), [({}, None), ({"guest-ping": "not there"}, "not there")]
)
def test_a_ping_tells_whether_the_agent_is_there(
    agent: Agent, local_guest: "LocalGuest", refusals: dict[str, str], why: str | None
) -> None:
    local_guest.refusals = refusals
    silence = agent.silence()
    assert (silence and silence.why) == why
    assert local_guest.log == ["guest-ping"]
    assert local_guest.requests == [{"execute": "guest-ping"}]
    assert 0 < local_guest.timeouts[0] <= 10


# files

SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7, READ, 2 * READ + 7]


@pytest.mark.parametrize("size", SIZES)
def test_a_file_of_any_size_is_read(
    agent: Agent, local_guest: "LocalGuest", tmp_path: Path, size: int
) -> None:
    data = (b"0123456789abcde\n" * (size // 16 + 1))[:size]
    (tmp_path / "file").write_bytes(data)
    chunks = list(agent.read(str(tmp_path / "file")))
    assert b"".join(chunks) == data
    assert all(len(chunk) <= READ for chunk in chunks)
    assert local_guest.open_files == 0


@pytest.mark.parametrize("size", SIZES)
def test_a_file_of_any_size_is_written(
    agent: Agent, local_guest: "LocalGuest", tmp_path: Path, size: int
) -> None:
    data = (b"0123456789abcde\n" * (size // 16 + 1))[:size]
    (tmp_path / "file").write_bytes(b"longer than what comes" * CHUNK)
    agent.write(str(tmp_path / "file"), iter([data[:100], b"", data[100:]]))
    assert (tmp_path / "file").read_bytes() == data
    assert local_guest.open_files == 0


def test_no_message_to_the_agent_is_longer_than_it_takes(
    agent: Agent, local_guest: "LocalGuest", tmp_path: Path
) -> None:
    agent.write(str(tmp_path / "file"), iter([bytes(3 * CHUNK)]))
    buffers = [r["arguments"]["buf-b64"] for r in local_guest.requests if "write" in r["execute"]]
    assert max(map(len, buffers)) <= 128 * 1024 * 4 / 3


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_file_that_cannot_be_opened_is_told(agent: Agent, tmp_path: Path, verb: str) -> None:
    path = str(tmp_path / "nowhere" / "file")

    def touch_it() -> None:
        if verb == "read":
            list(agent.read(path))
        else:
            agent.write(path, iter([b"data"]))

    with pytest.raises(AgentError, match=f"cannot open {path} in the guest") as caught:
        touch_it()
    assert caught.value.where == WHERE
    assert "No such file" in caught.value.why


def test_a_file_is_closed_when_reading_fails(
    agent: Agent, local_guest: "LocalGuest", tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("data")
    local_guest.refusals = {"guest-file-read": "Input/output error"}
    with pytest.raises(AgentError, match="guest-file-read"):
        list(agent.read(str(tmp_path / "file")))
    assert local_guest.open_files == 0


def test_a_file_is_closed_when_its_reader_stops_halfway(
    agent: Agent, local_guest: "LocalGuest", tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * READ))
    chunks = agent.read(str(tmp_path / "file"))
    next(chunks)
    chunks.close()  # type: ignore[attr-defined] # it is a generator
    assert local_guest.open_files == 0


def test_a_file_that_cannot_be_closed_is_no_error(
    agent: Agent, local_guest: "LocalGuest", tmp_path: Path
) -> None:
    local_guest.refusals = {"guest-file-close": "it is gone"}
    agent.write(str(tmp_path / "file"), iter([b"data"]))
