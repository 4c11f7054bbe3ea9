"""The last lines of a machine's console, for the message that it did not get ready."""

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import NOTHING_YET, libvirt

_KEPT = 8192  # bytes


class ConsoleTail:
    """What a console said last: from its log file where there is one, else listened to."""

    def __init__(self, log: Path | None, stream: "libvirt.virStream | None") -> None:
        self._log = log
        self._stream = stream
        self._heard: deque[int] = deque(maxlen=_KEPT)

    def listen(self) -> None:
        """Take what the console said since the last call; never waits."""
        while self._stream is not None:
            try:
                chunk: bytes | int = self._stream.recv(4096)
            except libvirt.libvirtError:
                self._stream = None
                return
            if chunk == NOTHING_YET or not chunk:
                return
            self._heard.extend(bytes(chunk))

    def lines(self, count: int = 15) -> str:
        """Return the last lines, without control characters."""
        raw = bytes(self._heard)
        if self._log is not None:
            with contextlib.suppress(OSError), self._log.open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _KEPT))
                raw = log.read()
        text = "".join(
            c if c.isprintable() or c == "\n" else "" for c in raw.decode(errors="replace")
        )
        return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


@contextlib.contextmanager
def console_tail(domain: Domain) -> Iterator[ConsoleTail]:
    """Follow the console of a running machine; one that somebody else has open is left alone."""
    xml = domain.xml()
    log = domainxml.console_log(xml) if domain.hypervisor.is_local else None
    stream = None
    if log is None and domainxml.has_pty_console(xml):
        try:
            raw = domain.raw
            connection: libvirt.virConnect = raw.connect()  # type: ignore[no-untyped-call]
            stream = connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
            raw.openConsole(
                None,  # type: ignore[arg-type] # the first console
                stream,
                libvirt.VIR_DOMAIN_CONSOLE_SAFE,
            )
        except libvirt.libvirtError:
            stream = None
    try:
        yield ConsoleTail(log, stream)
    finally:
        if stream is not None:
            with contextlib.suppress(libvirt.libvirtError):
                stream.abort()
