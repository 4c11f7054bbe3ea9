"""Where locks and journals are, and locks that leave nothing behind."""

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import filelock

from pytest_kvmsnap.errors import LeaseError

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
    address = urlsplit(uri)
    # what root calls its session is the daemon of the system
    is_of_root = address.path == "/session" and not address.hostname and os.geteuid() == 0
    is_shared = address.path == "/system" or is_of_root
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
        _check(folder)
    except OSError as error:
        raise LeaseError(
            f"cannot use {folder} for locks",
            why=error.strerror or str(error),
            cure="give another folder with --kvmsnap-lock-dir, the same to all runs on this host",
        ) from None
    return folder


def _check(folder: Path) -> None:
    """Raise when somebody may put something in the place of what we write there."""
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode) or not os.access(folder, os.W_OK | os.X_OK):
        raise OSError("it is a symbolic link, or this user may not write there")
    if status.st_mode & stat.S_ISVTX:
        return
    if status.st_uid not in (0, os.geteuid()):
        raise OSError("it belongs to another user, who may replace what is in it")
    if status.st_mode & stat.S_IWOTH:
        raise OSError("every user may replace what is in it (it is not sticky: chmod +t)")


class Lock:
    """A file that one process at a time holds locked: the lock dies with its owner.

    The file is removed at each release, so that the folder does not grow.
    """

    def __init__(self, path: Path) -> None:
        # In a folder of all users everyone must be able to open the lock; filelock opens it with
        # O_NOFOLLOW, and the folder is sticky, so nobody can put something in its place.
        mode = 0o600
        with contextlib.suppress(OSError):
            mode = 0o666 if path.parent.stat().st_mode & stat.S_ISVTX else mode
        self._lock = filelock.FileLock(path, mode=mode)

    @property
    def is_held(self) -> bool:
        """Whether it is ours."""
        return self._lock.is_locked

    def try_take(self, seconds: float = 0) -> bool:
        """Take it if it gets free in time.

        Raises:
            LeaseError: the file cannot be used.
        """
        if self.is_held:
            return True
        try:
            self._lock.acquire(timeout=seconds, poll_interval=0.05)
        except filelock.Timeout:
            return False
        except OSError as error:
            raise LeaseError(
                f"cannot use the lock {self._lock.lock_file}",
                why=str(error),
                cure="a lock must be a file of this user's own: remove what is there when no run"
                " is under way, or give another folder with --kvmsnap-lock-dir",
            ) from None
        return True

    def is_taken(self) -> bool:
        """Tell whether somebody else holds it."""
        path = Path(self._lock.lock_file)
        if not os.path.lexists(path):  # so mostly, and nothing need be made for a look
            return False
        if not self.try_take():
            return True
        self.release()
        return False

    def release(self) -> None:
        """Give it back, if it is ours."""
        if not self.is_held:
            return
        # still locked: whoever opened the file meanwhile sees that it is not the one on disk any
        # more (filelock looks) and makes a new one
        with contextlib.suppress(OSError):
            Path(self._lock.lock_file).unlink()
        self._lock.release()


def sweep(folder: Path, tell: Callable[[str], None]) -> None:
    """Remove the files of locks whose owners died; what living ones hold stays."""
    count = 0
    for path in sorted(folder.glob("*.lock")) if folder.is_dir() else ():
        lock = Lock(path)
        with contextlib.suppress(LeaseError):  # another user's, who sweeps it
            if lock.try_take():
                lock.release()
                count += 1
    if count:
        tell(f"removed {count} lock{'s' if count > 1 else ''} that dead runs left in {folder}")
