"""Where a test starts depends on the test alone: wide fixtures, preparations and their states."""

from typing import TYPE_CHECKING

import pytest
from notes import DATABASE, write

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite

# Each test says what it must find, and leaves dirt.
EVERYTHING = (
    DATABASE
    + """
@pytest.fixture(scope="module")
def web(module_vm):
    write(module_vm, "web")

@pytest.fixture(scope="module")
def schema(database, module_vm):
    assert read(module_vm) == ["database"]
    write(module_vm, "schema")

@pytest.fixture(scope="module")
def indirect(schema):
    return "asks for the machine through others only"

@pytest.fixture(scope="module", params=["v1", "v2"])
def version(request, module_vm):
    write(module_vm, request.param)
    return request.param

@pytest.fixture(scope="session")
def tools(session_vm):
    assert read(session_vm) == []
    write(session_vm, "tools")

@pytest.fixture
def client(module_vm):
    write(module_vm, "client")

def check(vm, *words):
    assert read(vm) == list(words)
    write(vm, "dirt")

def test_plain(vm): check(vm)
def test_database(database, vm): check(vm, "database")
def test_database_again(vm, database): check(vm, "database")
def test_web(web, vm): check(vm, "web")
def test_both(database, web, vm): check(vm, "database", "web")
def test_schema(schema, vm): check(vm, "database", "schema")
def test_schema_by_name(vm, schema, module_vm, session_vm): check(module_vm, "database", "schema")
def test_through_others(indirect, vm): check(vm, "database", "schema")
def test_tools(tools, vm): check(vm, "tools")
def test_tools_and_database(database, tools, vm): check(vm, "tools", "database")
def test_version(version, vm): check(vm, version)
def test_version_and_web(version, web, vm): check(vm, version, "web")
def test_client(client, vm): check(vm, "client")
def test_client_and_database(database, client, vm): check(vm, "database", "client")
def test_wide_and_plain(module_vm, vm): check(vm)

@pytest.fixture(scope="class")
def tables(database, class_vm):
    write(class_vm, "tables")

@pytest.fixture(scope="class")
def alone(class_vm):
    write(class_vm, "alone")

class TestClass:
    def test_tables(self, tables, vm): check(vm, "database", "tables")
    def test_alone(self, alone, vm): check(vm, "alone")
    def test_alone_on_database(self, database, alone, vm): check(vm, "database", "alone")
    def test_plain(self, vm): check(vm)

class TestOther:
    def test_plain(self, class_vm, vm): check(vm)

@pytest.mark.usefixtures("web")
class TestMarked:
    def test_web(self, vm): check(vm, "web")
"""
)
COUNT = 23  # two of them twice, for both versions


@pytest.mark.parametrize("state", ["running", "paused", "shut off"])
def test_each_test_starts_from_its_own_closures_state(
    suite: "Suite", host: "Host", state: str
) -> None:
    host.define(state=state)
    before = host.look()
    write(suite, EVERYTHING)
    suite.run().assert_outcomes(passed=COUNT)
    assert host.look() == before
    assert suite.left_over() == []


@pytest.mark.usefixtures("random_order")
@pytest.mark.parametrize("seed", range(12))
def test_each_test_starts_from_its_own_closures_state_in_any_order(
    suite: "Suite", host: "Host", seed: int
) -> None:
    host.define(state="running")
    before = host.look()
    write(suite, EVERYTHING)
    result = suite.run("--random-order-bucket=global", f"--random-order-seed={seed}")
    result.assert_outcomes(passed=COUNT)
    assert host.look() == before


# what it costs


class Shape:
    """A suite, and what it does to the snapshots of a machine that was found running."""

    def __init__(self, tests: str, *log: str, found: str = "running", passed: int = 2) -> None:
        self.tests = tests
        self.log = log
        self.found = found
        self.passed = passed


def revert(snapshot: str, times: int = 1) -> list[str]:
    return [f"revert {snapshot}"] * times


SHAPES = {
    "plain": Shape(
        "@pytest.mark.parametrize('n', range(3))\ndef test_it(vm, n): pass",
        "take found",
        *revert("found", 3),
        "delete found",
        passed=3,
    ),
    "module, with vm": Shape(
        DATABASE + "@pytest.mark.parametrize('n', range(3))\ndef test_it(database, vm, n): pass",
        "take found",
        "take database",
        *revert("database", 3),
        *revert("found"),  # the module is over
        "delete database",
        "delete found",
        passed=3,
    ),
    "module, without vm": Shape(
        DATABASE + "def test_one(database): pass\ndef test_two(module_vm): pass",
        "take found",
        "take database",
        "take held",  # test_two goes on from elsewhere, and test_one's way may be taken again
        *revert("found"),
        *revert("found"),
        "delete held",
        "delete database",
        "delete found",
    ),
    "module, machine alone": Shape(
        "def test_one(module_vm): pass\ndef test_two(module_vm): pass",
        "take found",
        *revert("found"),
        "delete found",
    ),
    "class in module": Shape(
        DATABASE
        + """
@pytest.fixture(scope="class")
def tables(database, class_vm): write(class_vm, "tables")

class TestIt:
    def test_one(self, tables, vm): pass
    def test_two(self, tables, vm): pass

def test_three(database, vm): pass
""",
        "take found",
        "take database",
        "take tables",
        *revert("tables", 2),
        *revert("database"),  # the class is over
        "delete tables",
        *revert("database"),
        *revert("found"),  # the module is over
        "delete database",
        "delete found",
        passed=3,
    ),
    "plain between prepared ones": Shape(
        DATABASE
        + """
def test_one(database, vm): pass
def test_two(vm): pass
def test_three(database, vm): pass
""",
        "take found",
        "take database",
        *revert("database"),
        *revert("found", 2),
        *revert("database", 2),
        *revert("found"),
        "delete database",
        "delete found",
        passed=3,
    ),
    "parametrized preparation": Shape(
        """
@pytest.fixture(scope="module", params=["v1", "v2"])
def version(request, module_vm): write(module_vm, request.param)

def test_one(version, vm): pass
def test_two(version, vm): pass
""",
        "take found",
        "take version",
        *revert("version", 2),
        *revert("found"),
        "delete version",
        "take version-2",
        *revert("version-2", 2),
        *revert("found"),
        "delete version-2",
        "delete found",
        passed=4,
    ),
    "two on each other": Shape(
        DATABASE
        + """
@pytest.fixture(scope="module")
def web(module_vm): write(module_vm, "web")

def test_both(database, web, vm): pass
def test_web(web, vm): pass
""",
        "take found",
        "take database",
        "take web",
        *revert("web"),
        *revert("found"),  # made anew, on the baseline
        "delete web",
        "take web-2",
        *revert("web-2"),
        *revert("found"),
        "delete database",
        "delete web-2",
        "delete found",
    ),
    "named snapshot": Shape(
        """
pytestmark = pytest.mark.kvm_snapshot("installed")

@pytest.fixture(scope="module")
def database(module_vm): write(module_vm, "database")

def test_one(database, vm): pass
def test_two(vm): pass
""",
        "take found",
        *revert("installed"),
        "take database",
        *revert("database"),
        *revert("installed", 2),
        "delete database",  # the module is over, and the machine elsewhere
        *revert("found"),
        "delete found",
    ),
    "off": Shape(
        DATABASE + "def test_one(database, vm): pass\ndef test_two(vm): pass",
        "take found",
        "take base",
        "take database",
        *revert("database"),
        *revert("base", 2),
        "delete database",
        *revert("found"),
        "delete base",
        "delete found",
        found="shut off",
    ),
}
SHAPES["paused"] = Shape(SHAPES["off"].tests, *SHAPES["off"].log, found="paused")


def test_what_is_over_is_deleted_though_the_machine_is_not_used_again(
    suite: "Suite", host: "Host"
) -> None:
    """`box` stands elsewhere when its preparation and its way through the module are over."""
    host.define("box", state="running")
    host.define("other", state="running")
    write(
        suite,
        DATABASE
        + """
import libvirt

def snapshots_of_box():
    names = libvirt.open("test:///default").lookupByName("box").snapshotListNames()
    return sorted(name.split("-")[1] for name in names)

@pytest.fixture(scope="class")
def tables(database, class_vm): class_vm.snapshot("of-the-preparation")

class TestBox:
    def test_first(self, tables, vm): pass
    def test_held(self, class_vm): pass
    def test_last(self, vm):
        assert snapshots_of_box() == ["database", "found", "held", "tables", "the"]

@pytest.mark.kvm_domain("other")
class TestOther:
    def test_first(self, vm): assert snapshots_of_box() == ["database", "found"]

def test_database(database, vm): assert read(vm) == ["database"]
""",
    )
    suite.run().assert_outcomes(passed=5)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_shape_of_suite_costs(
    suite: "Suite", host: "Host", calls: "Calls", shape: str
) -> None:
    expected = SHAPES[shape]
    domain = host.define(state="running")
    host.snapshot("installed")
    if expected.found == "shut off":
        domain.destroy()
    elif expected.found == "paused":
        domain.suspend()
    before = host.look()
    write(suite, expected.tests)
    suite.run().assert_outcomes(passed=expected.passed)
    assert calls.snapshots == list(expected.log)
    assert host.look() == before
