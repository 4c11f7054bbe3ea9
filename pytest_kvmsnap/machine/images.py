"""Disk images by `qemu-img`. Formats are always given, never guessed.

A guest can write a qcow2 header into a raw disk and point it at a file of the host; a tool that
guesses would follow it.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
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
    """What `qemu-img info` tells of an image; sizes in bytes.

    The names of other files, and the format of the backing file, are those in its header.
    """

    virtual_size: int
    disk_size: int
    snapshots: tuple[str, ...]
    backing_file: str | None
    backing_format: str | None
    data_file: str | None
    encrypted: bool


def info(path: Path, image_format: str, *, in_use: bool) -> ImageInfo:
    """Look at an image; `in_use` also looks at one that a running machine has locked.

    Opens no other file that its header names (QEMU 7.2: `img_info` asks for BDRV_O_NO_BACKING and
    BDRV_O_NO_IO, and since CVE-2024-4467 the latter leaves an external data file closed too).
    """
    share = ["-U"] if in_use else []
    told: dict[str, Any] = json.loads(
        _qemu_img("info", *share, "-f", image_format, "--output=json", _file(path), path=path)
    )
    return ImageInfo(
        virtual_size=int(told["virtual-size"]),
        disk_size=int(told.get("actual-size", 0)),
        snapshots=tuple(str(snapshot["name"]) for snapshot in told.get("snapshots", ())),
        backing_file=told.get("backing-filename"),
        backing_format=told.get("backing-filename-format"),
        data_file=told.get("format-specific", {}).get("data", {}).get("data-file"),
        encrypted=bool(told.get("encrypted")),
    )


def chain_problem(
    path: Path, image_format: str, folders: Sequence[Path], *, in_use: bool
) -> str | None:
    """Return why an image that strangers may have made must not be used, None when it may.

    Its header can name any file of the host, or one elsewhere by a protocol, and QEMU opens that as
    well. So the image and all that it is based on must be plain files that lie, links resolved, in
    one of the folders, each in a format that is given and not guessed. A file is opened only once
    that is known of it.
    """
    places = [Path(os.path.realpath(folder)) for folder in folders]
    seen: set[Path] = set()
    while True:
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(place) for place in places):
            return f"{path} is outside of the image folders ({', '.join(map(str, folders))})"
        if real in seen:
            return f"{path} is based on itself: its backing files go round in a circle"
        seen.add(real)
        problem, told = _look_at_one(path, image_format, in_use=in_use)
        if problem is not None or told is None or told.backing_file is None:
            return problem
        if told.backing_format is None:
            return (
                f"{path} does not name the format of its backing file {told.backing_file}, and"
                " formats are not guessed"
            )
        # QEMU takes what is before the first colon for a protocol unless a slash comes first, and
        # looks for a relative name beside the image as it was named, links not resolved.
        if re.match(r"[^/]*:", told.backing_file):
            return f"the backing file of {path} is no plain file: {told.backing_file}"
        path, image_format = path.parent / told.backing_file, told.backing_format


def _look_at_one(
    path: Path, image_format: str, *, in_use: bool
) -> tuple[str | None, ImageInfo | None]:
    """Return what is wrong with one image of a chain, and what it tells."""
    if image_format not in ("qcow2", "raw"):  # others name further files in ways of their own
        return f"{path} is in the format {image_format}; only qcow2 and raw are used", None
    try:
        told = info(path, image_format, in_use=in_use)
    except ImageError as error:
        if not error.where:  # nothing about this image: qemu-img is missing
            raise
        return f"{path} cannot be read as {image_format}: {error.why.strip()}", None
    if told.encrypted:
        return f"{path} is encrypted", told
    if told.data_file is not None:
        return f"{path} keeps its data in another file: {told.data_file}", told
    return None, told


def create(path: Path, size: str) -> None:
    """Make an empty qcow2 image, of a size such as "1M"."""
    _qemu_img("create", "-q", "-f", "qcow2", _file(path), size, path=path)


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


def convert_all(jobs: Sequence[tuple[Path, Path]], progress: Callable[[float], None]) -> None:
    """Copy raw images into qcow2 images, sparse, as many at a time as there are cores.

    The targets must exist: whoever made them has decided who may read them, and removes them when
    this fails. They are on disk when this returns. `progress` gets the percentage of the whole now
    and then, each image weighted by the data in it, in the caller's thread.

    Raises:
        ImageError: a copy failed (`where` is its raw image), and all others were broken off.
    """
    copies = [_Copy(raw, target) for raw, target in jobs]
    total = sum(copy.weight for copy in copies)
    cores = len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(cores, "qemu-img") as pool:
        try:
            running = {pool.submit(copy.run) for copy in copies}
            while running:
                done, running = concurrent.futures.wait(
                    running, timeout=0.1, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()
                progress(sum(copy.percent * copy.weight for copy in copies) / total)
        except BaseException:
            for copy in copies:
                copy.break_off()
            raise
    for copy in copies:
        copy.check_source()


class _Copy:
    """One `qemu-img convert`, run in a thread of its own; no libvirt there."""

    def __init__(self, raw: Path, target: Path) -> None:
        self._raw = raw
        self._target = target
        self._found = self._stamp()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_off = False
        self.weight = max(self._found.st_blocks, 1)
        self.percent = 0.0

    def run(self) -> None:
        """Convert, and wait until the image is on disk, which qemu-img does not (`-t unsafe`)."""
        process = self._start()
        if process is None:
            return
        with process:
            assert process.stdout is not None  # noqa: S101 - for mypy
            assert process.stderr is not None  # noqa: S101 - for mypy
            for percentage in _percentages(process.stdout.fileno()):
                self.percent = percentage
            complaint = process.stderr.read().decode(errors="replace")
        if process.returncode:
            raise self._failed(complaint or f"it ended with {process.returncode}")
        try:
            flush(self._target)
        except OSError as error:
            raise self._failed(str(error)) from None

    def _start(self) -> "subprocess.Popen[bytes] | None":
        command = ["qemu-img", "convert", "-p", "-f", "raw", "-O", "qcow2"]
        with self._lock:
            if not self._is_off:
                try:
                    self._process = subprocess.Popen(
                        [*command, _file(self._raw), _file(self._target)],
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        env=_environment(),
                    )
                except OSError as error:
                    raise _not_installed(error) from None
            return self._process

    def break_off(self) -> None:
        with self._lock:
            self._is_off = True
            if self._process is not None:
                self._process.terminate()

    def check_source(self) -> None:
        """Raise when somebody wrote to the raw image since the copy began.

        QEMU's lock keeps other QEMUs from that while qemu-img reads, and nobody else.
        """
        now = self._stamp()
        if any(
            getattr(now, part) != getattr(self._found, part)
            for part in ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
        ):
            raise self._failed("the raw image changed meanwhile: something wrote to it")

    def _stamp(self) -> os.stat_result:
        try:
            return self._raw.stat()
        except OSError as error:
            raise self._failed(str(error)) from None

    def _failed(self, why: str) -> ImageError:
        return ImageError("qemu-img convert failed", where=str(self._raw), why=why)


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


def delete_snapshot(path: Path, name: str) -> None:
    """Delete an internal snapshot from a qcow2 image on which no machine runs.

    This command of qemu-img takes no format, so the image is described in full. What it is based on
    is left out: that need not be opened.
    """
    file = {"driver": "file", "filename": str(path)}
    image = json.dumps({"driver": "qcow2", "backing": None, "file": file})
    _qemu_img("snapshot", "-d", name, f"json:{image}", path=path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def end_writers(image: Path) -> None:
    """End the qemu-img that a killed run left behind, and that goes on writing to this image.

    The name must be one that no other run gives to a file.
    """
    argument = os.fsencode(_file(image))
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            process = os.pidfd_open(int(entry.name))
            try:
                if argument in (entry / "cmdline").read_bytes().split(b"\0"):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    select.select([process], [], [], 10)
            finally:
                os.close(process)


def _file(path: Path) -> str:
    """Return the path so that qemu-img cannot read a protocol or an option into it."""
    return f"file:{path}"


def _qemu_img(*arguments: str, path: Path) -> str:
    try:
        done = subprocess.run(
            ["qemu-img", *arguments],
            capture_output=True,
            text=True,
            errors="replace",  # a header may name a file in any bytes
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
