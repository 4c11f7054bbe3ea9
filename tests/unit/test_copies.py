"""Copies into a guest and out of it, which is this computer here."""

import os
import stat
import threading
from pathlib import Path

import pytest
from localguest import LocalGuest, NoDomain

from pytest_kvmsnap import VM, AgentError
from pytest_kvmsnap.guest import files
from pytest_kvmsnap.guest.agent import CHUNK, READ
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.settings import Settings

Shown = list[tuple[str, float]]


@pytest.fixture
def shown() -> Shown:
    return []


@pytest.fixture
def vm(no_domain: NoDomain, shown: Shown) -> VM:
    guest = Guest(no_domain, Settings(ready="agent"))
    show = lambda what, percent: shown.append((what, percent))  # noqa: E731
    return VM(guest, revert_timeout=60, description="", show=show)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    path = tmp_path / "guest" / "-remote ü"
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * (READ // 100))
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("mode", [0o600, 0o751, 0o444, 0o4755])
def test_a_fetched_file_has_its_mode(vm: VM, remote: Path, here: Path, mode: int) -> None:
    remote.chmod(mode)
    vm.get(str(remote), here / "local")
    assert (here / "local").read_bytes() == remote.read_bytes()
    assert stat.S_IMODE((here / "local").stat().st_mode) == mode & 0o777
    assert names(here) == ["local"]


def test_a_guest_that_tells_no_modes_gives_its_files_all_the_same(
    vm: VM, local_guest: LocalGuest, remote: Path, here: Path
) -> None:
    local_guest.refusals = {"guest-exec": "guest-exec has been disabled"}
    vm.get(str(remote), here / "local")
    (here / "usual").touch()
    assert (here / "local").read_bytes() == remote.read_bytes()
    assert (here / "local").stat().st_mode == (here / "usual").stat().st_mode


def test_a_copy_that_breaks_leaves_what_was_there(
    vm: VM, local_guest: LocalGuest, remote: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "local").write_text("old")
    read = local_guest._guest_file_read

    def read_once(handle: int, count: int) -> dict[str, object]:
        local_guest.refusals = {"guest-file-read": "Input/output error"}
        return read(handle, count)

    monkeypatch.setattr(local_guest, "_guest_file_read", read_once)
    with pytest.raises(AgentError) as caught:
        vm.get(str(remote), here / "local")
    assert caught.value.what.startswith(f"cannot copy {remote} in the guest to {here / 'local'}: ")
    assert (here / "local").read_text() == "old"
    assert names(here) == ["local"]


def test_a_link_is_followed_and_a_pipe_stays_one(vm: VM, remote: Path, here: Path) -> None:
    (here / "file").touch()
    (here / "link").symlink_to("file")
    vm.get(str(remote), here / "link")
    assert (here / "link").is_symlink()
    assert (here / "file").read_bytes() == remote.read_bytes()
    os.mkfifo(here / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((here / "pipe").read_bytes()), daemon=True)
    reader.start()
    vm.get(str(remote), here / "pipe")
    reader.join(timeout=10)
    assert read == [remote.read_bytes()]
    assert names(here) == ["file", "link", "pipe"]


def test_both_ends_are_named_when_a_file_cannot_be_put(vm: VM, here: Path) -> None:
    (here / "local").touch()
    with pytest.raises(AgentError) as caught:
        vm.put(here / "local", "/no/where")
    copy, why = caught.value.what.split(": ")
    assert copy == f"cannot copy {here / 'local'} to /no/where in the guest"
    assert why == "cannot open /no/where in the guest"


def test_what_takes_long_is_shown(
    vm: VM, shown: Shown, remote: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm.get(str(remote), here / "local")
    assert shown == []
    monkeypatch.setattr(files, "_QUIET", -1)
    monkeypatch.setattr(files, "_OFTEN", 0)
    vm.get(str(remote), here / "local")
    assert {what for what, _ in shown} == {f"getting {remote}"}
    assert [percent for _, percent in shown] == sorted(percent for _, percent in shown)
    assert shown[-1][1] == pytest.approx(100)
    shown.clear()
    vm.put(here / "local", str(remote))
    assert len(shown) == -(-remote.stat().st_size // CHUNK)
    assert shown[-1] == (f"putting {here / 'local'}", 100)
