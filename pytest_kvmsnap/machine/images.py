"""Disk images by `qemu-img`. Formats are always given, never guessed.

A guest can write a qcow2 header into a raw disk and point it at a file of the host; a tool that
guesses would follow it.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_kvmsnap.errors import ImageError


@dataclass(frozen=True)
class Disk:
    """A disk of a machine and its image. Sizes in bytes; `disk_size` is what it takes on the host.

    `snapshots` are the names of the internal snapshots in the image.
    """

    target: str
    path: Path
    format: str
    virtual_size: int
    disk_size: int
    snapshots: tuple[str, ...]


@dataclass(frozen=True)
class ImageInfo:
    """What `qemu-img info` tells of an image."""

    virtual_size: int
    disk_size: int
    snapshots: tuple[str, ...]
    backing_file: str | None


def info(path: Path, image_format: str, *, in_use: bool) -> ImageInfo:
    """Look at an image; `in_use` also looks at one that a running machine has locked."""
    share = ["-U"] if in_use else []
    told: dict[str, Any] = json.loads(
        _qemu_img("info", *share, "-f", image_format, "--output=json", _file(path), path=path)
    )
    return ImageInfo(
        virtual_size=int(told["virtual-size"]),
        disk_size=int(told.get("actual-size", 0)),
        snapshots=tuple(str(snapshot["name"]) for snapshot in told.get("snapshots", ())),
        backing_file=told.get("backing-filename"),
    )


def check_raw_is_free(path: Path) -> None:
    """Raise `ImageError` when another process writes to a raw image.

    Of qemu-img's commands only `convert` asks for the lock (7.2), so a sector is converted into
    nothing; `info` sees it with qcow2 images, where it reads more than the length.
    """
    source = {
        "driver": "raw",
        "size": 512,
        "file": {"driver": "file", "filename": str(path)},
    }
    nothing = "driver=null-co,size=512"
    _qemu_img(
        "convert", "-n", "--target-image-opts", f"json:{json.dumps(source)}", nothing, path=path
    )


def space_needed(raw: Path) -> int:
    """Return how many bytes the qcow2 image made of this raw one takes at most."""
    told = _qemu_img("measure", "--output=json", "-O", "qcow2", "-f", "raw", _file(raw), path=raw)
    return int(json.loads(told)["required"])


def to_qcow2(raw: Path, target: Path, progress: Callable[[float], None]) -> None:
    """Convert a raw image, sparse; `progress` gets the percentage now and then."""
    command = ["qemu-img", "convert", "-p", "-f", "raw", "-O", "qcow2", _file(raw), _file(target)]
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment()
        )
    except OSError as error:
        raise _not_installed(error) from None
    with process:
        assert process.stdout is not None  # noqa: S101 - for mypy
        assert process.stderr is not None  # noqa: S101 - for mypy
        try:
            for percentage in _percentages(process.stdout.fileno()):
                progress(percentage)
            complaint = process.stderr.read().decode(errors="replace")
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise ImageError("qemu-img convert failed", where=str(raw), why=complaint)


def _percentages(descriptor: int) -> Iterator[float]:
    text = ""
    while chunk := os.read(descriptor, 4096):
        text = (text + chunk.decode(errors="replace"))[-200:]
        found = re.findall(r"\((\d+(?:\.\d+)?)/100%\)", text)
        if found:
            yield float(found[-1])


def create_overlay(path: Path, backing: Path, backing_format: str) -> None:
    """Make a thin qcow2 image on another one, private; the other one is never written to."""
    # Made first, so that it is private from the start: qemu-img would use the umask.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    base = ["-b", str(backing.absolute()), "-F", backing_format]  # with a slash first: no protocol
    _qemu_img("create", "-q", "-f", "qcow2", *base, _file(path), path=backing)


def is_same(raw: Path, qcow2: Path) -> bool:
    """Tell whether the two images have the same content."""
    try:
        _qemu_img("compare", "-f", "raw", "-F", "qcow2", _file(raw), _file(qcow2), path=raw)
    except ImageError:
        return False
    return True


def _file(path: Path) -> str:
    """Return the path so that qemu-img cannot read a protocol or an option into it."""
    return f"file:{path}"


def _qemu_img(*arguments: str, path: Path) -> str:
    try:
        done = subprocess.run(
            ["qemu-img", *arguments],
            capture_output=True,
            text=True,
            env=_environment(),
            check=False,
        )
    except OSError as error:
        raise _not_installed(error) from None
    if done.returncode:
        raise ImageError(f"qemu-img {arguments[0]} failed", where=str(path), why=done.stderr)
    return done.stdout


def _not_installed(error: OSError) -> ImageError:
    return ImageError(
        "cannot run qemu-img",
        why=str(error),
        cure="install it: qemu-utils on Debian and Ubuntu, qemu-img on Fedora",
    )


def _environment() -> dict[str, str]:
    # its messages are shown, and "Is another process using the image" is looked for in them
    return os.environ | {"LC_ALL": "C"}


def chain_problem(
    path: Path, image_format: str, folders: tuple[Path, ...], *, in_use: bool
) -> str | None:
    return None
