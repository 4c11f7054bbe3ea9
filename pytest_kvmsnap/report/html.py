"""What failed tests left, in the report of pytest-html where that is being written."""

import base64
import os
from pathlib import Path
from typing import Any

import pytest

from pytest_kvmsnap.report.evidence import Collector

_LONGEST = 64 * 1024  # characters of a console that are shown


def attach(config: pytest.Config, report: pytest.TestReport, collected: Collector) -> None:
    """Show screen and console, and link to the rest, in the row of the test."""
    place = getattr(config.option, "htmlpath", None)
    if not place or not config.pluginmanager.has_plugin("html"):
        return
    from pytest_html import extras  # type: ignore[import-untyped]

    name, folder = collected.machine_name, collected.folder
    shown: list[Any] = list(getattr(report, "extras", []))
    beside = Path(config.invocation_params.dir, os.path.expandvars(place)).parent
    for file in collected.files:
        path = folder / file
        if path.suffix == ".png":
            shown.append(
                extras.png(base64.b64encode(path.read_bytes()).decode(), f"{name}: {file}")
            )
        elif file == "console.log":
            text = path.read_text(encoding="utf-8", errors="replace")[-_LONGEST:]
            shown.append(extras.text(text, f"{name}: {file}"))
        else:
            shown.append(extras.url(os.path.relpath(path, beside), f"{name}: {file}"))
    report.extras = shown  # type: ignore[attr-defined] # pytest-html's way
