"""What the terminal says of a run: the header line, a line for each machine, the slowest tests."""

from collections.abc import Iterable, Sequence

from pytest_kvmsnap.lab.ledger import KINDS, Ledger
from pytest_kvmsnap.report.account import Account, Frame, clean_times, seconds_of
from pytest_kvmsnap.sizes import mib

_MOST_NAMES = 8
_WIDTH = 100
_SHOWN = 0.005
"""Seconds that are not shown as 0.00; pytest's own durations leave out the same."""


def header(frame: Frame) -> str:
    """Return the line that says what the tests run on."""
    versions = [
        f"{what} {version}"
        for what, version in (("libvirt", frame.libvirt), (frame.driver, frame.version))
        if version
    ]
    names = list(frame.machines[:_MOST_NAMES])
    if len(frame.machines) > _MOST_NAMES:
        names.append(f"and {len(frame.machines) - _MOST_NAMES} more")
    parts = [frame.uri + (f" ({', '.join(versions)})" if versions else "")]
    parts += [f"machines: {', '.join(names)}"] if names else []
    return ", ".join([*parts, f"revert: {frame.revert}"])


def machines(account: Account) -> list[str]:
    """Return a line for each machine that tests used, or that failed, and what else is of note."""
    shown = [
        ledger
        for ledger in account.machines()
        if account.uses(ledger.machine) or ledger.quarantine or ledger.kept
    ]
    rows = aligned([_cells(account, ledger) for ledger in shown])
    return [
        line
        for ledger, row in zip(shown, rows, strict=True)
        for line in (row, *(f"  {note}" for note in _notes(ledger)))
    ]


def _cells(account: Account, ledger: Ledger) -> list[str]:
    uses = account.uses(ledger.machine)
    reruns = sum(each.outcome == "rerun" for each, _ in uses)
    tests = _count(len(uses) - reruns, "test")
    if reruns:
        tests += f" ({_count(reruns, 'rerun')})"
    reverts = _count(ledger.reverts, "revert") if ledger.reverts else ""
    if ledger.fast_reverts:
        reverts += f" ({ledger.fast_reverts} fast)"
    clean = clean_times(used for _, used in uses)
    return [
        f"{ledger.machine}:",
        tests,
        _count(ledger.snapshots, "snapshot") if ledger.snapshots else "",
        reverts,
        f"clean in {clean.median:.2f} s (median) to {clean.longest:.2f} s (max)" if clean else "",
    ]


def _notes(ledger: Ledger) -> list[str]:
    notes = []
    if ledger.waits:
        times = f"{ledger.waits} times" if ledger.waits > 1 else "once"
        notes.append(f"waited {ledger.seconds['wait']:.1f} s for others ({times})")
    if ledger.growth:
        notes.append(f"growth of its images: {mib(ledger.growth)}")
    if ledger.kept:
        notes.append(f"kept: {', '.join(ledger.kept)}")
    if ledger.quarantine:
        notes.append(_shortened(f"in quarantine: {ledger.quarantine}", _WIDTH - 2))
    return notes


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of cells with a comma between them, one below the other; the first is a name."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        last = max(index for index, cell in enumerate(row) if cell)
        line = ""
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            comma = "," if cell and 0 < index < last else ""
            line += (cell + comma).ljust(width + (2 if index else 1)) if width else ""
        lines.append(line.rstrip())
    return lines


def durations(account: Account, count: int) -> list[str]:
    """Return the tests whose machines took longest, with what that was spent on."""
    spent = [
        (seconds_of(used), each, used)
        for each in account.tries
        for used in each.machines
        if seconds_of(used) >= _SHOWN
    ]
    slowest = sorted(spent, key=lambda it: it[0], reverse=True)[:count]
    if not slowest:
        return []
    width = len(f"{slowest[0][0]:.2f}")
    return [
        f"slowest {_count(count, 'preparation')}:" if count > 1 else "slowest preparation:",
        *(
            f"  {seconds:{width}.2f} s  {each.test} on {used['machine']}"
            f" ({', '.join(_spent_on(used))})"
            for seconds, each, used in slowest
        ),
    ]


def _spent_on(used: dict[str, float]) -> Iterable[str]:
    for kind in KINDS:
        seconds = seconds_of(used, kind)
        if seconds >= _SHOWN:
            yield f"{kind} {seconds:.2f}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
