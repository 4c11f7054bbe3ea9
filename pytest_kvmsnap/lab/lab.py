"""Which test gets which machine: leases, from the first test to the end of the run."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pytest_kvmsnap.errors import (
    ConfigError,
    ConnectionLostError,
    KvmsnapError,
    LeaseError,
    QuarantinedError,
    SnapshotNotFoundError,
    UsageProblem,
)
from pytest_kvmsnap.golden import Golden
from pytest_kvmsnap.lab import cleanup, foreign, locks, relay
from pytest_kvmsnap.lab import journal as journals
from pytest_kvmsnap.lab.checks import Checks
from pytest_kvmsnap.lab.clones import Clones
from pytest_kvmsnap.lab.kept import Kept
from pytest_kvmsnap.lab.lease import Lease, take_first_free
from pytest_kvmsnap.lab.ledger import Ledger
from pytest_kvmsnap.lab.machine import Machine
from pytest_kvmsnap.lab.outlook import Outlook
from pytest_kvmsnap.lab.savepoints import Savepoints
from pytest_kvmsnap.lab.site import Site
from pytest_kvmsnap.lab.voice import Voice
from pytest_kvmsnap.lab.waiting import Wait, circle, is_to_yield, waited_for
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import About
from pytest_kvmsnap.markers import Request
from pytest_kvmsnap.pools import Pool
from pytest_kvmsnap.settings import Settings

_Key = str | Golden  # domains by their UUID


class _Held(NamedTuple):
    savepoints: Savepoints
    lease: Lease

    @property
    def machine(self) -> Machine:
        return self.savepoints.machine


class Lab:
    """The machines of one process, on one hypervisor, from the first test to the last.

    `unproven` are the tests, by machine, after which only the state from outside proves the revert.
    `kept` are the states that were kept for people. `grown` are the words on images that grew too
    much, which were told already.
    """

    def __init__(self, settings: Settings, voice: Voice) -> None:
        self._site = Site(settings, voice)
        self._settings = settings
        self._voice = voice
        self._held: dict[_Key, _Held] = {}
        self._chosen: dict[Pool, str] = {}
        self._starts: set[str] = set()  # snapshots that tests start from
        self._test = ""  # for people who wait while it waits itself
        self._unfit: dict[str, KvmsnapError] = {}  # by UUID, those that could not be had
        self._lost: dict[str, KvmsnapError] = {}  # that failed when they were ours
        self._clones = Clones(self._site)
        self._checks = Checks(self._site, self._clones)
        self.unproven: dict[str, list[str]] = {}
        self.grown: list[str] = []
        self.kept: list[Kept] = []

    @property
    def about(self) -> About | None:
        """What the hypervisor said of itself, None before it was needed."""
        return self._site.about

    @property
    def ledgers(self) -> Mapping[str, Ledger]:
        """What machines cost that were ours, by name."""
        return self._site.ledgers

    # before the first test

    def check(self, requests: Iterable[Request]) -> None:
        """Check all machines that tests will ask for; see `Checks.check`."""
        asked = list(requests)
        self._starts = {each.snapshot for each in asked if each.snapshot is not None}
        self._checks.check(asked)

    def check_workers(self, held: Iterable[str | Pool | Golden], workers: int) -> None:
        """Refuse machines that every worker would hold for the whole run, where there are fewer.

        Raises:
            ConfigError: that is so.
        """
        for machine in dict.fromkeys(held):
            try:
                domains = self._checks.domains(machine)
            except UsageProblem:  # told by `check`
                continue
            if 0 < len(domains) < workers:
                some = "one machine" if len(domains) == 1 else f"{len(domains)} machines"
                raise ConfigError(
                    f"{workers} workers of pytest-xdist would wait for {some} until the run ends",
                    where=f"{machine} at {self._site.hypervisor.uri}",
                    why="session_vm holds its machine for as long as its worker has tests",
                    cure=f"run with -n {len(domains)} at most, name {workers} machines (a pool), or"
                    " prepare the machine in module_vm",
                )

    def shown(self, machines: Iterable[str | Pool | Golden]) -> list[str]:
        """Return machines as people know them, pools with how many there are."""
        return [
            f"{machine} ({len(self._site.members(machine))})"
            if isinstance(machine, Pool)
            else str(machine)
            for machine in dict.fromkeys(machines)
        ]

    def outlook(self, requests: Iterable[Request]) -> Outlook:
        """Look at all that tests will ask for, as `check` does; start and change nothing."""
        return self._checks.outlook(requests)

    def keep(self, machine: Machine, test: str) -> str:
        """Keep a machine as a test left it, for people; see `Machine.keep_for_people`."""
        return machine.keep_for_people(test, self._starts)

    # for a test

    def prepare(self, requests: Iterable[Request], test: str) -> None:
        """Take all machines of a test that needs several, in the one order of all runs.

        So no two tests wait for what the other took, unless wide fixtures hold machines. One that
        is ours still may go to others for as long as we wait for one that comes before it.

        Raises:
            KvmsnapError: as `savepoints`.
        """
        self._test = test
        wanted = {request.machine: request for request in requests}
        if len(wanted) > 1:
            for request in sorted(wanted.values(), key=self._order):
                self.savepoints(request).reserve()

    def begin(self) -> None:
        """Note that a test begins: what the consoles of our machines said so far is not its."""
        for held in self._held.values():
            held.machine.domain.console.begin()

    def _order(self, request: Request) -> tuple[int, str]:
        machine = request.machine
        if isinstance(machine, str):
            return 0, machine
        return (1, str(machine)) if isinstance(machine, Pool) else (2, str(machine))

    def savepoints(self, request: Request) -> Savepoints:
        """Return the states of the machine that was asked for, which is ours from now on.

        Raises:
            KvmsnapError: there is no such machine, it cannot be had, or something is in the way.
        """
        if isinstance(request.machine, Golden):
            return self._on_golden(request.machine)
        key = self._key(request.machine)
        if key is None:
            key = self._take(request)
        else:
            machine = self._held[key].machine
            self._checks.late_snapshot(machine.domain, request.snapshot)
        if isinstance(request.machine, Pool):
            self._chosen[request.machine] = key
        return self._held[key].savepoints

    def _on_golden(self, golden: Golden) -> Savepoints:
        if golden not in self._held:
            self._checks.late_golden(golden)
            machine, lease = self._clones.make(golden)
            self._held[golden] = _Held(Savepoints(machine), lease)
        return self._held[golden].savepoints

    def _key(self, machine: str | Pool) -> str | None:
        """Return by which key we hold a machine, None when we do not."""
        if isinstance(machine, str):
            uuid = self._domain(machine).uuid
            return uuid if uuid in self._held else None
        if machine in self._chosen:
            return self._chosen[machine]
        ours = [d.uuid for d in self._site.members(machine) if d.uuid in self._held]
        return next((uuid for uuid in ours if not self._held[uuid].machine.has_failed), None)

    def _take(self, request: Request) -> str:
        """Take the machine, or the first free one of a pool; return its key."""
        domains = self._candidates(request.machine)
        leases = {domain.uuid: self._site.lease(domain) for domain in domains}
        what = domains[0].where
        if len(domains) > 1:
            what = f"any of {', '.join(domain.name for domain in domains)}"
        settings = self._settings
        wait = Wait(what, settings.lock_timeout, self._voice.line, self._meanwhile(what))
        begun = time.perf_counter()
        try:
            lease = take_first_free(list(leases.values()), wait)
        finally:
            self._wait_for([])
        uuid = next(uuid for uuid, each in leases.items() if each is lease)
        domain = next(domain for domain in domains if domain.uuid == uuid)
        self._site.ledger(domain.name).waited(time.perf_counter() - begun)
        try:
            machine = self._machine(domain, lease, request.snapshot)
        except BaseException as error:
            lease.release()
            self._note_unfit(uuid, error)
            raise
        self._held[uuid] = _Held(Savepoints(machine), lease)
        return uuid

    def _note_unfit(self, uuid: str, error: BaseException) -> None:
        """Have others of a pool serve from now on, unless it is not the machine's fault."""
        passing = (ConnectionLostError, SnapshotNotFoundError)
        if isinstance(error, KvmsnapError) and not isinstance(error, passing):
            self._unfit[uuid] = error

    def _candidates(self, machine: str | Pool | Golden) -> list[Domain]:
        """Return the domains that may serve; those of a pool that failed are left out.

        Raises:
            QuarantinedError: all of them failed.
        """
        domains = self._checks.domains(machine)
        if not isinstance(machine, Pool):
            if domains[0].uuid in self._lost:
                raise QuarantinedError(
                    "the machine is in quarantine, since it failed before",
                    where=domains[0].where,
                    why=str(self._lost[domains[0].uuid]),
                )
            return domains
        failed = self._unfit | {
            domain.uuid: self._held[domain.uuid].machine.failure
            for domain in domains
            if domain.uuid in self._held  # and there is none that works, which would be the one
        }
        fit = [domain for domain in domains if domain.uuid not in failed]
        if not fit:
            failure = failed[domains[0].uuid]
            raise QuarantinedError(
                f"all machines of the pool {machine} are in quarantine, since they failed before",
                where=self._site.hypervisor.uri,
                why=str(failure),
            )
        return fit

    def _machine(self, domain: Domain, lease: Lease, snapshot: str | None) -> Machine:
        """Return a machine that was just leased, with what others left put right."""
        settings, slots, voice = self._settings, self._site.slots, self._voice
        journal = journals.load(lease.journal_path)
        if journal is not None and relay.can_be_taken_over(domain, journal, settings):
            self._checks.late_snapshot(domain, snapshot)
            journal = relay.taken_over(journal)
        else:
            cleanup.work_off(domain, lease, settings, self._voice.line)
            self._checks.late(domain, lease, snapshot)
            journal = self._site.journal(domain, lease)
        ledger = self._site.ledger(domain.name)
        ledger.image = ledger.image or _image_of(domain)
        return Machine(domain, journal, settings, slots, voice, ledger=ledger)

    def current(self, request: Request) -> Savepoints | None:
        """Return the states of a machine if it is ours now."""
        if isinstance(request.machine, Golden):
            held = self._held.get(request.machine)
        else:
            key = self._key(request.machine)
            held = self._held[key] if key is not None else None
        return held.savepoints if held is not None else None

    def replace_failed(self) -> None:
        """Have the next test get another machine for one that failed, where there are others.

        A throwaway machine is thrown away; of a pool another one serves. One that others wait for
        is theirs to try, and of no more use to us.
        """
        for key, held in list(self._held.items()):
            if held.machine.failure is None:
                continue
            if isinstance(key, Golden):
                self._clones.failed(key, held.machine)
            elif key in self._chosen.values() or held.lease.is_wanted():
                self._unfit[key] = self._lost[key] = held.machine.failure
            else:
                continue
            try:
                self._give_up(key)
            except KvmsnapError as error:
                self._voice.line(str(error))

    def _choose_no_more(self, key: _Key) -> None:
        self._chosen = {pool: uuid for pool, uuid in self._chosen.items() if uuid != key}

    # between tests, and while others have what is needed

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

    def _meanwhile(self, what: str) -> Callable[[Sequence[Path]], None]:
        """Return what is to be done while we wait: let others go on, and see that somebody can."""

        def meanwhile(wanted: Sequence[Path]) -> None:
            self._yield_idle()
            kept = self._wait_for(wanted)
            others = circle(wanted, kept)
            if others and is_to_yield(others):
                ours = self._names_of(kept)
                names = ours | {other.path: other.name for other in others}
                lines = [
                    f"{other.name} is held by {other.owner()}, who waits for"
                    f" {', '.join(names[path] for path in waited_for(other))}"
                    for other in others
                ]
                raise LeaseError(
                    "this wait would never end: others wait for machines that this process holds",
                    where=what,
                    why="\n".join([*lines, f"ours: {', '.join(ours.values())}"]),
                    cure="let all tests that need several machines ask for them in one test, or let"
                    " wide fixtures (session_vm, module_vm) hold one machine only",
                )

        return meanwhile

    def _names_of(self, paths: Iterable[Path]) -> dict[Path, str]:
        return {
            held.lease.journal_path: held.machine.domain.name
            for held in self._held.values()
            if held.lease.journal_path in paths
        }

    def _yield_idle(self) -> None:
        for key, held in list(self._held.items()):
            if held.savepoints.is_idle and held.lease.is_wanted():
                try:
                    self._give_up(key)
                except KvmsnapError as error:  # of no concern to the test that waits
                    self._voice.line(str(error))

    def _wait_for(self, wanted: Sequence[Path]) -> list[Path]:
        """Note in the journals of what we keep for what we wait; return these journals."""
        kept = [held for held in self._held.values() if not held.savepoints.is_idle]
        for held in kept if wanted else ():
            held.machine.used_by(self._test)
        for held in self._held.values():
            held.machine.waits_for([path.name for path in wanted] if held in kept else [])
        return [held.lease.journal_path for held in kept]

    def _tell_growth(self, machine: Machine) -> None:
        for line in machine.growth():
            self._voice.line(line)
            self.grown.append(line)

    def _give_up(self, key: _Key) -> None:
        """Let others have a machine: clean where only workers of our run want it, else as found."""
        held = self._held[key]
        failure: KvmsnapError | None = None
        try:
            made_by = relay.made_by(self._settings)
            if not (held.lease.is_wanted_by_run_alone() and held.machine.leave_clean(made_by)):
                held.machine.close()
        except KvmsnapError as error:
            failure = error
        held.machine.note_growth()
        held.lease.release()
        del self._held[key]  # only now: a Ctrl-C leaves it to the next call
        self._choose_no_more(key)
        self.kept += held.machine.kept
        if held.machine.unproven:
            self.unproven.setdefault(held.machine.domain.name, []).extend(held.machine.unproven)
        if isinstance(key, Golden) and held.machine.kept:
            self._clones.make_room(key)
        if failure is not None:
            raise failure

    # at the end

    def close(self) -> list[KvmsnapError]:
        """Leave every machine as it was found; return what went wrong with that."""
        failures: list[KvmsnapError] = []
        for key in list(self._held):
            try:
                self._give_up(key)
            except KvmsnapError as error:
                failures.append(error)
        try:
            failures += relay.put_back_leftovers(self._site) if self._site.is_connected else []
        except KvmsnapError as error:
            failures.append(error)
        self.kept = [kept for kept in self.kept if _is_there(kept)]
        self._site.close()
        return failures

    def clean(self, *, force: bool = False) -> int:
        """Undo what dead runs of this host left; return how many machines that failed for.

        With `force` also what runs of other hosts or containers left on the machines that the
        options name, or on all of this libvirt.

        Raises:
            UsageProblem: it is not said where to do that, or the domain to do it on is not there.
        """
        is_meant = self._meant_by_force() if force else None
        configured = self._settings.lock_dir
        places = [configured] if configured is not None else locks.folders()
        connected = self._site.hypervisor if self._settings.uri is not None else None
        failures = cleanup.clean(places, connected, self._settings, self._voice.line)
        for place in places:
            locks.sweep(place, self._voice.line)
        if is_meant is not None:
            failures += foreign.undo(self._site, is_meant)
        return failures

    def _meant_by_force(self) -> Callable[[str], bool]:
        wanted = self._settings.domain
        if self._settings.uri is None:
            raise ConfigError(
                "it is not said on which libvirt --kvmsnap-force is to undo what others left",
                cure="give --kvmsnap-uri, and --kvmsnap-domain unless all its machines are meant",
            )
        if isinstance(wanted, str):
            self._site.domain(wanted)
            return lambda name: name == wanted
        return wanted.has if wanted is not None else lambda _: True

    # helpers

    def _domain(self, name: str) -> Domain:
        for held in self._held.values():  # a test may have renamed one of ours
            if held.machine.domain.name == name:
                return held.machine.domain
        return self._site.domain(name)


def _image_of(domain: Domain) -> str:
    """Return the path of the first image that snapshots of a machine are in."""
    paths = [disk.path for disk in domain.disks(inactive=True) if disk.is_snapshotted]
    return str(next(filter(None, paths), ""))


def _is_there(kept: Kept) -> bool:
    """Tell whether nobody has made room in its place, which another worker may have done."""
    try:
        return kept.snapshot in kept.domain.snapshot_names()
    except KvmsnapError:
        return False
