"""Undoing what runs of other hosts and containers left: `--kvmsnap-clean --kvmsnap-force`.

The journal of such a run is not here. Its snapshots are, with run and host in their descriptions,
and the `kvmsnap-found…` one holds the machine as it was. What only the journal knows cannot be
undone: the autostart flag, a new name, a conversion that was under way. Nor can we tell a throwaway
machine from others, so it is put back, not removed.
"""

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_kvmsnap.errors import DomainNotFoundError, KvmsnapError
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.lab import restore
from pytest_kvmsnap.lab.journal import Found, Journal
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.lab.site import Site
from pytest_kvmsnap.machine import orphans
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.domainxml import Snapshot
from pytest_kvmsnap.machine.preflight import OURS

_DESCRIPTION = re.compile(rf"{re.escape(OURS)}(\S+) on (.*), pid \d+")  # Journal.description()


@dataclass(frozen=True)
class _Run:
    """A run and its snapshots of a machine, parents before children."""

    name: str
    host: str
    snapshots: tuple[Snapshot, ...]

    @property
    def description(self) -> str:
        return self.snapshots[0].description

    @property
    def found(self) -> Snapshot | None:
        """The one that holds the machine as it was found."""
        named = (s for s in self.snapshots if s.name == f"kvmsnap-found-{self.name}")
        return next(named, None)

    def may_live_here(self) -> bool:
        """Tell whether it may be a process of this host: one with another folder of locks.

        Workers of pytest-xdist hand a machine on, so that one run may have several processes.
        """
        pids = {snapshot.description.rpartition(" ")[2] for snapshot in self.snapshots}
        return self.host == socket.gethostname() and any(map(_is_python, pids))


def _is_python(pid: str) -> bool:
    try:
        return b"py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def undo(site: Site, is_meant: Callable[[str], bool]) -> int:
    """Put back the machines, of those whose names `is_meant` tells, that no journal here knows.

    What dead runs of this host left must have been undone before. Returns how many machines failed.
    """
    failures = seen = 0
    for name in filter(is_meant, site.hypervisor.names()):
        try:
            seen += _undo_on(site.domain(name), site)
        except DomainNotFoundError:  # somebody undefined it meanwhile
            continue
        except KvmsnapError as error:
            failures += 1
            site.voice.line(str(error))
    if not seen and not failures:
        site.voice.line("nothing to force: no run of another host or container left anything")
    return failures


def _undo_on(domain: Domain, site: Site) -> bool:
    """Undo all such runs on one machine, the newest first; tell whether there were any."""
    if not _runs_on(domain):
        return False
    lease = site.lease(domain)
    is_free = lease.try_take()
    try:
        if lease.journal_path.exists():
            # A run of this host: it lives, or could not be undone. `clean` told so, and what is
            # older must wait for that.
            return True
        if not is_free:
            site.voice.line(f"left {domain.name} alone: a process of this host has just taken it")
            return True
        for run in _runs_on(domain):
            if run.may_live_here():
                site.voice.line(
                    f"left {domain.name} alone: a living process of this host may be the"
                    f" {run.description}, with another --kvmsnap-lock-dir; end it first"
                )
                break
            site.voice.line(_undo_run(domain, run, lease, site))
    finally:
        lease.release()
    return True


def _runs_on(domain: Domain) -> list[_Run]:
    """Return the runs that snapshots of a machine tell of, the newest first.

    libvirt keeps times to the second, so that it is the place in the tree that tells in the end.
    """
    runs: dict[tuple[str, str], list[Snapshot]] = {}
    for snapshot in domain.snapshots():
        match = _DESCRIPTION.fullmatch(snapshot.description)
        if match is not None:
            runs.setdefault((match[1], match[2]), []).append(snapshot)
    found = [_Run(*key, tuple(snapshots)) for key, snapshots in runs.items()]
    found.sort(key=lambda run: min(snapshot.created for snapshot in run.snapshots))
    return found[::-1]


def _undo_run(domain: Domain, run: _Run, lease: Lease, site: Site) -> str:
    """Undo one run; return what to tell of it."""
    uri = domain.hypervisor.uri
    journal = Journal(lease.journal_path, run.name, uri, domain.name, domain.uuid, host=run.host)
    if run.found is None or orphans.without_data(domain, [run.found.name]):
        restore.delete_ours(domain, journal)
        return (
            f"deleted the snapshots of {domain.name} that were left by {run.description}; none of"
            " them held how it was found, so it stays as it is"
        )
    _put_back(domain, run.found, journal, site)
    state = run.found.state
    return f"put {domain.name} back as found ({state}), which was left by {run.description}"


def _put_back(domain: Domain, found: Snapshot, journal: Journal, site: Site) -> None:
    """Revert to the found snapshot, then do what is due at the end of a run."""
    if not domain.is_defined():  # it runs, and a test undefined it
        domain.hypervisor.define(domain.xml(inactive=True))
    settings = site.settings
    restore.revert(domain, journal, found.name, settings.revert_timeout)
    ours = set(restore.names_of(domain, journal))
    xmls = domain.snapshot_xmls()
    journal.found_snapshot = found.name
    journal.planted = True  # for all that we know
    journal.found = Found(
        state=found.state,
        autostart=domain.autostart(),
        current=found.parent,
        definition=domain.xml(inactive=True),
        snapshots={name: xml for name, xml in xmls.items() if name not in ours},
    )
    restore.as_found(Guest(domain, settings), journal, settings.revert_timeout, at=found.name)
