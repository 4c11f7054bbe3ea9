"""Which machine a test gets: markers, options, the lab hook, and fixtures that are not ours."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from testdriver import Host, Suite

# markers


def test_the_nearest_marker_wins(suite: "Suite", host: "Host") -> None:
    for name in ("of_option", "of_module", "of_class", "of_function"):
        host.define(name, state="running")
    suite.pytester.makepyfile(
        test_module="""
        import pytest

        pytestmark = pytest.mark.kvm_domain("of_module")

        def test_module(vm):
            assert vm.name == "of_module"

        @pytest.mark.kvm_domain("of_function")
        def test_function(vm):
            assert vm.name == "of_function"

        @pytest.mark.kvm_domain("of_class")
        class TestClass:
            def test_class(self, vm):
                assert vm.name == "of_class"

            @pytest.mark.kvm_domain("of_function")
            def test_function(self, vm):
                assert vm.name == "of_function"

        class TestOther:
            pytestmark = pytest.mark.kvm_domain("of_class")

            def test_class(self, vm):
                assert vm.name == "of_class"
        """,
        test_plain="""
        def test_option(vm):
            assert vm.name == "of_option"
        """,
    )
    suite.run(domain="of_option").assert_outcomes(passed=6)


def test_the_nearest_snapshot_marker_wins(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    for name in ("of_module", "of_class", "of_function"):
        host.snapshot(name)
    suite.write(
        """
        import pytest

        pytestmark = pytest.mark.kvm_snapshot("of_module")

        def test_module(vm):
            assert vm.current_snapshot.name == "of_module"

        @pytest.mark.kvm_snapshot(name="of_class")
        class TestClass:
            def test_class(self, vm):
                assert vm.current_snapshot.name == "of_class"

            @pytest.mark.kvm_snapshot("of_function")
            def test_function(self, vm):
                assert vm.current_snapshot.name == "of_function"
        """
    )
    suite.run().assert_outcomes(passed=3)


def test_a_marker_added_by_a_hook_counts(suite: "Suite", host: "Host") -> None:
    host.define("hooked", state="running")
    suite.write(
        "def test_machine(vm): assert vm.name == 'hooked'",
        conftest="""
        import pytest

        def pytest_collection_modifyitems(items):
            for item in items:
                item.add_marker(pytest.mark.kvm_domain("hooked"))
        """,
    )
    suite.run(domain=None).assert_outcomes(passed=1)


def test_an_indirect_parameter_beats_markers(suite: "Suite", host: "Host") -> None:
    host.define("one", state="running")
    host.define("two", state="running")
    suite.write(
        """
        import pytest

        @pytest.mark.kvm_domain("marked")
        @pytest.mark.parametrize("vm, wanted", [("one", "one"), ("two", "two")], indirect=["vm"])
        def test_machine(vm, wanted):
            assert vm.name == wanted
        """
    )
    suite.run().assert_outcomes(passed=2)


def test_a_machine_that_is_asked_for_at_run_time_is_given(suite: "Suite", host: "Host") -> None:
    """`getfixturevalue` cannot be seen before the first test."""
    host.define(state="running")
    before = host.look()
    suite.write(
        """
        def test_machine(request):
            assert request.getfixturevalue("vm").state == "running"
        """
    )
    suite.run().assert_outcomes(passed=1)
    assert host.look() == before


def test_several_fixtures_share_the_machine_of_a_test(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write(
        """
        import pytest

        @pytest.fixture
        def server(vm):
            return vm

        @pytest.fixture
        def client(vm):
            return vm

        def test_machine(server, client, vm):
            assert server is client is vm
        """
    )
    suite.run().assert_outcomes(passed=1)


def test_unittest_classes_may_use_it_by_an_autouse_fixture(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write(
        """
        import unittest
        import pytest

        class TestMachine(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def machine(self, vm):
                self.vm = vm

            def test_state(self):
                assert self.vm.state == "running"
        """
    )
    suite.run().assert_outcomes(passed=1)


# the automatic marker

MIXED = """
    import pytest

    @pytest.fixture
    def server(vm):
        return vm

    def test_direct(vm): pass
    def test_by_fixture(server): pass
    @pytest.mark.usefixtures("vm")
    def test_by_marker(): pass
    def test_without(): pass
"""


@pytest.mark.parametrize(("expression", "passed"), [("kvm", 3), ("not kvm", 1)])
def test_tests_with_a_machine_carry_the_marker_kvm(
    suite: "Suite", host: "Host", expression: str, passed: int
) -> None:
    host.define(state="running")
    suite.write(MIXED)
    result = suite.run("-m", expression, "--strict-markers")
    result.assert_outcomes(passed=passed, deselected=4 - passed)


def test_markers_are_registered(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    host.snapshot("installed")
    suite.write(
        """
        import pytest

        @pytest.mark.kvm_domain("box")
        @pytest.mark.kvm_snapshot("installed")
        def test_machine(vm): pass
        """
    )
    suite.run("--strict-markers", domain=None).assert_outcomes(passed=1)


# fixtures and parameters of others

FOREIGN = {
    "fixture of the same name": """
        import pytest

        @pytest.fixture
        def vm():
            return "mine"

        def test_vm(vm):
            assert vm == "mine"
    """,
    "fixture in a class": """
        import pytest

        class TestClass:
            @pytest.fixture
            def vm(self):
                return "mine"

            def test_vm(self, vm):
                assert vm == "mine"
    """,
    "parameter": """
        import pytest

        @pytest.mark.parametrize("vm", ["mine"])
        def test_vm(vm):
            assert vm == "mine"
    """,
    "parametrized fixture": """
        import pytest

        @pytest.fixture(params=["mine"])
        def vm(request):
            return request.param

        def test_vm(vm):
            assert vm == "mine"
    """,
    "session fixture": """
        import pytest

        @pytest.fixture(scope="session")
        def vm():
            return "mine"

        def test_vm(vm):
            assert vm == "mine"
    """,
    "parameter for a fixture that asks for it": """
        import pytest

        @pytest.fixture
        def server(vm):
            return vm

        @pytest.mark.parametrize("vm", ["mine"])
        def test_vm(server):
            assert server == "mine"
    """,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_vm_of_somebody_else_is_left_alone(suite: "Suite", kind: str) -> None:
    """No domain of the name is there, so that a machine of ours would be an error."""
    suite.write(FOREIGN[kind])
    suite.run(domain="nowhere").assert_outcomes(passed=1)
    result = suite.run("-m", "kvm", domain="nowhere")
    result.assert_outcomes(deselected=1)
    assert not suite.locks.exists()


def test_an_override_that_wraps_ours_is_ours(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    before = host.look()
    suite.write(
        """
        import pytest

        @pytest.fixture
        def vm(vm):
            vm.snapshot("wrapped")
            return vm

        class TestClass:
            @pytest.fixture
            def vm(self, vm):
                return vm

            def test_inner(self, vm):
                assert vm.current_snapshot.name == "wrapped"

        def test_outer(vm):
            assert vm.current_snapshot.name == "wrapped"
        """
    )
    suite.run("-m", "kvm").assert_outcomes(passed=2)
    assert host.look() == before


def test_an_override_below_one_that_does_not_wrap_ours_is_not_ours(suite: "Suite") -> None:
    suite.write(
        """
        import pytest

        @pytest.fixture
        def vm(vm):
            return vm + " twice"

        def test_vm(vm):
            assert vm == "mine twice"
        """,
        conftest="""
        import pytest

        @pytest.fixture
        def vm():
            return "mine"
        """,
    )
    suite.run(domain="nowhere").assert_outcomes(passed=1)


def test_doctests_which_have_no_fixtures_run(suite: "Suite") -> None:
    suite.write(
        """
        def double(number):
            '''Return it twice.

            >>> double(2)
            4
            '''
            return 2 * number
        """
    )
    suite.run("--doctest-modules", domain="nowhere").assert_outcomes(passed=1)


# the lab hook


def test_the_hook_names_the_machine(suite: "Suite", host: "Host") -> None:
    host.define("hooked", state="running")
    suite.write(
        "def test_machine(vm): assert vm.name == 'hooked'",
        conftest="def pytest_kvmsnap_lab(config): return {'domain': 'hooked'}",
    )
    suite.run(domain=None).assert_outcomes(passed=1)


def test_the_command_line_beats_the_hook_and_the_hook_beats_ini(
    suite: "Suite", host: "Host"
) -> None:
    for name in ("of_line", "of_hook", "of_ini"):
        host.define(name, state="running")
    suite.write("def test_machine(vm): print('on', vm.name)")
    suite.pytester.makeini("[pytest]\nkvmsnap_domain = of_ini")
    suite.run("-s", domain=None).stdout.fnmatch_lines(["*on of_ini*"])
    suite.pytester.makeconftest("def pytest_kvmsnap_lab(config): return {'domain': 'of_hook'}")
    suite.run("-s", domain=None).stdout.fnmatch_lines(["*on of_hook*"])
    suite.run("-s", domain="of_line").stdout.fnmatch_lines(["*on of_line*"])


@pytest.mark.parametrize(("asked", "calls"), [("vm", 1), ("tmp_path", 0)])
def test_the_hook_is_called_once_and_only_when_a_machine_will_be_used(
    suite: "Suite", host: "Host", asked: str, calls: int
) -> None:
    host.define(state="running")
    suite.write(
        f"def test_one({asked}): pass\ndef test_two({asked}): pass",
        conftest="""
        def pytest_kvmsnap_lab(config):
            with open("hook-calls", "a") as file:
                file.write("called ")
        """,
    )
    suite.run().assert_outcomes(passed=2)
    record = suite.pytester.path / "hook-calls"
    assert (record.read_text() if record.exists() else "") == "called " * calls


def test_a_hook_in_a_conftest_may_return_nothing(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write(
        "def test_machine(vm): pass", conftest="def pytest_kvmsnap_lab(config): return None"
    )
    suite.run().assert_outcomes(passed=1)
