"""Prepared states on a real guest: memory, processes and disk, in whatever order tests run."""

import pytest
from bench import Machine, Suite
from test_main_job import is_as_made, keep_a_copy

PREPARED = """
def words(vm):
    said = vm.run("cat /root/disk /run/memory; for p in /proc/[0-9]*/cmdline;"
                  " do tr '\\\\0' ' ' < $p | grep '^sleep ....[0-9]' | cut -d ' ' -f 2; done")
    return said.stdout.split()

def add(vm, word, number):
    # on the disk past the page cache, in the memory, and a process
    vm.run(f"echo {word} >> /root/disk; sync; echo {word} >> /run/memory;"
           f" sleep {number} >/dev/null 2>&1 &", check=True)

def expect(vm, *pairs):
    names = [name for name, _ in pairs]
    processes = sorted(str(number) for _, number in pairs)
    assert words(vm)[:2 * len(names)] == names + names
    assert sorted(words(vm)[2 * len(names):]) == processes

DATABASE, TABLES, WEB, TOOLS = ("database", 11111), ("tables", 22222), ("web", 33333), ("t", 44444)

@pytest.fixture(scope="session")
def tools(session_vm): add(session_vm, *TOOLS)

@pytest.fixture(scope="module")
def database(module_vm): add(module_vm, *DATABASE)

@pytest.fixture(scope="module")
def web(module_vm): add(module_vm, *WEB)

@pytest.fixture(scope="class")
def tables(database, class_vm):
    add(class_vm, *TABLES)
    yield
    expect(class_vm, DATABASE, TABLES)

@pytest.fixture(autouse=True)
def dirt(vm):
    yield
    add(vm, "dirt", 99999)

def test_database(database, vm): expect(vm, DATABASE)
def test_plain(vm): expect(vm)
def test_database_again(database, vm): expect(vm, DATABASE)
def test_tools(tools, web, vm): expect(vm, TOOLS, WEB)

class TestTables:
    def test_tables(self, tables, vm): expect(vm, DATABASE, TABLES)
    def test_tables_again(self, tables, vm): expect(vm, DATABASE, TABLES)
"""
TESTS = 6


@pytest.mark.usefixtures("random_order")
@pytest.mark.long
def test_each_test_starts_from_its_own_prepared_state(machine: Machine, suite: Suite) -> None:
    """In an order that takes the machine back and forth; the tests without QEMU try many more."""
    keep_a_copy(machine)
    definition = machine.definition
    suite.write(PREPARED)
    random = ["--random-order-seed=1", "--random-order-bucket=global"]
    suite.run(f"--kvmsnap-domain={machine.name}", *random).assert_outcomes(passed=TESTS)
    assert (machine.state, machine.snapshots) == ("shut off", [])
    assert machine.definition == definition
    assert is_as_made(machine)
    assert list(suite.locks.iterdir()) == []


SHAPES = """
@pytest.fixture(scope="module")
def database(module_vm): module_vm.write_text("/root/abc", "database")

@pytest.fixture(scope="class", params=["one", "two"])
def version(request, database, class_vm): class_vm.write_text("/root/version", request.param)

def test_plain(vm): pass
def test_database(database, vm): pass

class TestVersion:
    def test_it(self, version, vm): pass

def test_steps(module_vm): pass
"""


@pytest.mark.long
def test_what_the_shapes_cost(machine: Machine, suite: Suite) -> None:
    machine.start()
    suite.write(SHAPES)
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=5)
    assert suite.calls(machine, "take_snapshot", "revert", "delete_snapshot") == [
        "take_snapshot kvmsnap-found",
        "revert kvmsnap-found",  # plain
        "take_snapshot kvmsnap-database",
        "revert kvmsnap-database",  # database
        "take_snapshot kvmsnap-version",
        "revert kvmsnap-version",  # the first version's test
        "revert kvmsnap-database",
        "delete_snapshot kvmsnap-version",
        "take_snapshot kvmsnap-version-2",
        "revert kvmsnap-version-2",  # the second one's
        "revert kvmsnap-database",  # the class is over
        "delete_snapshot kvmsnap-version-2",
        "revert kvmsnap-found",  # steps
        "revert kvmsnap-found",  # the module is over
        "delete_snapshot kvmsnap-database",
        "delete_snapshot kvmsnap-found",
    ]
    assert (machine.state, machine.snapshots) == ("running", [])
    assert machine.image_snapshots() == []


def test_preparation_that_fails_half_way_leaves_nothing(machine: Machine, suite: Suite) -> None:
    keep_a_copy(machine)
    suite.write(
        """
@pytest.fixture(scope="module")
def broken(module_vm):
    module_vm.run("echo half > /root/half; sync; echo half > /run/half", check=True)
    module_vm.snapshot("half-way")
    module_vm.run("echo why >&2; false", check=True)

def test_one(broken, vm): pass
def test_two(broken, vm): pass
def test_plain(vm):
    assert vm.run("ls /root/half /run/half").stdout == ""
    assert len(vm.snapshots()) == 2
"""
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["*CalledProcessError*"])
    assert (machine.state, machine.snapshots) == ("shut off", [])
    assert is_as_made(machine)


@pytest.mark.long
def test_steps_without_vm_go_on_after_another_test(machine: Machine, suite: Suite) -> None:
    suite.write(
        """
SLEEPER = "grep -ls '5432[1]' /proc/[0-9]*/cmdline"

class TestSteps:
    def test_installs(self, class_vm):
        class_vm.run("echo 1.0 > /root/version; sync", check=True)
        class_vm.snapshot("installed")

    def test_starts(self, class_vm):
        class_vm.run("sleep 54321 >/dev/null 2>&1 &", check=True)

    def test_in_between(self, vm):
        assert vm.run("cat /root/version; " + SLEEPER).stdout == ""

    def test_runs(self, class_vm):
        assert class_vm.read_text("/root/version") == "1.0\\n"
        assert class_vm.run(SLEEPER).stdout
        class_vm.shutdown()

    def test_in_between_again(self, vm):
        assert vm.state == "running"

    def test_is_off(self, class_vm):
        assert class_vm.state == "shut off"
        class_vm.revert("installed")
        assert class_vm.run("cat /root/version; " + SLEEPER).stdout == "1.0\\n"

def test_plain(vm):
    assert vm.run("cat /root/version").stdout == ""
"""
    )
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=7)
    assert (machine.state, machine.snapshots) == ("shut off", [])


@pytest.mark.long
def test_live_no_boots_prepared_tests_from_the_prepared_disk(
    machine: Machine, suite: Suite
) -> None:
    suite.write(
        """
@pytest.fixture(scope="module")
def database(module_vm):
    module_vm.run("echo data > /root/data; echo > /run/memory", check=True)

@pytest.mark.parametrize("turn", [1, 2])
def test_database(database, vm, turn):
    assert vm.read_text("/root/data") == "data\\n"
    assert vm.run("ls /run/memory /root/dirt").stdout == ""
    vm.run("echo > /root/dirt; sync", check=True)
"""
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}", "--kvmsnap-live=no")
    result.assert_outcomes(passed=2)
    assert suite.calls(machine, "take_snapshot", "start", "shutdown") == [
        "take_snapshot kvmsnap-found",
        "start",
        "shutdown",
        "take_snapshot kvmsnap-database",
        *["start"] * 2,
    ]
    assert (machine.state, machine.snapshots) == ("shut off", [])


@pytest.mark.long
def test_preparation_may_end_while_the_guest_boots(machine: Machine, suite: Suite) -> None:
    suite.write(
        """
@pytest.fixture(scope="module")
def rebooted(module_vm):
    module_vm.run("echo > /run/memory", check=True)
    module_vm.reboot()

def test_is_ready_at_once(rebooted, vm):
    assert vm.run("ls /run/memory").returncode == 1
"""
    )
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=1)


@pytest.mark.long
def test_debugger_finds_the_machine_as_the_test_left_it(
    machine: Machine, suite: Suite, pytester: pytest.Pytester
) -> None:
    suite.write(
        """
@pytest.fixture(scope="module")
def database(module_vm): module_vm.write_text("/root/data", "data")

def test_fails(database, vm):
    vm.write_text("/root/data", "broken")
    assert vm.read_text("/root/data") == "data"

def test_next(database, vm):
    assert vm.read_text("/root/data") == "data"
"""
    )
    result = suite.run_with_input(
        b"p 'the machine has', vm.read_text('/root/data')\nc\n",
        f"--kvmsnap-domain={machine.name}",
        "--pdb",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            f"kvmsnap: {machine.name} stays as the test left it until you leave the debugger;"
            ' reach it by vm.run("...")',
            "*'the machine has', 'broken'*",
        ]
    )
    assert (machine.state, machine.snapshots) == ("shut off", [])
