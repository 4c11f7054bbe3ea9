"""What goes wrong with real machines: each is one clear message, and nothing is lost."""

import os
import subprocess
from pathlib import Path

import pytest
from bench import (
    NO_TRACE,
    ONE_TEST,
    Machine,
    Maker,
    Suite,
    assert_told_before_the_first_test,
    fill,
    move,
)

# --- the disk is full -------------------------------------------------------------------------


@pytest.mark.parametrize("is_seen_coming", [True, False])
def test_full_disk_while_snapshotting(
    machine: Machine, suite: Suite, small_disk: Path, is_seen_coming: bool
) -> None:
    move(machine, small_disk)
    blind = """
from pytest_kvmsnap.machine import space
space.check_space = lambda domain: None
"""
    suite.write(ONE_TEST + "def test_too(vm): pass\n", conftest="" if is_seen_coming else blind)
    fill(small_disk, leaving=12 * 2**20)
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    result.assert_outcomes(errors=2)
    said = result.stdout.str()
    if is_seen_coming:
        assert "there is no room for a snapshot of the running machine" in said
    else:
        assert "cannot take the snapshot 'kvmsnap-base-" in said
        assert "is the disk full?" in said
    assert "the machine is in quarantine" in said
    assert [trace for trace in NO_TRACE if trace in said] == []
    assert (machine.state, machine.snapshots, machine.image_snapshots()) == ("shut off", [], [])


# --- blockers ---------------------------------------------------------------------------------


def test_managed_save_is_refused_and_kept(machine: Machine, suite: Suite) -> None:
    machine.start()
    machine.virsh("managedsave")
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    assert_told_before_the_first_test(
        result, f"{machine.name} cannot be used for tests", "managed save", "managedsave-remove"
    )
    assert "Managed save:   yes" in machine.virsh("dominfo")


def test_missing_image(machine: Machine, suite: Suite) -> None:
    machine.disk.rename(machine.disk.with_suffix(".away"))
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    assert_told_before_the_first_test(
        result, f"{machine.name} cannot be used for tests", str(machine.disk), "put the file back"
    )


@pytest.mark.parametrize("disk_format", ["qcow2", "raw"])
def test_image_in_use_by_another_process(
    make_machine: Maker, suite: Suite, disk_format: str
) -> None:
    machine = make_machine(disk_format=disk_format)
    suite.write(ONE_TEST)
    holder = ["qemu-io", "-f", disk_format, str(machine.disk)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(8) == b"qemu-io>"
        result = suite.run(f"--kvmsnap-domain={machine.name}")
        process.terminate()
    assert_told_before_the_first_test(
        result, f"{machine.name} cannot be used for tests", "another process is using", "lsof"
    )


def test_image_of_another_format_than_the_definition_says(machine: Machine, suite: Suite) -> None:
    machine.disk.write_bytes(bytes(2**20))
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    assert_told_before_the_first_test(
        result, f"{machine.name} cannot be used for tests", "not in qcow2 format", "definition"
    )


def test_snapshot_whose_data_is_gone(machine: Machine, suite: Suite) -> None:
    machine.virsh("snapshot-create-as", "installed")
    subprocess.run(["qemu-img", "snapshot", "-d", "installed", machine.disk], check=True)
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-domain={machine.name}", "--kvmsnap-snapshot=installed")
    assert_told_before_the_first_test(
        result, f"the data of the snapshot 'installed' of {machine.name} is gone", "--metadata"
    )
    assert machine.snapshots == ["installed"]


def test_unknown_names(machine: Machine, suite: Suite) -> None:
    machine.virsh("snapshot-create-as", "installed")
    suite.write(
        f"""
@pytest.mark.kvm_domain("{machine.name}x")
def test_domain(vm): pass

@pytest.mark.kvm_snapshot("instaled")
def test_snapshot(vm): pass
"""
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    assert_told_before_the_first_test(
        result,
        "2 problems",
        f"there is no domain '{machine.name}x'",
        f"did you mean '{machine.name}'",
        f"there is no snapshot 'instaled' of {machine.name}",
        "snapshots there: installed",
    )


def test_embedded_libvirt_in_use_by_another_process(
    machine: Machine, suite: Suite, pytester: pytest.Pytester
) -> None:
    sign = pytester.path / "sign"
    suite.write(
        f"""
import pathlib, time
def test_stays(vm):
    pathlib.Path({str(sign)!r}).touch()
    time.sleep(60)
"""
    )
    arguments = suite.arguments(f"--kvmsnap-domain={machine.name}")
    with subprocess.Popen([os.sys.executable, "-m", "pytest", *arguments]) as process:  # type: ignore[attr-defined]
        while not sign.exists():
            assert process.poll() is None
        result = suite.run(f"--kvmsnap-domain={machine.name}")
        process.terminate()
    assert_told_before_the_first_test(
        result, "cannot connect to qemu:///embed", "another process is using"
    )
    suite.run("--kvmsnap-clean")


def test_socket_that_this_user_may_not_open(tmp_path: Path) -> None:
    """As an ordinary user: in a forked child, which may still use what is imported already."""
    from pytest_kvmsnap.errors import HypervisorError
    from pytest_kvmsnap.machine.libvirt_api import connect

    folder = Path("/tmp") / f"kvmsnap-socket-{os.getpid()}"
    folder.mkdir(mode=0o755)
    sock = folder / "libvirt-sock"
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sock))
        server.listen()
        sock.chmod(0o000)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            try:
                connect(f"qemu+unix:///system?socket={sock}")
            except HypervisorError as error:
                os.write(writing, str(error).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        said = os.read(reading, 65536).decode()
    sock.unlink()
    folder.rmdir()
    assert "cannot connect to qemu+unix:///system" in said
    assert "Permission denied" in said
    assert "usermod -aG libvirt" in said


# --- the guest --------------------------------------------------------------------------------


@pytest.mark.parametrize("console", ["log", "pty"])
def test_never_ready(make_machine: Maker, suite: Suite, tmp_path: Path, console: str) -> None:
    machine = make_machine(console_log=tmp_path / "console" if console == "log" else None)
    no_init = machine.definition.replace("root=/dev/vda", "rdinit=/none root=/none")
    definition = tmp_path / "no-init.xml"
    definition.write_text(no_init)
    machine.define(definition)
    suite.write(ONE_TEST + "def test_too(vm): pass\n")
    result = suite.run(f"--kvmsnap-domain={machine.name}", "--kvmsnap-ready-timeout=8")
    result.assert_outcomes(errors=2)
    said = result.stdout.str()
    assert "the machine did not get ready" in said
    assert "waited 8 s for the guest agent to answer" in said
    assert "end Kernel panic - not syncing" in said.partition("its console said last")[2]
    assert "the machine is in quarantine" in said
    assert [trace for trace in NO_TRACE if trace in said] == []
    assert (machine.state, machine.snapshots) == ("shut off", [])


# --- the revert -------------------------------------------------------------------------------


def test_revert_that_does_not_happen_is_noticed_by_the_guest(
    machine: Machine, suite: Suite
) -> None:
    """A libvirt that lies cannot be had, so the call is taken out: all looks well from outside."""
    suite.write(
        """
def test_dirties(vm):
    vm.run("echo 456 >> /opt/abc", check=True)

def test_would_see_it(vm): pass
""",
        conftest="""
from pytest_kvmsnap.machine.domain import Domain
real = Domain.revert
Domain.revert = lambda self, name, timeout: real(self, name, timeout) if "found" in name else None
""",
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    result.assert_outcomes(passed=1, errors=2)
    said = result.stdout.str()
    assert "the revert did not bring the machine back" in said
    assert "memory: /run/pytest-kvmsnap.canary is still there" in said
    assert "the machine is in quarantine" in said
    assert (machine.state, machine.snapshots) == ("shut off", [])


def test_canary_sees_a_disk_that_was_not_reverted(machine: Machine, suite: Suite) -> None:
    """The memory's mark is removed by hand, as if the memory alone had been reverted."""
    suite.write(
        """
from pytest_kvmsnap.guest import canary
from pytest_kvmsnap.guest.agent import Agent

def test_marks(vm):
    marks = canary.Canary(Agent(vm._domain), "token")
    assert marks.look() == ""
    assert marks.mark()
    assert marks.look().startswith("memory: ")
    vm.run(["rm", canary.MEMORY], check=True)
    assert marks.look().startswith("disk: ")
    vm.run(["rm", canary.DISK], check=True)
    assert marks.look() == ""
    vm.run("ln -s /run/loop /run/loop; rm -f /var/tmp/*; ln -s /run/loop " + canary.DISK)
    assert marks.look().startswith("disk: ")  # an error that is not "no such file"
"""
    )
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=1)


def test_machine_whose_snapshot_is_gone_is_quarantined(machine: Machine, suite: Suite) -> None:
    suite.write(
        """
def test_deletes_what_we_go_back_to(vm):
    vm.delete_snapshot(vm.current_snapshot)

def test_fails_at_once(vm): pass
"""
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    result.assert_outcomes(passed=1, errors=2)
    said = result.stdout.str()
    assert "cannot revert to the snapshot 'kvmsnap-base-" in said
    assert "the machine is in quarantine" in said
    assert [trace for trace in NO_TRACE if trace in said] == []
    assert suite.calls(machine, "revert") == ["revert kvmsnap-base", "revert kvmsnap-found"]
    assert (machine.state, machine.snapshots) == ("shut off", [])


# --- a run that is killed ---------------------------------------------------------------------


@pytest.mark.parametrize("by", ["next run", "clean"])
@pytest.mark.parametrize("found", ["shut off", "running"])
def test_killed_run_is_put_right(
    machine: Machine, suite: Suite, pytester: pytest.Pytester, found: str, by: str
) -> None:
    if found == "running":
        machine.start("touch /run/made-before-the-run")
    sign = pytester.path / "in-the-test"
    suite.write(
        f"""
import pathlib, time
def test_is_killed(vm):
    vm.write_text("/opt/abc", "dirty")
    vm.snapshot("of-the-test")
    pathlib.Path({str(sign)!r}).touch()
    time.sleep(60)
"""
    )
    suite.run_until(sign, f"--kvmsnap-domain={machine.name}")
    assert machine.snapshots != []
    suite.write(
        """
def test_is_clean(vm):
    assert vm.read_text("/opt/abc") == "123\\n"
    assert len([s for s in vm.snapshots() if s.name == "of-the-test"]) == 0
"""
    )
    arguments = ["--kvmsnap-clean"] if by == "clean" else [f"--kvmsnap-domain={machine.name}"]
    result = suite.run(*arguments)
    result.stdout.fnmatch_lines(
        [f"kvmsnap: put {machine.name} back as found ({found})*test_is_killed*"]
    )
    if by == "next run":
        result.assert_outcomes(passed=1)
    assert result.ret == 0
    assert (machine.state, machine.snapshots) == (found, [])
    assert list(suite.locks.iterdir()) == []
    if found == "running":
        assert machine.start("ls /run/made*; cat /opt/abc") == "/run/made-before-the-run\n123\n"
    else:
        assert machine.image_snapshots() == []
