"""What a machine cost: each second is counted once, for what it was spent on."""

import contextlib
from typing import Any

import pytest

from pytest_kvmsnap.errors import RevertError
from pytest_kvmsnap.lab.ledger import COUNTS, KINDS, Ledger


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    return Ledger("box", clock=clock)


def test_nothing_is_spent_at_first(ledger: Ledger, clock: Clock) -> None:
    clock.now += 5
    assert ledger.seconds == {"take": 0, "revert": 0, "ready": 0, "wait": 0}


def test_seconds_count_for_what_is_done_innermost(ledger: Ledger, clock: Clock) -> None:
    with ledger.reverting():
        clock.now += 1
        with ledger.getting_ready():
            clock.now += 2
            with ledger.taking():
                clock.now += 4
            clock.now += 8
        clock.now += 16
    clock.now += 32
    assert ledger.seconds == {"take": 4, "revert": 17, "ready": 10, "wait": 0}


def test_what_fails_is_counted_too_and_ends(ledger: Ledger, clock: Clock) -> None:
    with contextlib.suppress(KeyboardInterrupt), ledger.taking(), ledger.reverting():
        clock.now += 1
        raise KeyboardInterrupt
    clock.now += 2
    with ledger.taking():
        clock.now += 4
    assert (ledger.seconds["take"], ledger.seconds["revert"]) == (4, 1)


@pytest.mark.parametrize(
    ("seconds", "waits", "spent"), [(0.05, 0, {"revert": 3.05}), (2, 1, {"revert": 3, "wait": 2})]
)
def test_a_wait_is_one_when_somebody_would_call_it_that(
    ledger: Ledger, clock: Clock, seconds: float, waits: int, spent: dict[str, float]
) -> None:
    with ledger.reverting():
        clock.now += 1
        with ledger.waiting():
            clock.now += seconds
        clock.now += 2
    assert ledger.waits == waits
    assert ledger.seconds == pytest.approx(dict.fromkeys(KINDS, 0) | spent)


def test_a_wait_that_fails_was_one(ledger: Ledger, clock: Clock) -> None:
    with contextlib.suppress(RevertError), ledger.waiting():
        clock.now += 3
        raise RevertError("no")
    assert (ledger.waits, ledger.seconds["wait"]) == (1, 3)


def test_waits_for_the_machine_itself(ledger: Ledger) -> None:
    assert not ledger.waited(0.01)
    assert ledger.waited(4)
    assert (ledger.waits, ledger.seconds["wait"]) == (1, 4)


def test_fast_reverts_are_reverts(ledger: Ledger) -> None:
    ledger.reverted(fast=True)
    ledger.reverted(fast=False)
    ledger.reverted(fast=True)
    assert (ledger.reverts, ledger.fast_reverts) == (3, 2)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RevertError("it failed", where="box", why="the disk\nis full"), "it failed: the disk"),
        (RevertError("it failed\nbadly", cure="none"), "it failed"),
    ],
)
def test_the_first_failure_counts_in_one_line(
    ledger: Ledger, error: RevertError, line: str
) -> None:
    ledger.failed(error)
    ledger.failed(RevertError("another one"))
    assert ledger.quarantine == line


def plain(**given: Any) -> dict[str, Any]:
    ledger = Ledger("box")
    seconds = given.pop("seconds", {})
    for name, value in given.items():
        setattr(ledger, name, value)
    ledger.seconds |= seconds
    return ledger.plain()


def test_what_several_processes_spent_adds_up() -> None:
    ledger = Ledger("box")
    ledger.add(plain(image="/a", seconds={"take": 1.5}, kept=["one"]))
    ledger.add(plain(image="/b", seconds={"take": 2, "wait": 3}, kept=["two"], quarantine="no"))
    ledger.add(plain(quarantine="later"))
    assert ledger.seconds == {"take": 3.5, "revert": 0, "ready": 0, "wait": 3}
    assert (ledger.image, ledger.kept, ledger.quarantine) == ("/a", ["one", "two"], "no")


@pytest.mark.parametrize("count", COUNTS)
def test_all_counts_add_up(count: str) -> None:
    ledger = Ledger("box")
    for value in (2, 3):
        ledger.add(plain(**{count: value}))
    assert ledger.plain() == plain(**{count: 5})
