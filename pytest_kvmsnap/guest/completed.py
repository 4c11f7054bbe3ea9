"""How a command in the guest ended, as `subprocess` has it, by whatever way it was run."""

import subprocess
from collections.abc import Sequence


def as_input(given: str | bytes | None) -> bytes | None:
    """Return what a command is to read, text as UTF-8."""
    return given.encode() if isinstance(given, str) else given


def completed(
    command: str | Sequence[str], status: int, out: bytes, err: bytes, *, check: bool, text: bool
) -> "subprocess.CompletedProcess[str]":
    """Return what `subprocess.run` would; output that is no text is shown as far as it is.

    Raises:
        subprocess.CalledProcessError: `check` is given and the status is not 0.
    """
    __tracebackhide__ = True
    said = [each.decode(errors="replace") if text else each for each in (out, err)]
    if check and status:
        raise subprocess.CalledProcessError(status, command, *said)
    return subprocess.CompletedProcess(command, status, *said)  # type: ignore[arg-type]
