"""Copies of files into a guest and out of it, by its agent."""

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pytest_kvmsnap.errors import AgentError
from pytest_kvmsnap.guest.agent import CHUNK, Agent

Show = Callable[[str, float], None]

_QUIET = 3.0
"""Seconds that a copy may take before anything is shown of it."""
_OFTEN = 0.5
"""Seconds between two showings."""


def put(agent: Agent, local: Path, remote: str, show: Show) -> None:
    """Copy a file into the guest, with its mode where the guest has `chmod`."""
    with local.open("rb") as source:
        about = os.fstat(source.fileno())
        chunks = iter(lambda: source.read(CHUNK), b"")
        agent.write(remote, _shown(chunks, f"putting {local}", about.st_size, show))
    with contextlib.suppress(AgentError, subprocess.TimeoutExpired):
        agent.run(["chmod", f"{about.st_mode & 0o7777:o}", remote])


def get(agent: Agent, remote: str, local: Path, show: Show) -> None:
    """Copy a file out of the guest, with its mode where the guest has `stat`.

    It lies beside the file that it becomes until it is complete.
    """
    chunks = agent.read(remote)
    first = next(chunks, b"")  # a file that is not there leaves none here
    mode, size = _about(agent, remote)
    shown = _shown(chunks, f"getting {remote}", size - len(first), show)
    target = local.resolve()  # a link stays one
    if target.exists() and not target.is_file():  # a device or a pipe stays one too
        with target.open("wb") as file:
            file.write(first)
            for chunk in shown:
                file.write(chunk)
        return
    number, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    draft = Path(name)
    try:
        with open(number, "wb") as file:  # noqa: PTH123 - it is open already
            file.write(first)
            for chunk in shown:
                file.write(chunk)
        draft.chmod(_usual_mode() if mode is None else mode)
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _about(agent: Agent, path: str) -> tuple[int | None, int]:
    """Return the mode and the size of a file in the guest; None and 0 where it does not tell."""
    with contextlib.suppress(AgentError, subprocess.TimeoutExpired, ValueError):
        told = agent.run(["stat", "-L", "-c", "%a %s", "--", path]).stdout.split()
        if len(told) == 2:
            return int(told[0], 8) & 0o777, int(told[1])  # a guest gives nobody here any rights
    return None, 0


def _usual_mode() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


def _shown(chunks: Iterable[bytes], what: str, size: int, show: Show) -> Iterator[bytes]:
    """Yield the chunks, and show how far it is once it takes long."""
    done, then = 0, time.monotonic() + _QUIET
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        now = time.monotonic()
        if now > then and 0 < done <= size:
            show(what, 100 * done / size)
            then = now + _OFTEN
