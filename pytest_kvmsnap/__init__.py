"""pytest-kvmsnap: a libvirt/KVM machine in exactly the same state for every test.

The names below are imported when they are first used: this package is loaded in every pytest run
on the computer, and most of them need no libvirt.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_kvmsnap.errors import (
        AgentError,
        ConnectionLostError,
        ConsoleError,
        KvmsnapError,
        MachineError,
        NotReadyError,
        QuarantinedError,
        RevertError,
        SnapshotError,
        UsageProblem,
    )
    from pytest_kvmsnap.machine.domainxml import Snapshot
    from pytest_kvmsnap.machine.images import Disk
    from pytest_kvmsnap.vm import VM

__all__ = [
    "VM",
    "AgentError",
    "ConnectionLostError",
    "ConsoleError",
    "Disk",
    "KvmsnapError",
    "MachineError",
    "NotReadyError",
    "QuarantinedError",
    "RevertError",
    "Snapshot",
    "SnapshotError",
    "UsageProblem",
]

_HOMES = {
    "VM": "pytest_kvmsnap.vm",
    "Disk": "pytest_kvmsnap.machine.images",
    "Snapshot": "pytest_kvmsnap.machine.domainxml",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "pytest_kvmsnap.errors")), name)
