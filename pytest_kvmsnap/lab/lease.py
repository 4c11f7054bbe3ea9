"""One process owns a machine at a time: a lock that dies with its owner, a journal beside it.

A second lock, `….next`, is held by the one who waits for the first. So the owner can see that he is
waited for, and when he gives the machine up, whoever waited comes before him.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import filelock

from pytest_kvmsnap.errors import LeaseError
from pytest_kvmsnap.lab import journal as journals
from pytest_kvmsnap.machine.domain import Domain

_SHARED = Path("/run/lock/pytest-kvmsnap")


def private_folder() -> Path:
    """Return the user's own folder for locks and journals."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "pytest-kvmsnap"


def folders() -> list[Path]:
    """Return all folders that hold locks by default."""
    return [_SHARED, private_folder()]


def place_for(uri: str, configured: Path | None) -> Path:
    """Return where the folder for the machines of a URI is, or would be."""
    is_shared = urlsplit(uri).path == "/system"
    return configured or (_SHARED if is_shared else private_folder())


def folder_for(uri: str, configured: Path | None) -> Path:
    """Return the folder for the machines of a URI, made if need be.

    Raises:
        LeaseError: it is not ours to use, or cannot be made.
    """
    folder = place_for(uri, configured)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder == _SHARED and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
            folder.chmod(0o1777)  # everyone who may use the host's libvirt makes locks here
        if folder.is_symlink() or not os.access(folder, os.W_OK | os.X_OK):
            raise OSError("it is a symbolic link, or this user may not write there")
    except OSError as error:
        raise LeaseError(
            f"cannot use {folder} for locks",
            why=str(error),
            cure="give another folder with --kvmsnap-lock-dir, the same to all runs on this host",
        ) from None
    return folder


class Lease:
    """The right to a machine, for as long as this process lives or until it is released."""

    def __init__(self, journal_path: Path, mode: int) -> None:
        self.journal_path = journal_path
        self._lock = filelock.FileLock(journal_path.with_suffix(".lock"), mode=mode)
        self._next = filelock.FileLock(journal_path.with_suffix(".next"), mode=mode)

    @classmethod
    def of(cls, domain: Domain, folder: Path) -> "Lease":
        """Return the lease of a machine, not yet taken."""
        key = f"{domain.hypervisor.host}-{domain.uuid}".encode()
        return cls.beside(folder / f"{hashlib.sha256(key).hexdigest()[:24]}.json")

    @classmethod
    def beside(cls, journal_path: Path) -> "Lease":
        """Return the lease that a journal belongs to, not yet taken."""
        # In the folder of all users everyone must be able to open the lock; filelock opens it
        # with O_NOFOLLOW, and the folder is sticky, so nobody can put something in its place.
        mode = 0o666 if journal_path.parent == _SHARED else 0o600
        return cls(journal_path, mode)

    def take(self, what: str, timeout: float, tell: Callable[[str], None]) -> None:
        """Take it; waits up to `timeout` seconds for each owner and tells for whom.

        Raises:
            LeaseError: somebody held it all the time, or the lock cannot be used.
        """
        patience = _Patience(self.journal_path, what, timeout, tell)
        try:
            while not _acquired(self._next, patience.step()):
                patience.wait_on()
            while not _acquired(self._lock, patience.step()):
                patience.wait_on()
        finally:
            _release(self._next)

    def try_take(self) -> bool:
        """Take it if it is free."""
        return _acquired(self._lock, 0)

    def take_unless_in_use(self, seconds: float = 60) -> bool:
        """Take it if no run works with the machine; others look at it for a moment only."""
        end = time.monotonic() + seconds
        while not _acquired(self._lock, 0.1):
            if self.journal_path.exists() or time.monotonic() > end:
                return False
        return True

    def is_wanted(self) -> bool:
        """Tell whether somebody waits for it."""
        if not _acquired(self._next, 0):
            return True
        _release(self._next)
        return False

    def release(self) -> None:
        """Give it back, with the lock's file, so that the folder does not grow."""
        _release(self._lock)


class _Patience:
    """Waits for an owner, tells people for whom, and ends when it was always the same."""

    def __init__(
        self, journal_path: Path, what: str, timeout: float, tell: Callable[[str], None]
    ) -> None:
        self._journal_path = journal_path
        self._what = what
        self._timeout = timeout
        self._tell = tell
        self._owner: object = None
        self._end = time.monotonic() + timeout
        self._wait = 0.0  # nobody is told of the first try

    def step(self) -> float:
        """Return how long to wait before `wait_on` is due."""
        return min(self._wait, max(self._end - time.monotonic(), 0.01))

    def wait_on(self) -> None:
        """Go on waiting.

        Raises:
            LeaseError: the same owner had it for too long.
        """
        owner, words = self._look()
        if owner != self._owner:
            self._owner, self._end = owner, time.monotonic() + self._timeout
        elif time.monotonic() >= self._end:
            raise LeaseError(
                "the machine belongs to another process",
                where=self._what,
                why=f"waited {self._timeout:g} s for {words}",
                cure="let that run end, or wait longer with --kvmsnap-lock-timeout",
            )
        if self._wait:
            self._tell(f"waiting for {self._what}, held by {words}")
        self._wait = self._wait * 2 or 2.0

    def _look(self) -> tuple[object, str]:
        """Return what tells owners apart, and words for the present one."""
        try:
            journal = journals.load(self._journal_path)
        except LeaseError:
            return "another user", "another user's process"
        if journal is None:
            return None, "a process that has just taken it"
        # Another worker of our own run is not stuck while it goes from test to test.
        is_ours = journal.testrun and journal.testrun == journals.testrun()
        return (journal.run, journal.test if is_ours else ""), journal.owner()


def _acquired(lock: filelock.BaseFileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds, poll_interval=0.05)
    except filelock.Timeout:
        return False
    except OSError as error:
        raise LeaseError(
            f"cannot use the lock {lock.lock_file}",
            why=str(error),
            cure="a lock must be a file of this user's own: remove what is there when no run is"
            " under way, or give another folder with --kvmsnap-lock-dir",
        ) from None
    return True


def _release(lock: filelock.BaseFileLock) -> None:
    if not lock.is_locked:
        return
    # still locked: whoever opened the file meanwhile sees that it is not the one on disk any
    # more (filelock looks) and makes a new one
    with contextlib.suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()
