"""qemu-img as the tests use it: to compare images, and in stand-ins for what cannot be provoked."""

import os
import subprocess
from pathlib import Path

import pytest


def is_same(raw: Path, qcow2: Path) -> bool:
    """Tell whether a raw and a qcow2 image hold the same disk."""
    command = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", f"file:{raw}", f"file:{qcow2}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


CONVERTING = '[ "$1 $2" = "convert -p" ]'
"""True in a stand-in that is to convert an image; the look for its lock is a `convert` too."""


def fake_qemu_img(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Put a qemu-img first on the path that does what `script` says.

    In it, `$real` is the real one.
    """
    found = subprocess.run(["which", "qemu-img"], capture_output=True, text=True, check=False)
    folder.mkdir(exist_ok=True)
    fake = folder / "qemu-img"
    fake.write_text(f"#!/bin/sh\nreal='{found.stdout.strip()}'\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
