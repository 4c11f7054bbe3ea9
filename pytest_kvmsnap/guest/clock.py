"""The guest's clock: after a revert it stands at the time of the snapshot."""

import contextlib
import subprocess
import time

from pytest_kvmsnap.errors import AgentError, SshError
from pytest_kvmsnap.guest.agent import Agent
from pytest_kvmsnap.guest.ssh import Ssh
from pytest_kvmsnap.machine.domain import Domain

# Prints how it set the clock, in one word. Not every `date` takes a fraction of a second.
_SET = """
if date -s "@$1" >/dev/null 2>&1; then echo exact
elif date -s "@$2" >/dev/null 2>&1; then echo rounded
else echo failed; fi
shift 2
"""


def set_clock(domain: Domain) -> None:
    """Set the guest's clock to the host's.

    By the agent itself where the guest has `hwclock` (within 20 ms, measured), else by `date`, in
    whole seconds. A guest that can do neither keeps its time.
    """
    agent = Agent(domain)
    try:
        agent.command("guest-set-time", {"time": time.time_ns()})
    except AgentError:
        with contextlib.suppress(AgentError):
            agent.run(["date", "-s", f"@{round(time.time())}"])


def set_clock_by_ssh(ssh: Ssh) -> None:
    """Set the guest's clock to the host's by SSH, as root or with sudo that asks for no password.

    A guest that lets us do neither keeps its time.
    """
    date = "date -s" if ssh.user == "root" else "sudo -n date -s"
    with contextlib.suppress(SshError, subprocess.TimeoutExpired):
        ssh.connect()  # which takes its time
        now = time.time()
        ssh.run(f"{date} @{now:.3f} || {date} @{round(now)}")


class Clock:
    """Sets the clock of one guest in the same command as something else, to spare the time of one.

    By `date` alone: the hardware's clock follows the host's by itself, also over a revert (QEMU's
    default, `-rtc clock=host`; measured), and the `hwclock` that the agent would start to write it
    takes up to a second where it is that of util-linux, which waits for the next one.
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._takes_fractions = True

    def script(self) -> tuple[str, list[str]]:
        """Return the beginning of a shell script and its first arguments, to be used at once."""
        now = time.time()
        exact = f"{now:.3f}" if self._takes_fractions else f"{round(now)}"
        return _SET, [exact, f"{round(now)}"]

    def heard(self, word: str) -> None:
        """Take what the script printed first; if that did not set the clock, try another way."""
        if word == "rounded":
            self._takes_fractions = False
        elif word != "exact":
            set_clock(self._domain)
