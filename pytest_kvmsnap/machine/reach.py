"""How people reach a machine from outside: what to type."""

import contextlib
import ipaddress
import shlex
from urllib.parse import urlsplit

from pytest_kvmsnap.errors import MachineError
from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.domain import Domain


def ways_to(domain: Domain) -> list[str]:
    """Return commands that reach a machine, and `vm.run`, which does so from the test's process."""
    ways = ['vm.run("...")']
    uri = domain.hypervisor.uri
    if urlsplit(uri).path == "/embed":  # lives in this process, and lets no other one in
        return ways
    virsh = f"virsh -c {shlex.quote(uri)}"
    with contextlib.suppress(MachineError):  # the test may have undefined it
        if domainxml.has_pty_console(domain.xml()):
            # We listen to it, and let go for whoever insists.
            ways.append(f"{virsh} console --force {shlex.quote(domain.name)}")
        for address in map(ipaddress.ip_address, domain.addresses()):
            if not address.is_loopback and not address.is_link_local:
                ways.append(f"ssh root@{address}")
    return [*ways, f"{virsh} dominfo {shlex.quote(domain.name)}"]
