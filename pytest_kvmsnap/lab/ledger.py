"""What a machine cost in this run: counts and seconds, added up while the work is done."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_kvmsnap.errors import KvmsnapError

KINDS = ("take", "revert", "ready", "wait")
"""What seconds are spent on: snapshots, reverts, getting ready, and waits for others."""
COUNTS = ("snapshots", "reverts", "fast_reverts", "boots", "waits", "growth")
_NO_WAIT = 0.1
"""Seconds that nobody would call a wait: a lock is free, and taken."""


@dataclass(eq=False)
class Ledger:
    """The costs of one machine, over all the times that a process had it.

    `reverts` has the `fast_reverts` in it, but not the way back at the end of the run. `growth` is
    in bytes. `quarantine` is why the machine failed, empty while it did not; `kept` are the
    snapshots that stay for people to look at.
    """

    machine: str
    image: str = ""
    snapshots: int = 0
    reverts: int = 0
    fast_reverts: int = 0
    boots: int = 0
    waits: int = 0
    growth: int = 0
    quarantine: str = ""
    kept: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    clock: Callable[[], float] = time.perf_counter
    _kind: str | None = None  # of what is just being done
    _since: float = 0.0

    # while the work is done

    def taking(self) -> contextlib.AbstractContextManager[None]:
        """Snapshots are taken or deleted."""
        return self._spending("take")

    def reverting(self) -> contextlib.AbstractContextManager[None]:
        return self._spending("revert")

    def getting_ready(self) -> contextlib.AbstractContextManager[None]:
        """The machine boots or resumes, answers, and proves where it is."""
        return self._spending("ready")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Others have what is needed; if it is had at once, that is a part of what it is for."""
        outer = self._kind
        self._switch_to(None)
        begun = self._since
        try:
            yield
        finally:
            self._switch_to(outer)
            seconds = self._since - begun
            if not self.waited(seconds) and outer is not None:
                self.seconds[outer] += seconds

    def waited(self, seconds: float) -> bool:
        """Note a wait, unless nobody would call it one; tell which."""
        is_wait = seconds > _NO_WAIT
        if is_wait:
            self.seconds["wait"] += seconds
            self.waits += 1
        return is_wait

    def reverted(self, *, fast: bool) -> None:
        self.reverts += 1
        self.fast_reverts += fast

    def failed(self, error: KvmsnapError) -> None:
        """Note why the machine is in quarantine, in one line; the first cause counts."""
        lines = [part.strip().partition("\n")[0] for part in (error.what, error.why) if part]
        self.quarantine = self.quarantine or ": ".join(lines)

    @contextlib.contextmanager
    def _spending(self, kind: str) -> Iterator[None]:
        """Count the time for one kind, less what is counted for another one within it."""
        outer = self._kind
        self._switch_to(kind)
        try:
            yield
        finally:
            self._switch_to(outer)

    def _switch_to(self, kind: str | None) -> None:
        now = self.clock()
        if self._kind is not None:
            self.seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    # for another process

    def plain(self) -> dict[str, Any]:
        """Return all of it in lists, numbers and texts."""
        return {
            "machine": self.machine,
            "image": self.image,
            **{name: getattr(self, name) for name in COUNTS},
            "quarantine": self.quarantine,
            "kept": list(self.kept),
            "seconds": dict(self.seconds),
        }

    def add(self, plain: Mapping[str, Any]) -> None:
        """Add what another process spent on the machine."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + plain[name])
        for kind in KINDS:
            self.seconds[kind] += plain["seconds"][kind]
        self.image = self.image or plain["image"]
        self.quarantine = self.quarantine or plain["quarantine"]
        self.kept += plain["kept"]
