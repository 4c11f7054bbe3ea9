"""The fixtures. No libvirt is imported before one of them is set up."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap import states

if TYPE_CHECKING:
    from pytest_kvmsnap.vm import VM


@pytest.fixture
def vm(request: pytest.FixtureRequest) -> "VM":
    """A virtual machine: running, ready and clean, and put back with force after the test."""
    return states.clean_machine(request)


@pytest.fixture(scope="class")
def class_vm(request: pytest.FixtureRequest) -> "Iterator[VM]":
    """The machine of a class, to prepare it for its tests; undone when the class is over."""
    with states.held_machine(request) as machine:
        yield machine


@pytest.fixture(scope="module")
def module_vm(request: pytest.FixtureRequest) -> "Iterator[VM]":
    """The machine of a module, to prepare it for its tests; undone when the module is over."""
    with states.held_machine(request) as machine:
        yield machine


@pytest.fixture(scope="session")
def session_vm(request: pytest.FixtureRequest) -> "Iterator[VM]":
    """The machine of all tests, to prepare it for them; undone at the end of the run."""
    with states.held_machine(request) as machine:
        yield machine
