"""Preparations that pytest does not show beforehand, and machines that change between tests.

Found by comparing tests of random suites in random orders with the same tests run alone.
"""

from typing import TYPE_CHECKING

import pytest
from notes import DATABASE, write

if TYPE_CHECKING:
    from testdriver import Host, Suite


@pytest.fixture(autouse=True)
def machines(host: "Host") -> None:
    host.define(state="running")
    host.define("other", state="running")


WEB = """
@pytest.fixture(scope="module")
def web(module_vm): write(module_vm, "web")
"""


OVERRIDDEN = """
@pytest.fixture
def database(database): return "wrapped"

@pytest.fixture
def web(web): return "wrapped"

@pytest.fixture
def before(): pass

def test_first(database, vm): assert read(vm) == ["database"]
def test_vm_first(vm, database): assert read(vm) == ["database"]
def test_another_first(before, database, vm): assert read(vm) == ["database"]
def test_without_vm(before, database, module_vm): assert read(module_vm) == ["database"]
def test_both(vm, database, web): assert read(vm) == ["database", "web"]
def test_web(before, vm, web): assert read(vm) == ["web"]
def test_plain(before, vm): assert read(vm) == []
"""
TESTS = ["first", "vm_first", "another_first", "without_vm", "both", "web", "plain"]


@pytest.mark.parametrize("only", [None, *TESTS])
def test_a_preparation_may_be_overridden_for_each_test(suite: "Suite", only: str | None) -> None:
    """The override is set up with the test, and pytest sets up what it overrides that late too."""
    write(suite, OVERRIDDEN, DATABASE + WEB)
    if only is None:
        suite.run().assert_outcomes(passed=len(TESTS))
    else:
        (file,) = suite.pytester.path.glob("test_*.py")
        suite.run(f"{file.name}::test_{only}").assert_outcomes(passed=1)


@pytest.mark.parametrize("alone", [True, False])
def test_an_override_that_uses_vm_before_the_preparation_is_refused(
    suite: "Suite", alone: bool
) -> None:
    write(
        suite,
        ("" if alone else "def test_prepares(request): request.getfixturevalue('web')\n")
        + """
class TestIt:
    @pytest.fixture
    def web(self, vm, web): pass

    def test_it(self, web): pass
""",
        WEB,
    )
    result = suite.run()
    result.assert_outcomes(passed=0 if alone else 1, errors=1)
    result.stdout.fnmatch_lines(
        ["*the fixture 'web' prepares the machine 'box', which 'vm' uses already"]
    )


def test_a_wide_fixture_that_gets_a_preparation_unseen_is_refused(suite: "Suite") -> None:
    write(
        suite,
        DATABASE
        + """
@pytest.fixture(scope="module")
def late(request): return request.getfixturevalue("database")

def test_one(late, vm): pass
def test_named(database, vm): assert read(vm) == ["database"]
def test_two(late, vm): pass
""",
    )
    result = suite.run()
    result.assert_outcomes(passed=1, errors=2)
    told = "the fixture 'late' uses the machine of 'database' without naming it"
    assert result.stdout.str().count(f"\n{told}\n") == 2
    assert "pytest_kvmsnap/" not in result.stdout.str()


def test_a_preparation_that_comes_late_is_refused_whether_it_was_made_or_not(
    suite: "Suite",
) -> None:
    write(
        suite,
        DATABASE
        + """
def test_named(database, vm): pass
def test_late(vm, request): request.getfixturevalue("database")
def test_plain(vm): assert read(vm) == []
""",
    )
    result = suite.run()
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_late*", "*'database' prepares the machine 'box', which 'vm'*"]
    )
    suite.run("-k", "test_late").assert_outcomes(failed=1, deselected=2)


def test_a_use_without_naming_shows_the_users_lines_only(suite: "Suite") -> None:
    write(
        suite,
        """
HELD = []

@pytest.fixture(scope="module")
def keeps(module_vm): HELD.append(module_vm)

@pytest.fixture(scope="module")
def sneaks(): write(HELD[0], "unseen")

def test_one(keeps, sneaks, vm): pass
""",
    )
    result = suite.run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*'sneaks' uses the machine of 'module_vm' without naming it*"])
    assert "pytest_kvmsnap/" not in result.stdout.str()


def test_a_parameter_of_a_wider_fixture_moves_the_narrower_ones(
    suite: "Suite", host: "Host"
) -> None:
    before = host.looks()
    write(
        suite,
        DATABASE
        + """
@pytest.mark.parametrize("session_vm", ["box", "other"], indirect=True)
class TestIt:
    def test_machine(self, session_vm, module_vm, vm, request):
        wanted = request.node.callspec.params["session_vm"]
        assert session_vm.name == module_vm.name == vm.name == wanted

    def test_database(self, session_vm, database, vm):
        assert (vm.name, read(vm)) == (session_vm.name, ["database"])

def test_database(database, vm): assert (vm.name, read(vm)) == ("box", ["database"])
""",
    )
    suite.run().assert_outcomes(passed=5)
    assert host.looks() == before


@pytest.mark.parametrize("only", [[], ["-k", "TestInner"]])
def test_an_inner_class_may_name_another_machine(
    suite: "Suite", host: "Host", only: list[str]
) -> None:
    before = host.looks()
    write(
        suite,
        """
class TestOuter:
    def test_outer(self, class_vm, vm): assert class_vm.name == vm.name == "box"

    @pytest.mark.kvm_domain("other")
    class TestInner:
        def test_inner(self, class_vm, vm): assert class_vm.name == vm.name == "other"
        def test_step(self, class_vm):
            assert class_vm.name == "other"
            write(class_vm, "step")

    class TestThird:
        def test_step(self, class_vm): write(class_vm, "step")

def test_after(vm):
    assert [s.name for s in vm.snapshots()] == [vm.current_snapshot.name]
    assert read(vm) == []
""",
    )
    suite.run(*only).assert_outcomes(passed=2 if only else 5, deselected=3 if only else 0)
    assert host.looks() == before


def test_all_that_do_not_fit_are_torn_down_though_one_fails_to(suite: "Suite") -> None:
    write(
        suite,
        """
@pytest.fixture(scope="session")
def first(session_vm): write(session_vm, "first")

@pytest.fixture(scope="session")
def bad(session_vm):
    write(session_vm, "bad")
    yield
    pytest.fail("planned")

@pytest.fixture(scope="session")
def last(session_vm):
    write(session_vm, "last")
    yield
    print("last is torn down")

def test_one(bad, last, vm): pass
def test_two(first, bad, last, vm): pass
def test_three(first, last, vm): assert read(vm) == ["first", "last"]
def test_plain(vm): assert read(vm) == []
""",
    )
    result = suite.run("-s")
    result.assert_outcomes(passed=3, errors=1)
    assert result.stdout.str().count("last is torn down") >= 2
    assert "KeyError" not in result.stdout.str()
    assert "previous item" not in result.stdout.str()
