"""Other plugins of pytest beside this one."""

import time
from typing import TYPE_CHECKING

import pytest
from notes import DATABASE, write
from test_states import COUNT, EVERYTHING
from testdriver import disk, node_file

from pytest_kvmsnap.report import evidence

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite

# Dirt shows whether it is undone.
CHECK = """
def check(vm, *words):
    assert read(vm) == list(words)
    write(vm, "dirt")
"""
PREPARED = DATABASE + CHECK


pytestmark = pytest.mark.usefixtures("all_plugins")


def needs(module: str) -> None:
    pytest.importorskip(module, reason=f"{module.replace('_', '-')} is not installed")


@pytest.fixture(autouse=True)
def without_asyncio(suite: "Suite", monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pytest-asyncio out of all runs but its own: it warns where its loops are not set."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-pno:asyncio")


@pytest.fixture
def node(suite: "Suite") -> str:
    """The option for a machine `box` that runs in other processes find, each anew."""
    path = suite.pytester.path / "node.xml"
    path.write_text(node_file(disk("/images/box.qcow2")))
    return f"--kvmsnap-uri=test://{path}"


# pytest-bdd

FEATURE = """
Feature: Rows
  Scenario: A row is added
    Given a database
    When a row is added
    Then there is one row

  Scenario: Another row is added
    Given a database
    When a row is added
    Then there is one row
"""
STEPS = (
    PREPARED
    + """
from pytest_bdd import given, scenario, scenarios, then, when

@given("a running machine")
def _(vm):
    assert vm.state == "running"

@given("a database")
def _(database, vm):
    assert read(vm) == ["database"]

@when("a row is added")
def _(vm):
    write(vm, "row")

@then("there is one row")
def _(vm):
    assert read(vm) == ["database", "row"]
"""
)


def test_each_scenario_of_bdd_starts_from_what_its_steps_ask_for(
    suite: "Suite", host: "Host"
) -> None:
    needs("pytest_bdd")
    host.define(state="running")
    before = host.look()
    suite.pytester.makefile(".feature", rows=FEATURE)
    write(suite, STEPS + "scenarios('rows.feature')")
    suite.run().assert_outcomes(passed=2)
    assert host.look() == before
    assert suite.left_over() == []


@pytest.mark.parametrize("named", ["", "database"])
def test_a_step_of_bdd_cannot_prepare_what_an_earlier_one_uses_unless_the_scenario_names_it(
    suite: "Suite", host: "Host", named: str
) -> None:
    """Steps ask by `getfixturevalue`, one after the other."""
    needs("pytest_bdd")
    host.define(state="running")
    before = host.look()
    feature = FEATURE.replace("Given a database", "Given a running machine\n        And a database")
    suite.pytester.makefile(".feature", rows=feature)
    one = f"@scenario('rows.feature', 'A row is added')\ndef test_row({named}): pass"
    write(suite, STEPS + one)
    result = suite.run()
    if named:
        result.assert_outcomes(passed=1)
    else:
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(
            [
                "*'database' prepares the machine 'box', which 'vm' uses already",
                "*cure:  name database among the arguments of the test*",
            ]
        )
    assert host.look() == before


# pytest-asyncio


def run_with_asyncio(suite: "Suite", monkeypatch: pytest.MonkeyPatch) -> pytest.RunResult:
    needs("pytest_asyncio")
    monkeypatch.delenv("PYTEST_ADDOPTS")
    suite.pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    return suite.run()


def test_async_tests_start_clean(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define(state="running")
    before = host.look()
    write(
        suite,
        """
import asyncio

@pytest.mark.asyncio
@pytest.mark.parametrize("number", range(2))
async def test_machine(vm, number):
    assert read(vm) == []
    await asyncio.gather(*(asyncio.to_thread(vm.snapshot, name) for name in "ab"))
    write(vm, "dirt")
    assert {"a", "b"} < {snapshot.name for snapshot in vm.snapshots()}
""",
    )
    run_with_asyncio(suite, monkeypatch).assert_outcomes(passed=2)
    assert host.look() == before


def test_an_async_fixture_prepares_the_machine_once_and_tears_it_down_prepared(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define(state="running")
    before = host.look()
    write(
        suite,
        """
import asyncio
import pytest_asyncio

pytestmark = pytest.mark.asyncio(loop_scope="module")
log = []

@pytest.fixture(scope="session", autouse=True)
def at_the_end():
    yield
    assert log == ["set up", "torn down"]

@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(module_vm):
    write(module_vm, "server")
    log.append("set up")
    yield asyncio.get_running_loop()
    log.append("torn down")
    assert read(module_vm) == ["server"]

@pytest_asyncio.fixture(loop_scope="module")
async def client(server, vm):
    write(vm, "client")

@pytest.mark.parametrize("number", range(2))
async def test_server(server, vm, client, number):
    assert asyncio.get_running_loop() is server
    assert read(vm) == ["server", "client"]
    write(vm, "dirt")

async def test_plain(vm):
    assert read(vm) == []
""",
    )
    run_with_asyncio(suite, monkeypatch).assert_outcomes(passed=3)
    assert host.look() == before


# pytest-rerunfailures


def test_a_rerun_starts_from_the_preparation_which_is_made_once(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    needs("pytest_rerunfailures")
    host.define(state="running")
    before = host.look()
    write(
        suite,
        PREPARED
        + """
runs = []

def test_flaky(database, vm):
    runs.append("run")
    check(vm, "database")
    assert len(runs) == 3

def test_next(database, vm):
    check(vm, "database")
""",
    )
    result = suite.run("--reruns=2")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*2 passed, 2 rerun*"])
    assert calls.log.count("take database") == 1
    assert host.look() == before


def test_a_rerun_makes_a_preparation_that_failed_anew_on_a_clean_machine(
    suite: "Suite", host: "Host"
) -> None:
    needs("pytest_rerunfailures")
    host.define(state="running")
    before = host.look()
    write(
        suite,
        """
tries = []

@pytest.fixture(scope="module")
def database(module_vm):
    assert read(module_vm) == []
    tries.append("try")
    write(module_vm, f"try{len(tries)}")
    assert len(tries) == 2

def test_one(database, vm):
    assert read(vm) == ["try2"]
""",
    )
    result = suite.run("--reruns=1")
    result.stdout.fnmatch_lines(["*1 passed, 1 rerun*"])
    assert host.look() == before


# pytest-timeout


def test_a_timeout_by_signal_fails_the_test_and_the_machine_is_put_back(
    suite: "Suite", host: "Host"
) -> None:
    needs("pytest_timeout")
    host.define(state="running")
    before = host.look()
    write(
        suite,
        PREPARED
        + """
import time

@pytest.mark.timeout(0.2, method="signal", func_only=True)
def test_slow(database, vm):
    check(vm, "database")
    vm.destroy()
    time.sleep(10)

def test_next(database, vm):
    check(vm, "database")
""",
    )
    result = suite.run()
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*Timeout*", "what the test left is in kvmsnap-results/*"])
    assert host.look() == before
    assert suite.left_over() == []


def test_a_timeout_while_a_failed_test_is_looked_at_hides_nothing(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("pytest_timeout")
    monkeypatch.setattr(evidence, "_screen", lambda *_: time.sleep(3))
    host.define(state="running")
    before = host.look()
    suite.write("def test_fails(vm): assert not 'reached'\ndef test_next(vm): pass")
    result = suite.run("--timeout=1", "--timeout-method=signal")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*assert not 'reached'*", "what the test left is lost: *Timeout*"])
    assert host.look() == before


def test_a_timeout_by_signal_in_fixtures_is_undone(suite: "Suite", host: "Host") -> None:
    needs("pytest_timeout")
    host.define(state="running")
    before = host.look()
    write(
        suite,
        PREPARED
        + """
import time

@pytest.fixture(scope="module")
def slow_preparation(module_vm):
    write(module_vm, "half")
    time.sleep(10)

@pytest.fixture
def slow_teardown(vm):
    yield
    write(vm, "dirt")
    time.sleep(10)

@pytest.mark.timeout(0.3, method="signal")
def test_set_up(slow_preparation, vm): pass

@pytest.mark.timeout(0.3, method="signal")
def test_teardown(database, slow_teardown, vm): check(vm, "database")

def test_plain(vm): check(vm)
def test_database(database, vm): check(vm, "database")
""",
    )
    suite.run().assert_outcomes(passed=3, errors=2)
    assert host.look() == before
    assert suite.left_over() == []


def test_a_timeout_by_thread_ends_the_process_and_the_next_run_puts_the_machine_back(
    suite: "Suite", node: str
) -> None:
    needs("pytest_timeout")
    write(
        suite,
        PREPARED
        + """
import time

@pytest.mark.timeout(0.2, method="thread", func_only=True)
def test_slow(database, vm):
    time.sleep(10)

def test_next(database, vm):
    check(vm, "database")
""",
    )
    result = suite.run_apart(node)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*Timeout*"])
    assert [name for name in suite.left_over() if name.endswith(".json")]
    result = suite.run_apart(node, "-k", "test_next")
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(["kvmsnap: put box back as found (running): *::test_slow)"])
    assert suite.left_over() == []


# plugins that change which tests there are, and their order


@pytest.mark.parametrize("seed", range(5))
def test_each_test_starts_from_its_own_closures_state_under_randomly(
    suite: "Suite", host: "Host", seed: int
) -> None:
    needs("pytest_randomly")
    host.define(state="running")
    before = host.look()
    write(suite, EVERYTHING)
    options = [option for option in suite.options() if option != "-pno:randomly"]
    result = suite.pytester.runpytest_inprocess(*options, f"--randomly-seed={seed}")
    result.stdout.fnmatch_lines([f"Using --randomly-seed={seed}"])
    result.assert_outcomes(passed=COUNT)
    assert host.look() == before


@pytest.mark.parametrize("scope", ["function", "session"])
def test_each_repetition_starts_from_the_preparation_which_is_made_once(
    suite: "Suite", host: "Host", calls: "Calls", scope: str
) -> None:
    needs("pytest_repeat")
    host.define(state="running")
    before = host.look()
    write(
        suite,
        PREPARED
        + """
def test_plain(vm):
    check(vm)

def test_database(database, vm):
    check(vm, "database")
""",
    )
    suite.run("--count=3", f"--repeat-scope={scope}").assert_outcomes(passed=6)
    assert calls.log.count("take database") == 1
    assert host.look() == before


def test_subtests_share_the_machine_of_their_test(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    if not hasattr(pytest, "Subtests"):  # of pytest itself from 9 on
        needs("pytest_subtests")
    host.define(state="running")
    before = host.look()
    write(
        suite,
        PREPARED
        + """
def test_several(database, vm, subtests):
    for number in range(3):
        with subtests.test(number=number):
            write(vm, str(number))
            assert number != 1
    print("found", *read(vm))

def test_next(database, vm):
    check(vm, "database")
""",
    )
    result = suite.run("-s", "-rA")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*found database 0 1 2*", "PASSED *::test_next", "*SUBFAIL*"])
    assert calls.count("revert") == 3, "after each test, and after the preparation"
    assert host.look() == before


# pytest-xdist


def test_xdist_without_workers(suite: "Suite", host: "Host", calls: "Calls") -> None:
    needs("xdist")
    host.define(state="running")
    before = host.look()
    write(suite, PREPARED + "def test_one(database, vm): check(vm, 'database')")
    suite.run("-n0").assert_outcomes(passed=1)
    assert host.look() == before


def test_the_only_worker_of_xdist_makes_a_preparation_once(suite: "Suite", node: str) -> None:
    needs("xdist")
    write(
        suite,
        PREPARED
        + """
@pytest.mark.parametrize("number", range(3))
def test_database(database, vm, number):
    check(vm, "database")

def test_plain(vm):
    check(vm)
""",
    )
    suite.run_apart(node, "-n1").assert_outcomes(passed=4)
    assert suite.left_over() == []
