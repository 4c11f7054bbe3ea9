"""The folder for images that we make ourselves: converted golden images, and thin copies."""

import os
import stat
from pathlib import Path

from pytest_kvmsnap.errors import ImageError


def base() -> Path:
    """Return the folder below which all of it lies."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108 - what is below is checked


def place_of(name: str) -> Path:
    """Return where a folder is, or would be."""
    return base() / f"pytest-kvmsnap-{os.geteuid()}" / name


def folder(name: str) -> Path:
    """Return a folder of this user's for images, made if need be: `images` or `clones`.

    It is below `$TMPDIR` or /var/tmp, since images are large and /tmp may be memory. Others cannot
    list it, but enter it: a QEMU of the system's libvirt is another user. The images' own modes say
    who may read them.

    Raises:
        ImageError: it is not this user's alone, or cannot be made.
    """
    place = place_of(name)
    try:
        for each in (place.parent, place):
            each.mkdir(mode=0o711, exist_ok=True)
            found = each.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise OSError("it is a symbolic link, or belongs to somebody else")
            each.chmod(0o711)  # whatever the umask made of it
    except OSError as error:
        raise ImageError(
            "cannot use the folder for throwaway images",
            where=str(place),
            why=str(error),
            cure="remove what is there, or name another folder by TMPDIR",
        ) from None
    return place
