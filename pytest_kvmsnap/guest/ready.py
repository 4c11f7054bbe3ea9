"""Waiting until a machine can be used."""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Protocol

from pytest_kvmsnap.errors import AgentLostError, MachineError, NotReadyError, SshDeniedError
from pytest_kvmsnap.guest.agent import LOST, Agent
from pytest_kvmsnap.guest.ssh import Ssh
from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.console import Console
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.settings import CONSOLE

_WHAT = "the machine did not get ready"
_SLOW = "for a slow machine raise --kvmsnap-ready-timeout"
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


def means_of(domain: Domain, wanted: str | None) -> str:
    """Return what tells that the machine is ready: as wanted, else the agent where it can be."""
    if wanted is not None:
        return wanted
    return "agent" if domainxml.has_agent_channel(domain.xml(inactive=True)) else "none"


def sign_of(domain: Domain, means: str, ssh: Ssh | None = None) -> Sign | None:
    """Return the sign that a machine gives by these means, None where it is to give none."""
    if means == "agent":
        return AgentSign(domain)
    if means.startswith(CONSOLE):
        return ConsoleSign(domain.console, means.removeprefix(CONSOLE))
    return SshSign(domain, ssh) if means == "ssh" and ssh is not None else None


class AgentSign:
    """The guest agent answers."""

    awaited = "the guest agent to answer"
    cure = (
        "is qemu-guest-agent installed and started in the guest? Without it use"
        f" --kvmsnap-ready=none; {_SLOW}"
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
    cure = f"does sshd run in the guest, at --kvmsnap-ssh-port? Else {_SLOW}"

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


class ConsoleSign:
    """The console has said something since the machine boots.

    One that was up before we came has said it, and says it no more.
    """

    cure = f"does the guest use that console (console=ttyS0), and say that? Else {_SLOW}"

    def __init__(self, console: Console, pattern: str) -> None:
        self._console = console
        self._pattern = re.compile(pattern)
        self.awaited = f"its console to say {pattern!r}"

    def silence(self) -> MachineError | None:
        said = self._console.said_since_boot()
        if said is None or self._pattern.search(said):
            return None
        return self._console.unheard("the console did not say it")

    def given_up(self, silence: MachineError) -> NotReadyError | None:  # noqa: ARG002
        return None


def wait_ready(domain: Domain, sign: Sign | None, timeout: float) -> None:
    """Wait until there is a sign that the machine is ready.

    Raises:
        NotReadyError: it is not after `timeout` seconds, or it went off meanwhile; the message has
            the last lines of its console.
        AgentLostError: waiting is of no use, the machine must be started anew.
    """
    if sign is None or not sign.silence():
        return
    begin = had_hope = time.monotonic()
    with _heard(domain.console):
        while silence := sign.silence():
            now = time.monotonic()
            given_up = sign.given_up(silence)
            if given_up is None:
                had_hope = now
            elif now - had_hope > _PATIENCE:
                raise given_up
            if not domain.is_active():
                raise _not_ready(domain, sign, "the machine went off while it was booting")
            if now - begin > timeout:
                raise _not_ready(domain, sign, f"waited {timeout:g} s for {sign.awaited}")
            time.sleep(0.03)


@contextlib.contextmanager
def _heard(console: Console) -> Iterator[None]:
    """Listen to a console for a while, unless somebody does for longer."""
    was_heard = console.is_heard
    console.listen()
    try:
        yield
    finally:
        if not was_heard:
            console.hang_up()


def _not_ready(domain: Domain, sign: Sign, why: str) -> NotReadyError:
    said = "\n".join("| " + line for line in domain.console.lines().splitlines())
    return NotReadyError(
        _WHAT,
        where=domain.where,
        why=f"{why} (state: {domain.state()})\n"
        + (f"its console said last:\n{said}" if said else "nothing is known of its console"),
        cure=sign.cure,
    )
