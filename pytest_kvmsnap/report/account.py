"""What a run came to, put together from its tests and the ledgers of all its processes."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pytest_kvmsnap.lab.ledger import KINDS, Ledger
from pytest_kvmsnap.results import Try


@dataclass(frozen=True)
class Frame:
    """What the run ran on and with. What is not known is empty.

    `version` is that of what `driver` drives, such as QEMU's. `machines` are those that were asked
    for, in words. `durations` and `report` are the options.
    """

    uri: str = ""
    driver: str = ""
    libvirt: str = ""
    version: str = ""
    revert: str = "force"
    machines: tuple[str, ...] = ()
    durations: int = 0
    report: str | None = None


@dataclass(frozen=True)
class Account:
    """All that is told of a run; the times are those of its begin and end."""

    frame: Frame
    tries: list[Try]
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    begun: float = 0.0
    ended: float = 0.0

    @cached_property
    def _uses(self) -> dict[str, list[tuple[Try, dict[str, Any]]]]:
        uses: dict[str, list[tuple[Try, dict[str, Any]]]] = {}
        for each in self.tries:
            for used in each.machines:
                uses.setdefault(used["machine"], []).append((each, used))
        return uses

    def uses(self, machine: str) -> list[tuple[Try, dict[str, Any]]]:
        """Return the tries that used a machine, with what is told of that."""
        return self._uses.get(machine, [])

    def machines(self) -> list[Ledger]:
        """Return the machines by name. One whose process died has no costs but those of tests."""
        names = self._uses.keys() | self.ledgers.keys()
        known = [self.ledgers.get(name) or Ledger(name) for name in names]
        return sorted(known, key=lambda each: each.machine)


def merged(accounts: Iterable[Iterable[Mapping[str, Any]]]) -> dict[str, Ledger]:
    """Return the ledgers that several processes have of the same machines, as one each."""
    ledgers: dict[str, Ledger] = {}
    for account in accounts:
        for plain in account:
            name = plain["machine"]
            ledgers.setdefault(name, Ledger(name)).add(plain)
    return ledgers


def seconds_of(used: Mapping[str, Any], *kinds: str) -> float:
    """Return the seconds that a test spent on a machine; for everything unless kinds are given."""
    return sum(float(used.get(f"{kind}_seconds", 0)) for kind in kinds or KINDS)


@dataclass(frozen=True)
class Clean:
    """How long it took to have a machine clean again: for one test in two, and for the slowest."""

    median: float
    longest: float


def clean_times(uses: Iterable[Mapping[str, Any]]) -> Clean | None:
    """Return how long it took to be clean; None where no test paid for that.

    Tests that hold a machine together, for a wide fixture, mostly pay nothing.
    """
    times = [spent for used in uses if (spent := seconds_of(used, "revert", "ready")) > 0]
    return Clean(statistics.median(times), max(times)) if times else None
