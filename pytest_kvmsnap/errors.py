"""The errors that people meet: what was tried, on which machine, why it failed, how to cure it.

`UsageProblem` and its children are told before the first test (exit status 4); `MachineError` and
its children are told in the set-up, call or teardown of the test that meets them.
"""

from collections.abc import Sequence

__all__ = [
    "AgentError",
    "BlockedError",
    "ConfigError",
    "ConnectionLostError",
    "ConsoleError",
    "ConversionError",
    "DomainNotFoundError",
    "HypervisorError",
    "ImageError",
    "KvmsnapError",
    "LeaseError",
    "MachineError",
    "NotReadyError",
    "QuarantinedError",
    "RevertError",
    "SnapshotError",
    "SnapshotNotFoundError",
    "UsageProblem",
]


class KvmsnapError(Exception):
    """Base of all errors of pytest-kvmsnap.

    Attributes hold the parts of the message: `what` was tried, `where` (machine, host, file or
    test), `why` it failed, and the `cure`. Empty parts are left out of the text.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", cure: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.cure = cure

    def __str__(self) -> str:
        parts = (("where", self.where), ("why", self.why), ("cure", self.cure))
        lines = [self.what]
        for label, text in parts:
            if text:
                lines.append(f"  {label + ':':<6} " + text.strip().replace("\n", "\n" + " " * 9))
        return "\n".join(lines)


class UsageProblem(KvmsnapError):
    """Something that the person at the keyboard can put right; told before the first test."""


class ConfigError(UsageProblem):
    """A wrong option, ini value, hook result or marker."""


class HypervisorError(UsageProblem):
    """The URI cannot be reached, or does not let us in."""


class DomainNotFoundError(UsageProblem):
    """No domain of that name."""


class SnapshotNotFoundError(UsageProblem):
    """No snapshot of that name, or one that cannot be reverted to."""


class BlockedError(UsageProblem):
    """Something about the domain stands in the way of internal snapshots."""


class ConversionError(UsageProblem):
    """A raw image could not be turned into qcow2; the raw file and the definition are untouched."""


class ImageError(UsageProblem):
    """`qemu-img` refused an image or is not installed."""


class MachineError(KvmsnapError):
    """A machine did not do what it was told."""


class ConnectionLostError(MachineError):
    """The connection to libvirt broke, or stays away; it is opened again by whoever needs it."""


class NotReadyError(MachineError):
    """The machine did not get ready in time."""


class AgentLostError(NotReadyError):
    """libvirt will not talk to the guest agent again before the machine is started anew."""


class SnapshotError(MachineError):
    """A snapshot could not be taken or deleted."""


class RevertError(MachineError):
    """A revert failed, took too long, or could not be proven."""


class QuarantinedError(MachineError):
    """The machine failed before; tests that need it fail at once with the first cause."""


class LeaseError(MachineError):
    """The machine belongs to another process, or its lock cannot be used."""


class ConsoleError(MachineError):
    """The serial console cannot be used, or did not say what was waited for."""


class AgentError(MachineError):
    """The guest agent refused a command, or did not answer."""


def merged(problems: Sequence[UsageProblem]) -> UsageProblem:
    """Return one problem that tells all of them, so that people mend them in one go."""
    if len(problems) == 1:
        return problems[0]
    count = f"{len(problems)} problems must be solved before the first test can run"
    return UsageProblem("\n\n".join([count, *map(str, problems)]))
