"""What the terminal says of a run, as a function of what it came to."""

from typing import Any

import pytest

from pytest_kvmsnap.lab.ledger import Ledger
from pytest_kvmsnap.report import summary
from pytest_kvmsnap.report.account import Account, Frame, merged
from pytest_kvmsnap.results import Try


def used(machine: str = "box", **seconds: float) -> dict[str, Any]:
    return {"machine": machine, **{f"{kind}_seconds": spent for kind, spent in seconds.items()}}


def account(ledger: Ledger | None = None, *tries: Try) -> Account:
    return Account(Frame(), list(tries), {ledger.machine: ledger} if ledger else {})


def test_header() -> None:
    frame = Frame("qemu:///system", "QEMU", "9.0.0", "7.2.9", "fast", ("centos", "web-* (4)"))
    assert summary.header(frame) == (
        "qemu:///system (libvirt 9.0.0, QEMU 7.2.9), machines: centos, web-* (4), revert: fast"
    )


def test_header_of_a_host_that_tells_nothing() -> None:
    assert summary.header(Frame("qemu:///system", "QEMU")) == "qemu:///system, revert: force"


def test_header_with_many_machines() -> None:
    names = tuple(f"m{number}" for number in range(11))
    assert "m7, and 3 more, revert" in summary.header(Frame("a:///", machines=names))


def test_a_line_says_what_there_is_to_say() -> None:
    ledger = Ledger("box", snapshots=1, reverts=2, fast_reverts=1)
    tries = [Try("a", "passed", [used(revert=1, ready=2)]), Try("b", "failed", [used(revert=0.5)])]
    assert summary.machines(account(ledger, *tries)) == [
        "box: 2 tests, 1 snapshot, 2 reverts (1 fast), clean in 1.75 s (median) to 3.00 s (max)"
    ]


def test_a_line_says_nothing_of_what_there_is_not() -> None:
    assert summary.machines(account(Ledger("box"), Try("a", "passed", [used(take=1)]))) == [
        "box: 1 test"
    ]


def test_a_try_that_is_made_again_is_no_test() -> None:
    tries = [Try("a", "rerun", [used(revert=1)]), Try("a", "passed", [used(revert=3)])]
    (line,) = summary.machines(account(None, *tries))
    assert line == "box: 1 test (1 rerun), clean in 2.00 s (median) to 3.00 s (max)"


def test_what_is_of_note_comes_below() -> None:
    ledger = Ledger("box", waits=2, growth=3 * 2**20, kept=["one", "two"], quarantine="x" * 200)
    ledger.seconds["wait"] = 3.21
    lines = summary.machines(account(ledger))
    assert lines[:4] == [
        "box: 0 tests",
        "  waited 3.2 s for others (2 times)",
        "  growth of its images: 3.0 MiB",
        "  kept: one, two",
    ]
    assert lines[4].startswith("  in quarantine: xxx")
    assert lines[4].endswith("x…")
    assert len(lines[4]) == 100


def test_a_machine_that_no_test_came_to_use_is_left_out() -> None:
    assert summary.machines(account(Ledger("box", snapshots=1))) == []


def test_lines_are_aligned_and_within_100_columns() -> None:
    ledgers = [
        Ledger("centos", snapshots=3, reverts=240, fast_reverts=200),
        Ledger("debian-12-with-name", snapshots=12),
    ]
    tries = [
        Try("a", "passed", [used("centos", revert=0.71, ready=0.61)]),
        Try("b", "passed", [used("debian-12-with-name")]),
    ]
    lines = summary.machines(
        Account(Frame(), tries, {ledger.machine: ledger for ledger in ledgers})
    )
    assert lines == [
        "centos:              1 test, 3 snapshots,  240 reverts (200 fast), clean in 1.32 s"
        " (median) to 1.32 s (max)",
        "debian-12-with-name: 1 test, 12 snapshots",
    ]


def test_one_machine_of_several_processes_is_one_line() -> None:
    ledgers = merged([[Ledger("box", reverts=2).plain()], [Ledger("box", reverts=3).plain()]])
    tries = [Try("a", "passed", [used()])]
    assert summary.machines(Account(Frame(), tries, ledgers)) == ["box: 1 test, 5 reverts"]


def test_durations_are_the_slowest_first() -> None:
    tries = [
        Try("quick", "passed", [used(revert=0.5)]),
        Try("slow", "passed", [used(take=1, revert=2, ready=3, wait=4.25)]),
        Try("none", "passed", [used(revert=0.004)]),
        Try("two", "passed", [used("one", revert=1), used("other", ready=2, wait=0.001)]),
    ]
    assert summary.durations(account(None, *tries), 3) == [
        "slowest 3 preparations:",
        "  10.25 s  slow on box (take 1.00, revert 2.00, ready 3.00, wait 4.25)",
        "   2.00 s  two on other (ready 2.00)",
        "   1.00 s  two on one (revert 1.00)",
    ]
    assert len(summary.durations(account(None, *tries), 9)) == 5
    assert summary.durations(account(None, *tries), 1)[0] == "slowest preparation:"


@pytest.mark.parametrize("count", [1, 5])
def test_no_durations_of_nothing(count: int) -> None:
    assert summary.durations(account(None, Try("a", "passed", [used()])), count) == []
