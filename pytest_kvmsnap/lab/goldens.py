"""The qcow2 images that raw golden images become, kept for as long as the raw file is the same."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from pytest_kvmsnap.errors import ConversionError, ImageError, LeaseError
from pytest_kvmsnap.machine import conversion, images, store
from pytest_kvmsnap.sizes import mib

Tell = Callable[[str], None]
Progress = Callable[[float], None]


def as_qcow2(raw: Path, run: str, timeout: float, tell: Tell, progress: Progress) -> Path:
    """Return the qcow2 image of a raw golden image, converted when there is none of it yet.

    It is known by the raw file's path, size, time of change and inode, so that a file that changes
    is converted anew; what was made of it before goes. Of several runs that want it at once one
    converts and the others wait.

    Raises:
        ConversionError, ImageError: that failed; nothing of it is left.
        LeaseError: the other run does not get on with it.
    """
    place = store.folder("images")
    made = place / name(raw)
    if made.exists():
        return made
    with _alone(place / f"{key(raw)}.lock", raw, timeout, tell):
        if not made.exists():
            _drop_old(place, raw)
            _convert(raw, made, run, tell, progress)
    return made


def is_converted(raw: Path) -> bool:
    """Tell whether a raw golden image needs no conversion any more."""
    return (store.place_of("images") / name(raw)).exists()


def name(raw: Path) -> str:
    """Return the name in the cache of what a raw image, as it is now, becomes.

    Raises:
        ImageError: it is gone.
    """
    return f"{key(raw)}-{_version(raw)}.qcow2"


def key(raw: Path) -> str:
    """Return what all that is made of a raw image begins with."""
    return hashlib.sha256(os.fsencode(raw)).hexdigest()[:16]


def _version(raw: Path) -> str:
    try:
        status = raw.stat()
    except OSError as error:
        raise ImageError(
            "cannot use the golden image", where=str(raw), why=error.strerror or str(error)
        ) from None
    told = f"{status.st_size} {status.st_mtime_ns} {status.st_dev} {status.st_ino}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _alone(path: Path, raw: Path, timeout: float, tell: Tell) -> Iterator[None]:
    """Keep other runs from converting the same image."""
    lock = filelock.FileLock(path, mode=0o600)
    waited, size = 0.0, -1
    while True:
        step = min(2.0, timeout)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=step)
            break
        drafts = path.parent.glob(f"{path.stem}-*.draft")
        now = sum(draft.stat().st_blocks for draft in drafts if draft.exists())
        if size == -1:
            tell(f"waiting for another run, which converts {raw}")
        waited, size = (waited + step if now == size else 0.0), now
        if waited >= timeout:
            raise LeaseError(
                "another run converts the golden image, and does not get on with it",
                where=str(raw),
                why=f"waited {timeout:g} s",
                cure=f"who it is: lsof {path}",
            )
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: filelock sees that, and makes a new one
        lock.release()


def _drop_old(place: Path, raw: Path) -> None:
    """Remove what was made of earlier versions, and of images that are gone.

    A machine that uses one has a name of its own for it, so that it keeps its data.
    """
    for source in place.glob("*.source"):
        if source.stem == key(raw) or not source.exists():  # it is a link to the raw image
            for old in place.glob(f"{source.stem}-*"):
                images.end_writers(old)  # of a draft that a killed run left
                old.unlink(missing_ok=True)
            source.unlink(missing_ok=True)
    (place / f"{key(raw)}.source").symlink_to(raw)


def _convert(raw: Path, made: Path, run: str, tell: Tell, progress: Progress) -> None:
    draft = made.with_name(f"{made.stem}-{run}.draft")
    try:
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        images.convert_all([(raw, draft)], progress)
        conversion.like(raw, draft)
        draft.rename(made)
    except ImageError as error:
        free = mib(shutil.disk_usage(made.parent).free)
        raise ConversionError(
            "cannot convert the golden image to qcow2",
            where=str(raw),
            why=error.why,
            cure=f"the raw image is untouched; {free} are free in {made.parent}, and TMPDIR names"
            " another place",
        ) from None
    finally:
        draft.unlink(missing_ok=True)
    size = mib(made.stat().st_blocks * 512)
    tell(f"converted the golden image {raw} to qcow2 ({size}), kept in {made.parent}")
