"""The only module that imports libvirt: connections, the event loop, and errors in our words."""

import contextlib
import difflib
import getpass
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import libvirt
import libvirt_qemu

from pytest_kvmsnap.errors import DomainNotFoundError, HypervisorError, KvmsnapError, MachineError

__all__ = ["Hypervisor", "connect", "libvirt", "libvirt_qemu", "telling"]


class _EventLoop:
    """libvirt's default event loop in a thread, for as long as a connection of ours is open.

    `qemu:///embed` does not work without one, and remote connections need it for keepalives.
    libvirt knows one implementation a process, registered once and never taken back.
    """

    def __init__(self) -> None:
        self._registered = False
        self._users = 0
        self._thread: threading.Thread | None = None

    def enter(self) -> None:
        if not self._registered:
            libvirt.virEventRegisterDefaultImpl()
            self._registered = True
        self._users += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="libvirt-events", daemon=True)
            self._thread.start()

    def leave(self) -> None:
        self._users -= 1
        if self._users == 0 and self._thread is not None:
            # a timer that fires at once, so that the loop comes round and sees that it may end
            timer = libvirt.virEventAddTimeout(0, lambda *_: None, None)
            self._thread.join(timeout=5)
            libvirt.virEventRemoveTimeout(timer)
            self._thread = None

    def _run(self) -> None:
        while self._users:
            libvirt.virEventRunDefaultImpl()


_loop = _EventLoop()


@contextlib.contextmanager
def telling(what: str, where: str, kind: type[KvmsnapError] = MachineError) -> Iterator[None]:
    """Turn libvirt's errors into ours: `what` was tried, on the machine `where`."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise kind(what, where=where, why=_reason(error)) from None


def _reason(error: libvirt.libvirtError) -> str:
    return str(error.get_error_message() or error)


class Hypervisor:
    """An open connection. `kind` is libvirt's name of the driver, such as `QEMU` or `TEST`."""

    def __init__(self, connection: libvirt.virConnect, asked: str | None) -> None:
        self.connection = connection
        self.uri: str = connection.getURI() if asked is None else asked
        self.kind: str = connection.getType()
        self.host: str = connection.getHostname()
        # A host in the URI means that paths are paths of that host, which we cannot look at.
        self.is_local = not urlsplit(self.uri).hostname

    @property
    def architecture(self) -> str:
        """The host's, such as x86_64."""
        with telling("cannot ask for the architecture", self.uri):
            return str(self.connection.getInfo()[0])

    @property
    def version(self) -> int:
        """The version of the libvirt there as it counts it: 9000000 is 9.0.0."""
        with telling("cannot ask for libvirt's version", self.uri):
            return self.connection.getLibVersion()

    def close(self) -> None:
        with contextlib.suppress(libvirt.libvirtError):
            self.connection.close()
        _loop.leave()

    def names(self) -> list[str]:
        """Return the names of all domains, sorted."""
        with telling("cannot list the domains", self.uri):
            return sorted(domain.name() for domain in self.connection.listAllDomains())

    def find(self, name: str) -> str:
        """Return the UUID of the domain of that name.

        Raises:
            DomainNotFoundError: there is none; the message has the names that come close.
        """
        try:
            return self.connection.lookupByName(name).UUIDString()
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise MachineError(
                    f"cannot look up the domain {name!r}", where=self.uri, why=_reason(error)
                ) from None
        names = self.names()
        close = difflib.get_close_matches(name, names, n=3)
        if close:
            cure = "did you mean " + " or ".join(map(repr, close)) + "?"
        elif names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            cure = "domains there: " + ", ".join(names[:10]) + more
        else:
            cure = "this host has no domain at all: is the URI right?"
        raise DomainNotFoundError(
            f"there is no domain {name!r}", where=self.uri, cure=cure
        ) from None

    def lookup(self, uuid: str) -> libvirt.virDomain | None:
        """Return libvirt's object for a domain, looked up afresh; None when it is gone.

        Afresh since `virDomain` caches its ID, and by UUID since a rename keeps the new name.
        """
        try:
            return self.connection.lookupByUUIDString(uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise MachineError(
                f"cannot look up the domain {uuid}", where=self.uri, why=_reason(error)
            ) from None

    def define(self, xml: str) -> None:
        """Define a domain or change its persistent definition."""
        with telling("cannot define the domain", self.uri):
            self.connection.defineXML(xml)

    def definitions(self) -> Iterator[tuple[str, str]]:
        """Yield UUID and XML of every domain; one that vanishes meanwhile is left out."""
        with telling("cannot list the domains", self.uri):
            domains = self.connection.listAllDomains()
        for domain in domains:
            with contextlib.suppress(libvirt.libvirtError):
                yield domain.UUIDString(), domain.XMLDesc(0)


def connect(uri: str | None) -> Hypervisor:
    """Open a connection; None means `LIBVIRT_DEFAULT_URI`, else libvirt's own choice.

    Raises:
        HypervisorError: it cannot be reached or does not let us in; the message has the cure.
    """
    # Without a handler libvirt prints every error to stderr as well.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    _loop.enter()
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        _loop.leave()
        shown = uri or os.environ.get("LIBVIRT_DEFAULT_URI") or "libvirt's default URI"
        raise HypervisorError(
            f"cannot connect to {shown}", why=_reason(error), cure=_connection_cure(shown, error)
        ) from None
    hypervisor = Hypervisor(connection, uri)
    _wait_for_reconnection(hypervisor)
    return hypervisor


def _connection_cure(uri: str, error: libvirt.libvirtError) -> str:
    text = _reason(error)
    if "pid file" in text:
        root = parse_qs(urlsplit(uri).query).get("root", ["that root"])[0]
        return (
            f"another process is using {root}, and an embedded libvirt serves one process: wait"
            " for the other run to end, or give this one a root of its own"
        )
    denied = error.get_error_code() in (libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED)
    if denied or "ermission denied" in text or "authentication" in text:
        return (
            f"let {getpass.getuser()} use libvirt: sudo usermod -aG libvirt {getpass.getuser()},"
            " then log in again; or use a URI of your own, such as qemu:///session"
        )
    if "No such file" in text or "refused" in text:
        return (
            "start libvirt there (sudo systemctl start libvirtd, or virtqemud on newer systems),"
            " or give another URI with --kvmsnap-uri: virsh -c URI list shows whether one works"
        )
    return "check the URI: virsh -c URI list must work (https://libvirt.org/uri.html)"


def _wait_for_reconnection(hypervisor: Hypervisor, seconds: float = 10.0) -> None:
    """Wait until an embedded libvirt has taken up the machines that an earlier process left.

    It reconnects to each QEMU in a thread; until that is done the domain shows no state, or one
    that is about to change (measured on 9.0: within a second).
    """
    if urlsplit(hypervisor.uri).path != "/embed":
        return
    root = Path(parse_qs(urlsplit(hypervisor.uri).query)["root"][0])
    if not any((root / "run" / "qemu").glob("*.xml")):
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(1.0)
        with contextlib.suppress(libvirt.libvirtError):
            domains = hypervisor.connection.listAllDomains()
            states: list[int] = [domain.state()[0] for domain in domains]  # type: ignore[misc]
            if libvirt.VIR_DOMAIN_NOSTATE not in states:
                return
