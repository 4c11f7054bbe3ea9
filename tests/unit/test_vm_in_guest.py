"""`VM`: commands and files in the guest, which is this computer here."""

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap import VM, AgentError, ConsoleError
from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.guest.agent import CHUNK
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import Hypervisor, connect
from pytest_kvmsnap.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localguest import LocalGuest
    from testdriver import Host


@pytest.fixture
def hypervisor(host: "Host") -> "Iterator[Hypervisor]":
    hypervisor = connect("test:///default")
    yield hypervisor
    hypervisor.close()


@pytest.fixture
def vm(host: "Host", hypervisor: Hypervisor, local_guest: "LocalGuest") -> VM:
    domain = host.define(state="running")
    return VM(
        Guest(Domain(hypervisor, domain.UUIDString(), "box"), Settings(ready="agent")),
        revert_timeout=60,
        description="of the unit tests",
    )


# commands


def test_a_string_is_a_command_of_the_shell(vm: VM) -> None:
    done = vm.run("echo $((1 + 1)); echo err >&2; exit 3")
    assert done.args == "echo $((1 + 1)); echo err >&2; exit 3"
    assert (done.returncode, done.stdout, done.stderr) == (3, "2\n", "err\n")


def test_a_list_is_executed_as_it_is(vm: VM) -> None:
    done = vm.run(("printf", "%s", "$HOME; ü"))
    assert (done.args, done.stdout) == (["printf", "%s", "$HOME; ü"], "$HOME; ü")


def test_check_raises(vm: VM) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        vm.run("echo out; echo err >&2; exit 3", check=True)
    error = caught.value
    assert (error.returncode, error.stdout, error.stderr) == (3, "out\n", "err\n")
    assert error.cmd == "echo out; echo err >&2; exit 3"
    assert vm.run("true", check=True).returncode == 0


def test_a_timeout_raises_with_the_command_as_it_was_given(vm: VM) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        vm.run("sleep 600", timeout=0.05, cwd="/", env={"A": "a"})
    assert (caught.value.cmd, caught.value.timeout) == ("sleep 600", 0.05)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("given", ["ü\n", "ü\n".encode()])
def test_input_may_be_text_or_bytes(vm: VM, given: str | bytes) -> None:
    assert vm.run("cat", input=given).stdout == "ü\n"


def test_output_may_be_bytes(vm: VM) -> None:
    assert vm.run("printf '\\377'; printf '\\376' >&2", text=False).stdout == b"\xff"  # type: ignore[comparison-overlap]


def test_output_that_is_no_text_is_shown_as_far_as_it_is(vm: VM) -> None:
    assert vm.run("printf 'a\\377b'").stdout == "a\ufffdb"


@pytest.mark.parametrize("command", ["wc -c", ["wc", "-c"]])
@pytest.mark.parametrize("size", [0, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_input_of_any_length_arrives_and_leaves_no_file(
    vm: VM, command: str | list[str], size: int
) -> None:
    before = set(Path("/tmp").glob(".kvmsnap-input-*"))
    assert vm.run(command, input=bytes(size), cwd="/").stdout.split() == [str(size)]
    assert set(Path("/tmp").glob(".kvmsnap-input-*")) <= before


def test_environment_and_folder(vm: VM, tmp_path: Path) -> None:
    done = vm.run('echo "$PWD $A"', env={"A": "it's $A"}, cwd=str(tmp_path))
    assert done.stdout == f"{tmp_path} it's $A\n"


def test_a_command_that_is_not_there(vm: VM) -> None:
    with pytest.raises(AgentError):
        vm.run(["/nonexistent"])
    assert vm.run("/nonexistent").returncode == 127


# files


def test_text_is_utf_8(vm: VM, tmp_path: Path) -> None:
    path = tmp_path / "ü & co"
    vm.write_text(str(path), "grün\r\n☃")
    assert path.read_bytes() == "grün\r\n☃".encode()
    assert vm.read_text(str(path)) == "grün\r\n☃"


def test_bytes_are_bytes(vm: VM, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    vm.write_bytes(str(tmp_path / "file"), data)
    assert vm.read_bytes(str(tmp_path / "file")) == data
    vm.write_bytes(str(tmp_path / "file"), b"")
    assert vm.read_bytes(str(tmp_path / "file")) == b""


@pytest.mark.parametrize("size", [0, 1, 2 * CHUNK + 1])
@pytest.mark.parametrize("mode", [0o600, 0o755])
def test_files_are_put_with_their_mode_and_fetched(
    vm: VM, tmp_path: Path, size: int, mode: int
) -> None:
    local, remote, back = (tmp_path / name for name in ("local", "remote ü", "back"))
    local.write_bytes(bytes(size))
    local.chmod(mode)
    vm.put(local, str(remote))
    assert remote.read_bytes() == bytes(size)
    assert remote.stat().st_mode & 0o7777 == mode
    vm.get(str(remote), str(back))
    assert back.read_bytes() == bytes(size)


def test_a_guest_that_runs_no_commands_takes_files_all_the_same(
    vm: VM, local_guest: "LocalGuest", tmp_path: Path
) -> None:
    local_guest.refusals = {"guest-exec": "guest-exec has been disabled"}
    (tmp_path / "local").write_text("data")
    vm.put(tmp_path / "local", str(tmp_path / "remote"))
    assert (tmp_path / "remote").read_text() == "data"


def test_fetching_what_is_not_there_leaves_no_file(vm: VM, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="cannot open"):
        vm.get("/nonexistent/file", tmp_path / "local")
    assert not (tmp_path / "local").exists()


def test_putting_what_is_not_there_leaves_no_file(vm: VM, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        vm.put(tmp_path / "local", str(tmp_path / "remote"))
    assert not (tmp_path / "remote").exists()


# the machine


def test_power(vm: VM) -> None:
    assert vm.state == "running"
    vm.shutdown()
    assert vm.state == "shut off"
    vm.start()
    vm.wait_ready()
    assert vm.state == "running"
    vm.destroy()
    vm.destroy()
    assert vm.state == "shut off"


def test_snapshots_have_names_parents_and_states(vm: VM) -> None:
    first = vm.snapshot("first")
    vm.destroy()
    second = vm.snapshot()
    assert vm.current_snapshot == second
    assert [(s.name, s.state, s.parent) for s in vm.snapshots()] == [
        ("first", "running", None),
        (second.name, "shut off", "first"),
    ]
    assert first.description == "of the unit tests"
    vm.revert(first)
    assert vm.state == "running"
    vm.revert(second.name)
    assert vm.state == "shut off"
    vm.delete_snapshot(second)
    vm.delete_snapshot("first")
    assert vm.snapshots() == []
    assert vm.current_snapshot is None


def test_names_of_snapshots_are_made_up_anew_each_time(vm: VM) -> None:
    assert len({vm.snapshot().name for _ in range(3)}) == 3


@pytest.mark.parametrize("name", [".hidden", "a/b", "/", "."])
def test_names_that_qemu_refuses_are_refused(vm: VM, name: str) -> None:
    with pytest.raises(ConfigError, match="wrong name for a snapshot") as caught:
        vm.snapshot(name)
    assert caught.value.where == "box at test:///default"
    assert vm.snapshots() == []


@pytest.mark.parametrize("name", ["a & <b>", "grün ☃", 'it\'s "so"'])
def test_names_of_any_other_kind_are_taken(vm: VM, name: str) -> None:
    assert vm.snapshot(name).name == name
    vm.revert(name)
    vm.delete_snapshot(name)
    assert vm.snapshots() == []


def test_after_a_revert_the_machine_is_ready_and_its_clock_is_set(
    vm: VM, local_guest: "LocalGuest"
) -> None:
    vm.snapshot("one")
    local_guest.log.clear()
    vm.revert("one")
    assert local_guest.log == ["guest-ping", "guest-set-time"]


@pytest.mark.parametrize("verb", ["revert", "delete_snapshot"])
def test_a_snapshot_that_is_not_there_is_told(vm: VM, verb: str) -> None:
    from pytest_kvmsnap import KvmsnapError

    with pytest.raises(KvmsnapError) as caught:
        getattr(vm, verb)("missing")
    assert "'missing'" in caught.value.what
    assert caught.value.where == "box at test:///default"
    assert "no domain snapshot with matching name" in caught.value.why


def test_a_domain_that_is_gone_is_told(vm: VM, host: "Host") -> None:
    from pytest_kvmsnap import MachineError

    host.clear()
    with pytest.raises(MachineError, match="the domain is gone") as caught:
        _ = vm.state
    assert vm.uuid in caught.value.why


# screen and console


def test_a_picture_of_the_screen(vm: VM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test driver has one; QEMU before 7.1 makes another kind."""
    made = vm.screenshot(tmp_path / "screen.png")
    assert made == tmp_path / "screen.png"
    assert made.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(Domain, "screenshot", lambda _: (b"P6", "ppm"))
    assert vm.screenshot(str(tmp_path / "screen.png")) == tmp_path / "screen.ppm"


def test_a_console_that_nobody_heard_is_told(vm: VM) -> None:
    with pytest.raises(ConsoleError, match="nothing is known of the console"):
        vm.console_log()
    assert vm.console is vm.console
