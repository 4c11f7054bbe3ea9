"""`--kvmsnap-report`: the run as JSON, for programs. docs/reports.md describes it."""

import contextlib
import datetime as dt
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.lab.ledger import KINDS, Ledger
from pytest_kvmsnap.report.account import Account, clean_times

VERSION = 1


def check_place(path: Path, origin: str) -> None:
    """Make the folders of the report, and see that it can be written there.

    Raises:
        ConfigError: it cannot.
    """
    why = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        why = "it is a folder" if path.is_dir() else ""
    except OSError as error:
        why = str(error)
    if why:
        raise ConfigError(
            f"the report of {origin} cannot be written",
            where=str(path),
            why=why,
            cure="give a file in a folder that this user may write to",
        )


def write(account: Account, path: Path) -> None:
    """Write the report as a whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(as_plain(account), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def as_plain(account: Account) -> dict[str, Any]:
    """Return the report in objects, lists, numbers and texts."""
    frame = account.frame
    return {
        "version": VERSION,
        "uri": frame.uri,
        "libvirt": frame.libvirt or None,
        "qemu": frame.version or None if frame.driver == "QEMU" else None,
        "revert": frame.revert,
        "started": _time(account.begun),
        "ended": _time(account.ended),
        "machines": [_machine(account, ledger) for ledger in account.machines()],
        "tests": [
            {
                "test": each.test,
                "outcome": each.outcome,
                **({"evidence": each.evidence} if each.evidence else {}),
                "machines": [_use(used) for used in each.machines],
            }
            for each in account.tries
        ],
    }


def _use(used: Mapping[str, Any]) -> dict[str, Any]:
    return {"machine": used["machine"], "snapshot": None, "image": None, **used}


def _machine(account: Account, ledger: Ledger) -> dict[str, Any]:
    uses = account.uses(ledger.machine)
    clean = clean_times(used for _, used in uses)
    return {
        "machine": ledger.machine,
        "image": ledger.image or None,
        "tests": sum(each.outcome != "rerun" for each, _ in uses),
        "snapshots": ledger.snapshots,
        "reverts": ledger.reverts,
        "fast_reverts": ledger.fast_reverts,
        "boots": ledger.boots,
        "waits": ledger.waits,
        **{f"{kind}_seconds": round(ledger.seconds[kind], 3) for kind in KINDS},
        "clean_median_seconds": round(clean.median, 3) if clean else None,
        "clean_max_seconds": round(clean.longest, 3) if clean else None,
        "growth_bytes": ledger.growth,
        "quarantine": ledger.quarantine or None,
        "kept": ledger.kept,
    }


def _time(seconds: float) -> str:
    """Return a moment in UTC, to the millisecond, as ISO 8601 has it."""
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
