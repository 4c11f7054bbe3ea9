"""All ways to ask for a machine: autouse, unittest, parameters, markers, overrides, doctests."""

from typing import TYPE_CHECKING

import libvirt
import pytest
from notes import DATABASE, START, write

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite


def test_autouse_fixtures_prepare_every_test(suite: "Suite", host: "Host", calls: "Calls") -> None:
    host.define(state="running")
    before = host.look()
    write(
        suite,
        """
@pytest.fixture(scope="module", autouse=True)
def database(module_vm):
    write(module_vm, "database")

@pytest.fixture(autouse=True)
def client(vm):
    write(vm, "client")

@pytest.mark.parametrize("number", range(2))
def test_one(vm, number):
    assert read(vm) == ["tools", "database", "client"]
    write(vm, "dirt")

class TestClass:
    @pytest.fixture(autouse=True)
    def more(self, vm):
        write(vm, "more")

    def test_two(self, vm):
        assert sorted(read(vm)) == ["client", "database", "more", "tools"]

def test_that_asks_for_nothing():
    pass
""",
        conftest="""
@pytest.fixture(scope="session", autouse=True)
def tools(session_vm):
    write(session_vm, "tools")
""",
    )
    suite.run("-m", "kvm").assert_outcomes(passed=4)
    assert calls.snapshots[:3] == ["take found", "take tools", "take database"]
    assert calls.count("take") == 3
    assert host.look() == before


def test_unittest_classes_may_name_our_fixture_in_usefixtures(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    host.define(state="running")
    before = host.look()
    suite.write(
        """
        import unittest
        import pytest

        @pytest.mark.usefixtures("vm")
        class TestMachine(unittest.TestCase):
            def test_one(self): pass
            def test_two(self): pass
        """
    )
    suite.run("-m", "kvm").assert_outcomes(passed=2)
    assert calls.snapshots == ["take found", "revert found", "revert found", "delete found"]
    assert host.look() == before


@pytest.mark.parametrize("scope", ["class", "module", "session"])
def test_unittest_classes_are_prepared_by_usefixtures(
    suite: "Suite", host: "Host", scope: str
) -> None:
    host.define(state="running")
    before = host.look()
    write(
        suite,
        f"""
import unittest

@pytest.fixture(scope="{scope}")
def prepared({scope}_vm):
    write({scope}_vm, "prepared")

@pytest.fixture
def machine(request, vm):
    request.instance.vm = vm

@pytest.mark.usefixtures("prepared", "machine")
class TestPrepared(unittest.TestCase):
    def setUp(self):
        assert read(self.vm) == ["prepared"]
        write(self.vm, "set up")

    def test_one(self): pass
    def test_two(self): pass

@pytest.mark.usefixtures("machine")
class TestPlain(unittest.TestCase):
    def test_plain(self):
        assert read(self.vm) == []
""",
    )
    suite.run().assert_outcomes(passed=3)
    assert host.look() == before


def test_unittest_classes_hold_the_machine_of_their_class(suite: "Suite", host: "Host") -> None:
    """Without `vm` nothing is undone between their tests."""
    host.define(state="running")
    before = host.look()
    write(
        suite,
        """
import unittest

@pytest.fixture(scope="class")
def machine(request, class_vm):
    request.cls.machine = class_vm

class Steps:
    def test_1(self):
        assert read(self.machine) == []
        write(self.machine, "one")

    def test_2(self):
        assert read(self.machine) == ["one"]

@pytest.mark.usefixtures("machine")
class TestOne(Steps, unittest.TestCase): pass

@pytest.mark.usefixtures("machine")
class TestTwo(Steps, unittest.TestCase): pass
""",
    )
    suite.run().assert_outcomes(passed=4)
    assert host.look() == before


def test_the_ini_file_may_name_our_fixture_in_usefixtures(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    host.define(state="running")
    suite.pytester.makeini("[pytest]\nusefixtures = vm")
    suite.write("def test_one(): pass\ndef test_two(): pass")
    suite.run("-m", "kvm").assert_outcomes(passed=2)
    assert calls.count("revert") == 2


def test_a_fixture_of_a_package_prepares_its_tests_only(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    host.define(state="running")
    before = host.look()
    write(suite, "def test_plain(vm): assert read(vm) == []")
    prepared = """
@pytest.fixture(scope="package", autouse=True)
def prepared(session_vm):
    write(session_vm, __package__)
"""
    for name in ("one", "two"):
        package = suite.pytester.mkpydir(name)
        (package / "conftest.py").write_text(START + prepared)
        for module in ("test_a.py", "test_b.py"):
            tests = f"def test_it(vm): assert read(vm) == ['{name}']; write(vm, 'dirt')"
            (package / module).write_text(START + tests)
    suite.run().assert_outcomes(passed=5)
    assert calls.count("take") == 3, "as found, and for each package"
    assert host.look() == before


def test_an_indirect_parameter_of_a_wide_fixture_is_the_machine_of_the_test(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    for name in ("one", "two"):
        host.define(name, state="running")
    before = host.looks()
    write(
        suite,
        DATABASE
        + """
@pytest.mark.parametrize("module_vm", ["one", "two"], indirect=True)
class TestBoth:
    def test_first(self, module_vm, database, vm):
        assert read(vm) == ["database"]
        assert vm.name == module_vm.name
        write(vm, "dirt")

    def test_second(self, database, vm, request):
        assert (read(vm), vm.name) == (["database"], request.node.callspec.params["module_vm"])
""",
    )
    suite.run(domain="nowhere").assert_outcomes(passed=4)
    assert calls.log.count("take database") == 2
    assert host.looks() == before


def test_vm_alone_may_be_sent_to_another_machine(suite: "Suite", host: "Host") -> None:
    for name in ("box", "one", "two"):
        host.define(name, state="running")
    before = host.looks()
    write(
        suite,
        DATABASE
        + """
@pytest.mark.parametrize("vm", ["one", "two", "box"], indirect=True)
def test_pair(database, module_vm, vm):
    assert read(module_vm) == ["database"]
    assert read(vm) == (["database"] if vm.name == "box" else [])
    write(vm, "dirt")
    assert module_vm.name == "box"
""",
    )
    suite.run().assert_outcomes(passed=3)
    assert host.looks() == before


def test_a_wide_fixture_sees_the_markers_of_its_own_node_and_above(
    suite: "Suite", host: "Host"
) -> None:
    names = ("of_option", "of_module", "of_class", "of_base", "of_function")
    for name in names:
        host.define(name, state="running")
    before = host.looks()
    suite.write(
        """
        import pytest

        pytestmark = [pytest.mark.kvm_domain("of_module")]

        def names(*machines):
            return [machine.name.removeprefix("of_") for machine in machines]

        @pytest.mark.kvm_domain("of_function")
        def test_function(vm, class_vm, module_vm, session_vm):
            found = names(vm, class_vm, module_vm, session_vm)
            assert found == ["function", "function", "module", "option"]

        @pytest.mark.kvm_domain("of_class")
        class TestDecorated:
            def test_class(self, vm, class_vm, module_vm, session_vm):
                found = names(vm, class_vm, module_vm, session_vm)
                assert found == ["class", "class", "module", "option"]

            @pytest.mark.kvm_domain("of_function")
            def test_function(self, vm, class_vm, module_vm):
                assert names(vm, class_vm, module_vm) == ["function", "class", "module"]

        class Base:
            pytestmark = [pytest.mark.kvm_domain("of_base")]

        class TestInherited(Base):
            def test_base(self, vm, class_vm, module_vm):
                assert names(vm, class_vm, module_vm) == ["base", "base", "module"]

        class TestListed:
            pytestmark = [pytest.mark.kvm_domain("of_class")]

            def test_class(self, vm, class_vm, module_vm):
                assert names(vm, class_vm, module_vm) == ["class", "class", "module"]
        """
    )
    suite.run(domain="of_option").assert_outcomes(passed=5)
    assert host.looks() == before


def test_a_marker_of_a_class_beats_that_of_its_base_class(suite: "Suite", host: "Host") -> None:
    """For pytest's own `get_closest_marker` it does not (pytest's issue 14329)."""
    for name in ("of_base", "of_class"):
        host.define(name, state="running")
    suite.write(
        """
        import pytest

        @pytest.mark.kvm_domain("of_base")
        class TestBase:
            wanted = "of_base"

            def test_machine(self, vm, class_vm):
                assert vm.name == class_vm.name == self.wanted

        @pytest.mark.kvm_domain("of_class")
        class TestDerived(TestBase):
            wanted = "of_class"
        """
    )
    suite.run(domain=None).assert_outcomes(passed=2)


def test_a_wide_fixture_starts_from_the_snapshot_of_the_nearest_marker(
    suite: "Suite", host: "Host"
) -> None:
    box = host.define(state="running")
    for word in ("of_module", "of_class"):
        box.setMetadata(libvirt.VIR_DOMAIN_METADATA_TITLE, word, None, None, 0)  # type: ignore[arg-type]
        host.snapshot(word)
    before = host.look()
    write(
        suite,
        """
pytestmark = [pytest.mark.kvm_snapshot("of_module")]

@pytest.fixture(scope="module")
def database(module_vm):
    write(module_vm, "database")

def test_plain(vm):
    assert read(vm) == ["of_module"]

def test_module(module_vm):
    assert read(module_vm) == ["of_module"]
    write(module_vm, "more")

def test_database(database, vm):
    assert read(vm) == ["of_module", "database"]

@pytest.mark.kvm_snapshot("of_class")
class TestClass:
    def test_class(self, class_vm):
        assert read(class_vm) == ["of_class"]
        write(class_vm, "more")

    def test_module(self, module_vm):
        assert read(module_vm) == ["of_module", "more"]

    def test_class_again(self, class_vm):
        assert read(class_vm) == ["of_class", "more"]

    def test_plain(self, vm):
        assert read(vm) == ["of_class"]
""",
    )
    suite.run().assert_outcomes(passed=7)
    assert host.look() == before


def test_overrides_in_a_conftest_that_wrap_ours_are_ours(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    before = host.look()
    write(
        suite,
        DATABASE
        + """
def test_plain(vm):
    assert read(vm) == ["own"]

def test_house(module_vm, vm):
    assert read(vm) == ["house", "own"]

@pytest.mark.parametrize("number", range(2))
def test_database(database, vm, number):
    assert read(vm) == ["house", "database", "own"]
""",
        conftest="""
@pytest.fixture(scope="module")
def module_vm(module_vm):
    write(module_vm, "house")
    return module_vm

@pytest.fixture
def vm(vm):
    write(vm, "own")
    yield vm
    write(vm, "dirt")
""",
    )
    suite.run("-m", "kvm").assert_outcomes(passed=4)
    assert host.look() == before


# doctests


def test_doctests_in_a_module_get_a_clean_machine(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    before = host.look()
    write(
        suite,
        DATABASE
        + """
def first():
    '''
    >>> vm = getfixture("vm")
    >>> read(vm)
    []
    >>> write(vm, "dirt")
    '''

def second():
    '''
    >>> database = getfixture("database")
    >>> read(getfixture("vm"))
    ['database']
    >>> write(getfixture("vm"), "dirt")
    '''

def third():
    '''
    >>> database, vm = getfixture("database"), getfixture("vm")
    >>> read(vm)
    ['database']
    '''
""",
    )
    suite.run("--doctest-modules").assert_outcomes(passed=3)
    assert host.look() == before


def test_doctests_in_text_files_get_a_clean_machine(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    before = host.look()
    text = """
>>> from words import read, write
>>> vm = getfixture("vm")
>>> read(vm)
[]
>>> write(vm, "dirt")
"""
    write(suite, "")
    suite.pytester.maketxtfile(one=text, two=text)
    suite.run("--doctest-glob=*.txt").assert_outcomes(passed=2)
    assert host.look() == before
