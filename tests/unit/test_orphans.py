"""Snapshots of which a crash left one half, in images of the real qemu-img.

The domains are the test driver's, told to be QEMU's: their snapshots are never in the images.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemuimg import fake_qemu_img
from testdriver import Host, disk, fail_when

from pytest_kvmsnap.errors import SnapshotError
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.lab import foreign, restore
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.machine import images, orphans
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import Hypervisor, connect
from pytest_kvmsnap.settings import Settings

OURS = ["kvmsnap-found-dead", "kvmsnap-base-dead", "kvmsnap-a_b-2-dead"]
NOT_OURS = ["theirs", "kvmsnap-mine", "kvmsnap-base-0a1b2c3d", "kvmsnap-base-dead-1", "dead"]


@pytest.fixture
def hypervisor(host: Host) -> Iterator[Hypervisor]:
    hypervisor = connect("test:///default")
    hypervisor.kind = "QEMU"
    yield hypervisor
    hypervisor.close()


class Box:
    """A machine on real images, a run that was killed on it, and how its snapshots are deleted."""

    def __init__(
        self, folder: Path, host: Host, hypervisor: Hypervisor, patch: pytest.MonkeyPatch
    ) -> None:
        self.image, self.second = folder / "box, 1.qcow2", folder / "2.qcow2"
        base = folder / "base.qcow2"
        run("create", "-qf", "qcow2", base, "1M")
        run("create", "-qf", "qcow2", "-b", base, "-F", "qcow2", self.image, "1M")
        run("create", "-qf", "qcow2", self.second, "1M")
        raw = host.define("box", disk(self.image), disk(self.second, target="vdb"))
        self.host = host
        self.domain = Domain(hypervisor, raw.UUIDString(), "box")
        self.journal = Journal(folder / "j.json", "dead", hypervisor.uri, "box", self.domain.uuid)
        self.deleted: list[str] = []
        self.reverts: list[str] = []
        delete, revert = Domain.delete_snapshot, Domain.revert

        def deleting(domain: Domain, name: str) -> None:
            self.deleted.append(name)
            delete(domain, name)

        def forgetting(domain: Domain, name: str) -> None:
            self.deleted.append(f"{name} (metadata only)")
            delete(domain, name)  # all that the test driver can

        def reverting(domain: Domain, name: str, timeout: float) -> None:
            self.reverts.append(name)
            revert(domain, name, timeout)

        patch.setattr(Domain, "delete_snapshot", deleting)
        patch.setattr(Domain, "forget_snapshot", forgetting)
        patch.setattr(Domain, "revert", reverting)

    def found(self) -> None:
        self.journal.found = restore.look(self.domain)

    def take(self, *names: str) -> None:
        """Have libvirt know snapshots, of which the images hold nothing."""
        for name in names:
            self.domain.take_snapshot(name, self.journal.description())

    def put_back(self) -> None:
        restore.as_found(Guest(self.domain, Settings(ready="none")), self.journal, 9)

    def held(self, path: Path | None = None) -> list[str]:
        return list(images.info(path or self.image, "qcow2", in_use=False).snapshots)


def run(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True)


def put(path: Path, *names: str) -> None:
    """Have an image hold snapshots, of which libvirt knows nothing."""
    for name in names:
        run("snapshot", "-c", name, path)


@pytest.fixture
def box(
    tmp_path: Path,
    host: Host,
    hypervisor: Hypervisor,
    qemu_img: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Box:
    return Box(tmp_path, host, hypervisor, monkeypatch)


@pytest.mark.parametrize(
    ("name", "is_ours"), [*((name, True) for name in OURS), *((name, False) for name in NOT_OURS)]
)
def test_names_of_a_run(name: str, is_ours: bool) -> None:
    assert orphans.is_of_run(name, "dead") == is_ours
    assert not orphans.is_of_run(name, "....")


# in the images alone


def test_off_only_those_of_the_run_are_removed_from_all_images(box: Box) -> None:
    put(box.image, *NOT_OURS, *OURS, "-d", "of the test", 'a "test"')
    (box.image.parent / "base.qcow2").unlink()  # it need not be opened
    put(box.second, "theirs", OURS[0])
    box.found()
    box.journal.by_tests = ["of the test", 'a "test"', "-d", "never taken"]
    box.put_back()
    assert box.held() == NOT_OURS
    assert box.held(box.second) == ["theirs"]
    assert box.deleted == []


def test_what_the_run_had_found_is_not_taken_for_a_tests_own(box: Box) -> None:
    """A test asked for a snapshot of that name, which libvirt refused."""
    box.host.snapshot("theirs")
    put(box.image, "theirs")
    box.found()
    box.journal.by_tests = ["theirs"]
    box.put_back()
    box.host.domain().snapshotLookupByName("theirs").delete(0)
    restore.delete_ours(box.domain, box.journal)
    assert box.held() == ["theirs"]


def test_what_libvirt_knows_is_left_to_libvirt(box: Box) -> None:
    put(box.image, "theirs", "of the test")
    box.found()
    box.take("of the test")
    box.host.snapshot("theirs")
    box.journal.by_tests = ["theirs", "of the test"]
    orphans.remove(box.domain, "", lambda _: True)
    assert box.held() == ["theirs", "of the test"]


def test_running_libvirt_learns_of_them_and_deletes_them(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(box.image, "theirs", "of the test", *OURS)
    box.host.domain().create()
    box.host.snapshot("of the owner")
    box.found()
    before = box.host.look()
    box.journal.by_tests = ["of the test"]
    fake_qemu_img(monkeypatch, tmp_path / "bin", f'echo $1 >>"{tmp_path}/log"; exec "$real" "$@"')
    box.put_back()
    assert set((tmp_path / "log").read_text().split()) == {"info"}  # QEMU has the image open
    assert box.deleted == ["of the test", *OURS]
    assert box.host.look() == before


def test_off_and_not_writable_libvirt_deletes_them_too(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(box.image, "theirs", OURS[0])
    box.found()
    fake_qemu_img(monkeypatch, tmp_path / "bin", '[ "$1" = snapshot ] && exit 1; exec "$real" "$@"')
    box.put_back()
    assert box.deleted == [OURS[0]]


def test_what_libvirt_cannot_delete_it_forgets_again(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would look like another host's run, which keeps everybody from the machine."""
    put(box.image, OURS[0])
    box.host.domain().create()
    box.found()
    fail_when(monkeypatch, "delete_snapshot", SnapshotError("QEMU cannot"), lambda _: True)
    box.put_back()
    assert box.deleted == [f"{OURS[0]} (metadata only)"]
    assert box.host.look().snapshots == ()


def test_on_another_host_or_without_qemu_img_nobody_looks(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(box.image, *OURS)
    box.found()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        box.put_back()
    box.domain.hypervisor.is_local = False
    box.put_back()
    box.domain.hypervisor.is_local, box.domain.hypervisor.kind = True, "TEST"
    box.put_back()
    assert box.held() == OURS
    assert box.deleted == []


# known to libvirt alone


def test_those_without_data_are_deleted_as_metadata(box: Box) -> None:
    box.found()
    box.take("kvmsnap-found-dead", "kvmsnap-base-dead", "kvmsnap-db-dead")
    put(box.second, "kvmsnap-found-dead")  # one image is enough
    box.journal.found_snapshot = "kvmsnap-found-dead"
    box.put_back()
    assert box.deleted == [
        "kvmsnap-db-dead (metadata only)",
        "kvmsnap-base-dead (metadata only)",
        "kvmsnap-found-dead",
    ]


def test_where_one_image_cannot_be_read_nothing_is_taken_for_lost(box: Box) -> None:
    box.take("kvmsnap-found-dead")
    box.second.write_bytes(b"no qcow2")
    assert orphans.without_data(box.domain, ["kvmsnap-found-dead"]) == set()
    assert orphans.without_data(box.domain, []) == set()


@pytest.mark.parametrize("others", [(), ("kvmsnap-base-dead",)])
def test_a_run_that_was_killed_while_it_deleted_the_last_one(
    box: Box, others: tuple[str, ...]
) -> None:
    """The machine was back then; a revert to a snapshot without data kills it (seen with QEMU)."""
    box.host.domain().create()
    box.found()
    before = box.host.look()
    box.take("kvmsnap-found-dead", *others)
    box.journal.found_snapshot = "kvmsnap-found-dead"
    box.put_back()
    assert box.reverts == (["kvmsnap-found-dead"] if others else [])
    assert box.host.look() == before
    assert not box.journal.path.exists()


def test_nobody_reverts_to_a_found_snapshot_of_another_host_without_data(box: Box) -> None:
    box.host.domain().create()
    before = box.host.look()
    box.take("kvmsnap-found-dead", "kvmsnap-base-dead")
    (run,) = foreign._runs_on(box.domain)
    nowhere: Any = None
    said = foreign._undo_run(box.domain, run, Lease(box.journal.path), nowhere)
    assert "it stays as it is" in said
    assert box.reverts == []
    assert box.deleted == [
        "kvmsnap-base-dead (metadata only)",
        "kvmsnap-found-dead (metadata only)",
    ]
    assert box.host.look() == before
