"""The cache of converted golden images, by the real qemu-img, and the folder that it is in."""

import os
import threading
from pathlib import Path
from typing import Any

import filelock
import pytest
from qemuimg import is_same

from pytest_kvmsnap.errors import ImageError, LeaseError, UsageProblem
from pytest_kvmsnap.lab import goldens
from pytest_kvmsnap.machine import clone, images, store

MIB = 2**20


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu_img: str) -> Path:
    """Where the cache is; none of this works without qemu-img."""
    assert qemu_img
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"pytest-kvmsnap-{os.geteuid()}" / "images"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "two words ü.raw"
    path.write_bytes(os.urandom(MIB).ljust(3 * MIB, b"\0"))
    return path


class Heard:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.progress: list[float] = []

    def convert(self, raw: Path, timeout: float = 5) -> Path:
        return goldens.as_qcow2(raw, "run", timeout, self.lines.append, self.progress.append)


@pytest.fixture
def heard() -> Heard:
    return Heard()


def names(place: Path) -> set[str]:
    return {path.suffix for path in place.iterdir()}


def test_a_raw_image_is_converted_once(raw: Path, heard: Heard, place: Path) -> None:
    raw.chmod(0o640)
    assert not goldens.is_converted(raw)
    assert not place.exists()
    made = heard.convert(raw)
    assert goldens.is_converted(raw)
    assert is_same(raw, made)
    assert made.stat().st_mode & 0o777 == 0o640
    assert heard.progress[-1] == 100.0
    (line,) = heard.lines
    assert line.startswith(f"converted the golden image {raw} to qcow2 (")
    assert heard.convert(raw) == made
    assert len(heard.lines) == 1
    assert names(place) == {".qcow2", ".source"}


@pytest.mark.parametrize("change", ["size", "time", "inode", "path"])
def test_another_file_is_converted_anew_and_what_was_made_before_goes(
    raw: Path, heard: Heard, place: Path, change: str
) -> None:
    status = raw.stat()
    first = heard.convert(raw)
    if change == "size":
        raw.write_bytes(raw.read_bytes() + bytes(512))
        os.utime(raw, ns=(status.st_mtime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(raw, ns=(1, 1))
    elif change == "inode":
        other = raw.with_name("other")
        other.write_bytes(raw.read_bytes())
        os.utime(other, ns=(status.st_mtime_ns, status.st_mtime_ns))
        other.replace(raw)
    else:
        raw = raw.rename(raw.with_name("renamed.raw"))
    second = heard.convert(raw)
    assert first != second
    assert len(heard.lines) == 2
    assert list(place.glob("*.qcow2")) == [second]
    assert [link.resolve() for link in place.glob("*.source")] == [raw]


def test_images_that_are_still_there_keep_what_was_made_of_them(
    raw: Path, heard: Heard, place: Path
) -> None:
    other = raw.with_name("other.raw")
    other.write_bytes(b"other".ljust(MIB, b"\0"))
    made = {heard.convert(raw), heard.convert(other)}
    assert set(place.glob("*.qcow2")) == made


def test_a_machine_keeps_its_image_when_the_cache_drops_it(
    raw: Path, heard: Heard, tmp_path: Path
) -> None:
    cached = heard.convert(raw)
    folder = tmp_path / "clone"
    folder.mkdir()
    linked = clone.linked(cached, folder)
    os.utime(raw, (1, 1))
    heard.convert(raw)
    assert not cached.exists()
    assert is_same(raw, linked)


def test_what_a_killed_run_left_of_a_conversion_goes(raw: Path, heard: Heard, place: Path) -> None:
    made = heard.convert(raw)
    draft = made.with_name(f"{made.stem}-dead.draft")
    made.rename(draft)
    assert heard.convert(raw) == made
    assert not draft.exists()
    assert names(place) == {".qcow2", ".source"}


@pytest.mark.parametrize("trouble", ["fails", "interrupted"])
def test_nothing_is_left_of_a_conversion_that_fails(
    raw: Path, heard: Heard, place: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    real = images.convert_all

    def convert_all(*args: Any) -> None:
        real(*args)
        if trouble == "interrupted":
            raise KeyboardInterrupt
        raise ImageError("qemu-img convert failed", where=str(raw), why="No space left")

    monkeypatch.setattr(images, "convert_all", convert_all)
    with pytest.raises((UsageProblem, KeyboardInterrupt)):
        heard.convert(raw)
    assert names(place) == {".source"}


def test_an_image_that_is_gone_is_told(raw: Path, heard: Heard) -> None:
    raw.unlink()
    with pytest.raises(ImageError, match="cannot use the golden image") as caught:
        heard.convert(raw)
    assert caught.value.where == str(raw)
    assert "No such file" in caught.value.why


# another run


def lock_of(raw: Path) -> filelock.FileLock:
    return filelock.FileLock(store.folder("images") / f"{goldens.key(raw)}.lock")


def test_a_run_that_converts_the_same_image_is_waited_for(raw: Path, heard: Heard) -> None:
    other = Heard()
    with lock_of(raw):
        waiting = threading.Thread(target=heard.convert, args=(raw,))
        waiting.start()
        while not heard.lines:
            waiting.join(0.05)
        assert heard.lines == [f"waiting for another run, which converts {raw}"]
        made = store.folder("images") / goldens.name(raw)
        made.write_bytes(b"by the other run")
    waiting.join()
    assert heard.progress == []
    assert other.convert(raw) == made
    assert made.read_bytes() == b"by the other run"


def test_a_run_that_does_not_get_on_is_not_waited_for_any_longer(raw: Path, heard: Heard) -> None:
    with lock_of(raw), pytest.raises(LeaseError, match="does not get on") as caught:
        heard.convert(raw, timeout=0.1)
    assert caught.value.why == "waited 0.1 s"
    assert "lsof" in caught.value.cure


def test_a_run_that_gets_on_is_waited_for(
    raw: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is a mock, so that the other run's draft grows at each look and not by the clock."""
    draft = store.folder("images") / f"{goldens.key(raw)}-x-run.draft"
    looks = []

    class Taken:
        def __init__(self, *_: object, **__: object) -> None: ...

        def acquire(self, **_: object) -> None:
            looks.append(1)
            draft.write_bytes(bytes(min(len(looks), 5) * MIB))
            raise filelock.Timeout("lock")

    monkeypatch.setattr(filelock, "FileLock", Taken)
    with pytest.raises(LeaseError):
        heard.convert(raw, timeout=2)
    assert len(looks) == 6  # and the last of them saw no more than the one before
    assert len(heard.lines) == 1


# the folder


def test_the_folder_can_be_entered_but_not_listed_by_others(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        folder = store.folder("clones")
    finally:
        os.umask(before)
    assert folder == store.place_of("clones")
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o711}
    assert folder.parent.parent == tmp_path


def test_without_tmpdir_the_folder_is_not_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR")
    assert store.place_of("clones").parts[:3] == ("/", "var", "tmp")


@pytest.mark.parametrize("trap", ["link", "file", "foreign"])
def test_a_folder_that_is_not_ours_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    base = store.place_of("clones").parent
    if trap == "link":
        (tmp_path / "theirs").mkdir()
        base.symlink_to(tmp_path / "theirs")
    elif trap == "file":
        base.touch()
    else:
        base.mkdir()
        real = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: real + 1)  # no second user is needed for that
        base.rename(store.place_of("clones").parent)
    with pytest.raises(ImageError, match="cannot use the folder for throwaway images") as caught:
        store.folder("clones")
    assert "TMPDIR" in caught.value.cure
