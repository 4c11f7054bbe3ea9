"""However a run ends, the machine is as it was found."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite

MESS = "vm.snapshot('mess'); vm.domain.setAutostart(1); vm.destroy()"

ENDINGS = {
    "failing test": (f"def test_one(vm): {MESS}; assert 0", [], {"failed": 1, "passed": 1}),
    "error in the set-up of another fixture": (
        f"""
import pytest
@pytest.fixture
def broken(vm): {MESS}; raise OSError("broken")
def test_one(broken): pass
""",
        [],
        {"errors": 1, "passed": 1},
    ),
    "error in the teardown of another fixture": (
        f"""
import pytest
@pytest.fixture
def broken(vm): yield; {MESS}; raise OSError("broken")
def test_one(broken): pass
""",
        [],
        {"passed": 2, "errors": 1},
    ),
    "-x": (f"def test_one(vm): {MESS}; assert 0", ["-x"], {"failed": 1}),
    "--maxfail": (f"def test_one(vm): {MESS}; assert 0", ["--maxfail=1"], {"failed": 1}),
    "skip in the test": (
        f"import pytest\ndef test_one(vm): {MESS}; pytest.skip('late')",
        [],
        {"skipped": 1, "passed": 1},
    ),
    "expected failure": (
        f"import pytest\n@pytest.mark.xfail\ndef test_one(vm): {MESS}; assert 0",
        [],
        {"xfailed": 1, "passed": 1},
    ),
    "Ctrl-C": (f"def test_one(vm): {MESS}; raise KeyboardInterrupt", [], {}),
    "pytest.exit": (f"import pytest\ndef test_one(vm): {MESS}; pytest.exit('enough')", [], {}),
    "SystemExit": (
        f"def test_one(vm): {MESS}; raise SystemExit(3)",
        [],
        {"failed": 1, "passed": 1},
    ),
}


@pytest.mark.parametrize("state", ["running", "paused", "shut off"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_machine_is_as_it_was_found_after(
    suite: "Suite", host: "Host", ending: str, state: str
) -> None:
    source, args, outcomes = ENDINGS[ending]
    host.define(state=state)
    host.snapshot("of the owner")
    before = host.look()
    suite.write(f"{source}\ndef test_two(vm): assert vm.state == 'running'\n")
    suite.run(*args).assert_outcomes(**outcomes)
    assert host.look() == before
    assert suite.left_over() == []


def test_ctrl_c_in_the_set_up(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    before = host.look()
    suite.write(
        f"""
        import pytest

        @pytest.fixture
        def interrupted(vm):
            {MESS}
            raise KeyboardInterrupt

        def test_one(interrupted): pass
        """
    )
    assert suite.run().ret == pytest.ExitCode.INTERRUPTED
    assert host.look() == before
    assert suite.left_over() == []


def test_ctrl_c_while_the_machine_is_prepared(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since the test driver starts a machine at once."""
    from pytest_kvmsnap.machine.domain import Domain

    def interrupted(self: Domain) -> None:
        raise KeyboardInterrupt

    host.define()
    before = host.look()
    suite.write("def test_one(vm): pass")
    with monkeypatch.context() as patched:
        patched.setattr(Domain, "start", interrupted)
        assert suite.run().ret == pytest.ExitCode.INTERRUPTED
    assert host.look() == before
    assert suite.left_over() == []


@pytest.mark.usefixtures("rerunfailures")
def test_a_failing_test_is_undone_before_it_is_run_again(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    pytest.importorskip("pytest_rerunfailures", reason="pytest-rerunfailures is not installed")
    host.define(state="running")
    before = host.look()
    suite.write(
        """
        seen = []

        def test_one(vm):
            seen.append([s.name for s in vm.snapshots()])
            vm.snapshot("mess")
            assert len(seen) == 3
            assert seen[0] == seen[1] == seen[2]
        """
    )
    suite.run("--reruns=2").assert_outcomes(passed=1)
    assert host.look() == before
    assert calls.count("revert") == 3


def test_the_set_up_of_the_machine_is_not_shown_as_a_part_of_a_failing_test(
    suite: "Suite", host: "Host"
) -> None:
    host.define(state="running")
    suite.write("def test_one(vm): assert vm.state == 'asleep'")
    out = suite.run().stdout.str()
    assert "assert 'running' == 'asleep'" in out
    assert "pytest_kvmsnap/" not in out


def test_setup_show_and_setup_only_leave_the_machine_as_found(suite: "Suite", host: "Host") -> None:
    host.define()
    before = host.look()
    suite.write("def test_one(vm): pass")
    suite.run("--setup-show").assert_outcomes(passed=1)
    assert suite.run("--setup-only").ret == 0
    assert host.look() == before
    assert suite.left_over() == []


def test_stepwise_runs_in_a_row(suite: "Suite", host: "Host") -> None:
    host.define()
    before = host.look()
    suite.write("def test_one(vm): pass\ndef test_two(vm): assert 0\ndef test_three(vm): pass")
    for _ in range(2):
        suite.run("--stepwise")
        assert host.look() == before
