"""The guest agent's port, spoken to past libvirt's own agent code.

QEMU's `snapshot-load` resets the port. QEMU reports at once that it is closed, and that it is open
again only a second later: it limits VSERPORT_CHANGE to one event per second and port (QEMU's
monitor_qapi_event_conf). libvirt goes by these events, so for that second its agent commands fail
with "QEMU guest agent is not connected", while the agent is there. libvirt's stream to the port
works meanwhile (virDomainOpenChannel; 9.0, 11.3 and 12.8, measured).
"""

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_kvmsnap.errors import AgentError, KvmsnapError
from pytest_kvmsnap.machine.domainxml import AGENT_CHANNEL
from pytest_kvmsnap.machine.libvirt_api import NOTHING_YET, is_alive, libvirt

if TYPE_CHECKING:
    from pytest_kvmsnap.machine.domain import Domain

_LAG = 0.2
"""Seconds that libvirt may take to act on the event that the port is closed.

If it saw no such event by then, there was none: within a second of the one before, QEMU passes on
only how it ended.
"""
_SECOND = 0.9
"""Seconds from the load in which libvirt, having heard of the closed port, hears of no open one."""
_AFTERMATH = 2.0
"""Seconds from the load in which libvirt may lose sight of the agent after all, on a busy host."""
_LONGEST_GAP = 5.0
"""Seconds after which an agent that libvirt does not see is libvirt's to explain."""
_LOOK = 0.1
"""Seconds between looks whether libvirt sees the agent."""
_SYNC = 0.1
"""Seconds for an answer to `guest-sync`: what reaches a port before it is open is lost."""
_PAUSE = 0.001


class AgentPort:
    """The port of one machine from an in-process revert until libvirt sees its agent again.

    We must be gone from it by then: QEMU serves one client at a time, and libvirt's next command
    would wait for us for 5 s in vain. So a thread looks for that, whether a test talks or not.
    """

    def __init__(self, domain: "Domain") -> None:
        self._domain = domain
        self._since = time.monotonic()
        self._was_unseen = False
        self._look_from = 0.0
        self._line: _Line | None = None
        self._lock = threading.Lock()  # one command at a time
        self._is_over = threading.Event()
        self._watch = threading.Thread(target=self._until_seen, name="agent-port", daemon=True)

    def open(self) -> None:
        """Have the domain's agent commands come by here, until libvirt sees the agent."""
        self._watch.start()
        self._domain.agent_port = self

    def close(self) -> None:
        """Let go of the port, in time for what breaks the connection."""
        self._is_over.set()
        with self._lock:
            self._end()
        self._watch.join()

    @property
    def is_recent(self) -> bool:
        """Whether an agent that libvirt does not see is to be expected, and soon seen again."""
        return time.monotonic() - self._since < _AFTERMATH or not self._is_over.is_set()

    def wait(self) -> None:
        """Wait until libvirt sees the agent, for what libvirt itself asks of it."""
        self._is_over.wait(_LONGEST_GAP)

    def is_answered(self, timeout: float) -> bool:
        """Tell whether the agent answers here; if not, it is libvirt's to ask.

        Raises:
            AgentError: there is no answer within `timeout` seconds.
        """
        with self._lock:
            return self._opened(timeout) is not None

    def answer(self, request: str, timeout: float) -> Any:
        """Return the agent's whole answer to a request, None when it is libvirt's to ask.

        Raises:
            AgentError: there is no answer within `timeout` seconds.
        """
        with self._lock:
            line = self._opened(timeout)
            if line is None:
                return None
            try:
                return line.answer(request, timeout)
            except BaseException:  # a Ctrl-C too: the answer may come yet, and is for nobody
                self._hang_up()
                raise

    def _opened(self, timeout: float) -> "_Line | None":
        if self._line is not None and not self._line.is_alive():  # libvirt is another one by now
            self._end()
        if self._is_over.is_set():
            return None
        if self._is_seen():
            self._end_if_over()
        elif self._line is None:
            left = self._since + _LONGEST_GAP - time.monotonic()
            with contextlib.suppress(_NotOpenedError):  # then libvirt's way is the only one
                self._line = _Line(self._domain, min(timeout, max(left, 0.0)))
        return self._line

    def _until_seen(self) -> None:
        with contextlib.suppress(KvmsnapError):  # of what broke, the next command tells
            end = self._since + _LONGEST_GAP
            while not self._is_over.wait(_LOOK) and time.monotonic() < end:
                with self._lock:
                    if self._is_seen():
                        self._end_if_over()
        with self._lock:
            self._end()

    def _is_seen(self) -> bool:
        """Tell whether libvirt sees the agent.

        Right after the load it may only seem so: the event is still on its way.
        """
        if time.monotonic() < self._look_from:
            return False
        is_seen = self._domain.sees_agent()
        if not is_seen:
            self._was_unseen, self._look_from = True, self._since + _SECOND
        return is_seen

    def _end_if_over(self) -> None:
        self._hang_up()
        if self._was_unseen or time.monotonic() - self._since > _LAG:
            self._end()

    def _end(self) -> None:
        self._hang_up()
        self._is_over.set()

    def _hang_up(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()


class _NotOpenedError(AgentError):
    """libvirt does not open the port: it may not, or somebody else has it."""


class _Line:
    """An open connection to the port, on which every request so far was answered."""

    def __init__(self, domain: "Domain", timeout: float) -> None:
        self._domain = domain
        self._received = b""
        with domain.telling("cannot open the guest agent's port", _NotOpenedError):
            raw = domain.raw
            self._connection: libvirt.virConnect = raw.connect()  # type: ignore[no-untyped-call]
            self._stream = self._connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
            raw.openChannel(AGENT_CHANNEL, self._stream, 0)
        try:
            self._sync(time.monotonic() + timeout)
        except BaseException:
            self.close()
            raise

    def is_alive(self) -> bool:
        """Tell whether the connection to libvirt is, through which it goes."""
        return is_alive(self._connection)

    def _sync(self, end: float) -> None:
        """Ask for nothing else until an answer shows that the agent listens.

        A `guest-exec` that nobody answers may run after the next load (measured).
        """
        while True:
            number = secrets.randbelow(2**31)
            self._send(json.dumps({"execute": "guest-sync", "arguments": {"id": number}}), end)
            patience = min(time.monotonic() + _SYNC, end)
            while (answer := self._next(patience)) is not None:
                if answer.get("return") == number:
                    return
            if time.monotonic() > end:
                raise self._no_answer("guest-sync")

    def answer(self, request: str, timeout: float) -> Any:
        end = time.monotonic() + timeout
        self._send(request, end)
        answer = self._next(end)
        if answer is None:
            raise self._no_answer(json.loads(request)["execute"])
        return answer

    def close(self) -> None:
        with contextlib.suppress(libvirt.libvirtError):
            self._stream.abort()

    def _send(self, request: str, end: float) -> None:
        left = request.encode() + b"\n"
        with self._telling():
            while left:
                sent: int = self._stream.send(left)
                if sent != NOTHING_YET:
                    left = left[sent:]
                elif time.monotonic() > end:
                    raise self._no_answer("anything")
                else:
                    time.sleep(_PAUSE)

    def _next(self, end: float) -> dict[str, Any] | None:
        """Return the next answer, None when there is none until `end`."""
        with self._telling():
            while b"\n" not in self._received:
                chunk: bytes | int = self._stream.recv(65536)
                if not chunk:
                    raise AgentError("the guest agent's port was closed", where=self._domain.where)
                if chunk != NOTHING_YET:
                    self._received += bytes(chunk)
                elif time.monotonic() > end:
                    return None
                else:
                    time.sleep(_PAUSE)
        line, _, self._received = self._received.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:  # the rest of one of the past
            return {}
        return answer if isinstance(answer, dict) else {}

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except libvirt.libvirtError as error:
            what, where, why = "the guest agent's port broke", self._domain.where, str(error)
            if not self.is_alive():
                raise self._domain.hypervisor.lost(what, where, why) from None
            raise AgentError(what, where=where, why=why) from None

    def _no_answer(self, command: str) -> AgentError:
        return AgentError(
            f"the guest agent did not do {command}",
            where=self._domain.where,
            why="no answer in time, right after a revert inside QEMU",
        )
