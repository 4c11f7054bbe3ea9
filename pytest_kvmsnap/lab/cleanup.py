"""Undoing what dead runs left: at the next lease of the machine, or by `--kvmsnap-clean`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from pytest_kvmsnap.errors import KvmsnapError, LeaseError
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.lab import journal as journals
from pytest_kvmsnap.lab import restore
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.machine.clone import remove_folder
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import Hypervisor, connect
from pytest_kvmsnap.settings import Settings


def work_off(domain: Domain, lease: Lease, settings: Settings, tell: Callable[[str], None]) -> None:
    """Put a machine back if a run that held this lease before us could not; tell so in one line.

    Whoever holds the lease knows that the run in the journal is dead: its lock died with it.
    """
    journal = journals.load(lease.journal_path)
    if journal is None:
        return
    restore.as_found(Guest(domain, settings), journal, settings.revert_timeout)
    state = f" ({journal.found.state})" if journal.found else ""
    done = f"put {domain.name} back as found{state}"
    if journal.clone is not None:
        done = f"removed the throwaway machine {domain.name}"
    why = "a run ended without doing so"
    if journal.clean is not None:
        why = "a worker had left it clean for another one of its run"
    tell(f"{done}: {why} ({journal.owner()})")


def remove_dead_clones(
    folder: Path, hypervisor: Hypervisor, settings: Settings, tell: Callable[[str], None]
) -> None:
    """Remove the throwaway machines that dead runs left: nobody will ask for these by name.

    What cannot be removed is told, and no reason not to go on.
    """
    for path in sorted(folder.glob("*.json")):
        lease = Lease(path)
        try:
            journal = journals.load(path)
            if journal is None or journal.clone is None or journal.uri != hypervisor.uri:
                continue
            if lease.try_take():
                domain = Domain(hypervisor, journal.uuid, journal.name)
                work_off(domain, lease, settings, tell)
        except LeaseError:  # another user's, whose next run removes it
            continue
        except KvmsnapError as error:
            tell(str(error))
        finally:
            lease.release()


def clean(
    folders: Iterable[Path],
    connected: Hypervisor | None,
    settings: Settings,
    tell: Callable[[str], None],
) -> int:
    """Undo everything that dead runs of this host left; return how many machines failed."""
    hypervisors = {connected.uri: connected} if connected is not None else {}
    failures = seen = 0
    try:
        for path in (path for folder in folders for path in journals.places_in(folder)):
            seen += path.exists()
            try:
                _clean_one(path, hypervisors, settings, tell)
            except KvmsnapError as error:
                failures += 1
                tell(str(error))
    finally:
        for hypervisor in hypervisors.values():
            if hypervisor is not connected:
                hypervisor.close()
    if not seen:
        tell("nothing to clean: no run of this host left anything")
    return failures


def _clean_one(
    path: Path,
    hypervisors: dict[str, Hypervisor],
    settings: Settings,
    tell: Callable[[str], None],
) -> None:
    lease = Lease(path)
    if not lease.try_take():
        journal = journals.load(path)
        if journal is not None:
            tell(f"left {journal.name} alone: it is in use by {journal.owner()}")
        return
    try:
        journal = journals.load(path)
        if journal is None:
            journals.remove_draft(path)
            return
        domain = _domain_of(journal, hypervisors)
        if domain is None:
            if journal.clone is not None:
                remove_folder(journal.clone)
            journal.remove()
            tell(f"forgot {journal.name}: its libvirt is gone ({journal.owner()})")
        else:
            work_off(domain, lease, settings, tell)
    finally:
        lease.release()


def _domain_of(journal: Journal, hypervisors: dict[str, Hypervisor]) -> Domain | None:
    """Return the domain of a journal, None when its whole embedded libvirt is gone."""
    address = urlsplit(journal.uri)
    if address.path == "/embed" and not Path(parse_qs(address.query)["root"][0]).is_dir():
        return None
    if journal.uri not in hypervisors:
        hypervisors[journal.uri] = connect(journal.uri)
    return Domain(hypervisors[journal.uri], journal.uuid, journal.name)
