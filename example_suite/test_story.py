"""What a clean machine means: nothing that a test does is seen by the next one.

Run them in any order, alone or together: where a test starts depends on the test alone.
"""

from pathlib import Path

import pytest

from pytest_kvmsnap import VM


def test_appends_to_the_marker_file(marked_vm: VM) -> None:
    marked_vm.run("echo 456 >> /opt/abc", check=True)
    assert marked_vm.read_text("/opt/abc") == "123\n456\n"


def test_sees_the_marker_file_as_it_was(marked_vm: VM) -> None:
    assert marked_vm.read_text("/opt/abc") == "123\n"


AGENTS: dict[object, str] = {}


@pytest.mark.parametrize("turn", ["first", "second"])
def test_processes_are_those_of_the_snapshot(vm: VM, turn: str) -> None:
    """Memory comes back too: what ran at the snapshot runs on, what a test started is gone."""
    agent = vm.run("cut -d ' ' -f 1,22 /proc/$PPID/stat").stdout  # its pid, and when it started
    assert vm.current_snapshot is not None
    first = AGENTS.setdefault(vm.current_snapshot.created, agent)
    assert agent == first, "the machine was booted anew instead of reverted"

    assert count_of(vm, "sleep 98765") == 0, "a process of another test is still there"
    vm.run("sleep 98765 > /dev/null 2>&1 &", check=True)
    assert count_of(vm, "sleep 98765") == 1


def count_of(vm: VM, command: str) -> int:
    """Return how many processes in the guest run this command."""
    listed = vm.run("for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done 2> /dev/null")
    return [line.strip() for line in listed.stdout.splitlines()].count(command)


def test_destroys_the_system(vm: VM) -> None:
    vm.run("rm -rf /bin/* /sbin/* /usr/bin/* /usr/sbin/* /lib/modules")
    assert vm.state == "running"


def test_has_a_healthy_system(vm: VM) -> None:
    assert vm.run(["ls", "/"], check=True).stdout


def test_pulls_the_plug(vm: VM) -> None:
    vm.destroy()
    assert vm.state == "shut off"


def test_finds_the_machine_running(vm: VM) -> None:
    assert vm.state == "running"


def test_puts_and_fetches_a_file(vm: VM, big_file: Path, tmp_path: Path) -> None:
    vm.put(big_file, "/root/big")
    vm.get("/root/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big_file.read_bytes()


def test_takes_a_snapshot_of_its_own(vm: VM) -> None:
    vm.write_text("/root/state", "one")
    before = vm.snapshot()
    vm.write_text("/root/state", "two")
    vm.revert(before)
    assert vm.read_text("/root/state") == "one"


def test_machine_has_a_qcow2_image(vm: VM) -> None:
    """The example's machine is made with a raw image; it was converted before the first test."""
    assert {disk.format for disk in vm.disks()} == {"qcow2"}
