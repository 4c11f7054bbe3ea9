"""What goes wrong with real machines: each is one clear message, and nothing is lost."""

import json
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


BLIND_PREFLIGHT = """
from pytest_kvmsnap.machine import preflight
preflight.problems = lambda *_, **__: []
"""
BLIND = f"""{BLIND_PREFLIGHT}
from pytest_kvmsnap.machine import space
space.check_space = lambda domain: None
"""


def test_full_disk_is_told_before_the_first_test(
    machine: Machine, suite: Suite, small_disk: Path
) -> None:
    move(machine, small_disk)
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    assert_told_before_the_first_test(
        result,
        f"{machine.name} cannot be used for tests",
        f"a snapshot of it while it runs takes about 66.0 MiB in {small_disk}, where",
        "--kvmsnap-live=no",
    )
    fill(small_disk, leaving=12 * 2**20)
    suite.run(f"--kvmsnap-domain={machine.name}", "--kvmsnap-live=no").assert_outcomes(passed=1)
    assert (machine.state, machine.snapshots, machine.image_snapshots()) == ("shut off", [], [])


@pytest.mark.parametrize("is_seen_coming", [True, False])
def test_full_disk_while_snapshotting(
    machine: Machine, suite: Suite, small_disk: Path, is_seen_coming: bool
) -> None:
    """As if others had filled the disk since the look before the first test."""
    move(machine, small_disk)
    conftest = BLIND_PREFLIGHT if is_seen_coming else BLIND
    suite.write(ONE_TEST + "def test_too(vm): pass\n", conftest=conftest)
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


# --- the guest --------------------------------------------------------------------------------


@pytest.mark.parametrize("console", [pytest.param("log", marks=pytest.mark.long), "pty"])
def test_never_ready(make_machine: Maker, suite: Suite, tmp_path: Path, console: str) -> None:
    machine = make_machine(console_log=tmp_path / "console" if console == "log" else None)
    no_init = machine.definition.replace("root=/dev/vda", "rdinit=/none root=/none")
    definition = tmp_path / "no-init.xml"
    definition.write_text(no_init)
    machine.define(definition)
    suite.write(ONE_TEST + "def test_too(vm): pass\n")
    result = suite.run(f"--kvmsnap-domain={machine.name}", "--kvmsnap-ready-timeout=12")
    result.assert_outcomes(errors=2)
    said = result.stdout.str()
    assert "the machine did not get ready" in said
    assert "waited 12 s for the guest agent to answer" in said
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
from pytest_kvmsnap.guest.clock import Clock

def test_marks(vm):
    marks = canary.Canary(Agent(vm._domain), "token")
    clock = Clock(vm._domain)
    assert marks.look(clock) == ""
    assert marks.mark()
    assert marks.look(clock).startswith("memory: ")
    vm.run(["rm", canary.MEMORY], check=True)
    assert marks.look(clock).startswith("disk: ")
    vm.run(["rm", canary.DISK], check=True)
    assert marks.look(clock) == ""
    vm.run("ln -s /run/loop /run/loop; rm -f /var/tmp/*; ln -s /run/loop " + canary.DISK)
    assert marks.look(clock).startswith("disk: ")  # an error that is not "no such file"
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


@pytest.mark.parametrize(
    ("found", "by"),
    [
        ("shut off", "clean"),
        pytest.param("running", "next run", marks=pytest.mark.long),
        pytest.param("running", "force", marks=pytest.mark.long),
    ],
)
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
    theirs = part(machine, suite, found) if by != "force" else []
    suite.write(
        """
def test_is_clean(vm):
    assert vm.read_text("/opt/abc") == "123\\n"
    assert len([s for s in vm.snapshots() if s.name == "of-the-test"]) == 0
"""
    )
    arguments, which = {
        "clean": (["--kvmsnap-clean"], "test_is_killed"),
        "force": (["--kvmsnap-clean", "--kvmsnap-force"], "left by pytest-kvmsnap run"),
        "next run": ([f"--kvmsnap-domain={machine.name}"], "test_is_killed"),
    }[by]
    if by == "force":  # as another host sees it, which does not have the journal
        (journal,) = suite.locks.glob("*.json")
        journal.unlink()
    result = suite.run(*arguments)
    result.stdout.fnmatch_lines([f"kvmsnap: put {machine.name} back as found ({found})*{which}*"])
    if by == "next run":
        result.assert_outcomes(passed=1)
    assert result.ret == 0
    assert (machine.state, machine.snapshots) == (found, [])
    assert list(suite.locks.iterdir()) == []
    if found == "running":
        look = "ls /run/made* /var/tmp/*.canary; cat /opt/abc"
        assert machine.start(look) == "/run/made-before-the-run\n123\n"
    assert machine.image_snapshots() == theirs


def part(machine: Machine, suite: Suite, found: str) -> list[str]:
    """Part snapshots of a killed run, as kills do now and then: what libvirt knows and their data.

    Returns what somebody put into the image himself.
    """
    if found == "running":  # it still runs, and nobody but QEMU writes to the image
        machine.virsh("snapshot-delete", "of-the-test", "--metadata")
        assert "of-the-test" in machine.image_snapshots()
        return []
    machine.destroy()
    (journal,) = suite.locks.glob("*.json")
    run = json.loads(journal.read_text())["run"]
    for change, name in (
        ("-c", "theirs"),
        ("-c", f"kvmsnap-x-{run}"),
        ("-d", f"kvmsnap-base-{run}"),
    ):
        subprocess.run(["qemu-img", "snapshot", change, name, machine.disk], check=True)
    return ["theirs"]
