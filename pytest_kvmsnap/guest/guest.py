"""The system in one machine: how to talk to it, and how to tell that it is ready."""

from pytest_kvmsnap.guest import ready
from pytest_kvmsnap.guest.address import Address
from pytest_kvmsnap.guest.agent import Agent
from pytest_kvmsnap.guest.clock import set_clock, set_clock_by_ssh
from pytest_kvmsnap.guest.ssh import Ssh
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.settings import Settings


class Guest:
    """The guest of one machine. `means` is what tells that it is ready (see `ready.means_of`)."""

    def __init__(self, domain: Domain, settings: Settings) -> None:
        self.domain = domain
        self.agent = Agent(domain)
        self.means = ready.means_of(domain, settings.ready)
        self._address = Address(domain)
        self.ssh = Ssh(domain, self._address, settings)
        self._sign = ready.SshSign(domain, self.ssh) if self.means == "ssh" else None
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
        seconds = self._timeout if timeout is None else timeout
        ready.wait_ready(self.domain, self.means, seconds, self._sign)

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
