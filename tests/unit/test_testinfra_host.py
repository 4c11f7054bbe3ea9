"""`vm.host`: testinfra's modules over the agent of a guest, which is this computer here."""

import subprocess
import sys
from pathlib import Path

import pytest
from localguest import LocalGuest, NoDomain

from pytest_kvmsnap import VM, AgentError, KvmsnapError
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.settings import Settings


@pytest.fixture
def used() -> list[str]:
    return []


@pytest.fixture
def vm(no_domain: NoDomain, used: list[str]) -> VM:
    guest = Guest(no_domain, Settings(ready="agent"))
    return VM(guest, revert_timeout=60, description="", on_use=lambda: used.append("use"))


def test_modules_of_testinfra(vm: VM, tmp_path: Path) -> None:
    (tmp_path / "a b").write_text("text\n")
    file = vm.host.file(str(tmp_path / "a b"))
    assert (file.exists, file.is_file, file.size, file.content) == (True, True, 5, b"text\n")
    assert vm.host.user("root").uid == 0
    assert vm.host.mount_point("/proc").filesystem == "proc"
    assert vm.host.process.filter(pid=1)
    assert vm.host.system_info.type == "linux"
    assert vm.host.exists("sh")
    assert not vm.host.exists("no-such-command")


def test_commands_and_their_bytes(vm: VM) -> None:
    done = vm.host.run("printf '%%b' %s; echo err >&2; exit 3", r"\0377\0")
    assert (done.rc, done.stdout_bytes, done.stderr) == (3, b"\xff\0", "err\n")
    assert vm.host.run("echo ü").stdout == "ü\n"
    assert vm.host.check_output("cat %s", "/dev/null") == ""
    with pytest.raises(AssertionError, match="Unexpected exit code 1"):
        vm.host.check_output("false")


def test_who_it_is(vm: VM) -> None:
    assert repr(vm.host) == "<testinfra.host.Host kvmsnap://box>"
    assert vm.host.backend.get_hostname() == "box"
    assert vm.host.backend.get_connection_type() == "kvmsnap"
    assert vm.host is vm.host


def test_each_command_is_a_use_of_the_machine(vm: VM, used: list[str]) -> None:
    host = vm.host
    used.clear()
    host.run("true")
    assert used == ["use"]


def test_a_command_may_take_as_long_as_it_is_told(vm: VM) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        vm.host.run("sleep %s", "600", timeout=0.05)
    assert (caught.value.cmd, caught.value.timeout) == ("sleep 600", 0.05)


def test_after_a_revert_the_system_is_looked_at_anew(
    vm: VM, no_domain: NoDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("revert", "end_block_jobs"):
        monkeypatch.setattr(no_domain, name, lambda *_: None)
    monkeypatch.setattr(no_domain.console, "listen", lambda: None)
    before = vm.host
    vm.revert("any")
    assert vm.host is not before


def test_a_guest_without_its_agent_is_told(vm: VM, local_guest: LocalGuest) -> None:
    local_guest.refusals = {"guest-exec": "QEMU guest agent is not connected"}
    with pytest.raises(AgentError, match="guest-exec") as caught:
        _ = vm.host.file("/").exists
    assert "is qemu-guest-agent installed" in caught.value.cure


def test_without_testinfra_it_is_told_how_to_get_it(
    vm: VM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "pytest_kvmsnap.guest.testinfra", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "testinfra"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "testinfra", None)
    with pytest.raises(KvmsnapError, match="pytest-testinfra, which is not installed") as caught:
        _ = vm.host
    assert caught.value.cure == "pip install pytest-kvmsnap[testinfra]"


def test_testinfra_is_not_imported_before_it_is_used() -> None:
    script = "import sys, pytest_kvmsnap.vm; assert not any('testinfra' in n for n in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
