"""stub until the real one comes"""

from typing import Literal

from pytest_kvmsnap.machine.libvirt_api import Hypervisor


def domain_type(hypervisor: Hypervisor) -> Literal["kvm", "qemu"]:
    return "qemu"
