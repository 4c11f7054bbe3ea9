"""`vm.host`: pytest-testinfra's view of a guest, over the guest agent.

The only module that imports testinfra, and nothing imports it before a test asks for a host.
"""

import subprocess
from collections.abc import Callable
from typing import Any

from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.guest.agent import Agent

try:
    from testinfra.backend.base import BaseBackend, CommandResult
    from testinfra.host import Host
except ImportError as error:
    if (error.name or "").partition(".")[0] != "testinfra":
        raise
    raise ConfigError(
        "vm.host needs pytest-testinfra, which is not installed",
        cure="pip install pytest-kvmsnap[testinfra]",
    ) from None

__all__ = ["Host", "host_of"]


class _AgentBackend(BaseBackend):  # type: ignore[misc] # testinfra is not typed
    """Runs testinfra's commands as `vm.run` does: as root, by the guest's shell.

    Not by its way for output of any length, whose processes would show in `host.process`.
    """

    NAME = "kvmsnap"

    def __init__(self, name: str, agent: Callable[[], Agent]) -> None:
        super().__init__(name)
        self._agent = agent

    def run(self, command: str, *args: str, timeout: float = 60, **_: Any) -> CommandResult:
        """Run a command with its arguments quoted, for `timeout` seconds at most."""
        __tracebackhide__ = True
        line = self.get_command(command, *args)
        try:
            done = self._agent().run(["/bin/sh", "-c", line], timeout=timeout, shown=line)
        except subprocess.TimeoutExpired:
            raise subprocess.TimeoutExpired(line, timeout) from None
        return self.result(done.status, line.encode(), done.stdout, done.stderr)

    def get_encoding(self) -> str:
        """UTF-8, as everywhere else; testinfra would start a Python in the guest to ask."""
        return "utf-8"


def host_of(name: str, agent: Callable[[], Agent]) -> Host:
    """Return testinfra's `Host` of the machine `name`; the agent is asked for at each command."""
    backend = _AgentBackend(name, agent)
    host = Host(backend)
    backend.set_host(host)
    return host
