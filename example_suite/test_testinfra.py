"""testinfra's modules on a clean machine, by `vm.host`: neither network nor keys are needed.

This needs `pip install pytest-kvmsnap[testinfra]`. testinfra's own fixture `host` stays what it is.
"""

import pytest

from pytest_kvmsnap import VM

pytest.importorskip("testinfra", reason="vm.host needs pytest-kvmsnap[testinfra]")


def test_files_of_the_system(vm: VM) -> None:
    passwd = vm.host.file("/etc/passwd")
    assert passwd.is_file
    assert passwd.user == "root"
    assert passwd.mode == 0o644
    assert passwd.contains("root")


def test_users_and_mount_points(vm: VM) -> None:
    assert vm.host.user("root").exists
    assert vm.host.user("root").uid == 0
    assert vm.host.mount_point("/").exists
    assert vm.host.mount_point("/proc").filesystem == "proc"


def test_commands(vm: VM) -> None:
    assert vm.host.exists("sh")
    done = vm.host.run("test -e %s", "/no such file")
    assert done.failed
    assert vm.host.check_output("cat /etc/hostname")
