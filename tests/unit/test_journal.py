"""The journal: on disk whole or not at all, private, and never read through a link."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_kvmsnap.errors import LeaseError
from pytest_kvmsnap.lab import journal as journals
from pytest_kvmsnap.lab.journal import Found, Journal
from pytest_kvmsnap.machine.conversion import Conversion


def full(path: Path) -> Journal:
    journal = Journal(path, "1234", "qemu:///system", "grün & <co>", "some-uuid")
    journal.test = "test_x.py::test_y[ü]"
    journal.found = Found("running", True, "one", "<domain>ü</domain>", {"one": "<s/>", "two": ""})
    journal.found_snapshot = "kvmsnap-found-1234"
    journal.taken = {"kvmsnap-found-1234": "<a/>", "kvmsnap-base-1234": ""}
    journal.by_tests = ["of a test", "kvmsnap-test-1-1"]
    journal.planted = True
    journal.conversions = [
        Conversion("vda", Path("/a b.raw"), Path("/a b.qcow2"), Path("/.a b.qcow2.tmp"))
    ]
    return journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "machine.json"


def test_what_is_saved_is_loaded(path: Path) -> None:
    journal = full(path)
    journal.save()
    assert journals.load(path) == journal


def test_a_new_one_is_loaded_too(path: Path) -> None:
    journal = Journal(path, "1", "uri", "box", "uuid")
    journal.save()
    assert journals.load(path) == journal
    assert journal.pid == os.getpid()


def test_the_order_of_what_was_taken_is_kept(path: Path) -> None:
    journal = full(path)
    journal.taken = dict.fromkeys(("z", "a", "m"), "")
    journal.save()
    loaded = journals.load(path)
    assert loaded is not None
    assert list(loaded.taken) == ["z", "a", "m"]


def test_it_is_readable_by_the_owner_alone(path: Path) -> None:
    path.touch(mode=0o644)
    full(path).save()
    assert path.stat().st_mode & 0o777 == 0o600


def test_saving_again_replaces_it_and_leaves_nothing_beside(path: Path) -> None:
    journal = full(path)
    journal.save()
    journal.test = "another"
    journal.save()
    loaded = journals.load(path)
    assert loaded is not None
    assert loaded.test == "another"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_link_in_its_place_is_replaced_and_not_followed(path: Path) -> None:
    other = path.with_name("precious")
    other.write_text("precious")
    path.symlink_to(other)
    full(path).save()
    assert not path.is_symlink()
    assert other.read_text() == "precious"


def test_a_journal_that_cannot_be_written_stays_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since a full disk needs one of its own."""
    journal = full(path)
    journal.save()
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    journal.test = "another"
    with pytest.raises(OSError, match="No space left"):
        journal.save()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("is_link", [False, True])
def test_what_a_kill_left_of_a_save_is_replaced_and_not_written_to(
    path: Path, is_link: bool
) -> None:
    draft, other = journals.draft_of(path), path.with_name("precious")
    other.write_text("precious")
    other.chmod(0o644)
    draft.symlink_to(other) if is_link else draft.hardlink_to(other)
    full(path).save()
    assert other.read_text() == "precious"
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, "precious"]


def test_a_killed_save_leaves_one_private_file_that_is_found_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As good as killed: nothing is done after the writing, and no one cleans up."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: None)
        full(path).save()
        full(path).save()
    (draft,) = path.parent.iterdir()
    assert draft == journals.draft_of(path)
    assert draft.stat().st_mode & 0o777 == 0o600
    assert journals.places_in(path.parent) == [path]
    assert journals.load(path) is None
    full(path).remove()
    assert list(path.parent.iterdir()) == []


def test_a_draft_that_cannot_be_replaced_is_told(path: Path) -> None:
    journals.draft_of(path).mkdir()
    with pytest.raises(LeaseError, match="cannot write down what this run must undo") as caught:
        full(path).save()
    assert caught.value.where == f"{path}.draft"
    assert "--kvmsnap-lock-dir" in caught.value.cure
    full(path).remove()  # no error of its own


def test_removing_it_twice_is_no_error(path: Path) -> None:
    journal = full(path)
    journal.save()
    journal.remove()
    journal.remove()
    assert not path.exists()


def test_there_may_be_none(path: Path) -> None:
    assert journals.load(path) is None


def without(key: str) -> str:
    content = {
        "version": 1,
        "run": "1",
        "uri": "u",
        "name": "n",
        "uuid": "i",
        "found": None,
        "conversions": [],
    }
    del content[key]
    return json.dumps(content)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        "{}",
        '{"version": 2}',
        '{"version": 1, "found": null, "conversions": []}',
        '{"version": 1, "found": {"state": "off"}, "conversions": []}',
        without("uuid"),
        without("found"),
        without("conversions").replace("}", ', "conversions": [{}]}'),
        without("version").replace("}", ', "version": 1, "surprise": 1}'),
        b"\xff\xfe",
    ],
)
def test_a_damaged_one_is_told_with_its_path_and_cure(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(LeaseError, match="cannot read what an earlier run left") as caught:
        journals.load(path)
    assert caught.value.where == str(path)
    assert caught.value.why
    assert "--kvmsnap-clean" in caught.value.cure
    assert "remove the file" in caught.value.cure


@pytest.mark.parametrize("target", ["precious", "nowhere"])
def test_a_link_is_not_read(path: Path, target: str) -> None:
    full(path.with_name("precious")).save()
    path.symlink_to(target)
    with pytest.raises(LeaseError):
        journals.load(path)


def test_a_folder_in_its_place_is_told(path: Path) -> None:
    path.mkdir()
    with pytest.raises(LeaseError):
        journals.load(path)


def test_the_owner_is_named_for_people() -> None:
    journal = Journal(
        Path("/x"), "1234", "uri", "box", "uuid", pid=7, host="lab1", user="ann", since=0.0
    )
    assert journal.owner().startswith("pid 7 of ann on lab1, since 19")
    journal.test = "test_x.py::test_y"
    assert journal.owner().endswith(", in test_x.py::test_y")
    assert journal.description() == "pytest-kvmsnap run 1234 on lab1, pid 7"


def test_another_users_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to delete and to define, so whoever plants one would have that done by us."""
    path = tmp_path / "machine.json"
    Journal(path, "run", "uri", "box", "uuid").save()
    assert journals.load(path) is not None
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(LeaseError, match="cannot read what an earlier run left") as caught:
        journals.load(path)
    assert "belongs to another user" in caught.value.why


def test_threads_may_save_it_at_once(path: Path) -> None:
    """A test may take snapshots in several, each of which is noted first."""
    journal = Journal(path, "run", "uri", "box", "uuid")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: journal.save(), range(40)))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
