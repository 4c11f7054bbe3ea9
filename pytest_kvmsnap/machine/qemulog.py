"""Where libvirt writes what QEMU says about a machine."""

import os
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from pytest_kvmsnap.machine.domain import Domain


def place_of(domain: Domain) -> Path | None:
    """Return QEMU's log of a machine, None where it is on another host or there is none.

    By libvirt's habit (https://libvirt.org/kbase/debuglogs.html): it has no call that tells.
    """
    hypervisor = domain.hypervisor
    if hypervisor.kind != "QEMU" or not hypervisor.is_local:
        return None
    uri = urlsplit(hypervisor.uri)
    if uri.path == "/embed":
        folder = Path(parse_qs(uri.query)["root"][0], "log/qemu")
    elif uri.path == "/session" and os.geteuid() != 0:  # root's session is the system's daemon
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache, "libvirt/qemu/log")
    else:
        folder = Path("/var/log/libvirt/qemu")
    return folder / f"{domain.name}.log"
