"""What everything of one process shares: its settings and voice, its libvirt, its lock folder."""

import secrets
from functools import cached_property
from pathlib import Path

from pytest_kvmsnap.errors import DomainNotFoundError
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.lab.ledger import Ledger
from pytest_kvmsnap.lab.locks import folder_for, place_for
from pytest_kvmsnap.lab.slots import Slots
from pytest_kvmsnap.lab.voice import Voice
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import About, Hypervisor, connect
from pytest_kvmsnap.pools import Pool, is_pattern, matching
from pytest_kvmsnap.settings import Settings


class Site:
    """One process at one hypervisor, which is connected to when it is first needed.

    `ledgers` are those of the machines that it had, by name. `about` is what the hypervisor said of
    itself, None before it was needed.
    """

    def __init__(self, settings: Settings, voice: Voice) -> None:
        self.settings = settings
        self.voice = voice
        self.run = secrets.token_hex(4)
        self._hypervisor: Hypervisor | None = None
        self._members: dict[Pool, list[Domain]] = {}
        self.ledgers: dict[str, Ledger] = {}
        self.about: About | None = None

    @property
    def hypervisor(self) -> Hypervisor:
        if self._hypervisor is None:
            self._hypervisor = connect(self.settings.uri)
            self.about = self._hypervisor.about()
        return self._hypervisor

    @property
    def is_connected(self) -> bool:
        """Whether the hypervisor was needed so far."""
        return self._hypervisor is not None

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._hypervisor is not None:
            self._hypervisor.close()
            self._hypervisor = None

    @property
    def place(self) -> Path:
        """Where the locks and journals are, or would be."""
        return place_for(self.hypervisor.uri, self.settings.lock_dir)

    @cached_property
    def folder(self) -> Path:
        """The folder of locks and journals, made if need be."""
        return folder_for(self.hypervisor.uri, self.settings.lock_dir)

    @cached_property
    def slots(self) -> Slots:
        """The cap on reverts and boots."""
        hypervisor = self.hypervisor
        count = self.settings.max_concurrent or hypervisor.cores
        return Slots(self.folder, hypervisor.host, count, self.voice.line)

    def domain(self, name: str) -> Domain:
        """Return the domain of that name.

        Raises:
            DomainNotFoundError: there is none.
        """
        return Domain(self.hypervisor, self.hypervisor.find(name), name)

    def members(self, pool: Pool) -> list[Domain]:
        """Return the domains of a pool, as they were when this was first asked.

        Raises:
            DomainNotFoundError: a name or pattern of it stands for none.
        """
        if pool not in self._members:
            names: list[str] = []
            present = self.hypervisor.names()
            for name in pool.names:
                found = matching(name, present)
                if not found and is_pattern(name):
                    raise DomainNotFoundError(
                        f"there is no domain that matches {name!r}",
                        where=self.hypervisor.uri,
                        cure=f"domains there: {', '.join(present[:10]) or 'none at all'}",
                    )
                names += found or [name]
            self._members[pool] = [self.domain(name) for name in dict.fromkeys(names)]
        return self._members[pool]

    def lease(self, domain: Domain) -> Lease:
        """Return the lease of a machine, not yet taken."""
        return Lease.of(domain, self.folder)

    def ledger(self, name: str) -> Ledger:
        """Return the ledger of a machine, the same one each time that this process has it."""
        return self.ledgers.setdefault(name, Ledger(name))

    def journal(self, domain: Domain, lease: Lease) -> Journal:
        """Return a new journal of this process on a machine, not yet saved."""
        uri = domain.hypervisor.uri
        return Journal(lease.journal_path, self.run, uri, domain.name, domain.uuid)
