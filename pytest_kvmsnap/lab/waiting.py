"""Waiting for machines that others hold: people are told for whom, and nobody waits in a circle."""

import os
import pwd
import socket
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from pytest_kvmsnap.errors import LeaseError
from pytest_kvmsnap.lab import journal as journals
from pytest_kvmsnap.lab.journal import Journal

_POLL = 0.05
_LOOK = 0.5  # seconds between two looks at who holds what


class Wait:
    """The wait for one machine, or for any of several.

    It tells people for whom after 2 s, then at growing intervals. It ends when the same owners had
    the machines for `timeout` seconds. `meanwhile` is called now and then with the journals of the
    machines, and may raise.
    """

    def __init__(
        self,
        what: str,
        timeout: float,
        tell: Callable[[str], None],
        meanwhile: Callable[[Sequence[Path]], None] = lambda _journals: None,
    ) -> None:
        self._what = what
        self._timeout = timeout
        self._tell = tell
        self._meanwhile = meanwhile
        self._owners: object = None
        self._pause = 2.0
        now = time.monotonic()
        self._end = now + timeout
        self._next_look = now
        self._next_words = now + self._pause

    def go_on(self, paths: Sequence[Path]) -> None:
        """Wait a moment for the machines with these journals.

        Raises:
            LeaseError: the same owners had them for too long.
        """
        time.sleep(_POLL)
        now = time.monotonic()
        if now < self._next_look and now < self._end:
            return
        self._next_look = now + _LOOK
        self._meanwhile(paths)
        looks = [_look(path) for path in paths]
        owners = [owner for owner, _ in looks]
        words = "; ".join(dict.fromkeys(text for _, text in looks))
        if owners != self._owners:
            self._owners, self._end = owners, now + self._timeout
        elif now >= self._end:
            raise LeaseError(
                "the machine belongs to another process",
                where=self._what,
                why=f"waited {self._timeout:g} s for {words}",
                cure="let that run end, or wait longer with --kvmsnap-lock-timeout",
            )
        if now >= self._next_words:
            self._pause *= 2
            self._next_words = now + self._pause
            self._tell(f"waiting for {self._what}, held by {words}")


def _look(path: Path) -> tuple[object, str]:
    """Return what tells owners apart, and words for the present one."""
    try:
        journal = journals.load(path)
    except LeaseError:
        return "another user", f"a process of {_owner_of(path)}"
    if journal is None:
        return None, "a process that has just taken it"
    # Another worker of our own run is not stuck while it goes from test to test.
    is_ours = journal.testrun and journal.testrun == journals.testrun()
    return (journal.host, journal.pid, journal.test if is_ours else ""), journal.owner()


def _owner_of(path: Path) -> str:
    """Return whose journal it is, which only that user may read."""
    try:
        return f"the user {pwd.getpwuid(path.stat().st_uid).pw_name}"
    except (OSError, KeyError):  # it was just removed, or the user has no name here
        return "another user"


def circle(wanted: Collection[Path], kept: Collection[Path]) -> list[Journal]:
    """Return who waits, in a circle, for what we keep while we wait; empty where there is none.

    All by their journals, in which each says what it waits for while it keeps that machine. One
    that waits for any of several is stuck only when all of these are. A circle that we wait for
    without being in it is for those in it to break.
    """
    stuck: dict[Path, Journal] = {}
    to_see = list(wanted)
    while to_see:
        path = to_see.pop(0)
        if path in kept or path in stuck:
            continue
        journal = _waiting(path)
        if journal is None:
            return []
        stuck[path] = journal
        to_see += waited_for(journal)
    with_us = set(kept)  # what leads to us; all that we wait for does so where we are in the circle
    for _ in stuck:
        with_us |= {path for path, each in stuck.items() if with_us & set(waited_for(each))}
    return list(stuck.values()) if with_us >= stuck.keys() else []


def _waiting(path: Path) -> Journal | None:
    """Return the journal of a machine whose owner waits for others, None when it can go on."""
    try:
        journal = journals.load(path)
    except LeaseError:  # another user's, whose waits nobody else may read
        return None
    return journal if journal is not None and journal.waits_for else None


def waited_for(journal: Journal) -> list[Path]:
    """Return the journals of the machines that a process waits for."""
    return [journal.path.with_name(name) for name in journal.waits_for]


def is_to_yield(others: Collection[Journal]) -> bool:
    """Tell whether it is this process of a circle that must give way; all come to the same."""
    me = (socket.gethostname(), os.getpid())
    return all(me >= (journal.host, journal.pid) for journal in others)
