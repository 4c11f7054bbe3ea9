"""The main job on a real guest: every test starts from the same state, and nothing is left."""

import subprocess

import pytest
from bench import Machine, Maker, Suite

STORY = """
def test_dirties(vm):
    assert vm.state == "running"
    assert vm.read_text("/opt/abc") == "123\\n"
    vm.run("echo 456 >> /opt/abc; echo > /root/new; sync; sleep 4321 >/dev/null 2>&1 &", check=True)
    assert vm.read_text("/opt/abc") == "123\\n456\\n"

def test_sees_nothing_of_it(vm):
    assert vm.read_text("/opt/abc") == "123\\n"
    assert vm.run("test -e /root/new").returncode == 1
    assert "4321" not in vm.run("cat /proc/[0-9]*/cmdline 2>/dev/null").stdout

def test_breaks_the_system(vm):
    vm.run("rm -rf /bin/* /sbin/* /usr/bin/*")

def test_is_healthy(vm):
    vm.run(["ls", "/"], check=True)

def test_pulls_the_plug(vm):
    vm.destroy()

def test_runs(vm):
    assert vm.state == "running"
"""
TESTS = 6


def is_as_made(machine: Machine) -> bool:
    """Tell whether the disk holds just what the machine was made with, without snapshots."""
    pristine = machine.disk.with_name(machine.disk.name + ".before")
    same = ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(machine.disk), str(pristine)]
    check = ["qemu-img", "check", "-f", "qcow2", str(machine.disk)]
    return (
        subprocess.run(same, check=False).returncode == 0
        and subprocess.run(check, check=False).returncode == 0
        and machine.image_snapshots() == []
    )


def keep_a_copy(machine: Machine) -> None:
    copy = machine.disk.with_name(machine.disk.name + ".before")
    subprocess.run(["cp", "--sparse=always", machine.disk, copy], check=True)


@pytest.mark.usefixtures("all_plugins")
def test_machine_found_off_is_left_off_with_its_disk_as_found(
    machine: Machine, suite: Suite
) -> None:
    keep_a_copy(machine)
    definition = machine.definition
    suite.write(STORY)
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    result.assert_outcomes(passed=TESTS)
    assert (machine.state, machine.snapshots) == ("shut off", [])
    assert machine.definition == definition
    assert is_as_made(machine)
    assert suite.calls(machine, "take_snapshot", "revert", "delete_snapshot", "start") == [
        "take_snapshot kvmsnap-found",
        "start",
        "take_snapshot kvmsnap-base",
        *["revert kvmsnap-base"] * TESTS,
        "revert kvmsnap-found",
        "delete_snapshot kvmsnap-base",
        "delete_snapshot kvmsnap-found",
    ]
    assert list(suite.locks.iterdir()) == []
    # what broke the guest could not be proven from inside, and the report says so
    result.stdout.fnmatch_lines(["*state*alone*test_breaks_the_system*test_pulls_the_plug*"])


def test_machine_found_running_runs_on(machine: Machine, suite: Suite) -> None:
    machine.start("touch /run/made-before-the-run")
    suite.write(
        STORY
        + """
def test_what_ran_before_still_does(vm):
    assert vm.run("test -e /run/made-before-the-run").returncode == 0
"""
    )
    some = ("-k", "breaks or healthy or before")
    result = suite.run(f"--kvmsnap-domain={machine.name}", *some)
    result.assert_outcomes(passed=3, deselected=TESTS - 2)
    assert (machine.state, machine.snapshots) == ("running", [])
    assert machine.image_snapshots() == []
    assert suite.calls(machine, "take_snapshot", "revert", "delete_snapshot", "start") == [
        "take_snapshot kvmsnap-found",
        *["revert kvmsnap-found"] * 3,
        "delete_snapshot kvmsnap-found",
    ]
    left = "ls -d /run/made* /run/*canary* /var/tmp/* 2>/dev/null; cat /opt/abc"
    assert machine.start(left) == "/run/made-before-the-run\n123\n"


def test_machine_found_paused_is_left_paused(machine: Machine, suite: Suite) -> None:
    machine.start()
    machine.virsh("suspend")
    suite.write(STORY)
    some = ("-k", "dirties or nothing or plug")
    result = suite.run(f"--kvmsnap-domain={machine.name}", *some)
    result.assert_outcomes(passed=3, deselected=TESTS - 3)
    assert (machine.state, machine.snapshots) == ("paused", [])
    assert suite.calls(machine, "take_snapshot", "revert") == [
        "take_snapshot kvmsnap-found",
        "take_snapshot kvmsnap-base",
        *["revert kvmsnap-base"] * 3,
        "revert kvmsnap-found",
    ]


@pytest.mark.long
def test_live_no_boots_for_each_test(machine: Machine, suite: Suite) -> None:
    keep_a_copy(machine)
    suite.write(STORY)
    some = ("-k", "dirties or nothing")
    result = suite.run(f"--kvmsnap-domain={machine.name}", "--kvmsnap-live=no", *some)
    result.assert_outcomes(passed=2, deselected=TESTS - 2)
    assert (machine.state, machine.snapshots) == ("shut off", [])
    assert is_as_made(machine)
    assert suite.calls(machine, "take_snapshot", "revert", "start") == [
        "take_snapshot kvmsnap-found",
        *["start", "revert kvmsnap-found"] * 2,
    ]


@pytest.mark.long
def test_live_no_leaves_a_running_machine_running(machine: Machine, suite: Suite) -> None:
    machine.start("touch /run/made-before-the-run")
    suite.write(
        """
@pytest.mark.parametrize("turn", [1, 2])
def test_is_booted(vm, turn):
    assert vm.run("test -e /run/made-before-the-run").returncode == 1
    vm.write_text("/opt/abc", "dirty")
"""
    )
    suite.run(f"--kvmsnap-domain={machine.name}", "--kvmsnap-live=no").assert_outcomes(passed=2)
    assert (machine.state, machine.snapshots) == ("running", [])
    assert machine.start("ls /run/made*; cat /opt/abc") == "/run/made-before-the-run\n123\n"


@pytest.mark.parametrize("kept", ["running", pytest.param("off", marks=pytest.mark.long)])
def test_named_snapshot_is_where_tests_start_and_is_never_touched(
    machine: Machine, suite: Suite, kept: str
) -> None:
    machine.start("touch /root/made-before-the-run; sync")
    if kept == "off":
        machine.destroy()
    machine.virsh("snapshot-create-as", "installed")
    taken = machine.virsh("snapshot-dumpxml", "installed")
    machine.destroy()
    suite.write(
        """
@pytest.mark.kvm_snapshot("installed")
def test_starts_there(vm):
    assert vm.state == "running"
    assert vm.current_snapshot.name == "installed"
    assert vm.run("test -e /root/made-before-the-run").returncode == 0
    assert vm.run("test -e /root/leftover").returncode == 1
    vm.run("echo > /root/leftover", check=True)

def test_starts_from_the_baseline(vm):
    assert vm.current_snapshot.name.startswith("kvmsnap-base-")
    assert vm.run("test -e /root/leftover").returncode == 1

@pytest.mark.kvm_snapshot("installed")
def test_starts_there_again(vm):
    assert vm.run("test -e /root/leftover").returncode == 1
"""
    )
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=3)
    assert (machine.state, machine.snapshots) == ("shut off", ["installed"])
    assert (machine.current, machine.image_snapshots()) == ("installed", ["installed"])
    assert machine.virsh("snapshot-dumpxml", "installed") == taken


def test_clock_is_right_after_a_revert(machine: Machine, suite: Suite) -> None:
    suite.write(
        """
import time

@pytest.mark.parametrize("turn", [1, 2])
def test_clock(vm, turn):
    assert abs(int(vm.run("date +%s").stdout) - time.time()) < 60
    vm.run("date -s @1000000000", check=True)
    assert int(vm.run("date +%s").stdout) < 1000000100
"""
    )
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=2)


def test_machine_without_agent(make_machine: Maker, suite: Suite) -> None:
    machine = make_machine(agent=False)
    suite.write(
        """
@pytest.mark.parametrize("turn", [1, 2])
def test_runs(vm, turn):
    assert vm.state == "running"
    vm.destroy()

def test_agent_is_missed(vm):
    vm.run("true")
"""
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*AgentError*", "*QEMU guest agent is not configured*"])
    assert (machine.state, machine.snapshots) == ("shut off", [])
