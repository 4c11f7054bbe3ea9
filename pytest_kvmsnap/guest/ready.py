"""Waiting until a machine can be used."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator

from pytest_kvmsnap.errors import AgentLostError, KvmsnapError, NotReadyError
from pytest_kvmsnap.guest.agent import LOST, Agent
from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.console import Console
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.settings import CONSOLE

_PATIENCE = 2.0
"""Seconds that libvirt may have lost the agent. A guest that reboots opens its port anew."""

Silence = Callable[[], KvmsnapError | None]
"""Tells why a machine does not answer right now, None when it does."""


def means_of(domain: Domain, wanted: str | None) -> str:
    """Return what tells that the machine is ready: as wanted, else the agent where it can be."""
    if wanted is not None:
        return wanted
    return "agent" if domainxml.has_agent_channel(domain.xml(inactive=True)) else "none"


def wait_ready(domain: Domain, means: str, timeout: float) -> None:
    """Wait until the machine is ready.

    Raises:
        NotReadyError: it is not after `timeout` seconds, or it went off meanwhile; the message has
            the last lines of its console.
        AgentLostError: waiting is of no use, the machine must be started anew.
    """
    silence_of, what, cure = _means(domain, means)
    if not silence_of():
        return
    begin = had_it = time.monotonic()
    with _heard(domain.console):
        while silence := silence_of():
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
                raise _not_ready(domain, "the machine went off while it was booting", cure)
            if now - begin > timeout:
                raise _not_ready(domain, f"waited {timeout:g} s for {what}", cure)
            time.sleep(0.03)


def _means(domain: Domain, means: str) -> tuple[Silence, str, str]:
    """Return how to ask, what is waited for, and what to do when it does not come."""
    slow = "for a slow machine raise --kvmsnap-ready-timeout"
    if means == "agent":
        cure = "is qemu-guest-agent installed and started in the guest? Without it use"
        cure = f"{cure} --kvmsnap-ready=none; {slow}"
        return Agent(domain).silence, "the guest agent to answer", cure
    if means.startswith(CONSOLE):
        pattern = re.compile(means.removeprefix(CONSOLE))
        cure = f"does the guest use that console (console=ttyS0), and say that? Else {slow}"
        what = f"its console to say {pattern.pattern!r}"
        return lambda: _console_silence(domain.console, pattern), what, cure
    return lambda: None, "", ""


def _console_silence(console: Console, pattern: re.Pattern[str]) -> KvmsnapError | None:
    """Tell whether the console has said it since the machine boots.

    One that was up before we came has said it, and says it no more.
    """
    said = console.said_since_boot()
    if said is None or pattern.search(said):
        return None
    return console.unheard("the console did not say it")


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


def _not_ready(domain: Domain, why: str, cure: str) -> NotReadyError:
    said = "\n".join("| " + line for line in domain.console.lines().splitlines())
    return NotReadyError(
        "the machine did not get ready",
        where=domain.where,
        why=f"{why} (state: {domain.state()})\n"
        + (f"its console said last:\n{said}" if said else "nothing is known of its console"),
        cure=cure,
    )
