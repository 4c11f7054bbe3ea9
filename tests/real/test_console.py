"""A guest without agent and without network: its console is all that there is."""

import pytest
from bench import Maker, Suite

READY = "--kvmsnap-ready=console:example:~#"


def test_a_guest_without_agent_is_ready_and_talked_to_by_its_console(
    make_machine: Maker, suite: Suite
) -> None:
    """Found off: it boots once, and each test starts with a system that is up."""
    machine = make_machine(agent=False)
    suite.write(
        r"""
def test_writes(vm):
    assert "Linux version" not in vm.console_log() or "example:~#" in vm.console_log()
    vm.console.sendline("echo 456 >> /opt/abc; cat /opt/abc")
    vm.console.expect("123\r\n456\r\n")
    vm.console.sendline("echo $((6 * 7))")
    assert vm.console.expect(["no", r"(\d)2\r"]) == 1
    assert vm.console.match[1] == "4"

def test_is_clean_and_hears_nothing_of_the_test_before(vm):
    vm.console.sendline("cat /opt/abc; echo e''nd")
    vm.console.expect("end\r\n")
    assert "456" not in vm.console_log()
    assert "123\r\n" in vm.console.before

def test_is_waited_for_when_it_boots_again(vm):
    vm.console.sendline("poweroff -f")
    while vm.state != "shut off":
        pass
    vm.start()
    vm.wait_ready()
    vm.console.expect("Power down")
    vm.console.expect("Linux version")
    vm.console.expect("example:~#")
    vm.console.sendline("echo u''p")
    vm.console.expect_exact("up\r\n")

def test_one_that_is_off_is_told_at_once(vm):
    vm.destroy()
    with pytest.raises(Exception, match="the console did not say 'x'"):
        vm.console.expect("x", timeout=600)
    with pytest.raises(Exception, match="cannot type"):
        vm.console.sendline("x")
"""
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}", READY)
    result.assert_outcomes(passed=4)
    assert machine.state == "shut off"
    assert suite.left_over() == []


def test_a_guest_that_never_says_it_leaves_what_it_said(
    make_machine: Maker, suite: Suite, pytester: pytest.Pytester
) -> None:
    """The set-up fails, and its evidence is what is needed then."""
    machine = make_machine(agent=False)
    suite.write("def test_one(vm): pass")
    result = suite.run(
        f"--kvmsnap-domain={machine.name}",
        "--kvmsnap-ready=console:no such words",
        "--kvmsnap-ready-timeout=10",
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*waited 10 s for its console to say 'no such words'*"])
    (folder,) = (pytester.path / "kvmsnap-results").iterdir()
    assert "Linux version" in (folder / "console.log").read_text()
    assert (folder / "screen.png").read_bytes().startswith(b"\x89PNG")
    assert "guest's log" in (folder / "not-collected.txt").read_text()
    assert machine.state == "shut off"


@pytest.mark.long
def test_each_test_boots_where_machines_are_snapshotted_while_off(
    make_machine: Maker, suite: Suite
) -> None:
    machine = make_machine(agent=False)
    suite.write(
        r"""
@pytest.mark.parametrize("turn", "ab")
def test_hears_the_boot(vm, turn):
    assert vm.console_log().count("Linux version") == 1
    assert vm.console_log().count("example:~#") == 1
"""
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}", READY, "--kvmsnap-live=no")
    result.assert_outcomes(passed=2)
