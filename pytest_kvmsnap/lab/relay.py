"""A machine goes from one worker of pytest-xdist to the next of the same run, with its snapshots.

The first leaves it clean, and its journal says so; the next finds it as it was left, or reverts it
first. What nobody takes over is put back as found by the last one out.
"""

import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

from pytest_kvmsnap.errors import KvmsnapError, LeaseError
from pytest_kvmsnap.lab import cleanup
from pytest_kvmsnap.lab import journal as journals
from pytest_kvmsnap.lab.journal import Clean, Journal
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.settings import Settings

if TYPE_CHECKING:
    from pytest_kvmsnap.lab.site import Site


def made_by(settings: Settings) -> list[Any]:
    """Return what the states of a machine depend on, beside the machine."""
    return [settings.live, settings.verify, settings.ready]


def is_for_us(journal: Journal | None, settings: Settings) -> bool:
    """Tell whether a worker of our own run left the machine clean, for workers like this one."""
    left = _left_by_our_run(journal)
    return left is not None and left.made_by == made_by(settings)


def _left_by_our_run(journal: Journal | None) -> Clean | None:
    """Return how a worker of our own run left the machine clean; its settings may be others."""
    if journal is None or journal.testrun != journals.testrun():
        return None
    return journal.clean


def can_be_taken_over(domain: Domain, journal: Journal, settings: Settings) -> bool:
    """Tell whether a machine is for us, and all the snapshots are there that it was left with."""
    if journal.clean is None or not is_for_us(journal, settings):
        return False
    needed = {journal.found_snapshot, journal.clean.snapshot, journal.clean.baseline} - {None}
    return needed <= {snapshot.name for snapshot in domain.snapshots()}


def taken_over(journal: Journal) -> Journal:
    """Return the journal of a machine that was left clean as one of this process."""
    return dataclasses.replace(journal, pid=os.getpid(), since=time.time(), test="")


def put_back_leftovers(site: "Site") -> list[KvmsnapError]:
    """Put back what workers of our run left clean and nobody waits for; return what went wrong."""
    failures: list[KvmsnapError] = []
    if not journals.testrun():
        return failures
    for path in sorted(site.place.glob("*.json")):
        lease = Lease(path)
        try:
            journal = journals.load(path)
            is_here = journal is not None and journal.uri == site.hypervisor.uri
            if is_here and _left_by_our_run(journal) is not None and not lease.is_wanted():
                _put_back(lease, site)
        except LeaseError:  # another user's
            continue
        except KvmsnapError as error:
            failures.append(error)
        finally:
            lease.release()
    return failures


def _put_back(lease: Lease, site: "Site") -> None:
    if lease.try_take():
        journal = journals.load(lease.journal_path)
        if journal is not None and _left_by_our_run(journal) is not None:
            domain = Domain(site.hypervisor, journal.uuid, journal.name)
            cleanup.work_off(domain, lease, site.settings, lambda _line: None)
