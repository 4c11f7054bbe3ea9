"""Putting a machine back: to a snapshot after a test, as it was found after a run or a crash."""

from collections.abc import Callable

from pytest_kvmsnap.errors import MachineError
from pytest_kvmsnap.guest.canary import Canary
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.lab.journal import Found, Journal
from pytest_kvmsnap.machine import clone, conversion, domainxml, orphans
from pytest_kvmsnap.machine.domain import Domain


def look(domain: Domain) -> Found:
    """Return the machine as it is now."""
    return Found(
        state=domain.state(),
        autostart=domain.autostart(),
        current=domain.current(),
        definition=domain.xml(inactive=True),
        snapshots=domain.snapshot_xmls(),
    )


def revert(domain: Domain, journal: Journal, snapshot: str, timeout: float) -> None:
    """Revert with force, whatever a test did to the domain.

    A block job would make the revert fail, and a managed save would put stale memory over the
    reverted disk at the next start. A revert restores neither an undefined domain nor its name nor
    the autostart flag.
    """
    _define_again(domain, journal)
    domain.restore_name()
    domain.end_block_jobs()
    if domain.has_managed_save():
        domain.remove_managed_save()
    domain.revert(snapshot, timeout)
    _define_again(domain, journal)  # where QEMU died in it, libvirt 9.0 may leave it transient
    if journal.found is not None:
        domain.set_autostart(journal.found.autostart)


def _define_again(domain: Domain, journal: Journal) -> None:
    """Bring back a domain that was undefined, with its snapshots, whose data is in the image."""
    found = journal.found
    if found is None or domain.is_defined():
        return
    domain.hypervisor.define(found.definition)
    present = {snapshot.name for snapshot in domain.snapshots()}
    known = found.snapshots | journal.kept | journal.taken
    missing = {name: xml for name, xml in known.items() if xml and name not in present}
    for xml in domainxml.parents_first(missing, present):
        domain.redefine_snapshot(xml, current=False)


def delete(domain: Domain, is_over: Callable[[str], bool]) -> None:
    """Delete the snapshots whose names `is_over` tells, children first."""
    for name in reversed(domain.snapshot_names()):
        if is_over(name):
            domain.delete_snapshot(name)


def as_found(
    guest: Guest, journal: Journal, revert_timeout: float, *, at: str | None = None
) -> None:
    """Leave a machine as a run found it, and forget the run. A throwaway machine is removed.

    `at` is the snapshot that it stands at, when that is sure.

    Raises:
        MachineError: it could not be put back; the journal stays, so that it can be tried again.
    """
    domain = guest.domain
    if journal.clone is not None:
        leave_clone(domain, journal)
        return
    _define_again(domain, journal)
    conversion.remove_leftovers(domain, journal.conversions)
    found = journal.found
    if found is not None:
        _go_back(domain, journal, found, revert_timeout, at)
        if found.state == "running" and (journal.planted or at is None):
            _tidy_guest(guest, journal)
        delete_ours(domain, journal)
        _restore_current(domain, found)
        if domain.xml(inactive=True) != found.definition:  # a revert changes the order of devices
            domain.hypervisor.define(found.definition)
        domain.set_autostart(found.autostart)
        _compare(domain, found)
    journal.remove()


def leave_clone(domain: Domain, journal: Journal) -> None:
    """Remove a throwaway machine, or leave it off where it holds states that are kept for people.

    Raises:
        MachineError: that failed; the journal stays.
    """
    if not any(journal.kept.values()):
        discard(domain, journal)
        return
    domain.destroy()
    delete_ours(domain, journal)
    journal.remove()


def discard(domain: Domain, journal: Journal) -> None:
    """Remove a throwaway machine with all that was made for it.

    Raises:
        MachineError: that failed; the journal stays.
    """
    if journal.clone is not None:
        clone.discard(domain, journal.clone)
    journal.remove()


def _go_back(
    domain: Domain, journal: Journal, found: Found, timeout: float, at: str | None
) -> None:
    goal = journal.found_snapshot
    if goal is not None and goal in {snapshot.name for snapshot in domain.snapshots()}:
        if at != goal and not _is_just_being_deleted(domain, journal, goal):
            revert(domain, journal, goal, timeout)
    elif found.state == "running" and domain.state() == "paused":
        domain.resume()  # a run killed while it took its first snapshot leaves the guest paused


def _is_just_being_deleted(domain: Domain, journal: Journal, goal: str) -> bool:
    """Tell whether a run was killed while it deleted this snapshot.

    It is the last to go, when the machine is back already. A revert to it would kill the machine.
    """
    return names_of(domain, journal) == [goal] and bool(orphans.without_data(domain, [goal]))


def _tidy_guest(guest: Guest, journal: Journal) -> None:
    """Remove the canary's block from a machine that was found running, and set its clock."""
    if guest.domain.state() != "running":
        return
    try:
        guest.wait_ready()
        guest.set_clock()
    finally:
        guest.domain.disconnect()
    if journal.planted:
        Canary(guest.agent, journal.run).remove()


def names_of(domain: Domain, journal: Journal) -> list[str]:
    """Return the names of this run's snapshots, parents before children."""
    return [s.name for s in domain.snapshots() if journal.is_of_run(s.description)]


def delete_ours(domain: Domain, journal: Journal) -> None:
    """Delete the snapshots of this run, children first, and nobody else's.

    With those that a kill left in the images only; of those whose data is gone, what libvirt knows.
    """
    unfinished = {name for name, xml in journal.kept.items() if not xml}
    known = domain.snapshot_names() if unfinished else []
    ours = [*names_of(domain, journal), *(name for name in known if name in unfinished)]
    without_data = orphans.without_data(domain, ours)
    for name in reversed(ours):
        if name in without_data:
            domain.forget_snapshot(name)
        else:
            domain.delete_snapshot(name)
    theirs = journal.found.snapshots if journal.found is not None else {}
    by_tests = set(journal.by_tests).difference(theirs)
    orphans.remove(
        domain,
        journal.description(),
        lambda name: name in by_tests | unfinished or orphans.is_of_run(name, journal.run),
    )


def _restore_current(domain: Domain, found: Found) -> None:
    """Make the snapshot current that was; deleting ours makes their parent so, mostly that one."""
    if found.current is None or domain.current() == found.current:
        return
    if found.current in domain.snapshot_xmls():  # else a test deleted it, and its data is gone
        domain.redefine_snapshot(found.snapshots[found.current], current=True)


def _compare(domain: Domain, found: Found) -> None:
    """Raise when the machine is not as it was found."""
    now = look(domain)
    differences = [
        f"{what} is {is_now!r}, was {was!r}"
        for what, is_now, was in (
            ("the state", now.state, found.state),
            ("autostart", now.autostart, found.autostart),
            ("the current snapshot", now.current, found.current),
        )
        if is_now != was
    ]
    lost = found.snapshots.keys() - now.snapshots.keys()
    if lost:
        differences.append(f"these snapshots are gone: {', '.join(sorted(lost))}")
    if differences:
        raise MachineError(
            "the machine could not be left as it was found",
            where=domain.where,
            why="; ".join(differences),
            cure="pytest --kvmsnap-clean tries again",
        )
