"""The serial console of a machine: what it says and, where libvirt has a stream to it, typing."""

import contextlib
import re
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_kvmsnap.errors import ConsoleError, MachineError
from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.libvirt_api import NOTHING_YET, libvirt

if TYPE_CHECKING:
    from pytest_kvmsnap.machine.domain import Domain

_EVENTS = (
    libvirt.VIR_STREAM_EVENT_READABLE
    | libvirt.VIR_STREAM_EVENT_HANGUP
    | libvirt.VIR_STREAM_EVENT_ERROR
)
_CHUNK = 65536
_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # of a terminal (ECMA-48, CSI)
_LAST = 16384  # characters in which the last lines are looked for
_LETTING_GO = 5.0  # seconds for libvirt's event loop to let go of a stream
_MOST = 64 * 2**20
"""Bytes that are kept of what is heard, at least; of twice as many the older half is dropped."""
_TYPING = 10.0  # seconds that a guest may take to take what is typed


class Console:
    """The first serial console of a machine, and what it said since `begin`.

    It is heard by libvirt's stream, which one client can have at a time: nobody is driven off it.
    Where there is none, the log file of the definition tells, if we may read it.
    """

    def __init__(self, domain: "Domain") -> None:
        self._domain = domain
        self._stream: libvirt.virStream | None = None
        self._is_over = False  # the stream's
        self._heard = _Heard()
        self._log: _Log | None = None
        self._boot: int | None = None
        self.silence = "nobody listened to it"
        self.mark = 0
        """The position after the last jump in time: what came before is of the past."""
        self._closed: list[tuple[float, libvirt.virStream]] = []

    def begin(self) -> None:
        """Forget what was said so far: a test begins."""
        self._in_file().begin()
        if self._boot is None:  # else somebody waits still for what it says
            self._heard.begin()
            self.mark = self._heard.start

    def listen(self) -> None:
        """Listen from now on, where that is possible; `silence` tells why it is not.

        It costs a tenth of a millisecond, and nothing while nothing is said: libvirt's event loop
        takes what comes.
        """
        if self.is_heard:
            return
        self._close()
        try:
            raw = self._domain.raw
            connection: libvirt.virConnect = raw.connect()  # type: ignore[no-untyped-call]
            stream = connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
            raw.openConsole(
                None,  # type: ignore[arg-type] # the first console
                stream,
                libvirt.VIR_DOMAIN_CONSOLE_SAFE,
            )
            self._stream, self._is_over = stream, False
            stream.eventAddCallback(_EVENTS, self._take, None)
        except (libvirt.libvirtError, MachineError) as error:
            self._is_over = True
            self.silence = str(error)

    def _take(self, stream: libvirt.virStream, _events: int, _opaque: object) -> None:
        """Take what there is; libvirt calls this in the thread of its event loop.

        Here a stream must not lose its last reference: to free it needs a lock that libvirt holds
        until we are back (9.0: the event loop stands still for ever).
        """
        try:
            chunk: bytes | int = stream.recv(_CHUNK)
        except libvirt.libvirtError:
            chunk = b""
        if chunk == NOTHING_YET:
            return
        if chunk:
            self._heard.add(bytes(chunk))
            return
        if stream is self._stream:  # else it was closed just now
            self._is_over = True
            self.silence = "the machine went off, or somebody else took the console"
        with contextlib.suppress(libvirt.libvirtError):
            stream.eventUpdateCallback(0)  # else it would be called again and again

    def hang_up(self) -> None:
        """Stop listening: the machine jumps in time, and is up when it arrives."""
        self._boot = None
        self._close()
        self.mark = self._heard.end

    def _close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        with contextlib.suppress(libvirt.libvirtError):
            stream.eventRemoveCallback()
        with contextlib.suppress(libvirt.libvirtError):
            stream.abort()
        # The event loop may be in the callback right now, and lets go of the stream after that.
        now = time.monotonic()
        self._closed = [(then, each) for then, each in self._closed if now - then < _LETTING_GO]
        self._closed.append((now, stream))

    def boots(self) -> None:
        """Note that the machine boots from here on; see `said_since_boot`."""
        self._boot = self._heard.end
        if self._log is not None:
            self._log.boots()

    def arrived(self) -> None:
        """Note that the machine has booted."""
        self._boot = None

    # what it said

    @property
    def is_heard(self) -> bool:
        """Whether it is listened to right now."""
        return self._stream is not None and not self._is_over

    @property
    def end(self) -> int:
        """The position after the last byte that was heard."""
        return self._heard.end

    def heard(self, position: int) -> bytes:
        """Return what was heard from a position on, as far as it was not forgotten."""
        return self._heard.read(position)

    def wait(self, position: int, timeout: float) -> bool:
        """Wait, `timeout` seconds at most, until more was heard than to this position."""
        return self._heard.wait(position, timeout)

    def said(self) -> str | None:
        """Return all that it said since `begin`; None when nobody knows."""
        heard = self._heard.read(self._heard.start)
        if not self.is_heard:  # somebody else may have taken it
            log = self._in_file().read()
            if log or (log is not None and not heard):
                return log.decode(errors="replace")
        return heard.decode(errors="replace") if heard or self.is_heard else None

    def _in_file(self) -> "_Log":
        if self._log is None:
            self._log = _Log(_log_of(self._domain))
        return self._log

    def said_since_boot(self) -> str | None:
        """Return what it said since the machine boots; None if that was before we came."""
        if self._boot is None:
            return None
        heard = self._heard.read(self._boot)
        if not heard and not self.is_heard:
            heard = self._in_file().read_since_boot() or b""
        return heard.decode(errors="replace")

    def lines(self, count: int = 15) -> str:
        """Return the last lines that are known, without colours and control characters."""
        said = _SEQUENCE.sub("", (self.said() or "")[-_LAST:])
        text = "".join(c if c.isprintable() or c == "\n" else "" for c in said)
        return "\n".join([line for line in text.splitlines() if line.strip()][-count:])

    # typing

    def type(self, data: bytes) -> None:
        """Send what somebody would type.

        Raises:
            ConsoleError: it cannot be typed on.
        """
        self.listen()
        end = time.monotonic() + _TYPING
        left = data
        while left:
            stream = self._stream
            if stream is None or self._is_over:
                raise self.unheard("cannot type on the console")
            try:
                sent: int = stream.send(left)
            except libvirt.libvirtError as error:
                raise self.unheard("cannot type on the console", str(error)) from None
            if sent != NOTHING_YET:
                left = left[sent:]
            elif time.monotonic() > end:
                raise self.unheard("cannot type on the console", "the machine takes no more")
            else:
                time.sleep(0.01)

    def unheard(self, what: str, why: str = "") -> ConsoleError:
        """Return the error that the console cannot be used."""
        return ConsoleError(
            what,
            where=self._domain.where,
            why=why or self.silence,
            cure="the machine must run, have <serial type='pty'>, and nobody else may have its"
            " console open (virsh console, virt-manager)",
        )


class _Heard:
    """What came by the stream, in a file without a name; positions count all that ever came."""

    def __init__(self) -> None:
        self.start = self.end = 0
        self._file: Any = None
        self._base = 0  # the position of the first byte in the file
        self._more = threading.Condition()  # of a lock that its holder may take again

    def begin(self) -> None:
        with self._more:
            self._keep(0)
            self.start = self.end

    def add(self, chunk: bytes) -> None:
        with self._more:
            with contextlib.suppress(OSError):  # the disk is full, which others tell
                if self._file is None:
                    self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                    weakref.finalize(self, self._file.close)
                self._file.seek(0, 2)
                self.end += self._file.write(chunk)
                if self.end - self._base > 2 * _MOST:
                    self._keep(_MOST)
            self._more.notify_all()

    def _keep(self, count: int) -> None:
        """Drop all but the last bytes."""
        kept = self.read(self.end - count) if count else b""
        self._base = self.end - len(kept)
        self.start = max(self.start, self._base)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.seek(0)
                self._file.truncate()
                self._file.write(kept)

    def read(self, position: int) -> bytes:
        with self._more:
            if self._file is None:
                return b""
            self._file.seek(max(position - self._base, 0))
            data: bytes = self._file.read()
            return data

    def wait(self, position: int, timeout: float) -> bool:
        with self._more:
            return self._more.wait_for(lambda: self.end > position, timeout)


class _Log:
    """The file that the console is written to, from where it ended at `begin`."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._start = self._boot = 0

    def begin(self) -> None:
        self._start = self._size()

    def boots(self) -> None:
        self._boot = self._size()

    def _size(self) -> int:
        if self._path is not None:
            with contextlib.suppress(OSError):
                return self._path.stat().st_size
        return 0

    def read(self) -> bytes | None:
        return self._read(self._start)

    def read_since_boot(self) -> bytes | None:
        return self._read(self._boot)

    def _read(self, start: int) -> bytes | None:
        if self._path is None:
            return None
        try:
            with self._path.open("rb") as file:
                if self._path.stat().st_size >= start:  # else a new QEMU began it anew
                    file.seek(start)
                return file.read()
        except OSError:
            return None


def _log_of(domain: "Domain") -> Path | None:
    if not domain.hypervisor.is_local:
        return None
    with contextlib.suppress(MachineError):
        return domainxml.console_log(domain.xml())
    return None
