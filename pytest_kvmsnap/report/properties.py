"""What a test used of machines, as properties of its reports: JUnit's XML has them, and so have we.

A test's seconds are what the ledgers of its machines came to between its set-up and its teardown.
"""

from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap.lab.ledger import KINDS
from pytest_kvmsnap.results import MACHINE, NAMES

if TYPE_CHECKING:
    from pytest_kvmsnap.lab.ledger import Ledger

_MORE = pytest.StashKey[dict[str, list[tuple[str, object]]]]()


def add(item: pytest.Item, machine: str, name: str, value: object) -> None:
    """Tell something more of a machine of a test, by one of `NAMES`."""
    item.stash.setdefault(_MORE, {}).setdefault(machine, []).append((name, value))


class Properties:
    """Adds the properties before the report on a test's teardown is made.

    `starts_of` tells the snapshots that a test started from, by the ledgers of its machines.
    """

    def __init__(
        self,
        ledgers: "Mapping[str, Ledger]",
        starts_of: "Callable[[pytest.Item], Mapping[Ledger, str]]",
    ) -> None:
        self._ledgers = ledgers
        self._starts_of = starts_of
        self._before: dict[str, dict[str, float]] = {}
        self._last: list[tuple[str, object]] = []

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        # pytest-rerunfailures tries the same item again, which still has what we told
        item.user_properties[:] = [each for each in item.user_properties if each[0] not in NAMES]
        item.stash[_MORE] = {}
        self._before = {name: dict(each.seconds) for name, each in self._ledgers.items()}
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        try:
            return (yield)
        finally:
            more = item.stash.get(_MORE, {})
            self._last = [
                told
                for ledger, start in self._starts_of(item).items()
                for told in (*self._of_machine(ledger, start), *more.get(ledger.machine, ()))
            ]
            item.user_properties += self._last

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Have a report on a try that is not the last tell of its machines too.

        pytest-rerunfailures may show no other one of that try, and it shows all reports only after
        the teardown.
        """
        outcome: str = report.outcome
        if outcome == "rerun" and report.when != "teardown":
            report.user_properties += self._last

    def _of_machine(self, ledger: "Ledger", start: str) -> list[tuple[str, object]]:
        before = self._before.get(ledger.machine, {})
        return [
            (MACHINE, ledger.machine),
            *([("kvmsnap_snapshot", start)] if start else []),
            *([("kvmsnap_image", ledger.image)] if ledger.image else []),
            *(
                (f"kvmsnap_{kind}_seconds", round(ledger.seconds[kind] - before.get(kind, 0.0), 3))
                for kind in KINDS
            ),
        ]
