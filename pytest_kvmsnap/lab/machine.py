"""A leased machine: the state that tests start from, and the way back to it with its proof."""

import secrets
from typing import NamedTuple

from pytest_kvmsnap.errors import (
    KvmsnapError,
    MachineError,
    QuarantinedError,
    RevertError,
    SnapshotError,
    SnapshotNotFoundError,
)
from pytest_kvmsnap.guest.agent import Agent
from pytest_kvmsnap.guest.canary import Canary
from pytest_kvmsnap.guest.ready import means_of, set_clock, wait_ready
from pytest_kvmsnap.lab import restore
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.machine import space
from pytest_kvmsnap.machine.domain import Domain, Fingerprint
from pytest_kvmsnap.settings import Settings
from pytest_kvmsnap.vm import VM

_SHUTDOWN = 120.0  # seconds for a guest to go off by itself, where live=no asks for it


class _Stand(NamedTuple):
    """A snapshot that the machine provably stands at, and how it looks from outside there."""

    snapshot: str
    fingerprint: Fingerprint


class Machine:
    """One machine, ours until `close`.

    `unproven` are the tests after which the guest could not take or look for the canary's marks,
    so that the revert is proven by power state and current snapshot alone.
    """

    def __init__(self, domain: Domain, journal: Journal, settings: Settings) -> None:
        self.domain = domain
        self.unproven: list[str] = []
        self._journal = journal
        self._settings = settings
        self._ready = means_of(domain, settings.ready)
        self._found = restore.look(domain)
        self._states = {snapshot.name: snapshot.state for snapshot in domain.snapshots()}
        self._baseline: str | None = None
        self._start = ""
        self._stand: _Stand | None = None
        self._marked: Canary | None = None
        self._failure: KvmsnapError | None = None
        if self._found.state not in ("running", "paused", "shut off"):
            raise MachineError(
                f"the machine is {self._found.state!r}, which tests cannot start from",
                where=domain.where,
                cure="start it or shut it off first",
            )
        journal.found = self._found
        journal.save()

    # what tests see

    def prepare(self, snapshot: str | None, test: str) -> VM:
        """Bring the machine into the state that a test starts from: running, ready and clean.

        `snapshot` is an existing one, None the baseline.

        Raises:
            QuarantinedError: the machine failed before.
            MachineError: it cannot be brought there; it is in quarantine from now on.
        """
        if self._failure is not None:
            raise QuarantinedError(
                "the machine is in quarantine, since it failed before",
                where=self.domain.where,
                why=str(self._failure),
            )
        if snapshot is not None and snapshot not in self._states:
            raise SnapshotNotFoundError(
                f"the snapshot {snapshot!r} was made after this run took the machine",
                where=self.domain.where,
                cure="start the run again",
            )
        self._journal.test = test
        self._journal.save()
        try:
            found = self._found_snapshot()
            self._start = snapshot if snapshot is not None else self._baseline_from(found)
            if not self._stands_at(self._start):
                self._revert(self._start)
            self._bring_up()
        except KvmsnapError as error:
            self._failure = error
            raise
        return VM(
            self.domain,
            ready=self._ready,
            ready_timeout=self._settings.ready_timeout,
            revert_timeout=self._settings.revert_timeout,
            description=self._journal.description(),
        )

    def undo(self) -> None:
        """Put the machine back after a test, with force, and prove it.

        Raises:
            RevertError: it failed or could not be proven; the machine is in quarantine now.
        """
        try:
            is_marked = self._revert(self._start)
        except KvmsnapError as error:
            self._failure = error
            raise
        if self._takes_marks() and not is_marked:
            self.unproven.append(self._journal.test)

    def close(self) -> None:
        """Leave the machine as it was found.

        Raises:
            MachineError: that failed; the journal stays for the next try.
        """
        goal = self._journal.found_snapshot
        restore.as_found(
            self.domain,
            self._journal,
            ready=self._settings.ready,
            ready_timeout=self._settings.ready_timeout,
            revert_timeout=self._settings.revert_timeout,
            at=goal if goal is not None and self._stands_at(goal) else None,
        )

    # the states that tests start from

    def _found_snapshot(self) -> str:
        """Return the snapshot to go back to at the end, taken when there is none."""
        if self._journal.found_snapshot is None:
            if self._found.state == "running" and self._settings.live:
                wait_ready(self.domain, self._ready, self._settings.ready_timeout)
                self._journal.planted = self._takes_marks()
                self._journal.save()
                self._plant()
            self._journal.found_snapshot = f"kvmsnap-found-{self._journal.run}"
            self._take(self._journal.found_snapshot)
        return self._journal.found_snapshot

    def _baseline_from(self, found: str) -> str:
        """Return the snapshot that tests without a marker start from, taken when there is none.

        It is the found one where that is running (or off, with live=no).
        """
        if self._baseline is not None:
            return self._baseline
        if self._found.state == ("running" if self._settings.live else "shut off"):
            self._baseline = found
            return found
        if not self._stands_at(found):
            self._revert(found)
        self._bring_up()
        if self._settings.live:
            self._plant()
        else:
            self.domain.shutdown(_SHUTDOWN)
        name = f"kvmsnap-base-{self._journal.run}"
        self._take(name)
        self._baseline = name
        return name

    def _take(self, name: str) -> None:
        """Take a snapshot of ours, announced in the journal first."""
        space.check_space(self.domain)
        self._journal.taken[name] = ""
        self._journal.save()
        try:
            taken = self.domain.take_snapshot(name, self._journal.description())
        except SnapshotError as error:
            raise space.explain(self.domain, error) from None
        self._states[name] = taken.state
        self._journal.taken[name] = self.domain.snapshot_xmls()[name]
        self._journal.save()
        self._stand = _Stand(name, self.domain.fingerprint())

    def _stands_at(self, snapshot: str) -> bool:
        """Tell whether we put the machine there and nobody touched it since."""
        stand = self._stand
        if stand is None or stand.snapshot != snapshot:
            return False
        return self.domain.fingerprint() == stand.fingerprint

    def _bring_up(self) -> None:
        """Make the machine run and wait until it is ready; it may be anywhere from now on."""
        self._stand = None
        state = self.domain.state()
        if state == "running":
            return
        if state == "paused":
            self.domain.resume()
        else:
            self.domain.start()
        self._arrive()

    def _arrive(self) -> None:
        """Wait for a machine that just came up; set its clock and look for marks."""
        wait_ready(self.domain, self._ready, self._settings.ready_timeout)
        if self._ready == "agent":
            set_clock(self.domain)
        marked, self._marked = self._marked, None
        left = marked.look() if marked is not None else ""
        if left is None:
            self.unproven.append(self._journal.test)
        elif left:
            raise RevertError(
                "the revert did not bring the machine back",
                where=self.domain.where,
                why=f"a mark made right before it was not gone after it; {left}",
                cure="keep the machine for a look and report it: libvirt or QEMU is at fault here",
            )

    # the way back

    def _revert(self, snapshot: str) -> bool:
        """Revert with force and prove it; tell whether the guest took marks for the proof."""
        self._stand = None
        self._marked = self._mark()
        is_marked = self._marked is not None
        restore.revert(self.domain, self._journal, snapshot, self._settings.revert_timeout)
        restore.delete_unknown(self.domain, set(self._states))
        self._check_state(snapshot)
        if self._states[snapshot] == "running":
            self._arrive()
        self._stand = _Stand(snapshot, self.domain.fingerprint())
        return is_marked

    def _plant(self) -> None:
        """Allocate the canary's block before a snapshot is taken."""
        if self._takes_marks():
            Canary(Agent(self.domain), self._journal.run).plant()

    def _mark(self) -> Canary | None:
        """Have the guest make the marks that a revert must wipe out; None when it cannot."""
        try:
            if not self._takes_marks() or self.domain.state() != "running":
                return None
        except MachineError:  # the domain is gone; the revert brings it back
            return None
        canary = Canary(Agent(self.domain), secrets.token_hex(8))
        return canary if canary.mark() else None

    def _takes_marks(self) -> bool:
        return self._settings.verify == "canary" and self._ready == "agent"

    def _check_state(self, snapshot: str) -> None:
        state, current = self.domain.state(), self.domain.current()
        if (state, current) != (self._states[snapshot], snapshot):
            raise RevertError(
                f"the machine is not where the revert to {snapshot!r} should have brought it",
                where=self.domain.where,
                why=f"it is {state} at the snapshot {current!r}; expected"
                f" {self._states[snapshot]} at {snapshot!r}",
            )
