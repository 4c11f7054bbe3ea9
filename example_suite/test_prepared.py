"""Prepared states: made once for a module, the same for each test that asks for them."""

import pytest

from pytest_kvmsnap import VM


@pytest.fixture(scope="module")
def database(module_vm: VM) -> None:
    """A service with some data, which would take long to install."""
    module_vm.run("mkdir -p /opt/database && echo one > /opt/database/rows && sync", check=True)
    module_vm.run("sleep 87654 > /dev/null 2>&1 &", check=True)  # the service


def test_starts_with_the_database(database: None, vm: VM) -> None:
    assert vm.read_text("/opt/database/rows") == "one\n"
    vm.run("echo two >> /opt/database/rows", check=True)


def test_plain_one_does_not(vm: VM) -> None:
    assert vm.run(["test", "-e", "/opt/database"]).returncode != 0


def test_starts_with_it_again(database: None, vm: VM) -> None:
    assert vm.read_text("/opt/database/rows") == "one\n"


@pytest.fixture(scope="module", params=["1.0", "2.0"])
def version(request: pytest.FixtureRequest, database: None, module_vm: VM) -> str:
    """One of several versions of a program, on the machine with the database."""
    number: str = request.param
    module_vm.run(f"echo {number} >> /opt/version", check=True)
    return number


@pytest.mark.parametrize("turn", ["first", "second"])
def test_has_one_version_only(version: str, vm: VM, turn: str) -> None:
    assert vm.read_text("/opt/version") == f"{version}\n"
    assert vm.read_text("/opt/database/rows") == "one\n"
    vm.run("echo changed > /opt/version", check=True)
