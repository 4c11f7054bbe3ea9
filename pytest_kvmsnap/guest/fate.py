"""What became of a command whose agent went from under it, and of the machine.

Nothing of this is asked for before a command is lost: what libvirt then says ("Guest agent
disappeared while executing command", "Invalid parameter 'pid'") is the same for an agent that was
killed and for a guest that rebooted.
"""

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

from pytest_kvmsnap.errors import AgentError
from pytest_kvmsnap.machine.domain import Domain

if TYPE_CHECKING:
    from pytest_kvmsnap.guest.agent import Agent

_BACK = 30.0
"""Seconds for an agent to come back; a guest that reboots takes as long as its boot."""
_GOING_OFF = 5.0
"""Seconds from the first sign that a machine goes off until it is."""
_LOOK = 0.1


class _Fate(NamedTuple):
    what_happened: str
    cure: str


_OFF = _Fate(
    "the machine went off while the command ran",
    "vm.start and vm.wait_ready bring it up again; to end a machine there are vm.shutdown and"
    " vm.destroy",
)
_HALTED = _Fate(
    "the machine does not run any more", "find out who stopped it, the command or somebody outside"
)
_REBOOTED = _Fate(
    "the guest rebooted while the command ran, which ended it",
    "to reboot there is vm.reboot, and then vm.wait_ready",
)
_RESTARTED = _Fate(
    "the guest agent was started anew while the command ran; whether that goes on, and how it"
    " ended, nobody can tell any more",
    "what stops or replaces qemu-guest-agent must not be waited for: have the command start it in"
    " the background, with setsid and its output redirected",
)
_GONE = _Fate(
    f"the guest agent is gone, and did not come back within {_BACK:g} s: it was stopped, or the"
    " guest is rebooting",
    "vm.wait_ready waits for it; leave qemu-guest-agent running in the guest",
)
_SILENT = _Fate(
    "the guest does not answer any more: its kernel panicked or hangs, or it is too busy; the"
    " command may go on",
    "the console of the machine may tell why",
)


def told(domain: Domain, agent: "Agent", shown: str, began: float, error: AgentError) -> AgentError:
    """Return what became of a command that the agent does not tell any more.

    `error` is how that was noticed, `began` when the command was begun (`time.monotonic`).
    """
    fate = _fate(domain, agent, began)
    return AgentError(
        f"the command was lost: {shown}",
        where=domain.where,
        why=f"{fate.what_happened} (state: {domain.state()})\n{error.why or error.what}",
        cure=fate.cure,
    )


def comes_back(domain: Domain) -> bool:
    """Wait for an agent that libvirt does not see, and tell whether it is there again."""
    end = time.monotonic() + _BACK
    while domain.is_active() and time.monotonic() < end:
        if domain.sees_agent():
            return True
        time.sleep(_LOOK)
    return False


def _fate(domain: Domain, agent: "Agent", began: float) -> _Fate:
    end = time.monotonic() + _GOING_OFF
    while domain.state() == "in shutdown" and time.monotonic() < end:
        time.sleep(_LOOK)
    if not domain.is_active():
        return _OFF
    if domain.state() != "running":
        return _HALTED
    if not domain.sees_agent():
        return _GONE
    if agent.silence() is not None:
        return _SILENT if domain.sees_agent() else _GONE
    with contextlib.suppress(AgentError, ValueError, IndexError):
        up = float(b"".join(agent.read("/proc/uptime")).split()[0])
        return _REBOOTED if up < time.monotonic() - began else _RESTARTED
    return _RESTARTED
