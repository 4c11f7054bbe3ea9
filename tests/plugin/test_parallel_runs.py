"""Several workers of pytest-xdist, and several runs, on one machine: each has it for itself.

Each process has a test driver of its own, but all of them know the machine by the same UUID, so
that they meet at its lease.
"""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from notes import DATABASE, write
from testdriver import disk, node_file

from pytest_kvmsnap.lab.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterable

    from testdriver import Host, Suite

    from pytest_kvmsnap.markers import Request

# Notes when each process begins and ends to use the machine.
DIARY = """
import os, time

def note(what):
    with open("diary", "a") as file:
        file.write(f"{what} {os.getpid()}\\n")

@pytest.fixture
def diary(vm):
    note("begin")
    time.sleep(0.1)
    yield
    note("end")
"""


@pytest.fixture
def uri(suite: "Suite", xdist: None) -> str:
    """The option for a machine `box` that every process finds, each in a driver of its own."""
    node = suite.pytester.path / "node.xml"
    node.write_text(node_file(disk("/images/box.qcow2")))
    return f"--kvmsnap-uri=test://{node}"


def pids(folder: Path) -> list[str]:
    """Return the processes that used the machine, in order; check that none got in between."""
    lines = [line.split() for line in (folder / "diary").read_text().splitlines()]
    for (begin, one), (end, other) in zip(lines[::2], lines[1::2], strict=True):
        assert (begin, end) == ("begin", "end")
        assert one == other
    return [pid for _, pid in lines[::2]]


def test_workers_take_turns_on_one_machine(suite: "Suite", uri: str) -> None:
    write(
        suite,
        DATABASE
        + """
@pytest.mark.parametrize("number", range(10))
def test_machine(vm, diary, number):
    assert read(vm) == []
    write(vm, "dirt")

def test_without(): pass
""",
        DIARY,
    )
    result = suite.run_apart("-n2", uri)
    result.assert_outcomes(passed=11)
    order = pids(suite.pytester.path)
    assert len(set(order)) == 2
    turns = sum(one != other for one, other in itertools.pairwise(order))
    assert turns >= 4, "the one who waits comes next"
    assert suite.left_over() == []


def test_a_worker_keeps_the_machine_while_a_fixture_holds_it(suite: "Suite", uri: str) -> None:
    prepared = (
        DATABASE
        + """
@pytest.mark.parametrize("number", range(4))
def test_machine(database, vm, diary, number):
    assert read(vm) == ["database"]
"""
    )
    write(suite, "", DIARY)
    for name in ("one", "two"):
        suite.pytester.makepyfile(
            **{f"test_{name}": "import pytest\nfrom words import read, write\n" + prepared}
        )
    suite.run_apart("-n2", "--dist=loadfile", uri).assert_outcomes(passed=8)
    order = pids(suite.pytester.path)
    assert order == [order[0]] * 4 + [order[-1]] * 4
    assert suite.left_over() == []


@pytest.mark.parametrize(
    ("scope", "dist"), [("class", "loadscope"), ("module", "load"), ("session", "worksteal")]
)
def test_prepared_states_are_right_with_workers(
    suite: "Suite", uri: str, scope: str, dist: str
) -> None:
    write(
        suite,
        f"""
@pytest.fixture(scope="{scope}")
def prepared({scope}_vm): write({scope}_vm, "prepared")

class TestIt:
    @pytest.mark.parametrize("number", range(4))
    def test_prepared(self, prepared, vm, diary, number):
        assert read(vm) == ["prepared"]
        write(vm, "dirt")

    @pytest.mark.parametrize("number", range(4))
    def test_plain(self, vm, diary, number):
        assert read(vm) == []
        write(vm, "dirt")
""",
        DIARY,
    )
    suite.run_apart("-n2", f"--dist={dist}", uri).assert_outcomes(passed=8)
    pids(suite.pytester.path)
    assert suite.left_over() == []


def test_what_is_wrong_is_told_once_by_all_workers(suite: "Suite", uri: str) -> None:
    write(suite, "def test_one(module_vm): pass\ndef test_two(vm): pass\n")
    result = suite.run_apart("-n2", uri, domain="nowhere")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.assert_outcomes()
    said = result.stdout.str() + result.stderr.str()
    assert said.count("there is no domain 'nowhere'") == 1
    assert "INTERNALERROR" not in said
    assert "Different tests" not in said


@pytest.mark.usefixtures("xdist")
def test_workers_cannot_share_an_embedded_libvirt(suite: "Suite") -> None:
    write(suite, "def test_one(vm): pass\n")
    result = suite.run_apart("-n2", "--kvmsnap-uri=qemu:///embed?root=/nowhere")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = result.stdout.str()
    assert said.count("2 workers of pytest-xdist cannot share qemu:///embed?root=/nowhere") == 1
    assert "INTERNALERROR" not in said


@pytest.mark.usefixtures("xdist")
def test_the_hook_may_give_each_worker_an_embedded_libvirt(suite: "Suite") -> None:
    """It is not there, which is told by libvirt and not by us."""
    suite.write(
        "def test_one(vm): pass",
        "def pytest_kvmsnap_lab(config): return {'uri': 'qemu:///embed?root=/dev/null/nowhere'}",
    )
    options = [option for option in suite.options() if "uri" not in option]
    result = suite.pytester.runpytest_subprocess(*options, "-n2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "cannot share" not in result.stdout.str()
    assert "cannot connect" in result.stdout.str()


def test_a_run_that_died_between_our_check_and_our_first_test_is_undone(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is a mock that looks at nothing: there is no way to die at just that moment."""
    host.define(state="running")
    suite.write("def test_one(vm): assert 0")

    def check(self: Lab, requests: "Iterable[Request]") -> None:
        self._checked |= set(requests)
        domain = self._domain("box")
        lease = self._lease(domain)
        journal = self._journal(domain, lease)
        journal.test = "test_x.py::test_killed"
        journal.save()

    monkeypatch.setattr(Lab, "check", check)
    result = suite.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*put box back as found: a run ended without doing so*"])
    assert suite.left_over() == []


@pytest.mark.usefixtures("xdist")
def test_workers_of_xdist_may_run_other_tests(suite: "Suite") -> None:
    suite.write("def test_machine(vm): pass\ndef test_without(): pass")
    suite.run_apart("-n2", "-m", "not kvm").assert_outcomes(passed=1)
