"""Under which network address a guest is reached from here."""

import contextlib
import ipaddress
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pytest_kvmsnap.errors import NoAddressError
from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.domain import Domain

_ARP_TABLE = Path("/proc/net/arp")


class Endpoint(NamedTuple):
    """Where a port of the guest is reached."""

    address: str
    port: int


class Address:
    """The address of one guest: from the agent, the leases of libvirt's DHCP, or the host's ARP.

    A revert may leave all three without one, since the guest does not notice it and does not
    announce itself anew. Then the last address that was known is tried: the guest still has it.
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._last: str | None = None

    def find(self) -> str:
        """Return the guest's address.

        Raises:
            NoAddressError: nobody knows one, and nobody ever did.
        """
        for told in self._told():
            found = best(told)
            if found is not None:
                self._last = found
                break
        if self._last is None:
            raise NoAddressError(
                "nobody knows the machine's address",
                where=self._domain.where,
                why="neither the guest agent, the leases of libvirt's networks nor the host's ARP"
                f" table has one (state: {self._domain.state()})",
                cure="has it a network card, and has its guest set that up? The agent knows every"
                " address; without it, use a network of libvirt's with DHCP",
            )
        return self._last

    def _told(self) -> Iterator[list[str]]:
        yield from self._domain.addresses()
        # libvirt 9.0 cannot read the table of every kernel ("wrong nlmsg len", on Linux 6.18)
        if self._domain.hypervisor.is_local:
            with contextlib.suppress(OSError):
                table = _ARP_TABLE.read_text(encoding="ascii")
                yield in_arp_table(table, domainxml.macs(self._domain.xml()))

    def endpoint(self, port: int) -> Endpoint:
        """Return where a TCP port of the guest is reached, perhaps as a forwarded one.

        Raises:
            NoAddressError: nobody knows.
        """
        is_local = self._domain.hypervisor.is_local
        forwarded = domainxml.forwarded_port(self._domain.xml(), port) if is_local else None
        return Endpoint(*forwarded) if forwarded is not None else Endpoint(self.find(), port)


def best(addresses: Iterable[str]) -> str | None:
    """Return the first address that others can use, IPv4 before IPv6; None when there is none."""
    usable = [each for each in map(ipaddress.ip_address, addresses) if _is_usable(each)]
    usable.sort(key=lambda each: each.version)  # and else as they came
    return str(usable[0]) if usable else None


def in_arp_table(table: str, macs: set[str]) -> list[str]:
    """Return the addresses that the kernel's ARP table has for some network cards."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return [row[0] for row in rows if len(row) > 3 and row[3].lower() in macs]


def _is_usable(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return not (
        address.is_loopback
        or address.is_link_local
        or address.is_unspecified
        or address.is_multicast
    )
