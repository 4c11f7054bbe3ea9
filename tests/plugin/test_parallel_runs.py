"""Several workers of pytest-xdist, and several runs, on one machine: each has it for itself."""

from typing import TYPE_CHECKING

import pytest
from notes import DATABASE, write
from records import RECORDS, Record, turns

from pytest_kvmsnap.lab.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sharedhost import SharedSuite
    from testdriver import Host, Suite

    from pytest_kvmsnap.markers import Request


@pytest.mark.usefixtures("xdist")
def test_workers_take_turns_on_one_machine(shared: "SharedSuite") -> None:
    shared.host.define(state="running")
    before = shared.host.look()
    write(
        shared,
        DATABASE
        + """
@pytest.mark.parametrize("number", range(10))
def test_machine(vm, diary, number):
    assert read(vm) == []
    write(vm, "dirt")

def test_without(): pass
""",
        RECORDS,
    )
    shared.run_apart("-n2").assert_outcomes(passed=11)
    users = Record(shared.pytester.path).users()
    assert len(users) == 10
    assert len(set(users)) == 2
    assert turns(users) >= 4, "the one who waits comes next"
    assert shared.left_over() == []
    assert shared.host.look() == before


@pytest.mark.usefixtures("xdist")
def test_a_worker_keeps_the_machine_while_a_fixture_holds_it(shared: "SharedSuite") -> None:
    shared.host.define(state="running")
    prepared = (
        DATABASE
        + """
@pytest.mark.parametrize("number", range(4))
def test_machine(database, vm, diary, number):
    assert read(vm) == ["database"]
"""
    )
    write(shared, "", RECORDS)
    for name in ("one", "two"):
        shared.pytester.makepyfile(
            **{f"test_{name}": "import pytest\nfrom words import read, write\n" + prepared}
        )
    shared.run_apart("-n2", "--dist=loadfile").assert_outcomes(passed=8)
    users = Record(shared.pytester.path).users()
    assert users == [users[0]] * 4 + [users[-1]] * 4
    assert users[0] != users[-1]
    assert shared.left_over() == []


@pytest.mark.usefixtures("xdist")
@pytest.mark.parametrize(
    ("scope", "dist"), [("class", "loadscope"), ("module", "load"), ("module", "worksteal")]
)
def test_prepared_states_are_right_with_workers(
    shared: "SharedSuite", scope: str, dist: str
) -> None:
    shared.host.define(state="running")
    before = shared.host.look()
    write(
        shared,
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
        RECORDS,
    )
    shared.run_apart("-n2", f"--dist={dist}").assert_outcomes(passed=8)
    assert len(Record(shared.pytester.path).users()) == 8
    assert shared.left_over() == []
    assert shared.host.look() == before


@pytest.mark.usefixtures("xdist")
def test_a_machine_for_the_whole_run_is_refused_where_workers_would_wait_for_it(
    shared: "SharedSuite",
) -> None:
    shared.host.define()
    before = shared.host.look()
    shared.write("def test_one(session_vm): pass\ndef test_two(vm): pass\n", RECORDS)
    result = shared.run_apart("-n2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.assert_outcomes()
    said = result.stdout.str() + result.stderr.str()
    assert said.count("2 workers of pytest-xdist would wait for one machine until the run") == 1
    assert "run with -n 1 at most, name 2 machines" in said
    assert "INTERNALERROR" not in said
    assert not (shared.pytester.path / "record").exists()
    assert shared.host.look() == before
    assert shared.left_over() == []


@pytest.mark.usefixtures("xdist")
def test_a_machine_for_the_whole_run_is_for_one_worker_each(shared: "SharedSuite") -> None:
    for name in ("box", "bot"):
        shared.host.define(name, state="running")
    before = shared.host.looks()
    write(
        shared,
        """
@pytest.fixture(scope="session")
def prepared(session_vm): write(session_vm, "prepared")

@pytest.mark.parametrize("number", range(6))
def test_prepared(prepared, vm, diary, number):
    assert read(vm) == ["prepared"]
    write(vm, "dirt")
""",
        RECORDS,
    )
    shared.run_apart("-n2", domain="bo*").assert_outcomes(passed=6)
    record = Record(shared.pytester.path)
    assert [len(set(record.users(name))) for name in ("box", "bot")] == [1, 1]
    assert record.count("take", "prepared") == 2
    assert shared.left_over() == []
    assert shared.host.looks() == before


@pytest.mark.usefixtures("xdist")
def test_what_is_wrong_is_told_once_by_all_workers(suite: "Suite") -> None:
    suite.write("def test_one(module_vm): pass\ndef test_two(vm): pass\n")
    result = suite.run_apart("-n2", domain="nowhere")
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
        domain = self._site.domain("box")
        self._checks.passed |= {(domain.uuid, None)}
        journal = self._site.journal(domain, self._site.lease(domain))
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
