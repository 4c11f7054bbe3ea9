"""The fixtures. No libvirt is imported before one of them is set up."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap import run

if TYPE_CHECKING:
    from pytest_kvmsnap.vm import VM


@pytest.fixture
def vm(request: pytest.FixtureRequest) -> "Iterator[VM]":
    """A virtual machine: running, ready and clean, and put back with force after the test."""
    with run.clean_machine(request) as machine:
        yield machine
