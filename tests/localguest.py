"""A guest agent whose guest is this computer: commands and files are real, the machine is not."""

import base64
import contextlib
import itertools
import json
import subprocess
import threading
from collections.abc import Iterator
from typing import IO, Any

import libvirt
import pytest

from pytest_kvmsnap.guest import agent as agents
from pytest_kvmsnap.guest.agent import Agent
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import connect

WHERE = "box at test:///default"


class _Reader(threading.Thread):
    """Reads what a command says while it runs, as the agent does: a pipe holds 64 KiB."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        super().__init__(daemon=True)
        assert stream is not None
        self._stream = stream
        self.data = b""
        self.start()

    def run(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed at the end of the test
            self.data = self._stream.read()
            self._stream.close()


class LocalGuest:
    """Answers what libvirt would pass on to the agent.

    `log` has the names of all commands. `refusals` are error messages by command's name, and
    `replies` are answers by command's name in place of the true ones.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.timeouts: list[int] = []
        self.refusals: dict[str, str] = {}
        self.replies: dict[str, Any] = {}
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._files: dict[int, IO[bytes]] = {}
        self._outputs: dict[int, list[_Reader]] = {}

    @property
    def open_files(self) -> int:
        return len(self._files)

    def answer(self, _domain: object, request: str, timeout: int, _flags: int) -> str:
        """Stand in for `libvirt_qemu.qemuAgentCommand`."""
        command = json.loads(request)
        name = command["execute"]
        self.log.append(name)
        self.requests.append(command)
        self.timeouts.append(timeout)
        if name in self.refusals:
            raise libvirt.libvirtError(self.refusals[name])
        if name in self.replies:
            return json.dumps({"return": self.replies[name]})
        method = getattr(self, "_" + name.replace("-", "_"))
        return json.dumps({"return": method(**command.get("arguments", {}))})

    def _guest_ping(self) -> dict[str, Any]:
        return {}

    def _guest_set_time(self, time: int) -> dict[str, Any]:
        """Leave the clock alone: it is this computer's."""
        return {}

    def _guest_exec(self, path: str, arg: list[str], **more: Any) -> dict[str, Any]:
        assert more["capture-output"] is True
        try:
            process = subprocess.Popen(
                [path, *arg],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(pair.split("=", 1) for pair in more["env"]) if "env" in more else None,
            )
        except OSError as error:
            raise libvirt.libvirtError(f"Guest agent command failed: {error}") from None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended without reading; the agent lets it
            process.stdin.write(base64.b64decode(more.get("input-data", "")))
        with contextlib.suppress(BrokenPipeError):  # so does what was buffered until now
            process.stdin.close()
        process.stdin = None
        self.processes[process.pid] = process
        self._outputs[process.pid] = [_Reader(process.stdout), _Reader(process.stderr)]
        return {"pid": process.pid}

    def _guest_exec_status(self, pid: int) -> dict[str, Any]:
        process = self.processes[pid]
        readers = self._outputs[pid]
        if process.poll() is None or any(reader.is_alive() for reader in readers):
            return {"exited": False}
        out, err = (reader.data for reader in readers)
        status: dict[str, Any] = {"exited": True}
        if process.returncode < 0:
            status["signal"] = -process.returncode
        else:
            status["exitcode"] = process.returncode
        for key, data in (("out-data", out), ("err-data", err)):
            if data:
                status[key] = base64.b64encode(data).decode()
        return status

    def _guest_file_open(self, path: str, mode: str) -> int:
        try:
            file = open(path, mode + "b")  # noqa: SIM115, PTH123 - as the agent does
        except OSError as error:
            raise libvirt.libvirtError(f"failed to open file '{path}': {error}") from None
        self._files[1000 + file.fileno()] = file
        return 1000 + file.fileno()

    def _guest_file_read(self, handle: int, count: int) -> dict[str, Any]:
        data = self._files[handle].read(count)
        reply = {"count": len(data), "eof": len(data) < count}
        return reply | {"buf-b64": base64.b64encode(data).decode()}

    def _guest_file_write(self, handle: int, **buffer: str) -> dict[str, Any]:
        data = base64.b64decode(buffer["buf-b64"])[:50_000]  # the agent may write less than asked
        return {"count": self._files[handle].write(data), "eof": False}

    def _guest_file_close(self, handle: int) -> dict[str, Any]:
        self._files.pop(handle).close()
        return {}

    def end(self) -> None:
        for file in self._files.values():
            file.close()
        for process in self.processes.values():
            process.kill()
            process.wait()
        for reader in itertools.chain(*self._outputs.values()):
            reader.join(timeout=5)


@pytest.fixture
def local_guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalGuest]:
    guest = LocalGuest()
    monkeypatch.setattr(agents.libvirt_qemu, "qemuAgentCommand", guest.answer)
    yield guest
    guest.end()


class NoDomain(Domain):
    """A machine that is not there; its guest is asked nevertheless.

    `states` are what it is found in, one after the other, the last one for good; `seen` is whether
    libvirt sees its agent, likewise.
    """

    raw = None  # type: ignore[assignment]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.states = ["running"]
        self.seen = [True]

    def state(self) -> str:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def is_active(self) -> bool:
        return self.states[0] != "shut off"

    def sees_agent(self) -> bool:
        return self.seen.pop(0) if len(self.seen) > 1 else self.seen[0]


@pytest.fixture
def no_domain(local_guest: LocalGuest) -> Iterator[NoDomain]:
    """The machine whose guest is this computer."""
    assert local_guest
    hypervisor = connect("test:///default")
    yield NoDomain(hypervisor, "", "box")
    hypervisor.close()


@pytest.fixture
def agent(no_domain: NoDomain) -> Agent:
    """The agent of that machine."""
    return Agent(no_domain)
