"""What a failed test leaves: files, and the state of the machine, on real machines."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from bench import EXAMPLE, Machine, Maker, Suite

from guest import Guest

FAILS = r"""
def test_before(vm, tmp_path):
    assert vm.screenshot(tmp_path / "now.png").read_bytes().startswith(b"\x89PNG")
    vm.console.sendline("echo of the test be''fore")
    vm.console.expect("of the test before")

def test_fails(vm):
    vm.write_text("/root/left", "left behind")
    vm.console.sendline("echo of the test that fa''ils")
    vm.console.expect("of the test that fails")
    vm.run("echo said to the kernel > /dev/kmsg", check=True)
    vm.snapshot("of-the-test")
    assert not "reached"

def test_is_clean(vm):
    assert vm.run(["test", "-e", "/root/left"]).returncode == 1
    assert [s.name for s in vm.snapshots() if s.name == "of-the-test"] == []
"""
HOOKS = r"""
import pathlib
LOG = pathlib.Path("hooks")

def note(*words):
    with LOG.open("a") as file:
        print(*words, file=file)

def pytest_kvmsnap_vm_ready(vm):
    note("ready", vm.state, vm.run("ls /root").stdout.split())

def pytest_kvmsnap_collect(vm, item, folder):
    note("collect", item.name)
    (folder / "left.txt").write_text(vm.read_text("/root/left"))

def pytest_kvmsnap_before_revert(vm, item, failed):
    note("revert", item.name, failed, vm.run("ls /root").stdout.split())
"""


def folders(pytester: pytest.Pytester) -> list[Path]:
    return sorted((pytester.path / "kvmsnap-results").iterdir())


def test_a_failed_test_leaves_all_that_can_be_seen_before_the_revert(
    machine: Machine, suite: Suite, pytester: pytest.Pytester
) -> None:
    suite.write(FAILS, HOOKS)
    options = [f"--kvmsnap-domain={machine.name}", "--junitxml=junit.xml"]
    result = suite.run(*options)
    result.assert_outcomes(passed=2, failed=1)
    (folder,) = folders(pytester)
    assert re.fullmatch(r"test_inner\.py-test_fails-[0-9a-f]{6}", folder.name)
    console = (folder / "console.log").read_text()
    assert "of the test that fails" in console
    assert "of the test before" not in console
    picture = (folder / "screen.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20]) >= 640  # its width
    assert ET.parse(folder / "domain.xml").findtext("name") == machine.name
    assert "said to the kernel" in (folder / "guest.log").read_text()
    assert "qemu-system" in (folder / "qemu.log").read_text()
    assert (folder / "left.txt").read_text() == "left behind"
    assert not (folder / "not-collected.txt").exists()
    result.stdout.fnmatch_lines([f"what the test left is in kvmsnap-results/{folder.name}"])
    assert (pytester.path / "hooks").read_text().splitlines() == [
        "ready running []",
        "revert test_before False []",
        "ready running []",
        "collect test_fails",
        "revert test_fails True ['left']",
        "ready running []",
        "revert test_is_clean False []",
    ]
    properties = ET.parse(pytester.path / "junit.xml").iter("property")
    told = {each.get("name"): each.get("value") for each in properties}
    assert told["kvmsnap_evidence"] == f"kvmsnap-results/{folder.name}"


def test_kept_states_stay_and_tests_start_from_them(
    machine: Machine, suite: Suite, pytester: pytest.Pytester
) -> None:
    """Of three tests that leave theirs two are kept; a later run goes on from one of these."""
    suite.write(
        """
@pytest.mark.parametrize("turn", "abc")
def test_leaves(vm, turn):
    vm.write_text("/run/left", turn)
    assert vm.run(["sync"]).returncode == 1
"""
    )
    options = [f"--kvmsnap-domain={machine.name}", "--kvmsnap-keep=on-failure"]
    result = suite.run(*options, "--kvmsnap-keep-max=2")
    result.assert_outcomes(failed=3)
    kept = machine.snapshots
    assert [re.sub(r"-\d+-\d+$", "", name) for name in kept] == [
        "kvmsnap-kept-test_leaves_b",
        "kvmsnap-kept-test_leaves_c",
    ]
    assert machine.state == "shut off"
    assert suite.left_over() == []
    result.stdout.fnmatch_lines(
        [
            f"*virsh -c * snapshot-revert {machine.name} {kept[1]}",
            f"*pytest --kvmsnap-uri * --kvmsnap-domain {machine.name} --kvmsnap-snapshot {kept[1]}"
            " 'test_inner.py::test_leaves[[]c[]]'",
            f"*virsh -c * snapshot-delete {machine.name} {kept[1]}",
        ]
    )
    suite.run("--kvmsnap-clean")
    assert machine.snapshots == kept
    suite.write("def test_goes_on(vm):\n    assert vm.read_text('/run/left') == 'c'")
    start = f"--kvmsnap-snapshot={kept[1]}"
    suite.run(f"--kvmsnap-domain={machine.name}", start).assert_outcomes(passed=1)
    assert machine.snapshots == kept


@pytest.mark.long
def test_a_throwaway_machine_stays_with_the_states_that_are_kept(
    make_machine: Maker, suite: Suite, pytester: pytest.Pytester
) -> None:
    """It is off, without snapshots of the run; of those of one image so many stay as are kept."""
    image = make_machine().disk
    suite.write(
        f"""
pytestmark = pytest.mark.kvm_golden("{image}", memory="128 MiB", template="machine.xml")

def test_fails(vm):
    vm.write_text("/run/left", vm.name)
    assert vm.name == ""
"""
    )
    (pytester.path / "machine.xml").write_text(make_machine().definition)
    machines = []
    for _ in range(2):
        result = suite.run("--kvmsnap-keep=on-failure", "--kvmsnap-keep-max=1")
        result.assert_outcomes(failed=1)
        (name, _) = suite.left_over()  # its folder, and its definition
        machines.append(Machine(suite._lab, name, image))
    assert machines[0].name != machines[1].name
    assert machines[1].state == "shut off"
    (kept,) = machines[1].snapshots
    suite.write(f"def test_it(vm):\n    assert vm.read_text('/run/left') == '{machines[1].name}'")
    domain = f"--kvmsnap-domain={machines[1].name}"
    suite.run(domain, f"--kvmsnap-snapshot={kept}").assert_outcomes(passed=1)
    machines[1].virsh("undefine", "--snapshots-metadata")


@pytest.mark.long
def test_the_example_that_fails_leaves_a_folder_which_its_second_test_checks(
    linux: Guest, tmp_path: Path
) -> None:
    assert linux.kernel.exists()
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(EXAMPLE / "test_failing.py"),
        "-pno:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "--example-failure", "--require-real"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert len(list((tmp_path / "kvmsnap-results").iterdir())) == 1
