"""The system in one machine: how to talk to it, and how to tell that it is ready."""

from pytest_kvmsnap.guest import ready
from pytest_kvmsnap.guest.agent import Agent
from pytest_kvmsnap.guest.clock import set_clock
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.settings import Settings


class Guest:
    """The guest of one machine. `means` is what tells that it is ready (see `ready.means_of`)."""

    def __init__(self, domain: Domain, settings: Settings) -> None:
        self.domain = domain
        self.agent = Agent(domain)
        self.means = ready.means_of(domain, settings.ready)
        self._timeout = settings.ready_timeout

    @property
    def has_agent(self) -> bool:
        """Whether its agent is what tells that it is ready, and so is there."""
        return self.means == "agent"

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until it is ready, `ready-timeout` seconds unless told otherwise.

        Raises:
            NotReadyError: it is not; the message has the last lines of its console.
            AgentLostError: waiting is of no use, the machine must be started anew.
        """
        ready.wait_ready(self.domain, self.means, self._timeout if timeout is None else timeout)
        self.domain.console.arrived()

    def shell(self, script: str, *arguments: str, timeout: int) -> bytes:
        """Run a short shell script, for a guest that may be broken; return what it printed.

        Raises:
            MachineError: there is no answer within about `timeout` seconds.
            subprocess.TimeoutExpired: the script took longer.
        """
        self.agent.command("guest-ping", timeout=timeout)
        argv = ["/bin/sh", "-c", script, "sh", *arguments]
        return self.agent.run(argv, timeout=timeout).stdout

    def set_clock(self) -> None:
        """Set its clock to the host's, where it can be told to."""
        if self.has_agent:
            set_clock(self.domain)
