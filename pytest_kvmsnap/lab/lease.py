"""One process owns a machine at a time: a lock that dies with its owner, a journal beside it."""

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


def folder_for(uri: str, configured: Path | None) -> Path:
    """Return the folder for the machines of a URI, made if need be.

    Raises:
        LeaseError: it is not ours to use, or cannot be made.
    """
    is_shared = urlsplit(uri).path == "/system"
    folder = configured or (_SHARED if is_shared else private_folder())
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

    def __init__(self, lock: filelock.BaseFileLock, journal_path: Path) -> None:
        self._lock = lock
        self.journal_path = journal_path

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
        return cls(filelock.FileLock(journal_path.with_suffix(".lock"), mode=mode), journal_path)

    def take(self, what: str, timeout: float, tell: Callable[[str], None]) -> None:
        """Take it; waits up to `timeout` seconds and tells for whom.

        Raises:
            LeaseError: somebody held it all the time, or the lock cannot be used.
        """
        end = time.monotonic() + timeout
        wait = 2.0
        while not self.try_take():
            owner = self._owner()
            if time.monotonic() >= end:
                raise LeaseError(
                    "the machine belongs to another process",
                    where=what,
                    why=f"waited {timeout:g} s for {owner}",
                    cure="let that run end, or wait longer with --kvmsnap-lock-timeout",
                )
            if self._acquired_within(min(wait, max(end - time.monotonic(), 0.01))):
                return
            tell(f"waiting for {what}, held by {owner}")
            wait *= 2

    def try_take(self) -> bool:
        """Take it if it is free."""
        return self._acquired_within(0)

    def _acquired_within(self, seconds: float) -> bool:
        try:
            self._lock.acquire(timeout=seconds, poll_interval=0.1)
        except filelock.Timeout:
            return False
        except OSError as error:
            raise LeaseError(
                f"cannot use the lock {self._lock.lock_file}",
                why=str(error),
                cure="a lock must be a file of this user's own: remove what is there when no run is"
                " under way, or give another folder with --kvmsnap-lock-dir",
            ) from None
        return True

    def _owner(self) -> str:
        try:
            journal = journals.load(self.journal_path)
        except LeaseError:
            return "another user's process"
        return journal.owner() if journal else "a process that has just taken it"

    def release(self) -> None:
        """Give it back, with the lock's file, so that the folder does not grow."""
        # still locked: whoever opened the file meanwhile sees that it is not the one on disk any
        # more (filelock looks) and makes a new one
        with contextlib.suppress(OSError):
            Path(self._lock.lock_file).unlink()
        self._lock.release()
