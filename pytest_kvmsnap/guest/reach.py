"""How people reach a machine from outside: what to type."""

import contextlib
import shlex
from urllib.parse import urlsplit

from pytest_kvmsnap.errors import MachineError
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.machine import domainxml


def ways_to(guest: Guest) -> list[str]:
    """Return commands that reach a machine, and `vm.run`, which does so from the test's process."""
    ways = ['vm.run("...")']
    domain = guest.domain
    uri = domain.hypervisor.uri
    if urlsplit(uri).path == "/embed":  # lives in this process, and lets no other one in
        return ways
    virsh = f"virsh -c {shlex.quote(uri)}"
    with contextlib.suppress(MachineError):  # the test may have undefined it; nobody knows one
        if domainxml.has_pty_console(domain.xml()):
            # We listen to it, and let go for whoever insists.
            ways.append(f"{virsh} console --force {shlex.quote(domain.name)}")
        ways.append(f"ssh {guest.ssh.user}@{guest.ip_address()}")
    return [*ways, f"{virsh} dominfo {shlex.quote(domain.name)}"]
