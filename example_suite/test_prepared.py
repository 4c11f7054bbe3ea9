"""Prepared states: made once, and the same for every test that asks for them, in any order."""

import pytest

from pytest_kvmsnap import VM

MADE: list[str] = []  # what was prepared, to show that it is once


@pytest.fixture(scope="module")
def database(module_vm: VM) -> None:
    """A service with some data, which would take long to install."""
    MADE.append("database")
    module_vm.run("mkdir -p /opt/database && echo one > /opt/database/rows && sync", check=True)
    module_vm.run("sleep 87654 > /dev/null 2>&1 &", check=True)  # the service


def test_starts_with_the_database(database: None, vm: VM) -> None:
    assert vm.read_text("/opt/database/rows") == "one\n"
    vm.run("echo two >> /opt/database/rows", check=True)


def test_plain_one_does_not(vm: VM) -> None:
    assert vm.run(["test", "-e", "/opt/database"]).returncode != 0


def test_starts_with_it_again(database: None, vm: VM) -> None:
    assert vm.read_text("/opt/database/rows") == "one\n"
    assert MADE.count("database") == 1


@pytest.fixture(scope="module", params=["1.0", "2.0"])
def version(request: pytest.FixtureRequest, database: None, module_vm: VM) -> str:
    """One of several versions of a program, on the machine with the database."""
    number: str = request.param
    MADE.append(number)
    module_vm.run(f"echo {number} >> /opt/version", check=True)
    return number


@pytest.mark.parametrize("turn", ["first", "second"])
def test_has_one_version_only(version: str, vm: VM, turn: str) -> None:
    assert vm.read_text("/opt/version") == f"{version}\n"
    assert vm.read_text("/opt/database/rows") == "one\n"
    assert MADE.count(version) == 1
    vm.run("echo changed > /opt/version", check=True)


class TestSteps:
    """Steps that build on each other, by `class_vm` without `vm`."""

    def test_installs(self, class_vm: VM) -> None:
        class_vm.run("echo installed > /opt/steps", check=True)

    def test_clean_one_in_between(self, vm: VM) -> None:
        assert vm.run(["test", "-e", "/opt/steps"]).returncode != 0

    def test_goes_on(self, class_vm: VM) -> None:
        assert class_vm.read_text("/opt/steps") == "installed\n"
