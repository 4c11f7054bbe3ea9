"""The only module that imports libvirt: connections, the event loop, and errors in our words."""

import contextlib
import difflib
import getpass
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs, urlsplit

import libvirt
import libvirt_qemu

from pytest_kvmsnap.errors import (
    ConnectionLostError,
    DomainNotFoundError,
    HypervisorError,
    KvmsnapError,
    MachineError,
)

__all__ = ["NOTHING_YET", "About", "Hypervisor", "connect", "is_alive", "libvirt", "libvirt_qemu"]

NOTHING_YET = -2
"""What a stream that does not block says when there is nothing to be had, or no room."""

_T = TypeVar("_T")

_KEEPALIVE = (5, 5)
"""Seconds between two signs of life, and how many may stay away: 30 s, and a daemon has hung."""
_PATIENCE = 30.0
"""Seconds that a daemon which is restarted may stay away."""
_ONE_TRY = 5.0
"""Seconds for a connection to be opened, once it was waited for in vain."""
_PAUSES = (0.05, 1.0)
"""Seconds between two tries to open it: at first, at most."""


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


def _reason(error: libvirt.libvirtError) -> str:
    return str(error.get_error_message() or error)


class _Refused(KvmsnapError):
    """libvirt did not do what may be left undone."""


class About(NamedTuple):
    """What a hypervisor is; a version that it does not tell is empty."""

    uri: str
    driver: str
    libvirt: str
    version: str  # of what the driver drives, such as QEMU


class Hypervisor:
    """A connection, opened anew when it was lost.

    Objects of libvirt's die with the connection that they are of: nobody keeps one for longer than
    a call. `kind` is libvirt's name of the driver, such as `QEMU` or `TEST`. `is_away` tells that
    the last try to open the connection again was in vain, `times_opened` counts the others.
    """

    def __init__(self, connection: libvirt.virConnect, asked: str | None) -> None:
        self.uri: str = connection.getURI() if asked is None else asked
        self.kind: str = connection.getType()
        self.host: str = connection.getHostname()
        # A host in the URI means that paths are paths of that host, which we cannot look at.
        self.is_local = not urlsplit(self.uri).hostname
        self._connection = connection
        self._lock = threading.RLock()  # a revert runs in a thread of its own
        self._opening: Future[libvirt.virConnect] | None = None
        self.is_away = False
        self.times_opened = 1
        self._reopened: float | None = None

    @property
    def connection(self) -> libvirt.virConnect:
        """The open connection.

        Raises:
            ConnectionLostError: it was lost, and cannot be opened again. Half a minute is waited
                for that; once that was in vain, the next ones who ask have one try each.
        """
        with self._lock:
            if not is_alive(self._connection):
                # Dropped rather than closed: another thread may just be in a call on it, and the
                # last who lets go of it closes it.
                self._connection = self._open_again()
                self._reopened = time.monotonic()
                self.times_opened += 1
                _wait_until_settled(self._connection, 0.05)
            return self._connection

    def was_reopened_within(self, seconds: float) -> bool:
        """Tell whether the connection was lost and opened again in the last seconds."""
        return self._reopened is not None and time.monotonic() - self._reopened < seconds

    def _open_again(self) -> libvirt.virConnect:
        patience = _PATIENCE
        if self.is_away:  # a try that hangs was waited for already
            patience = _ONE_TRY if self._opening is None else 0.0
        end = time.monotonic() + patience
        pause, longest = _PAUSES
        while True:
            # Opening hangs for as long as a daemon does. So it goes on in its thread, and the next
            # who asks finds it there.
            self._opening = self._opening or _open_in_a_thread(self.uri)
            try:
                connection = self._opening.result(max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise self._stays_away("no answer", patience) from None
            except libvirt.libvirtError as error:
                self._opening = None
                if self.is_away or time.monotonic() + pause > end:
                    raise self._stays_away(_reason(error), patience) from None
            else:
                self._opening, self.is_away = None, False
                return connection
            time.sleep(pause)
            pause = min(pause * 2, longest)

    def _stays_away(self, answer: str, waited: float) -> ConnectionLostError:
        tried = "once more" if self.is_away else f"for {waited:g} s"
        self.is_away = True
        return ConnectionLostError(
            f"the connection to {self.uri} is lost and cannot be opened again",
            why=f"tried {tried}: {answer}",
            cure="get the daemon or the network back: each further test tries once more; what is"
            " not put back then, the next run or pytest --kvmsnap-clean does",
        )

    # errors

    @contextlib.contextmanager
    def telling(
        self, what: str, where: str = "", kind: type[KvmsnapError] = MachineError
    ) -> Iterator[None]:
        """Turn libvirt's errors into ours: `what` was tried, on the machine `where`.

        Raises:
            ConnectionLostError: the connection broke meanwhile, or cannot be had.
        """
        connection = self.connection
        try:
            yield
        except libvirt.libvirtError as error:
            if _is_loss(error, connection):
                raise self.lost(what, where, _reason(error)) from None
            raise kind(what, where=where or self.uri, why=_reason(error)) from None

    @contextlib.contextmanager
    def tolerating(self, what: str, where: str = "") -> Iterator[None]:
        """Go on where libvirt does not do something; as `telling` if the connection is lost."""
        with contextlib.suppress(_Refused), self.telling(what, where, _Refused):
            yield

    def lost(self, what: str, where: str, why: str) -> ConnectionLostError:
        """Return the error that the connection broke in the middle of something."""
        return ConnectionLostError(
            what,
            where=where or self.uri,
            why=f"the connection to libvirt broke: {why}",
            cure="none if the daemon was restarted: the next test connects again; else find out"
            " whether it crashes or hangs, or the network does",
        )

    # what is there

    @property
    def identity(self) -> str:
        """What two URIs of one hypervisor have in common: its host, and the root of an embedded."""
        root = parse_qs(urlsplit(self.uri).query).get("root", [""])
        return f"{self.host}{root[0]}"

    @property
    def architecture(self) -> str:
        """The host's, such as x86_64."""
        return str(self._asked("cannot ask for the architecture", lambda c: c.getInfo()[0]))

    @property
    def cores(self) -> int:
        """How many processors the host has."""
        return int(self._asked("cannot ask for the processors", lambda c: c.getInfo()[2]))

    @property
    def version(self) -> int:
        """The version of the libvirt there as it counts it: 9000000 is 9.0.0."""
        return self._asked("cannot ask for libvirt's version", lambda c: c.getLibVersion())

    def about(self) -> About:
        """Return what people are told of it. Never fails."""
        connection = self._connection
        ours, theirs = map(_version, (connection.getLibVersion, connection.getVersion))
        return About(self.uri, self.kind, ours, theirs)

    def close(self) -> None:
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.close()
        _loop.leave()

    def names(self) -> list[str]:
        """Return the names of all domains, sorted."""
        domains = self._asked("cannot list the domains", lambda c: c.listAllDomains())
        return sorted(domain.name() for domain in domains)

    def find(self, name: str) -> str:
        """Return the UUID of the domain of that name.

        Raises:
            DomainNotFoundError: there is none; the message has the names that come close.
        """
        found = self._found(name, lambda c: c.lookupByName(name))
        if found is not None:
            return found.UUIDString()
        names = self.names()
        close = difflib.get_close_matches(name, names, n=3)
        if close:
            cure = "did you mean " + " or ".join(map(repr, close)) + "?"
        elif names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            cure = "domains there: " + ", ".join(names[:10]) + more
        else:
            cure = "this host has no domain at all: is the URI right?"
        raise DomainNotFoundError(f"there is no domain {name!r}", where=self.uri, cure=cure)

    def lookup(self, uuid: str) -> libvirt.virDomain | None:
        """Return libvirt's object for a domain, looked up afresh; None when it is gone.

        Afresh since `virDomain` caches its ID, and by UUID since a rename keeps the new name.
        """
        return self._found(uuid, lambda c: c.lookupByUUIDString(uuid))

    def _found(
        self, shown: str, look_up: Callable[[libvirt.virConnect], libvirt.virDomain]
    ) -> libvirt.virDomain | None:
        def look(connection: libvirt.virConnect) -> libvirt.virDomain | None:
            try:
                return look_up(connection)
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    return None
                raise

        return self._asked(f"cannot look up the domain {shown!r}", look)

    def define(self, xml: str) -> None:
        """Define a domain or change its persistent definition."""
        with self.telling("cannot define the domain"):
            self.connection.defineXML(xml)

    def definitions(self) -> list[tuple[str, str]]:
        """Return UUID and XML of every domain; one that vanishes meanwhile is left out."""

        def ask(connection: libvirt.virConnect) -> list[tuple[str, str]]:
            found = []
            for domain in connection.listAllDomains():
                try:
                    found.append((domain.UUIDString(), domain.XMLDesc(0)))
                except libvirt.libvirtError as error:
                    if _is_loss(error, connection):
                        raise
            return found

        return self._asked("cannot list the domains", ask)

    def _asked(self, what: str, ask: Callable[[libvirt.virConnect], _T]) -> _T:
        """Ask for what nothing is changed by, and so once more if the connection breaks."""
        try:
            with self.telling(what):
                return ask(self.connection)
        except ConnectionLostError:
            if self.is_away:
                raise
            with self.telling(what):
                return ask(self.connection)


def _version(ask: Callable[[], int]) -> str:
    """Return a version as people write it: 9000000 is 9.0.0."""
    try:
        number = ask()
    except libvirt.libvirtError:
        return ""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def connect(uri: str | None) -> Hypervisor:
    """Open a connection; None means `LIBVIRT_DEFAULT_URI`, else libvirt's own choice.

    Raises:
        HypervisorError: it cannot be reached or does not let us in; the message has the cure.
    """
    # Without a handler libvirt prints every error to stderr as well.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    _loop.enter()
    try:
        connection = _open(uri)
        hypervisor = Hypervisor(connection, uri)
    except libvirt.libvirtError as error:
        _loop.leave()
        shown = uri or os.environ.get("LIBVIRT_DEFAULT_URI") or "libvirt's default URI"
        raise HypervisorError(
            f"cannot connect to {shown}", why=_reason(error), cure=_connection_cure(shown, error)
        ) from None
    _wait_for_reconnection(hypervisor)
    return hypervisor


def _open(uri: str | None) -> libvirt.virConnect:
    connection = libvirt.open(uri)
    with contextlib.suppress(libvirt.libvirtError):  # drivers in this process have none
        connection.setKeepAlive(*_KEEPALIVE)
    return connection


def _open_in_a_thread(uri: str) -> "Future[libvirt.virConnect]":
    opening: Future[libvirt.virConnect] = Future()

    def work() -> None:
        try:
            opening.set_result(_open(uri))
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            opening.set_exception(error)

    threading.Thread(target=work, name="libvirt-open", daemon=True).start()
    return opening


def is_alive(connection: libvirt.virConnect) -> bool:
    """Tell whether a connection can still be used."""
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False


def _is_loss(error: libvirt.libvirtError, connection: libvirt.virConnect) -> bool:
    """Tell whether a call failed since its connection broke. What the far side refuses is no loss.

    Killed in a call, the daemon leaves "Cannot recv data" or "End of file while reading data";
    before it, "client socket is closed" (libvirt 9.0, measured).
    """
    is_of_the_way = (
        error.get_error_domain() == libvirt.VIR_FROM_RPC
        or "client socket is closed" in _reason(error)
    )
    return is_of_the_way and not is_alive(connection)


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


def _wait_for_reconnection(hypervisor: Hypervisor) -> None:
    """Wait until an embedded libvirt has taken up the machines that an earlier process left.

    It reconnects to each QEMU in a thread; until that is done the domain shows no state, or one
    that is about to change (measured on 9.0: within a second).
    """
    if urlsplit(hypervisor.uri).path != "/embed":
        return
    root = Path(parse_qs(urlsplit(hypervisor.uri).query)["root"][0])
    if any((root / "run" / "qemu").glob("*.xml")):
        time.sleep(1.0)
        _wait_until_settled(hypervisor.connection, 1.0)


def _wait_until_settled(
    connection: libvirt.virConnect, pause: float, seconds: float = 10.0
) -> None:
    """Wait until a libvirt that was just started knows the state of its machines.

    A daemon is there for its clients before it has reconnected to every QEMU (measured on 9.0: up
    to 0.3 s before).
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and is_alive(connection):
        with contextlib.suppress(libvirt.libvirtError):
            if not any(map(_is_in_between, connection.listAllDomains())):
                return
        time.sleep(pause)


def _is_in_between(domain: libvirt.virDomain) -> bool:
    state: int = domain.state()[0]  # type: ignore[assignment] # the binding's annotation is wrong
    if state == libvirt.VIR_DOMAIN_NOSTATE:
        return True
    with contextlib.suppress(libvirt.libvirtError):  # it is off, or the driver has no such thing
        control: Any = domain.controlInfo()  # the annotation is wrong here, too
        return bool(control[0] == libvirt.VIR_DOMAIN_CONTROL_OCCUPIED)
    return False
