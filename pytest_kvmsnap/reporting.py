"""What a run tells of its machines: on the terminal, in the reports of its tests, as JSON.

The room `report` makes it, and is not entered before a machine is used. Under pytest-xdist the
workers count, and the controller tells.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kvmsnap import results, run, xdist

if TYPE_CHECKING:
    from pytest_kvmsnap.lab.ledger import Ledger
    from pytest_kvmsnap.markers import Request
    from pytest_kvmsnap.report.account import Account, Frame

_LISTENS = pytest.StashKey[bool]()
_MACHINES = pytest.StashKey[tuple[str, ...]]()
_ACCOUNT = pytest.StashKey["Account"]()
_PROBLEM = pytest.StashKey[str]()


def check(config: pytest.Config) -> None:
    """See that the report can be written at the end.

    Raises:
        ConfigError: it cannot.
    """
    settings = run.settings_of(config)
    if settings.report is not None:
        from pytest_kvmsnap.report import jsonfile

        jsonfile.check_place(settings.report, settings.origins["report"])


def begin(config: pytest.Config, requests: "Sequence[Request]") -> None:
    """Note what the tests will run on, now that it was looked at, and say so in one line."""
    from pytest_kvmsnap.report import summary

    shown = run.lab_of(config).shown(request.machine for request in requests)
    config.stash[_MACHINES] = tuple(shown)
    is_wanted = _is_verbose(config) and not config.getoption("no_header", default=False)
    if is_wanted and not xdist.is_worker(config):
        run.voice(config).line(summary.header(_frame(config)))


def listen(
    config: pytest.Config, starts_of: "Callable[[pytest.Item], Mapping[Ledger, str]]"
) -> None:
    """Gather what tests use of machines from now on; see `Properties` for `starts_of`."""
    from pytest_kvmsnap.report.properties import Properties

    config.stash[_LISTENS] = True
    if not xdist.is_worker(config):
        results.listen(config)
    ledgers = run.lab_of(config).ledgers
    config.pluginmanager.register(Properties(ledgers, starts_of), "kvmsnap-properties")


def finish(config: pytest.Config) -> bool:
    """Put together what the run came to, once its machines are as found; tell whether it is kept.

    A worker hands its part over to the controller. The report is written.
    """
    if xdist.is_worker(config):
        if _LISTENS in config.stash:
            xdist.hand_over_account(config, _own(config))
        return True
    heard = results.results_of(config)
    if heard is None:
        return True
    heard.end()
    parts = [_own(config)] if _LISTENS in config.stash else xdist.accounts_of_workers(config)
    if not parts and not heard.tries:
        return True
    config.stash[_ACCOUNT] = account = _account(config, parts, heard)
    return _write(config, account)


def _account(
    config: pytest.Config, parts: Sequence[Mapping[str, Any]], heard: results.Results
) -> "Account":
    from pytest_kvmsnap.report.account import Account, Frame, merged

    frame = Frame(**parts[0]["frame"]) if parts else _frame_without_lab(config)
    ledgers = merged(part["ledgers"] for part in parts)
    return Account(frame, heard.tries, ledgers, heard.begun, time.time())


def _own(config: pytest.Config) -> dict[str, Any]:
    """Return what this process has to tell, in lists, numbers and texts."""
    ledgers = run.lab_of(config).ledgers.values()
    return {
        "frame": dataclasses.asdict(_frame(config)),
        "ledgers": [ledger.plain() for ledger in ledgers],
    }


def _frame(config: pytest.Config) -> "Frame":
    frame = _frame_without_lab(config)
    about = run.lab_of(config).about
    if about is not None:
        frame = dataclasses.replace(frame, **about._asdict())
    return dataclasses.replace(frame, machines=config.stash.get(_MACHINES, ()))


def _frame_without_lab(config: pytest.Config) -> "Frame":
    """Return what the settings say. A controller whose workers all died has nothing else."""
    from pytest_kvmsnap.report.account import Frame

    is_of_lab = _LISTENS in config.stash or _MACHINES in config.stash
    settings = run.settings_of(config) if is_of_lab else run.settings_without_hook(config)
    return Frame(
        uri=settings.uri or "",
        revert=settings.revert,
        durations=settings.durations,
        report=str(settings.report) if settings.report is not None else None,
    )


def _write(config: pytest.Config, account: "Account") -> bool:
    if account.frame.report is None:
        return True
    from pytest_kvmsnap.report import jsonfile

    try:
        jsonfile.write(account, Path(account.frame.report))
    except OSError as error:
        config.stash[_PROBLEM] = f"the report could not be written: {error}"
        if not config.pluginmanager.has_plugin("terminalreporter") or config.option.no_summary:
            sys.stderr.write(f"{config.stash[_PROBLEM]}\n")
        return False
    return True


def closing_lines(config: pytest.Config) -> list[str]:
    """Return what the terminal says at the end; nothing when no machine was used."""
    account = config.stash.get(_ACCOUNT, None)
    if account is None or config.option.no_summary:  # newer versions of pytest ask nevertheless
        return []
    from pytest_kvmsnap.report import summary

    lines = summary.machines(account) if _is_verbose(config) else []
    if lines and xdist.accounts_of_workers(config):  # who looked at the machines, and cannot speak
        lines.insert(0, summary.header(account.frame))
    if account.frame.durations:
        lines += summary.durations(account, account.frame.durations)
    if _PROBLEM in config.stash:
        lines.append(config.stash[_PROBLEM])
    return lines


def _is_verbose(config: pytest.Config) -> bool:
    """Tell whether people want to read more than the outcome, which -q denies."""
    verbosity: int = config.getoption("verbose", default=0)  # of the terminal's, if there is one
    return verbosity >= 0
