"""Waiting until a machine can be used."""

import time

from pytest_kvmsnap.errors import AgentLostError, NotReadyError
from pytest_kvmsnap.guest.agent import LOST, Agent
from pytest_kvmsnap.guest.console import console_tail
from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.domain import Domain

Ready = str
"""What tells that a machine is ready, as the option `ready` has it."""

_PATIENCE = 2.0
"""Seconds that libvirt may have lost the agent. A guest that reboots opens its port anew."""


def means_of(domain: Domain, wanted: Ready | None) -> Ready:
    """Return what tells that the machine is ready: as wanted, else the agent where it can be."""
    if wanted is not None:
        return wanted
    return "agent" if domainxml.has_agent_channel(domain.xml(inactive=True)) else "none"


def wait_ready(domain: Domain, means: Ready, timeout: float) -> None:
    """Wait until the machine is ready.

    Raises:
        NotReadyError: it is not after `timeout` seconds, or it went off meanwhile; the message has
            the last lines of its console.
        AgentLostError: waiting is of no use, the machine must be started anew.
    """
    agent = Agent(domain)
    if means == "none" or not agent.silence():
        return
    begin = had_it = time.monotonic()
    with console_tail(domain) as console:
        while silence := agent.silence():
            console.listen()
            now = time.monotonic()
            if LOST not in silence.why:
                had_it = now
            elif now - had_it > _PATIENCE:
                raise AgentLostError(
                    "the machine did not get ready",
                    where=domain.where,
                    why=f"libvirt lost the guest agent: {silence.why}",
                    cure=silence.cure,
                )
            if not domain.is_active():
                raise _not_ready(
                    domain, "the machine went off while it was booting", console.lines()
                )
            if now - begin > timeout:
                why = f"waited {timeout:g} s for the guest agent to answer"
                raise _not_ready(domain, why, console.lines())
            time.sleep(0.03)


def _not_ready(domain: Domain, why: str, console: str) -> NotReadyError:
    said = "\n".join("| " + line for line in console.splitlines())
    return NotReadyError(
        "the machine did not get ready",
        where=domain.where,
        why=f"{why} (state: {domain.state()})\n"
        + (f"its console said last:\n{said}" if said else "nothing is known of its console"),
        cure="is qemu-guest-agent installed and started in the guest? Without it use"
        " --kvmsnap-ready=none; for a slow machine raise --kvmsnap-ready-timeout",
    )
