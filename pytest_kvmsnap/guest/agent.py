"""The QEMU guest agent, through libvirt: commands, processes and files in the guest.

The protocol: https://qemu.readthedocs.io/en/latest/interop/qemu-ga-ref.html. libvirt sends a
`guest-sync` before each command, so no answer of the past counts.
"""

import base64
import contextlib
import json
import math
import shlex
import subprocess
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pytest_kvmsnap.errors import AgentError
from pytest_kvmsnap.guest import fate
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import libvirt_qemu

# Bytes in one message. With 256 KiB (base64: 350,000 characters) a write never gets through and
# the agent is lost to libvirt from then on; 128 KiB works and is no faster (libvirt 9.0, measured).
CHUNK = 64 * 1024
# Reads are answers, which may be longer: 10 MiB took 2.0 to 3.1 s in parts of 512 KiB and 2.2 to
# 3.8 s in parts of 64 KiB, and more of 3 MiB again (the same).
READ = 512 * 1024
# What libvirt says from then on when its connection to the agent broke, or something that is no
# JSON came through it; a new QEMU process or a restart of the agent in the guest ends that. The end
# of the QEMU before can break it too, when the new one is there already (libvirt's
# qemuProcessHandleAgentError; seen once in 80 reverts that followed each other at once).
LOST = "not available due to an error"
# A libvirt that was just started talks to the agents of its machines a little later than to us (up
# to 0.3 s, measured). It says so before anything went to the guest, so the command can be repeated.
_NOT_YET = "agent is not connected"
_NEW = 5.0  # seconds for that
_PING = 5  # seconds
_POLL = (0.003, 0.05)  # seconds between looks at a running command: at first, at most
_ANSWER = 30  # seconds for an answer
_GRACE = 10  # seconds for the last answer, once a command's time is up
_KILLING = 10  # seconds
# What libvirt says when it stopped waiting for an answer, or the agent went while it did; of a
# refusal it says the agent's own words.
_LOSS = "not responding"
# libvirt takes no answer of more than 10 MiB, and has lost the agent after one (9.0, measured).
_TOO_LONG = "No complete agent response"

# Kills a process and all that descend from it. The agent starts commands in its own process
# group, so there is no group to kill. The name, which may hold blanks, ends at the last ")".
_KILL = """
tree() {
    echo "$1"
    for stat in /proc/[0-9]*/stat; do
        read -r line 2>/dev/null < "$stat" || continue
        set -- "$1" ${line##*) }
        if [ "$3" = "$1" ]; then tree "${line%% *}"; fi
    done
}
kill -9 $(tree "$1")
"""


class Finished(NamedTuple):
    """A command that ended. A signal that ended it is a negative status, as in `subprocess`."""

    status: int
    stdout: bytes
    stderr: bytes


class Agent:
    """The guest agent of one machine."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def silence(self) -> AgentError | None:
        """Return why the agent does not answer right now, None when it does."""
        port = self._domain.agent_port
        try:
            if port is None or not port.is_answered(_PING):
                self.command("guest-ping", timeout=_PING)
        except AgentError as error:
            return error
        return None

    def command(
        self, name: str, arguments: Mapping[str, object] | None = None, *, timeout: int = _ANSWER
    ) -> Any:
        """Send one command and return its answer.

        Raises:
            AgentError: no agent, no answer within `timeout` seconds, or a refusal.
            ConnectionLostError: the connection to libvirt broke; it may have been done or not.
        """
        request: dict[str, object] = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        while True:
            try:
                return self._answer(name, json.dumps(request), timeout)
            except AgentError as error:
                is_new = self._domain.hypervisor.was_reopened_within(_NEW)
                port = self._domain.agent_port
                is_to_come = is_new or (port is not None and port.is_recent)
                if not (is_to_come and _NOT_YET in error.why):
                    error.cure = self._cure(name, error.why)
                    raise
            time.sleep(0.05)

    def _answer(self, name: str, request: str, timeout: int) -> Any:
        port = self._domain.agent_port
        told = port.answer(request, timeout) if port is not None else None
        if told is not None:
            return self._checked(name, told)
        with self._domain.telling(f"the guest agent did not do {name}", AgentError):
            reply = libvirt_qemu.qemuAgentCommand(self._domain.raw, request, timeout, 0)
        return json.loads(reply).get("return")

    def _checked(self, name: str, answer: Mapping[str, Any]) -> Any:
        if "error" in answer:
            what = f"the guest agent did not do {name}"
            raise AgentError(what, where=self._domain.where, why=answer["error"]["desc"])
        return answer.get("return")

    @staticmethod
    def _cure(name: str, why: str) -> str:
        if "has been disabled" in why or "has not been found" in why:
            return (
                f"allow {name} in the guest: /etc/sysconfig/qemu-ga (BLACKLIST_RPC,"
                " FILTER_RPC_ARGS)"
                " or /etc/qemu/qemu-ga.conf (block-rpcs, allow-rpcs), then restart qemu-guest-agent"
            )
        if LOST in why:
            return (
                "libvirt talks to it again after a revert, and when qemu-guest-agent is started"
                " anew in the guest"
            )
        if "not connected" in why or "not configured" in why or "not responding" in why:
            return (
                "is qemu-guest-agent installed and running in the guest, and does the machine have"
                " the channel org.qemu.guest_agent.0?"
            )
        return ""

    # processes

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes | None = None,
        environment: Sequence[str] | None = None,
        timeout: float = 60,
        shown: str | None = None,
    ) -> Finished:
        """Run a command in the guest and wait for it. No shell is involved.

        `shown` is how errors name it, should the caller know better.

        Raises:
            AgentError: it could not be started, its output was too long, or it was lost: the agent,
                the guest or the machine went from under it.
            subprocess.TimeoutExpired: it took more than `timeout` seconds and was killed, with all
                that descends from it. What parted from it, as daemons do, goes on.
        """
        began = time.monotonic()
        shown = textwrap.shorten(shown or shlex.join(command), 200, placeholder=" …")
        try:
            pid = self._start(command, stdin, environment)
        except AgentError as error:
            if _LOSS in error.why and _NOT_YET not in error.why and LOST not in error.why:
                raise fate.told(self._domain, self, shown, began, error) from None
            raise
        status = self._waited_for(shown, pid, began, timeout)
        if status is None:
            with contextlib.suppress(AgentError):
                kill = ["/bin/sh", "-c", _KILL, "sh", str(pid)]
                self._wait(self._start(kill, timeout=_KILLING), _KILLING)
            raise subprocess.TimeoutExpired(list(command), timeout)
        return self._finished(shown, status)

    def ask(self, command: Sequence[str], timeout: int) -> bytes:
        """Run a short command in a guest that may be broken; return what it printed.

        It ends within `timeout` seconds, whatever the guest does, and kills nothing: whoever asks
        may not have the machine any more by then.

        Raises:
            AgentError: there is no answer by then.
        """
        end = time.monotonic() + timeout

        def left() -> int:
            return max(1, math.floor(end - time.monotonic()))

        self.command("guest-ping", timeout=min(_PING, left()))
        pid = self._start(command, timeout=left())
        while True:
            status = self.command("guest-exec-status", {"pid": pid}, timeout=left())
            if status["exited"]:
                return self._finished(shlex.join(command), status).stdout
            if time.monotonic() > end:
                raise AgentError("the guest did not answer in time", where=self._domain.where)
            time.sleep(_POLL[1])

    def _waited_for(
        self, shown: str, pid: int, began: float, timeout: float
    ) -> Mapping[str, Any] | None:
        """Wait for a command as `_wait` does, over a time in which libvirt does not see the agent.

        Raises:
            AgentError: it was lost; what became of it and of the machine.
        """
        while True:
            try:
                return self._wait(pid, began + timeout - time.monotonic())
            except AgentError as error:
                if _TOO_LONG in error.why:
                    raise self._too_long(shown, "libvirt takes (7.5 MiB)") from None
                if self._domain.sees_agent() or not fate.comes_back(self._domain):
                    raise fate.told(self._domain, self, shown, began, error) from None

    def _wait(self, pid: int, timeout: float) -> Mapping[str, Any] | None:
        """Return the last status of a command, None when it still runs after `timeout` seconds."""
        end = time.monotonic() + timeout
        pause, longest = _POLL
        while True:
            left = max(0, math.ceil(end - time.monotonic()))
            status: Mapping[str, Any] = self.command(
                "guest-exec-status", {"pid": pid}, timeout=min(_ANSWER, left + _GRACE)
            )
            if status["exited"]:
                return status
            if time.monotonic() > end:
                return None
            time.sleep(pause)
            pause = min(pause * 2, longest)  # each look takes the guest some time too

    def _start(
        self,
        command: Sequence[str],
        stdin: bytes | None = None,
        environment: Sequence[str] | None = None,
        *,
        timeout: int = _ANSWER,
    ) -> int:
        arguments: dict[str, object] = {
            "path": command[0],
            "arg": list(command[1:]),
            "capture-output": True,
        }
        if stdin is not None:
            arguments["input-data"] = base64.b64encode(stdin).decode()
        if environment is not None:
            arguments["env"] = list(environment)
        pid: int = self.command("guest-exec", arguments, timeout=timeout)["pid"]
        return pid

    def _finished(self, shown: str, status: Mapping[str, Any]) -> Finished:
        if status.get("out-truncated") or status.get("err-truncated"):
            raise self._too_long(shown, "the guest agent keeps (16 MiB)")
        code = status["exitcode"] if "exitcode" in status else -int(status.get("signal", 1))
        return Finished(
            code,
            base64.b64decode(status.get("out-data", "")),
            base64.b64decode(status.get("err-data", "")),
        )

    def _too_long(self, shown: str, limit: str) -> AgentError:
        is_lost = "libvirt" in limit
        return AgentError(
            f"the output is longer than {limit}: {shown}",
            where=self._domain.where,
            why="libvirt lost the guest agent with that, and has it back after the next revert"
            if is_lost
            else "",
            cure="vm.run with text=False takes any length; or write it to a file in the guest and"
            " fetch that with vm.get",
        )

    # files

    def read(self, path: str) -> Iterator[bytes]:
        """Yield the content of a file in chunks."""
        with self._open(path, "r") as handle:
            while True:
                reply = self.command("guest-file-read", {"handle": handle, "count": READ})
                if reply["count"]:
                    yield base64.b64decode(reply["buf-b64"])
                if reply["eof"]:
                    return

    def write(self, path: str, chunks: Iterator[bytes]) -> None:
        """Write a file from chunks of any size, replacing what was there."""
        with self._open(path, "w") as handle:
            for chunk in chunks:
                left = memoryview(chunk)
                while left:
                    part = base64.b64encode(left[:CHUNK]).decode()
                    reply = self.command("guest-file-write", {"handle": handle, "buf-b64": part})
                    left = left[reply["count"] :]

    @contextlib.contextmanager
    def _open(self, path: str, mode: str) -> Iterator[int]:
        try:
            handle: int = self.command("guest-file-open", {"path": path, "mode": mode})
        except AgentError as error:
            error.what = f"cannot open {path} in the guest"
            raise
        try:
            yield handle
        finally:
            with contextlib.suppress(AgentError):
                self.command("guest-file-close", {"handle": handle})
