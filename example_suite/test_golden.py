"""Throwaway machines on a golden image: here a raw one, converted before the first test.

The conftest marks these tests with `kvm_golden("golden.raw", memory="128 MiB")`, or with an image
of yours.
"""

import pytest

from pytest_kvmsnap import VM

pytestmark = pytest.mark.golden


def test_destroys_a_machine_that_is_nobodys(vm: VM) -> None:
    vm.run("rm -rf /bin/* /sbin/* /usr/bin/* /usr/sbin/* /lib/modules")
    assert vm.name.startswith("kvmsnap-golden-")


def test_has_a_machine_as_good_as_new(vm: VM) -> None:
    assert vm.run(["ls", "/"], check=True).stdout


def test_writes_into_a_thin_copy(vm: VM) -> None:
    (disk,) = vm.disks()
    assert disk.format == "qcow2"
    vm.write_text("/root/new", "only here")
    assert vm.disks()[0].virtual_size == disk.virtual_size
