"""Tests that start from a snapshot that was there before, and never change it.

In your suite this is `@pytest.mark.kvm_snapshot("installed")`. Here a marker of the conftest stands
for that, so that the same tests run on your machine with a snapshot of another name.
"""

import pytest

from pytest_kvmsnap import VM

pytestmark = pytest.mark.installed


@pytest.mark.parametrize("turn", ["first", "second"])
def test_starts_from_the_snapshot(vm: VM, turn: str) -> None:
    leftover = "/root/kvmsnap-example-leftover"
    assert vm.run(["test", "-e", leftover]).returncode != 0, "the last test's file is still there"
    vm.write_text(leftover, turn)


def test_knows_its_snapshot(vm: VM) -> None:
    assert vm.current_snapshot is not None
