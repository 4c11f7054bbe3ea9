"""One process owns a machine at a time: a lock that dies with its owner, a journal beside it.

Further locks are held by those who wait for it, one process each: `….next-<run>.lock` by the first
of the workers of a run of pytest-xdist, `….next.lock` by the first of all others. So the owner can
see that it is waited for, and by whom, and when it gives the machine up, whoever waited comes
before it.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pytest_kvmsnap.errors import LeaseError
from pytest_kvmsnap.lab import journal as journals
from pytest_kvmsnap.lab.locks import Lock
from pytest_kvmsnap.lab.waiting import Wait
from pytest_kvmsnap.machine.domain import Domain


class Lease:
    """The right to a machine, for as long as this process lives or until it is released."""

    def __init__(self, journal_path: Path) -> None:
        self.journal_path = journal_path
        run = journals.testrun()
        label = f"-{hashlib.sha256(run.encode()).hexdigest()[:8]}" if run else ""
        self._is_of_workers = bool(run)
        self._lock = Lock(journal_path.with_suffix(".lock"))
        self._queue = journal_path.with_name(f"{journal_path.stem}.next{label}.lock")
        self._next = Lock(self._queue)

    @classmethod
    def of(cls, domain: Domain, folder: Path) -> "Lease":
        """Return the lease of a machine, not yet taken."""
        key = f"{domain.hypervisor.identity}-{domain.uuid}".encode()
        return cls(folder / f"{hashlib.sha256(key).hexdigest()[:24]}.json")

    def take(self, what: str, timeout: float, tell: Callable[[str], None]) -> None:
        """Take it; waits up to `timeout` seconds for each owner and tells for whom.

        Raises:
            LeaseError: somebody held it all the time, or the lock cannot be used.
        """
        take_first_free([self], Wait(what, timeout, tell))

    def try_take(self) -> bool:
        """Take it if it is free."""
        return self._lock.try_take()

    def take_unless_in_use(self, seconds: float = 60) -> bool:
        """Take it if no run works with the machine; others look at it for a moment only."""
        end = time.monotonic() + seconds
        while not self._lock.try_take(0.1):
            if self.journal_path.exists() or time.monotonic() > end:
                return False
        return True

    def is_wanted(self) -> bool:
        """Tell whether somebody waits for it."""
        return bool(self._waited_in())

    def is_wanted_by_run_alone(self) -> bool:
        """Tell whether only workers of our own run of pytest-xdist wait for it."""
        return self._is_of_workers and self._waited_in() == [self._queue]

    def _waited_in(self) -> list[Path]:
        """Return the queues, ours and those of other runs, in which somebody waits for it."""
        folder, key = self.journal_path.parent, self.journal_path.stem
        found = []
        for queue in folder.glob(f"{key}.next*.lock"):
            with contextlib.suppress(LeaseError):  # who may not use our locks waits in none
                if Lock(queue).is_taken():
                    found.append(queue)
        return found

    def release(self) -> None:
        """Give it back, with the lock's file, so that the folder does not grow."""
        self._lock.release()

    def try_unless_wanted(self) -> bool:
        """Take it if nobody holds it and nobody waits for it."""
        return not self.is_wanted() and self._lock.try_take()

    def queue(self) -> bool:
        """Wait for it, if nobody of our kind does; tell whether we are the next one of these.

        To be ended by `not_next`.
        """
        return self._next.try_take()

    def try_next(self) -> bool:
        """Take it if we are the next one, or can be, and nobody holds it."""
        return self.queue() and self._lock.try_take()

    def not_next(self) -> None:
        """Wait for it no more."""
        self._next.release()


def take_first_free(leases: Sequence[Lease], wait: Wait) -> Lease:
    """Take the first of these machines that is free, or gets free.

    Whoever comes while others wait, lets them go first.

    Raises:
        LeaseError: the same owners held them all the time, or a lock cannot be used.
    """
    for lease in leases:  # before any owner is told that it is waited for
        if lease.try_unless_wanted():
            return lease
    paths = [lease.journal_path for lease in leases]
    try:
        for lease in leases:
            lease.queue()
        while True:
            wait.go_on(paths)
            for lease in leases:
                if lease.try_next():
                    return lease
    finally:
        for lease in leases:
            lease.not_next()
