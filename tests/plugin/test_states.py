"""Where a test starts depends on the test alone: wide fixtures, preparations and their states.

A machine's title stands for its disk here: libvirt's test driver brings it back with a revert.
"""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite

NOTES = '''
import libvirt

def write(vm, word):
    """Add a word to the machine."""
    words = [*read(vm), word]
    vm.domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_TITLE, " ".join(words), None, None, 0)

def read(vm):
    """Return the words on the machine."""
    try:
        return vm.domain.metadata(libvirt.VIR_DOMAIN_METADATA_TITLE, None, 0).split()
    except libvirt.libvirtError:
        return []
'''
START = "import pytest\nfrom notes import read, write\n\n"


@pytest.fixture(autouse=True)
def notes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(notes=NOTES)
    pytester.syspathinsert()


def write(suite: "Suite", tests: str, conftest: str = "") -> None:
    """Write a suite whose tests add to the machine and read what is there."""
    suite.pytester.makepyfile(START + tests)
    if conftest:
        suite.pytester.makeconftest(START + conftest)


DATABASE = """
@pytest.fixture(scope="module")
def database(module_vm):
    write(module_vm, "database")
    return "the database"
"""

# Each test says what it must find, and leaves dirt. Its name is all that -k needs.
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


@pytest.mark.parametrize("seed", range(12))
def test_each_test_starts_from_its_own_closures_state_in_any_order(
    suite: "Suite", host: "Host", seed: int
) -> None:
    pytest.importorskip("random_order", reason="pytest-random-order is not installed")
    host.define(state="running")
    before = host.look()
    write(suite, EVERYTHING)
    result = suite.run("--random-order-bucket=global", f"--random-order-seed={seed}")
    result.assert_outcomes(passed=COUNT)
    assert host.look() == before
