"""A whole Debian with systemd as the guest: what the example's tiny Linux has not."""

import dataclasses
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import Machine, Maker, Suite

from guest import Guest
from lab import Lab

pytestmark = pytest.mark.long

PACKAGES = ("systemd-sysv", "udev", "dbus", "procps", "qemu-guest-agent")
SIZE = 1024 * 2**20


@pytest.fixture(scope="session")
def debian(pytestconfig: pytest.Config, linux: Guest) -> Guest:
    """A Debian that the example's kernel starts, built once for the user, in two minutes."""
    release = platform.freedesktop_os_release()
    lacks = [tool for tool in ("debootstrap", "mke2fs") if shutil.which(tool) is None]
    if lacks or os.geteuid() != 0 or release["ID"] != "debian":
        complain = pytest.fail if pytestconfig.getoption("--require-real") else pytest.skip
        complain("a Debian guest is built by root, on Debian, with debootstrap and mke2fs")
    suite = release["VERSION_CODENAME"]
    image = linux.root.parents[1] / f"debian-{suite}-{len(PACKAGES)}.raw"
    if not image.exists():
        build(suite, image)
    return dataclasses.replace(linux, root=image)


def build(suite: str, image: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kvmsnap-debian-", dir="/var/tmp") as name:
        tree, draft = Path(name, "tree"), Path(name, "draft")
        with_packages = f"--include={','.join(PACKAGES)}"
        call("debootstrap", "--variant=minbase", with_packages, suite, str(tree))
        with draft.open("wb") as file:
            file.truncate(SIZE)
        call("mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(draft))
        copy = image.with_name(f".{image.name}.{os.getpid()}")
        call("cp", "--sparse=always", str(draft), str(copy))
        copy.replace(image)


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.fixture
def debian_machine(lab: Lab, debian: Guest) -> Iterator[Machine]:
    machine = Maker(lab, debian)(memory_mib=512)
    yield machine
    machine.destroy()
    machine.virsh("undefine", "--snapshots-metadata", "--managed-save")


def test_testinfra(debian_machine: Machine, suite: Suite) -> None:
    suite.write(
        r"""
@pytest.fixture
def vm(module_vm):
    return module_vm

def test_system(vm):
    assert vm.host.system_info.distribution == "debian"
    assert vm.host.file("/etc/debian_version").is_file
    assert vm.host.user("root").home == "/root"
    assert vm.host.mount_point("/").filesystem == "ext4"

def test_packages(vm):
    assert vm.host.package("bash").is_installed
    assert vm.host.package("bash").version[0].isdigit()
    assert not vm.host.package("no-such-package").is_installed

def test_services_and_processes(vm):
    service = vm.host.service("qemu-guest-agent")
    assert (service.exists, service.is_running) == (True, True)
    assert not vm.host.service("no-such-service").is_running
    assert vm.host.process.get(pid=1).comm == "systemd"
    assert len(vm.host.process.filter(comm="qemu-ga")) == 1

def test_journal(vm):
    assert "qemu-ga" in vm.run("journalctl -b --no-pager -n 50", check=True).stdout

def test_an_agent_that_systemd_starts_anew(vm):
    with pytest.raises(Exception, match="the command was lost") as caught:
        vm.run("systemctl restart qemu-guest-agent; sleep 600", timeout=5)
    assert "the guest agent" in caught.value.why
    vm.wait_ready()
    assert vm.run("echo back").stdout == "back\n"
"""
    )
    options = [f"--kvmsnap-domain={debian_machine.name}", "--kvmsnap-ready-timeout=170"]
    suite.run(*options).assert_outcomes(passed=5)
