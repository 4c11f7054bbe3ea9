"""Waiting until a machine can be used."""

import time
from typing import Protocol

from pytest_kvmsnap.errors import AgentLostError, MachineError, NotReadyError, SshDeniedError
from pytest_kvmsnap.guest.agent import LOST, Agent
from pytest_kvmsnap.guest.console import console_tail
from pytest_kvmsnap.guest.ssh import Ssh
from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.domain import Domain

Ready = str
"""What tells that a machine is ready, as the option `ready` has it."""

_WHAT = "the machine did not get ready"
_PATIENCE = 2.0
"""Seconds that something hopeless may last. A guest that reboots opens its agent's port anew; one
that boots may let users in a moment after it answers."""


class Sign(Protocol):
    """What tells that a machine is ready. `awaited` and `cure` are for the message if it is not."""

    awaited: str
    cure: str

    def silence(self) -> MachineError | None:
        """Return why there is no sign right now, None when there is."""

    def given_up(self, silence: MachineError) -> NotReadyError | None:
        """Return what to tell if such a silence lasts, None when waiting may be of use."""


def means_of(domain: Domain, wanted: Ready | None) -> Ready:
    """Return what tells that the machine is ready: as wanted, else the agent where it can be."""
    if wanted is not None:
        return wanted
    return "agent" if domainxml.has_agent_channel(domain.xml(inactive=True)) else "none"


class AgentSign:
    """The guest agent answers."""

    awaited = "the guest agent to answer"
    cure = (
        "is qemu-guest-agent installed and started in the guest? Without it use"
        " --kvmsnap-ready=none; for a slow machine raise --kvmsnap-ready-timeout"
    )

    def __init__(self, domain: Domain) -> None:
        self._where = domain.where
        self._agent = Agent(domain)

    def silence(self) -> MachineError | None:
        return self._agent.silence()

    def given_up(self, silence: MachineError) -> NotReadyError | None:
        if LOST not in silence.why:
            return None
        why = f"libvirt lost the guest agent: {silence.why}"
        return AgentLostError(_WHAT, where=self._where, why=why, cure=silence.cure)


class SshSign:
    """A command runs by SSH."""

    awaited = "ssh to let us in"
    cure = (
        "does sshd run in the guest, at --kvmsnap-ssh-port? For a slow machine raise"
        " --kvmsnap-ready-timeout"
    )

    def __init__(self, domain: Domain, ssh: Ssh) -> None:
        self._where = domain.where
        self._ssh = ssh

    def silence(self) -> MachineError | None:
        silence = self._ssh.silence()
        if silence is not None:
            self.awaited = f"ssh to let us in, which said last: {silence.why}"
        return silence

    def given_up(self, silence: MachineError) -> NotReadyError | None:
        if not isinstance(silence, SshDeniedError):
            return None
        why = f"ssh does not let us in: {silence.why}"
        return NotReadyError(_WHAT, where=self._where, why=why, cure=silence.cure)


def wait_ready(domain: Domain, means: Ready, timeout: float, sign: Sign | None = None) -> None:
    """Wait until the machine is ready: until there is `sign`, by default that of the agent.

    Raises:
        NotReadyError: it is not after `timeout` seconds, or it went off meanwhile; the message has
            the last lines of its console.
        AgentLostError: waiting is of no use, the machine must be started anew.
    """
    sign = AgentSign(domain) if sign is None else sign
    if means == "none" or not sign.silence():
        return
    begin = had_hope = time.monotonic()
    with console_tail(domain) as console:
        while silence := sign.silence():
            console.listen()
            now = time.monotonic()
            given_up = sign.given_up(silence)
            if given_up is None:
                had_hope = now
            elif now - had_hope > _PATIENCE:
                raise given_up
            if not domain.is_active():
                why = "the machine went off while it was booting"
                raise _not_ready(domain, sign, why, console.lines())
            if now - begin > timeout:
                why = f"waited {timeout:g} s for {sign.awaited}"
                raise _not_ready(domain, sign, why, console.lines())
            time.sleep(0.03)


def _not_ready(domain: Domain, sign: Sign, why: str, console: str) -> NotReadyError:
    said = "\n".join("| " + line for line in console.splitlines())
    return NotReadyError(
        _WHAT,
        where=domain.where,
        why=f"{why} (state: {domain.state()})\n"
        + (f"its console said last:\n{said}" if said else "nothing is known of its console"),
        cure=sign.cure,
    )
