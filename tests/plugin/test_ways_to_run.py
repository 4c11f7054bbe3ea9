"""What pytest shows, selects and stops at leaves the machine as it was found."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from notes import DATABASE, write

from pytest_kvmsnap.machine.domain import Domain

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite

# what pytest shows

PREPARED = (
    DATABASE
    + """
@pytest.fixture(scope="module")
def web(module_vm):
    write(module_vm, "web")

def check(vm, *words):
    assert read(vm) == list(words)
    write(vm, "dirt")

def test_plain(vm): check(vm)
def test_database(database, vm): check(vm, "database")
def test_web(web, vm): check(vm, "web")
def test_both(database, web, vm): check(vm, "database", "web")
"""
)


@pytest.mark.parametrize("option", ["--setup-show", "--setup-plan"])
def test_the_set_up_is_shown_in_its_order(
    suite: "Suite", host: "Host", calls: "Calls", option: str
) -> None:
    host.define(state="running")
    before = host.look()
    write(suite, PREPARED)
    result = suite.run(option, "-k", "test_database")
    result.stdout.fnmatch_lines(
        [
            "*SETUP    M module_vm",
            "*SETUP    M database (fixtures used: module_vm)",
            "*SETUP    F vm",
            "*::test_database (fixtures used: *",
            "*TEARDOWN F vm",
            "*TEARDOWN M database",
            "*TEARDOWN M module_vm",
        ],
        consecutive=True,
    )
    assert bool(calls.log) == (option == "--setup-show")
    assert host.look() == before


@pytest.mark.parametrize("option", ["--collect-only", "--fixtures", "--fixtures-per-test"])
def test_what_only_shows_preparations_makes_none(
    suite: "Suite", host: "Host", calls: "Calls", option: str
) -> None:
    host.define(state="running")
    write(suite, PREPARED)
    assert suite.run(option).ret == 0
    assert calls.log == []
    assert not suite.locks.exists()


def test_our_fixtures_are_listed_with_their_meanings(suite: "Suite") -> None:
    suite.pytester.runpytest_inprocess("--fixtures").stdout.fnmatch_lines_random(
        [
            "vm -- *",
            "class_vm [[]class scope[]] -- *",
            "module_vm [[]module scope[]] -- *",
            "session_vm [[]session scope[]] -- *",
            "    A virtual machine: running, ready and clean, and put back *",
            "    The machine of a class, to prepare it for its tests; undone *",
            "    The machine of a module, to prepare it for its tests; undone *",
            "    The machine of all tests, to prepare it for them; undone *",
        ]
    )


@pytest.mark.parametrize("args", [["-pno:terminal"], ["-q", "-q"], ["-pno:capture"], ["-vv"]])
def test_whatever_is_printed(suite: "Suite", host: "Host", args: list[str]) -> None:
    host.define()
    before = host.look()
    write(suite, PREPARED)
    result = suite.run(*args)
    assert result.ret == 0
    assert result.stderr.str() == ""
    assert host.look() == before
    assert suite.left_over() == []


def test_a_usage_error_is_told_without_a_terminal(suite: "Suite", host: "Host") -> None:
    suite.write("def test_one(vm): pass")
    result = suite.run("-pno:terminal")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "there is no domain 'box'" in result.stderr.str()


# what pytest selects

FLAKY = PREPARED + "def test_flaky(database, web, vm): check(vm, 'database', 'web'); assert {}\n"


@pytest.mark.parametrize(
    ("args", "outcomes"),
    [
        (["--lf"], {"passed": 1}),
        (["--ff"], {"passed": 5}),
        (["--stepwise"], {"passed": 1, "deselected": 4}),
    ],
)
def test_a_failed_test_run_again_starts_from_its_preparations(
    suite: "Suite", host: "Host", args: list[str], outcomes: dict[str, int]
) -> None:
    host.define(state="running")
    before = host.look()
    write(suite, FLAKY.format("not 'mended'"))
    suite.run(*args).assert_outcomes(passed=4, failed=1)
    assert host.look() == before
    write(suite, FLAKY.format("'mended'"))
    suite.run(*args).assert_outcomes(**outcomes)
    assert host.look() == before
    assert suite.left_over() == []


@pytest.mark.parametrize("failing", ["test", "preparation"])
def test_stopping_at_the_first_failure_undoes_what_is_prepared(
    suite: "Suite", host: "Host", failing: str
) -> None:
    host.define(state="running")
    before = host.look()
    line = {"test": 'check(vm, "web")', "preparation": 'write(module_vm, "web")'}[failing]
    write(suite, PREPARED.replace(line, f"{line}; assert 0"))
    outcome = {"errors": 1} if failing == "preparation" else {"failed": 1}
    suite.run("-x").assert_outcomes(passed=2, **outcome)
    assert host.look() == before
    assert suite.left_over() == []


def test_only_what_the_picked_test_asks_for_is_prepared(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    host.define(state="running")
    before = host.look()
    write(suite, PREPARED)
    suite.run("-k", "test_web").assert_outcomes(passed=1, deselected=3)
    assert calls.snapshots[:2] == ["take found", "take web"]
    assert calls.count("take") == 2
    assert host.look() == before


# Ctrl-C

PAUSES = """
import atexit, os, signal, time
from pathlib import Path
import libvirt
from testdriver import Host, URI

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
host = Host(libvirt.open(URI))
host.define(state="running")
before = host.look()

@atexit.register
def at_the_end():
    Path("end").write_text("as found" if host.look() == before else str(host.look()))

@pytest.fixture(scope="session")
def pause():
    def pause(place):
        if place in os.environ["PAUSES"].split(","):
            print(f"now in the {place}", flush=True)
            time.sleep(60)

    return pause
"""
INTERRUPTED = """
@pytest.fixture(scope="module")
def database(module_vm, pause):
    write(module_vm, "database")
    pause("preparation")
    yield
    pause("teardown of the preparation")

@pytest.fixture
def client(vm, pause):
    yield
    write(vm, "teardown")
    pause("teardown of the test")

def test_one(database, vm, client, pause):
    vm.snapshot("dirt")
    pause("test")
    vm.destroy()

def test_two(database, vm, pause):
    assert read(vm) == ["database"]
"""


@pytest.mark.parametrize(
    "places",
    [
        ["preparation"],
        ["test"],
        ["teardown of the test"],
        ["teardown of the preparation"],
        ["test", "teardown of the test"],
        ["test", "teardown of the preparation"],
        ["teardown of the test", "teardown of the preparation"],
    ],
    ids=", then in the ".join,
)
def test_the_machine_is_as_it_was_found_after_ctrl_c_in_the(
    suite: "Suite", monkeypatch: pytest.MonkeyPatch, places: list[str]
) -> None:
    """In a process of its own, whose test driver is looked at when Python ends."""
    write(suite, INTERRUPTED, PAUSES)
    for folder in (Path(__file__).parents[1], suite.pytester.path):  # of testdriver, and words
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("PAUSES", ",".join(places))
    command = [sys.executable, "-mpytest", *suite.options(), "-s"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for place in places:
            assert any(f"now in the {place}" in line for line in process.stdout)
            process.send_signal(signal.SIGINT)
        said, _ = process.communicate()
    assert "KeyboardInterrupt" in said or process.returncode == -signal.SIGINT
    assert (suite.pytester.path / "end").read_text() == "as found"
    assert suite.left_over() == []


@pytest.mark.parametrize("state", ["running", "shut off"])
def test_ctrl_c_while_the_machine_is_brought_to_how_it_was_found(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """A mock, since the test driver is too fast to be interrupted there."""
    delete, interrupts = Domain.delete_snapshot, [KeyboardInterrupt()]

    def interrupted(self: Domain, name: str) -> None:
        if interrupts and "found" in name:
            raise interrupts.pop()
        delete(self, name)

    monkeypatch.setattr(Domain, "delete_snapshot", interrupted)
    host.define(state=state)
    before = host.look()
    write(suite, PREPARED)
    with pytest.raises(KeyboardInterrupt):
        suite.run()
    assert interrupts == []
    assert host.look() == before
    assert suite.left_over() == []
