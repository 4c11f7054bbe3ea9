"""Throwaway machines on golden images: checked beforehand, made when a test asks, replaced."""

import contextlib
import datetime as dt
import itertools
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from pytest_kvmsnap.errors import KvmsnapError, QuarantinedError, UsageProblem
from pytest_kvmsnap.golden import Golden
from pytest_kvmsnap.lab import goldens, restore
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.kept import surplus
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.lab.machine import Machine
from pytest_kvmsnap.lab.outlook import PlannedConversion
from pytest_kvmsnap.lab.site import Site
from pytest_kvmsnap.machine import clone, goldencheck, images, store
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import Hypervisor

_TRIES = 2  # machines that may fail in their first boot, before the image is to blame


class Clones:
    """The throwaway machines of one process."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._settings = site.settings
        self._voice = site.voice
        self._run = site.run
        self._numbers = itertools.count(1)
        self._stillborn: dict[Golden, list[KvmsnapError]] = {}

    def problems(
        self, golden: Golden, hypervisor: Hypervisor, *, may_try: bool = True
    ) -> list[UsageProblem]:
        """Return what stands in the way of machines on a golden image; see `preflight.problems`."""
        settings = self._settings
        found = goldencheck.problems(
            golden, hypervisor, settings.ready, live=settings.live, may_try=may_try
        )
        if not found and golden.format == "raw" and not goldens.is_converted(golden.image):
            problem = goldencheck.conversion_problem(golden, settings.convert)
            return [problem] if problem is not None else []
        return found

    def conversions(self, golden: Golden) -> list[PlannedConversion]:
        """Return what `base` would convert."""
        if golden.format == "qcow2" or goldens.is_converted(golden.image):
            return []
        size = images.space_needed(golden.image)
        return [PlannedConversion(str(golden), golden.image, None, size)]

    def base(self, golden: Golden) -> Path:
        """Return the qcow2 image to lay machines on, converted if need be.

        Raises:
            KvmsnapError: the conversion failed.
        """
        if golden.format == "qcow2":
            return golden.image
        voice = self._voice
        timeout = self._settings.lock_timeout
        return goldens.as_qcow2(golden.image, self._run, timeout, voice.line, voice.progress)

    def make(self, golden: Golden) -> tuple[Machine, Lease]:
        """Make a new machine, which is off.

        Raises:
            QuarantinedError: those before it did not come up.
            KvmsnapError: it cannot be made.
        """
        stillborn = self._stillborn.get(golden, [])
        if len(stillborn) >= _TRIES:
            raise QuarantinedError(
                f"the golden image {golden} is in quarantine, since {_TRIES} machines on it did not"
                " come up",
                where=str(golden.image),
                why=str(stillborn[0]),
            )
        site = self._site
        domain = Domain(site.hypervisor, str(uuid.uuid4()), self._name(golden))
        lease = site.lease(domain)
        lease.take(domain.where, site.settings.lock_timeout, site.voice.line)
        journal = site.journal(domain, lease)
        journal.clone = store.folder("clones") / domain.name
        with _undone_if_it_fails(domain, journal, lease):
            journal.save()
            clone.make(domain, golden, self.base(golden), journal.clone)
            ledger = site.ledger(domain.name)
            ledger.image = str(golden.image)
            voice = site.voice
            machine = Machine(domain, journal, site.settings, site.slots, voice, ledger=ledger)
            return machine, lease

    def _name(self, golden: Golden) -> str:
        return f"{_prefix(golden)}{self._run}-{next(self._numbers)}"

    def make_room(self, golden: Golden) -> None:
        """Remove the oldest machines that hold states which are kept for people, if there are many.

        Other processes may do so too, or use one: what does not work is left to the next one.
        """
        pattern = re.compile(rf"{re.escape(_prefix(golden))}[0-9a-f]{{8}}-\d+")
        holders: list[tuple[dt.datetime, Domain]] = []
        for name in filter(pattern.fullmatch, self._site.hypervisor.names()):
            with contextlib.suppress(KvmsnapError):
                domain = self._site.domain(name)
                holders += [(each.created, domain) for each in surplus(domain.snapshots(), 0)[-1:]]
        holders.sort(key=lambda holder: holder[0])
        for _, domain in holders[: max(len(holders) - self._settings.keep_max, 0)]:
            with contextlib.suppress(KvmsnapError):
                self._remove_holder(domain)

    def _remove_holder(self, domain: Domain) -> None:
        folder, lease = store.folder("clones") / domain.name, self._site.lease(domain)
        try:
            # One of a dead run, which is to be worked off, has a journal.
            is_free = lease.try_take() and not lease.journal_path.exists()
            if is_free and folder.is_dir() and not domain.is_active():
                clone.discard(domain, folder)
        finally:
            lease.release()

    def failed(self, golden: Golden, machine: Machine) -> None:
        """Note why a machine failed: one that never came up may do so because of its image."""
        if machine.failure is not None and not machine.has_come_up:
            self._stillborn.setdefault(golden, []).append(machine.failure)
        else:
            self._stillborn.pop(golden, None)


def _prefix(golden: Golden) -> str:
    label = re.sub(r"[^\w-]", "-", golden.image.stem, flags=re.ASCII)[:40]
    return f"kvmsnap-{label}-"


@contextlib.contextmanager
def _undone_if_it_fails(domain: Domain, journal: Journal, lease: Lease) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(KvmsnapError):  # then the journal stays, for the next run
            restore.discard(domain, journal)
        lease.release()
        raise
