"""Which test gets which machine: the check before the first test, leases, the end of the run."""

import contextlib
import os
import secrets
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pytest_kvmsnap.errors import KvmsnapError, UsageProblem, merged
from pytest_kvmsnap.golden import Golden
from pytest_kvmsnap.lab import cleanup
from pytest_kvmsnap.lab import journal as journals
from pytest_kvmsnap.lab.clones import Clones
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.lease import Lease, folder_for, folders, place_for
from pytest_kvmsnap.lab.machine import Machine
from pytest_kvmsnap.lab.outlook import Outlook, PlannedConversion
from pytest_kvmsnap.lab.savepoints import Savepoints
from pytest_kvmsnap.lab.voice import Voice
from pytest_kvmsnap.machine import conversion, images, preflight, probe
from pytest_kvmsnap.machine.conversion import Conversion
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import Hypervisor, connect
from pytest_kvmsnap.markers import Request
from pytest_kvmsnap.settings import Settings

_Plan = tuple[Domain, Lease, list[Conversion]]


class _Held(NamedTuple):
    savepoints: Savepoints
    lease: Lease

    @property
    def machine(self) -> Machine:
        return self.savepoints.machine


class Lab:
    """The machines of one process, on one hypervisor, from the first test to the last.

    `unproven` are the tests, by machine, after which only the state from outside proves the revert.
    `grown` are the words on images that grew too much, which were told already.
    """

    def __init__(self, settings: Settings, voice: Voice) -> None:
        self._settings = settings
        self._voice = voice
        self._run = secrets.token_hex(4)
        self._hypervisor: Hypervisor | None = None
        self._held: dict[str | Golden, _Held] = {}  # domains by their UUID
        self._checked: set[Request] = set()
        self._clones = Clones(settings, voice, self._run)
        self.unproven: dict[str, list[str]] = {}
        self.grown: list[str] = []

    @property
    def hypervisor(self) -> Hypervisor:
        if self._hypervisor is None:
            self._hypervisor = connect(self._settings.uri)
        return self._hypervisor

    # before the first test

    def check(self, requests: Iterable[Request]) -> None:
        """Check all machines that tests will ask for, then convert their raw images.

        What a dead run left is put back first. A machine that another run holds is checked when
        it is free. So are golden images; raw ones are converted too.

        Raises:
            UsageProblem: something stands in the way; all problems of all machines in one.
        """
        problems: list[UsageProblem] = []
        plans: list[_Plan] = []
        requests = list(requests)
        goldens = _goldens(requests)
        self._remove_dead_clones()
        with contextlib.ExitStack() as leases:
            for name, snapshots in _by_domain(requests).items():
                try:
                    domain = self._domain(name)
                    lease = self._lease(domain)
                    if conversion.planned(domain, self._run):
                        lease.take(domain.where, self._settings.lock_timeout, self._voice.line)
                    elif not lease.take_unless_in_use():
                        continue
                    leases.callback(lease.release)
                    # only now, since the one that we waited for may have converted them
                    conversions = conversion.planned(domain, self._run)
                    found = self._problems(domain, lease, snapshots, conversions)
                except UsageProblem as problem:
                    found = [problem]
                problems += found
                if not found:
                    plans.append((domain, lease, conversions))
                    self._checked |= {Request(name, snapshot) for snapshot in snapshots}
            for golden in goldens:
                problems += self._clones.problems(golden, self.hypervisor)
            together = _without_leases(plans)
            problems += conversion.problems_together(together, live=self._settings.live)
            if problems:
                raise merged(problems)
            self._convert(plans)
        for golden in goldens:
            self._clones.base(golden)
            self._checked.add(Request(golden))

    def outlook(self, requests: Iterable[Request]) -> Outlook:
        """Look at all that tests will ask for, as `check` does; start and change nothing."""
        requests = list(requests)
        outlook = Outlook()
        if self._settings.live and probe.is_suspicious(self.hypervisor):
            outlook.notes.append(
                "this libvirt may be one that cannot revert to a snapshot of a running machine; a"
                " run tries it first, on a tiny machine of its own"
            )
        plans: list[conversion.Plan] = []
        for name, snapshots in _by_domain(requests).items():
            try:
                domain = self._domain(name)
                plans.append((domain, self._look_at(domain, snapshots, outlook)))
            except UsageProblem as problem:
                outlook.problems.append(problem)
        outlook.problems += conversion.problems_together(plans, live=self._settings.live)
        for golden in _goldens(requests):
            outlook.images[golden] = [golden.image]
            found = self._clones.problems(golden, self.hypervisor, may_try=False)
            outlook.problems += found
            if not found:
                outlook.conversions += self._clones.conversions(golden)
        return outlook

    def _look_at(
        self, domain: Domain, snapshots: list[str | None], outlook: Outlook
    ) -> list[Conversion]:
        """Look at one machine; return what would be converted of it."""
        disks = domain.disks(inactive=True)
        outlook.images[domain.name] = [
            disk.path for disk in disks if disk.is_snapshotted and disk.path is not None
        ]
        place = place_for(domain.hypervisor.uri, self._settings.lock_dir)
        with contextlib.ExitStack() as leases:
            if place.is_dir():
                lease = Lease.of(domain, place)
                is_free = lease.try_take()
                leases.callback(lease.release)
                journal = journals.load(lease.journal_path)
                if journal is not None:
                    outlook.notes.append(_left_or_held(journal, is_free))
                    return []
            conversions = conversion.planned(domain, self._run)
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
        cleanup.work_off(domain, lease, self._settings, self._voice.line)
        return self._blockers(domain, snapshots, conversions)

    def _blockers(
        self,
        domain: Domain,
        snapshots: Iterable[str | None],
        conversions: list[Conversion],
        *,
        may_try: bool = True,
    ) -> list[UsageProblem]:
        settings = self._settings
        found = preflight.problems(domain, settings.ready, live=settings.live, may_try=may_try)
        for snapshot in snapshots:
            problem = preflight.snapshot_problem(domain, snapshot) if snapshot else None
            if problem is not None:
                found.append(problem)
        return found + conversion.problems(domain, conversions, settings.convert)

    def _convert(self, plans: Sequence[_Plan]) -> None:
        """Convert for all machines at once; their journals say so first."""
        plans = [plan for plan in plans if plan[2]]
        with contextlib.ExitStack() as at_end:
            for domain, lease, conversions in plans:
                journal = self._journal(domain, lease)
                journal.conversions = conversions
                at_end.callback(_forget, journal)
                journal.save()
            if plans:
                conversion.perform(_without_leases(plans), self._voice.progress, self._voice.line)

    # for a test

    def savepoints(self, request: Request) -> Savepoints:
        """Return the states of the machine that was asked for, which is ours from now on.

        Raises:
            KvmsnapError: there is no such machine, it cannot be had, or something is in the way.
        """
        if isinstance(request.machine, Golden):
            return self._on_golden(request.machine)
        domain = self._domain(request.machine)
        if domain.uuid not in self._held:
            lease = self._lease(domain)
            lease.take(domain.where, self._settings.lock_timeout, self._voice.line)
            try:
                cleanup.work_off(domain, lease, self._settings, self._voice.line)
                self._check_late(domain, lease, request)
                machine = Machine(domain, self._journal(domain, lease), self._settings)
            except BaseException:
                lease.release()
                raise
            self._held[domain.uuid] = _Held(Savepoints(machine), lease)
        elif request not in self._checked and request.snapshot:
            problem = preflight.snapshot_problem(domain, request.snapshot)
            if problem is not None:
                raise problem
            self._checked.add(request)
        return self._held[domain.uuid].savepoints

    def _on_golden(self, golden: Golden) -> Savepoints:
        if golden not in self._held:
            if Request(golden) not in self._checked:
                found = self._clones.problems(golden, self.hypervisor)
                if found:
                    raise merged(found)
                self._checked.add(Request(golden))
            machine, lease = self._clones.make(golden, self.hypervisor)
            self._held[golden] = _Held(Savepoints(machine), lease)
        return self._held[golden].savepoints

    def current(self, request: Request) -> Savepoints | None:
        """Return the states of a machine if it is ours now."""
        if isinstance(request.machine, Golden):
            held = self._held.get(request.machine)
        else:
            held = self._held.get(self._domain(request.machine).uuid)
        return held.savepoints if held is not None else None

    def replace_failed_clones(self) -> None:
        """Throw away throwaway machines that failed, so that the next test gets a new one."""
        for key, held in list(self._held.items()):
            if isinstance(key, Golden) and held.machine.has_failed:
                self._clones.failed(key, held.machine)
                try:
                    self._give_up(key)
                except KvmsnapError as error:
                    self._voice.line(str(error))

    def settle(self) -> list[KvmsnapError]:
        """Do at the end of a test what need not wait; return what went wrong with that.

        What fixtures that are torn down did is undone, and machines that others wait for are given
        up, unless a fixture holds them.
        """
        failures = []
        for key, held in list(self._held.items()):
            try:
                held.savepoints.settle()
                self._tell_growth(held.machine)
                if held.savepoints.is_idle and held.lease.is_wanted():
                    self._give_up(key)
            except KvmsnapError as error:
                failures.append(error)
        return failures

    def _tell_growth(self, machine: Machine) -> None:
        for line in machine.growth():
            self._voice.line(line)
            self.grown.append(line)

    def _give_up(self, key: str | Golden) -> None:
        """Leave a machine as it was found, and let others have it."""
        held = self._held[key]
        failure: KvmsnapError | None = None
        try:
            held.machine.close()
        except KvmsnapError as error:
            failure = error
        held.lease.release()
        del self._held[key]  # only now: a Ctrl-C leaves it to the next call
        if held.machine.unproven:
            self.unproven.setdefault(held.machine.domain.name, []).extend(held.machine.unproven)
        if failure is not None:
            raise failure

    def _check_late(self, domain: Domain, lease: Lease, request: Request) -> None:
        """Check a machine that could not be checked before the first test.

        Nobody could know of it then (`getfixturevalue`), or another run held it.
        """
        if request in self._checked:
            return
        conversions = conversion.planned(domain, self._run)
        found = self._problems(domain, lease, [request.snapshot], conversions)
        plan = (domain, conversions)
        found = found or conversion.problems_together([plan], live=self._settings.live)
        if found:
            raise merged(found)
        self._convert([(domain, lease, conversions)])
        self._checked.add(request)

    # at the end

    def close(self) -> list[KvmsnapError]:
        """Leave every machine as it was found; return what went wrong with that."""
        failures: list[KvmsnapError] = []
        for key in list(self._held):
            try:
                self._give_up(key)
            except KvmsnapError as error:
                failures.append(error)
        if self._hypervisor is not None:
            self._hypervisor.close()
            self._hypervisor = None
        return failures

    def clean(self) -> int:
        """Undo what dead runs of this host left; return how many machines that failed for."""
        configured = self._settings.lock_dir
        places = [configured] if configured is not None else folders()
        connected = self.hypervisor if self._settings.uri is not None else None
        return cleanup.clean(places, connected, self._settings, self._voice.line)

    # helpers

    def _domain(self, name: str) -> Domain:
        for held in self._held.values():  # a test may have renamed one of ours
            if held.machine.domain.name == name:
                return held.machine.domain
        return Domain(self.hypervisor, self.hypervisor.find(name), name)

    def _remove_dead_clones(self) -> None:
        folder = folder_for(self.hypervisor.uri, self._settings.lock_dir)
        cleanup.remove_dead_clones(folder, self.hypervisor, self._settings, self._voice.line)

    def _lease(self, domain: Domain) -> Lease:
        return Lease.of(domain, folder_for(domain.hypervisor.uri, self._settings.lock_dir))

    def _journal(self, domain: Domain, lease: Lease) -> Journal:
        return Journal(
            lease.journal_path, self._run, domain.hypervisor.uri, domain.name, domain.uuid
        )


def _without_leases(plans: Sequence[_Plan]) -> list[conversion.Plan]:
    return [(domain, conversions) for domain, _, conversions in plans]


def _forget(journal: Journal) -> None:
    """Remove the journal of conversions, unless something is left that it must tell of."""
    if not any(os.path.lexists(c.temporary) for c in journal.conversions):
        journal.remove()


def _by_domain(requests: Iterable[Request]) -> dict[str, list[str | None]]:
    snapshots: dict[str, list[str | None]] = {}
    for request in dict.fromkeys(requests):
        if isinstance(request.machine, str):
            snapshots.setdefault(request.machine, []).append(request.snapshot)
    return snapshots


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
