"""With --pdb the machine stays as the test left it, and a line says how to reach it."""

import sys
from typing import TYPE_CHECKING

import pytest
from notes import DATABASE, write
from testdriver import disk, node_file

from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.guest.reach import ways_to
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import connect
from pytest_kvmsnap.settings import Settings

if TYPE_CHECKING:
    from testdriver import Host, Suite

CONSOLE = "<console type='pty'><target type='serial' port='0'/></console>"
NETWORK = "<interface type='network'><source network='default'/></interface>"


@pytest.mark.parametrize("state", ["running", "shut off"])
def test_ways_to_a_machine(host: "Host", state: str) -> None:
    domain = host.define("box", disk("/images/box.qcow2"), CONSOLE, NETWORK, state=state)
    hypervisor = connect("test:///default")
    ways = ways_to(Guest(Domain(hypervisor, domain.UUIDString(), "box"), Settings()))
    hypervisor.close()
    # Which one depends on how many domains ran in this process before.
    ssh = [way for way in ways if way.startswith("ssh root@192.168.")]
    assert len(ssh) == (1 if state == "running" else 0)
    assert [way for way in ways if way not in ssh] == [
        'vm.run("...")',
        "virsh -c test:///default console --force box",
        "virsh -c test:///default dominfo box",
    ]


def test_ways_to_a_machine_that_was_undefined(host: "Host") -> None:
    hypervisor = connect("test:///default")
    gone = Domain(hypervisor, "6695eb01-f6a4-8304-79aa-97f2502e193f", "my box")
    ways = ways_to(Guest(gone, Settings()))
    hypervisor.close()
    assert ways == ['vm.run("...")', "virsh -c test:///default dominfo 'my box'"]


def run_with_debugger(suite: "Suite", typed: str, *args: str) -> pytest.RunResult:
    """Run in a process of its own with somebody at the keyboard."""
    node = suite.pytester.path / "node.xml"
    node.write_text(node_file(disk("/images/box.qcow2")))
    command = [sys.executable, "-m", "pytest", *suite.options(), f"--kvmsnap-uri=test://{node}"]
    return suite.pytester.run(*command, *args, stdin=typed.encode())


SHOW = "p 'it has', read(vm)\nc\n"


def test_the_machine_is_put_back_after_the_debugger(suite: "Suite") -> None:
    write(
        suite,
        DATABASE
        + """
def test_fails(database, vm):
    write(vm, "dirt")
    assert 0

def test_breaks(database, vm):
    write(vm, "more")
    breakpoint()

def test_next(database, vm): assert read(vm) == ["database"]
""",
    )
    result = run_with_debugger(suite, SHOW * 2, "--pdb")
    result.assert_outcomes(failed=1, passed=2)
    result.stdout.fnmatch_lines(
        [
            "kvmsnap: box stays as the test left it until you leave the debugger; reach it by"
            ' vm.run("..."), virsh -c test://*/node.xml dominfo box',
            "*'it has', [[]'database', 'dirt']*",
            "kvmsnap: box stays as the test left it *",
            "*'it has', [[]'database', 'more']*",
        ]
    )
    assert suite.left_over() == []


def test_a_preparation_that_fails_stays_as_it_is_too(suite: "Suite") -> None:
    write(
        suite,
        """
@pytest.fixture(scope="module")
def broken(module_vm):
    write(module_vm, "half")
    assert 0

def test_one(broken, vm): pass
def test_two(vm): assert read(vm) == []
""",
    )
    result = run_with_debugger(suite, SHOW.replace("(vm", "(module_vm"), "--pdb")
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["kvmsnap: box stays as *", "*'it has', [[]'half']*"])


def test_the_debugger_in_a_test_without_machine_says_nothing(suite: "Suite") -> None:
    write(suite, "def test_one(vm): pass\ndef test_two(): assert 0")
    result = run_with_debugger(suite, "c\n", "--pdb")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.no_fnmatch_line("*kvmsnap: box stays*")


def test_quitting_the_debugger_puts_the_machine_back(suite: "Suite") -> None:
    write(suite, "def test_one(vm): assert 0\ndef test_two(vm): pass")
    result = run_with_debugger(suite, "q\n", "--pdb")
    result.assert_outcomes(failed=1)
    assert suite.left_over() == []
