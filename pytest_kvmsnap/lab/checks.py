"""The look at all machines before the first test, and the conversion of their raw images."""

import contextlib
import os
from collections.abc import Iterable, Sequence

from pytest_kvmsnap.errors import UsageProblem, merged
from pytest_kvmsnap.golden import Golden
from pytest_kvmsnap.lab import cleanup, relay
from pytest_kvmsnap.lab import journal as journals
from pytest_kvmsnap.lab.clones import Clones
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.lab.outlook import Outlook, PlannedConversion
from pytest_kvmsnap.lab.site import Site
from pytest_kvmsnap.machine import conversion, images, preflight, probe
from pytest_kvmsnap.machine.conversion import Conversion
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.markers import Request
from pytest_kvmsnap.pools import Pool

_Plan = tuple[Domain, Lease, list[Conversion]]
_Wanted = dict[str, tuple[Domain, list[str | None]]]
"""Domains by UUID, with the snapshots that tests start from."""


class Checks:
    """What stands in the way of the machines that tests ask for; what was found well is kept."""

    def __init__(self, site: Site, clones: Clones) -> None:
        self._site = site
        self._clones = clones
        self.passed: set[tuple[str, str | None] | Golden] = set()  # domains by their UUID

    def check(self, requests: Iterable[Request]) -> None:
        """Check all machines that tests will ask for, then convert their raw images.

        What a dead run left is put back first. A machine that another run holds is checked when
        it is free. So are golden images; raw ones are converted too.

        Raises:
            UsageProblem: something stands in the way; all problems of all machines in one.
        """
        requests = list(requests)
        goldens = _goldens(requests)
        cleanup.remove_dead_clones(
            self._site.folder, self._site.hypervisor, self._site.settings, self._site.voice.line
        )
        wanted, problems = self._wanted(requests)
        plans: list[_Plan] = []
        with contextlib.ExitStack() as leases:
            for domain, snapshots in wanted.values():
                lease = self._site.lease(domain)
                try:
                    if not self._take(domain, lease):
                        continue
                    leases.callback(lease.release)
                    # only now, since the one that we waited for may have converted them
                    conversions = conversion.planned(domain, self._site.run)
                    found = self._problems(domain, lease, snapshots, conversions)
                except UsageProblem as problem:
                    found = [problem]
                problems += found
                if not found:
                    plans.append((domain, lease, conversions))
                    self.passed |= {(domain.uuid, snapshot) for snapshot in snapshots}
            for golden in goldens:
                problems += self._clones.problems(golden, self._site.hypervisor)
            together = _without_leases(plans)
            problems += conversion.problems_together(together, live=self._site.settings.live)
            if problems:
                raise merged(problems)
            self._convert(plans)
        for golden in goldens:
            self._clones.base(golden)
            self.passed.add(golden)

    def _wanted(self, requests: Iterable[Request]) -> tuple[_Wanted, list[UsageProblem]]:
        """Return the domains to look at, in the one order in which all runs take leases."""
        wanted: _Wanted = {}
        problems: list[UsageProblem] = []
        for request in dict.fromkeys(requests):
            try:
                domains = self.domains(request.machine)
            except UsageProblem as problem:
                if str(problem) not in map(str, problems):
                    problems.append(problem)
                continue
            for domain in domains:
                wanted.setdefault(domain.uuid, (domain, []))[1].append(request.snapshot)
        return dict(sorted(wanted.items(), key=lambda it: it[1][0].name)), problems

    def domains(self, machine: str | Pool | Golden) -> list[Domain]:
        """Return the domains that may serve for a machine; none for a golden image.

        Raises:
            DomainNotFoundError: there is none.
        """
        if isinstance(machine, Pool):
            return self._site.members(machine)
        return [self._site.domain(machine)] if isinstance(machine, str) else []

    def _take(self, domain: Domain, lease: Lease) -> bool:
        """Take the lease of a machine to look at it, unless somebody uses it or was just there."""
        settings = self._site.settings
        if conversion.planned(domain, self._site.run):
            lease.take(domain.where, settings.lock_timeout, self._site.voice.line)
        elif not lease.take_unless_in_use():
            return False
        if relay.is_for_us(journals.load(lease.journal_path), settings):
            lease.release()
            return False
        return True

    def late(self, domain: Domain, lease: Lease, snapshot: str | None) -> None:
        """Check a machine, just leased, that could not be checked before the first test.

        Nobody could know of it then (`getfixturevalue`), or another run held it.
        """
        if (domain.uuid, snapshot) in self.passed:
            return
        conversions = conversion.planned(domain, self._site.run)
        found = self._problems(domain, lease, [snapshot], conversions)
        plan = (domain, conversions)
        found = found or conversion.problems_together([plan], live=self._site.settings.live)
        if found:
            raise merged(found)
        self._convert([(domain, lease, conversions)])
        self.passed.add((domain.uuid, snapshot))

    def late_snapshot(self, domain: Domain, snapshot: str | None) -> None:
        """Check a snapshot of a machine that is ours, unless that was done before the first test.

        Raises:
            SnapshotNotFoundError: tests cannot start from it.
        """
        if snapshot is None or (domain.uuid, snapshot) in self.passed:
            return
        problem = preflight.snapshot_problem(domain, snapshot)
        if problem is not None:
            raise problem
        self.passed.add((domain.uuid, snapshot))

    def late_golden(self, golden: Golden) -> None:
        """Check a golden image, unless that was done before the first test."""
        if golden not in self.passed:
            found = self._clones.problems(golden, self._site.hypervisor)
            if found:
                raise merged(found)
            self.passed.add(golden)

    def outlook(self, requests: Iterable[Request]) -> Outlook:
        """Look at all that tests will ask for, as `check` does; start and change nothing."""
        requests = list(requests)
        outlook = Outlook()
        settings, hypervisor = self._site.settings, self._site.hypervisor
        if settings.live and probe.is_suspicious(hypervisor):
            outlook.notes.append(
                "this libvirt may be one that cannot revert to a snapshot of a running machine; a"
                " run tries it first, on a tiny machine of its own"
            )
        wanted, problems = self._wanted(requests)
        outlook.problems += problems
        plans: list[conversion.Plan] = []
        for domain, snapshots in wanted.values():
            try:
                plans.append((domain, self._look_at(domain, snapshots, outlook)))
            except UsageProblem as problem:
                outlook.problems.append(problem)
        outlook.problems += conversion.problems_together(plans, live=settings.live)
        for golden in _goldens(requests):
            outlook.images[golden] = [golden.image]
            found = self._clones.problems(golden, hypervisor, may_try=False)
            outlook.problems += found
            if not found:
                outlook.conversions += self._clones.conversions(golden)
        for pool in {each.machine for each in requests if isinstance(each.machine, Pool)}:
            with contextlib.suppress(UsageProblem):  # told already
                members = self._site.members(pool)
                outlook.images[pool] = [
                    image for member in members for image in outlook.images.get(member.name, ())
                ]
        return outlook

    def _look_at(
        self, domain: Domain, snapshots: list[str | None], outlook: Outlook
    ) -> list[Conversion]:
        """Look at one machine; return what would be converted of it."""
        disks = domain.disks(inactive=True)
        outlook.images[domain.name] = [
            disk.path for disk in disks if disk.is_snapshotted and disk.path is not None
        ]
        place = self._site.place
        with contextlib.ExitStack() as leases:
            if place.is_dir():
                lease = Lease.of(domain, place)
                is_free = lease.try_take()
                leases.callback(lease.release)
                journal = journals.load(lease.journal_path)
                if journal is not None:
                    outlook.notes.append(_left_or_held(journal, is_free))
                    return []
            conversions = conversion.planned(domain, self._site.run)
            found = self._blockers(domain, snapshots, conversions, may_try=False)
            outlook.problems += found
            if found:
                return []
            outlook.conversions += [
                PlannedConversion(domain.name, c.raw, c.qcow2, images.space_needed(c.raw))
                for c in conversions
            ]
            return conversions

    def _problems(
        self,
        domain: Domain,
        lease: Lease,
        snapshots: Iterable[str | None],
        conversions: list[Conversion],
    ) -> list[UsageProblem]:
        """Put back what a dead run left, then return what stands in the way."""
        cleanup.work_off(domain, lease, self._site.settings, self._site.voice.line)
        return self._blockers(domain, snapshots, conversions)

    def _blockers(
        self,
        domain: Domain,
        snapshots: Iterable[str | None],
        conversions: list[Conversion],
        *,
        may_try: bool = True,
    ) -> list[UsageProblem]:
        settings = self._site.settings
        found = preflight.problems(domain, settings.ready, live=settings.live, may_try=may_try)
        for snapshot in snapshots:
            problem = preflight.snapshot_problem(domain, snapshot) if snapshot else None
            if problem is not None:
                found.append(problem)
        return found + conversion.problems(domain, conversions, settings.convert)

    def _convert(self, plans: Sequence[_Plan]) -> None:
        """Convert for all machines at once; their journals say so first."""
        plans = [plan for plan in plans if plan[2]]
        voice = self._site.voice
        with contextlib.ExitStack() as at_end:
            for domain, lease, conversions in plans:
                journal = self._site.journal(domain, lease)
                journal.conversions = conversions
                at_end.callback(_forget, journal)
                journal.save()
            if plans:
                conversion.perform(_without_leases(plans), voice.progress, voice.line)


def _without_leases(plans: Sequence[_Plan]) -> list[conversion.Plan]:
    return [(domain, conversions) for domain, _, conversions in plans]


def _forget(journal: Journal) -> None:
    """Remove the journal of conversions, unless something is left that it must tell of."""
    if not any(os.path.lexists(c.temporary) for c in journal.conversions):
        journal.remove()


def _left_or_held(journal: Journal, is_free: bool) -> str:
    if is_free:
        return (
            f"{journal.name} was left by a dead run, which the next one undoes before it looks for"
            f" what stands in the way ({journal.owner()})"
        )
    return f"{journal.name} is in use, so tests on it would wait ({journal.owner()})"


def _goldens(requests: Iterable[Request]) -> list[Golden]:
    machines = dict.fromkeys(request.machine for request in requests)
    return [machine for machine in machines if isinstance(machine, Golden)]
