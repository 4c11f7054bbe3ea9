"""Whether KVM works, asked of a real QEMU and of libvirt."""

import shutil
import subprocess
import sys

import pytest

import guest as guests
from lab import Lab
from pytest_kvmsnap.machine.accelerator import boots

ASK = """
import sys
from pytest_kvmsnap.machine.accelerator import domain_type
from pytest_kvmsnap.machine.libvirt_api import connect
hypervisor = connect(sys.argv[1])
print(domain_type(hypervisor))
hypervisor.close()
"""


@pytest.mark.usefixtures("linux")
def test_boot_sector_runs_in_a_real_emulator() -> None:
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu is not None
    assert boots(qemu, "tcg")
    assert boots(qemu, "none") is False


def test_kvm_is_chosen_where_it_runs_a_kernel(lab: Lab) -> None:
    """The example's guest is tried with KVM in another way: by its kernel reaching user space."""
    asked = [sys.executable, "-c", ASK, lab.uri]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("kvm" if guests.kvm_works() else "qemu")
