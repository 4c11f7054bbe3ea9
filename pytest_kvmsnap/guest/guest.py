"""The system in one machine: how to talk to it, and how to tell that it is ready."""

from functools import cached_property

from pytest_kvmsnap.guest import ready
from pytest_kvmsnap.guest.address import Address
from pytest_kvmsnap.guest.agent import Agent
from pytest_kvmsnap.guest.clock import set_clock, set_clock_by_ssh
from pytest_kvmsnap.guest.ssh import Ssh
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.settings import Settings


class Guest:
    """The guest of one machine."""

    def __init__(self, domain: Domain, settings: Settings) -> None:
        self.domain = domain
        self.agent = Agent(domain)
        self._address = Address(domain)
        self.ssh = Ssh(domain, self._address, settings)
        self._wanted = settings.ready
        self._timeout = settings.ready_timeout

    @cached_property
    def means(self) -> str:
        """What tells that it is ready (see `ready.means_of`)."""
        return ready.means_of(self.domain, self._wanted)

    @cached_property
    def _sign(self) -> ready.Sign | None:
        return ready.sign_of(self.domain, self.means, self.ssh)

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
        ready.wait_ready(self.domain, self._sign, self._timeout if timeout is None else timeout)
        self.domain.console.arrived()

    def shell(self, script: str, *arguments: str, timeout: int) -> bytes:
        """Run a short shell script, for a guest that may be broken; return what it printed.

        Raises:
            MachineError: there is no answer within `timeout` seconds.
        """
        argv = ["/bin/sh", "-c", script, "sh", *arguments]
        if self.means == "ssh":
            done = self.ssh.run(argv, text=False, timeout=timeout)
            return done.stdout  # type: ignore[return-value] # bytes, by text=False
        return self.agent.ask(argv, timeout)

    def set_clock(self) -> None:
        """Set its clock to the host's, where it can be told to."""
        if self.has_agent:
            set_clock(self.domain)
        elif self.means == "ssh":
            set_clock_by_ssh(self.ssh)

    def ip_address(self) -> str:
        """Return the address under which others reach it.

        Raises:
            NoAddressError: nobody knows one.
        """
        return self._address.find()
