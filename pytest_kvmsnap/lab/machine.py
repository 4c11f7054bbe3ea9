"""A leased machine: going to a snapshot, keeping one, and the way back with its proof."""

import contextlib
import itertools
import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

from pytest_kvmsnap.errors import (
    AgentLostError,
    ConnectionLostError,
    KvmsnapError,
    MachineError,
    QuarantinedError,
    RevertError,
    SnapshotError,
    SnapshotNotFoundError,
)
from pytest_kvmsnap.guest.canary import Canary
from pytest_kvmsnap.guest.clock import Clock
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.lab import restore
from pytest_kvmsnap.lab.fast import FastReverts
from pytest_kvmsnap.lab.growth import Growth
from pytest_kvmsnap.lab.journal import Clean, Journal
from pytest_kvmsnap.lab.kept import Keeper, Kept
from pytest_kvmsnap.lab.ledger import Ledger
from pytest_kvmsnap.lab.slots import Slots
from pytest_kvmsnap.lab.voice import Voice
from pytest_kvmsnap.machine import space
from pytest_kvmsnap.machine.domain import Domain, Fingerprint
from pytest_kvmsnap.settings import Settings
from pytest_kvmsnap.vm import VM

_T = TypeVar("_T")
_SHUTDOWN = 120.0  # seconds for a guest to go off by itself, where live=no asks for it


class _Stand(NamedTuple):
    """A snapshot that the machine provably stands at, and how it looks from outside there."""

    snapshot: str
    fingerprint: Fingerprint


class Machine:
    """One machine, ours until `close`.

    `guest` is the system in it.
    `unproven` are the tests after which the guest could not take or look for the canary's marks,
    so that the revert is proven by power state and current snapshot alone. `failure` is why the
    machine is in quarantine, None while it is not.
    """

    def __init__(
        self,
        domain: Domain,
        journal: Journal,
        settings: Settings,
        slots: Slots,
        voice: Voice,
        *,
        ledger: Ledger,
    ) -> None:
        self.domain = domain
        self.ledger = ledger
        self.unproven: list[str] = []
        self._journal = journal
        self._settings = settings
        self._slots = slots
        self._voice = voice
        self.guest = Guest(domain, settings)
        self._keeper = Keeper(domain, journal, ledger, settings.keep_max)
        self._roots: set[str] = set()  # snapshots that tests started from
        domain.console.begin()
        self._fast = FastReverts(domain, voice.line) if settings.revert == "fast" else None
        self._clock = Clock(domain)
        self._found = journal.found or restore.look(domain)  # found by the worker before us
        self._growth = Growth(domain, settings.growth_limit)
        self._powers = {snapshot.name: snapshot.state for snapshot in domain.snapshots()}
        self._baseline: str | None = None
        self._forgotten: set[str] = set()  # snapshots that are to be deleted
        self._numbers = defaultdict[str, Iterator[int]](lambda: itertools.count(1))
        self._stand: _Stand | None = None
        self._user = ""  # the test that used the machine last
        self._is_used = False  # since the last revert
        self._is_halted = False  # perhaps, by a libvirt that died: it is to run on
        self._marked: Canary | None = None
        self.failure: KvmsnapError | None = None
        if self._found.state not in ("running", "paused", "shut off"):
            raise MachineError(
                f"the machine is {self._found.state!r}, which tests cannot start from",
                where=domain.where,
                cure="start it or shut it off first",
            )
        journal.found = self._found
        left, journal.clean = journal.clean, None
        if left is not None:
            self._baseline = left.baseline
            self._stand = _Stand(left.snapshot, Fingerprint(*left.fingerprint))
        journal.save()

    @property
    def has_failed(self) -> bool:
        """Whether the machine is in quarantine."""
        return self.failure is not None

    @property
    def has_come_up(self) -> bool:
        """Whether it was there, ready, to start tests from."""
        return self._baseline is not None

    def vm(self, on_use: Callable[[], None]) -> VM:
        """Return the machine as tests and fixtures hold it; `on_use` is called at each use."""
        return VM(
            self.guest,
            revert_timeout=self._settings.revert_timeout,
            description=self._journal.description(),
            on_use=on_use,
            on_snapshot=self._note_snapshot,
            show=self._voice.show,
        )

    def used_by(self, test: str) -> None:
        """Note for which test the machine is worked on, for people who wait for it."""
        if self._journal.test != test:
            self._journal.test = test
            self._journal.save()

    def _note_snapshot(self, name: str) -> None:
        """Note that a test is about to take a snapshot: a kill may leave it in the image alone."""
        if name not in self._journal.by_tests:
            self._journal.by_tests.append(name)
            self._journal.save()

    def growth(self) -> list[str]:
        """Return what to tell of images that grew, after the last test; each is told once."""
        return self._growth.news(self._journal.test)

    def note_growth(self) -> None:
        """Note by how much the images grew, once the machine is no more of use to us."""
        self.ledger.growth += self._growth.so_far()

    # the way to a state

    def start_of(self, snapshot: str | None) -> str:
        """Return the snapshot that tests start from: an existing one, or (None) the baseline.

        Raises:
            QuarantinedError: the machine failed before.
            MachineError: the baseline cannot be had; the machine is in quarantine from now on.
        """
        if snapshot is not None and snapshot not in self._powers:
            raise SnapshotNotFoundError(
                f"the snapshot {snapshot!r} was made after this run took the machine",
                where=self.domain.where,
                cure="start the run again",
            )
        with self._in_quarantine_if_it_fails():
            found = self._found_snapshot()
            root = snapshot if snapshot is not None else self._baseline_from(found)
            self._roots.add(root)
            return root

    def go(self, snapshot: str, *, as_kept: bool = False) -> None:
        """Bring the machine to a snapshot of it.

        It is running and ready then, or, with `as_kept`, in the power state that was kept.

        Raises:
            QuarantinedError: the machine failed before.
            MachineError: it cannot be brought there; it is in quarantine from now on.
        """
        with self._in_quarantine_if_it_fails():
            if not self._stands_at(snapshot):
                self._revert(snapshot)
            elif self._fast is not None:
                self._fast.note(snapshot)  # perhaps another worker brought it there
            if not as_kept:
                self._bring_up(snapshot)
            self.domain.console.listen()

    def back(self, snapshot: str) -> None:
        """Put the machine back after a use of it, with force, and prove it.

        Raises:
            RevertError: it failed or could not be proven; the machine is in quarantine now.
        """
        with self._in_quarantine_if_it_fails():
            self._revert(snapshot)

    def touched(self) -> None:
        """Note that somebody used the machine, who may have changed what cannot be seen outside."""
        self._stand = None
        self._is_used = True
        self._user = self._journal.test

    # snapshots of ours

    def keep(self, label: str) -> tuple[str, ...]:
        """Keep the machine as a preparation left it: ready, or (live=no) shut down.

        Returns the name of the new snapshot and of those that the preparation took itself.

        Raises:
            MachineError: it did not get ready, or the snapshot could not be taken.
        """
        if self.domain.state() == "running":
            with self.ledger.getting_ready():
                self.guest.wait_ready()
            if self._settings.live:
                self._plant()
            else:
                with self.ledger.taking():
                    self.domain.shutdown(_SHUTDOWN)
        return self.keep_as_it_is(label)

    def keep_as_it_is(self, label: str) -> tuple[str, ...]:
        """Keep the machine as it is now; like `keep`."""
        self._go_on()
        name = self._name(label)
        theirs = self._adopt()
        try:
            self._take(name)
        except ConnectionLostError:  # where they are, they stay
            self._disown(theirs)
            raise
        except KvmsnapError:
            self.forget(theirs)
            raise
        return (name, *theirs)

    def keep_for_people(self, test: str, in_use: Collection[str]) -> str:
        """Keep the machine as a test leaves it, for whoever looks into that; oldest out first.

        `in_use` are snapshots that tests of this run start from. With live=no it is shut down
        first: its memory is what people then do not want to have in a snapshot. Returns the name
        of the snapshot.

        Raises:
            MachineError: the snapshot could not be taken, or none deleted to make room.
        """
        if not self._settings.live and self.domain.state() == "running":
            with contextlib.suppress(MachineError):
                self.domain.shutdown(_SHUTDOWN)
            self.domain.destroy()
        found = {self._found.current} if self._found.current is not None else set()
        for name in self._keeper.make_room({*in_use, *self._roots, *found}):
            self._powers.pop(name, None)
        space.check_space(self.domain)
        kept = self._keeper.keep(test)
        self._powers[kept.name] = kept.state
        return kept.name

    @property
    def kept(self) -> list[Kept]:
        """The states that this run kept for people."""
        return self._keeper.kept

    def forget(self, snapshots: tuple[str, ...]) -> None:
        """Let go of snapshots that serve no more; the next revert or `tidy` deletes them."""
        self._disown(snapshots)
        self._forgotten.update(snapshots)

    def _disown(self, snapshots: tuple[str, ...]) -> None:
        for name in snapshots:
            self._powers.pop(name, None)
            self._journal.taken.pop(name, None)

    def tidy(self) -> None:
        """Delete what was let go of, when no revert has come since.

        Raises:
            QuarantinedError: the machine failed before.
            MachineError: that failed; the machine is in quarantine from now on.
        """
        with self._in_quarantine_if_it_fails():
            self._despite_a_loss(self._delete_forgotten)

    def _delete_forgotten(self) -> None:
        if not self._forgotten:
            return
        with self.ledger.taking():
            restore.delete(self.domain, self._forgotten.__contains__)
        if self._fast is not None:
            self._fast.deleted(self._forgotten)
        self._forgotten.clear()

    def waits_for(self, journals: list[str]) -> None:
        """Note for which machines this process waits while it keeps this one."""
        if self._journal.waits_for != journals:
            self._journal.waits_for = journals
            self._journal.save()

    def leave_clean(self, made_by: list[Any]) -> bool:
        """Leave the machine to another worker of this run, if it is provably clean; tell whether.

        Its snapshots of this run are those that all tests start from. See `Clean` for `made_by`.
        """
        stand, found = self._stand, self._journal.found_snapshot
        if stand is None or found is None or self.has_failed or self._marked is not None:
            return False
        further = self._journal.taken.keys() - {found, self._baseline}
        if further or not self._stands_at(stand.snapshot):
            return False
        self._journal.clean = Clean(
            stand.snapshot, list(stand.fingerprint), self._baseline, made_by
        )
        self._journal.test = ""
        self._journal.save()
        self._let_go()
        return True

    def close(self) -> None:
        """Leave the machine as it was found.

        Raises:
            MachineError: that failed; the journal stays for the next try.
        """
        try:
            self._despite_a_loss(self._leave_as_found)
        except ConnectionLostError as error:
            error.cure = "the next run puts the machine back, or pytest --kvmsnap-clean does"
            raise
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self.domain.await_agent()  # for whoever comes next, and goes by libvirt
        self.domain.hang_up()
        if self._fast is not None:
            self._fast.close()

    def _leave_as_found(self) -> None:
        self._go_on()
        goal = self._journal.found_snapshot
        with self._slots.one():
            restore.as_found(
                self.guest,
                self._journal,
                self._settings.revert_timeout,
                at=goal if goal is not None and self._stands_at(goal) else None,
            )

    @contextlib.contextmanager
    def _in_quarantine_if_it_fails(self) -> Iterator[None]:
        if self.failure is not None:
            raise QuarantinedError(
                "the machine is in quarantine, since it failed before",
                where=self.domain.where,
                why=str(self.failure),
            )
        try:
            yield
        except ConnectionLostError:  # no fault of the machine; but who knows where it stands now
            self._stand = None
            if self._journal.found_snapshot is None:
                self._is_halted = self._found.state == "running"
            raise
        except KvmsnapError as error:
            self.failure = error
            self.ledger.failed(error)
            raise

    def _despite_a_loss(self, act: Callable[[], _T]) -> _T:
        """Do again, on a new connection, what the loss of the old one interrupted."""
        try:
            return act()
        except ConnectionLostError:
            if self.domain.hypervisor.is_away:
                raise
            return act()

    # the states that everything starts from

    def _found_snapshot(self) -> str:
        """Return the snapshot to go back to at the end, taken when there is none."""
        if self._journal.found_snapshot is None:
            self._go_on()
            if self._found.state == "running" and self._settings.live:
                with self.ledger.getting_ready():
                    self.guest.wait_ready()
                self._journal.planted = self._takes_marks()
                self._journal.save()
                self._plant()
            self._journal.found_snapshot = self._name("found")
            try:
                self._take(self._journal.found_snapshot)
            except ConnectionLostError:  # it stands or not; the next test takes another
                self._journal.found_snapshot = None
                raise
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
        self._bring_up(found)
        self._baseline, *_ = self.keep("base")
        return self._baseline

    def _name(self, label: str) -> str:
        """Return a new name for a snapshot; a label is of letters, digits and underscores."""
        number = next(self._numbers[label])
        again = f"-{number}" if number > 1 else ""
        return f"kvmsnap-{label}{again}-{self._journal.run}"

    def _take(self, name: str) -> None:
        """Take a snapshot of ours, announced in the journal first."""
        with self.ledger.taking():
            self._take_it(name)
        self.ledger.snapshots += 1

    def _take_it(self, name: str) -> None:
        space.check_space(self.domain)
        self._journal.taken.setdefault(name, "")
        self._journal.save()
        is_running = self.domain.state() == "running"
        try:
            taken = self.domain.take_snapshot(name, self._journal.description())
        except ConnectionLostError:
            self._is_halted = is_running
            with contextlib.suppress(KvmsnapError):  # else later: what broke is what is to be told
                self._go_on()
            raise
        except SnapshotError as error:
            raise space.explain(self.domain, error) from None
        self._powers[name] = taken.state
        self._journal.taken[name] = self.domain.snapshot_xmls()[name]
        self._journal.save()
        self._stands_now_at(name)

    def _stands_now_at(self, snapshot: str) -> None:
        """Note that the machine was just brought to a snapshot."""
        self._stand = _Stand(snapshot, self.domain.fingerprint())
        if self._fast is not None:
            self._fast.note(snapshot)

    def _go_on(self) -> None:
        """Have a machine run on that a libvirt which died stopped.

        It leaves the guest paused if it was taking a snapshot. The next one may end QEMU: it takes
        the answer to the old one for its own (seen on 9.0, in a few of 40 snapshots).
        """
        if self._is_halted:
            state = self.domain.state()
            if state == "paused":
                self.domain.resume()
            elif state == "shut off":
                self.domain.start()
        self._is_halted = False

    def _adopt(self) -> tuple[str, ...]:
        """Return the snapshots that somebody took by `VM.snapshot`, which are known from now on."""
        unknown = [s for s in self.domain.snapshots() if s.name not in self._powers]
        for snapshot in unknown:
            self._powers[snapshot.name] = snapshot.state
        xmls = self.domain.snapshot_xmls() if unknown else {}
        self._journal.taken |= {snapshot.name: xmls[snapshot.name] for snapshot in unknown}
        names = tuple(snapshot.name for snapshot in unknown)
        # those too that were not announced, since a test took them by libvirt itself
        self._journal.by_tests = list(dict.fromkeys([*self._journal.by_tests, *names]))
        return names

    def _stands_at(self, snapshot: str) -> bool:
        """Tell whether we put the machine there and nobody touched it since."""
        stand = self._stand
        if stand is None or stand.snapshot != snapshot:
            return False
        return self.domain.fingerprint() == stand.fingerprint

    def _bring_up(self, snapshot: str) -> None:
        """Make a machine that stands at a snapshot run, and wait until it is ready."""
        if self.domain.state() == "running":
            return
        try:
            self._run()
        except AgentLostError:
            # No new marks: nobody used it, and those of the test before are still to be looked for.
            self._revert_once(snapshot)
            self._run()

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """Hold one of the host's slots for reverts and boots."""
        with contextlib.ExitStack() as stack:
            with self.ledger.waiting():
                stack.enter_context(self._slots.one())
            yield

    def _run(self) -> None:
        with self.ledger.getting_ready(), self._slot():
            if self.domain.state() == "paused":
                self.domain.resume()
            else:
                self.domain.start()
                self.ledger.boots += 1
            self._stand = None
            self._arrive()

    def _arrive(self) -> None:
        """Wait for a machine that just came up; set its clock and look for marks."""
        self.guest.wait_ready()
        left: str | None = ""
        if self._marked is not None:
            left = self._marked.look(self._clock)
        else:
            self.guest.set_clock()
        self._marked = None  # only now: a lost connection leaves them to the next revert
        if left is None:
            self.unproven.append(self._user)
        elif left:
            raise RevertError(
                "the revert did not bring the machine back",
                where=self.domain.where,
                why=f"a mark made right before it was not gone after it; {left}",
                cure="keep the machine for a look and report it: libvirt or QEMU is at fault here",
            )

    # the way back

    def _revert(self, snapshot: str) -> None:
        """Revert with force and prove it."""
        with self.ledger.reverting():
            self._revert_and_prove(snapshot)

    def _revert_and_prove(self, snapshot: str) -> None:
        self._stand = None
        self._is_halted = False
        self._marked = self._despite_a_loss(self._mark)
        is_unproven = self._is_used and self._marked is None and self._takes_marks()
        revert = partial(self._revert_once, snapshot)
        try:
            self._despite_a_loss(revert)
        except AgentLostError:
            if self._fast is not None:
                self._fast.forget()
            self._despite_a_loss(revert)
        if is_unproven:
            self.unproven.append(self._user)
        self._is_used = False
        self._stands_now_at(snapshot)

    def _revert_once(self, snapshot: str) -> None:
        with self.ledger.reverting(), self._slot():
            timeout = self._settings.revert_timeout
            if self._fast is not None and self._fast.revert(snapshot, timeout):
                self.ledger.reverted(fast=True)
                self._delete_forgotten()  # the test took none of its own, so these are all
            else:
                restore.revert(self.domain, self._journal, snapshot, timeout)
                self.ledger.reverted(fast=False)
                restore.delete(self.domain, lambda name: name not in self._powers)
                self._forgotten.clear()
            self._check_state(snapshot)
            if self._powers[snapshot] == "running":
                with self.ledger.getting_ready():
                    self._arrive()

    def _plant(self) -> None:
        """Allocate the canary's block before a snapshot is taken."""
        if self._takes_marks():
            with self.ledger.taking():
                Canary(self.guest.agent, self._journal.run).plant()

    def _mark(self) -> Canary | None:
        """Have the guest make the marks that a revert must wipe out; None when it cannot."""
        try:
            if not self._takes_marks() or self.domain.state() != "running":
                return None
        except ConnectionLostError:
            raise
        except MachineError:  # the domain is gone; the revert brings it back
            return None
        canary = Canary(self.guest.agent, secrets.token_hex(8))
        return canary if canary.mark() else None

    def _takes_marks(self) -> bool:
        return self._settings.verify == "canary" and self.guest.has_agent

    def _check_state(self, snapshot: str) -> None:
        state, current = self.domain.state(), self.domain.current()
        if (state, current) != (self._powers[snapshot], snapshot):
            raise RevertError(
                f"the machine is not where the revert to {snapshot!r} should have brought it",
                where=self.domain.where,
                why=f"it is {state} at the snapshot {current!r}; expected"
                f" {self._powers[snapshot]} at {snapshot!r}",
            )
