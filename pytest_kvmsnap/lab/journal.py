"""What a run did to a machine and must undo, on disk before each step, for whoever comes after."""

import contextlib
import dataclasses
import getpass
import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_kvmsnap.errors import LeaseError
from pytest_kvmsnap.machine.conversion import Conversion
from pytest_kvmsnap.machine.preflight import OURS

_VERSION = 1


def testrun() -> str:
    """Return what the workers of one run of pytest-xdist have in common, nothing without it."""
    return os.environ.get("PYTEST_XDIST_TESTRUNUID", "")


@dataclass
class Found:
    """A machine as a run found it.

    `snapshots` are the XML of its snapshots by name, `definition` the persistent definition.
    """

    state: str
    autostart: bool
    current: str | None
    definition: str
    snapshots: dict[str, str]


@dataclass
class Journal:
    """One run on one machine.

    `found_snapshot` is the one that the machine goes back to at the end. `taken` are the snapshots
    of this run, oldest first, with their XML, which is empty until they stand. `planted` tells
    that the canary's block was put on the disk of a machine that was found running. `clone` is the
    folder of a throwaway machine, which is removed rather than put back.
    """

    path: Path
    run: str
    uri: str
    name: str
    uuid: str
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    user: str = field(default_factory=getpass.getuser)
    since: float = field(default_factory=time.time)
    test: str = ""
    testrun: str = field(default_factory=testrun)
    found: Found | None = None
    found_snapshot: str | None = None
    taken: dict[str, str] = field(default_factory=dict)
    planted: bool = False
    conversions: list[Conversion] = field(default_factory=list)
    clone: Path | None = None

    def owner(self) -> str:
        """Return who it is, for people."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        doing = f", in {self.test}" if self.test else ""
        return f"pid {self.pid} of {self.user} on {self.host}, since {since}{doing}"

    def description(self) -> str:
        """Return what stands in the description of every snapshot of this run."""
        return f"{OURS}{self.run} on {self.host}, pid {self.pid}"

    def save(self) -> None:
        """Write it whole or not at all, readable by the owner alone: it holds definitions."""
        content = dataclasses.asdict(self) | {"version": _VERSION}
        del content["path"]
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".journal-")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file, default=str)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def load(path: Path) -> Journal | None:
    """Return the journal in a file, None when there is no such file.

    Raises:
        LeaseError: it cannot be read, so nobody here knows what must be undone.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle) as file:
            # It says what to delete and to define, and a folder may be open to all users.
            if os.fstat(handle).st_uid != os.geteuid():
                raise PermissionError("it belongs to another user")
            return _read(path, json.load(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LeaseError(
            "cannot read what an earlier run left to be undone",
            where=str(path),
            why=str(error),
            cure="run pytest --kvmsnap-clean as the user of that run; or put the machine right by"
            " hand and remove the file",
        ) from None


def _read(path: Path, content: Any) -> Journal:
    if not isinstance(content, dict):
        raise TypeError("it is no journal")
    if content.pop("version") != _VERSION:
        raise ValueError("it was written by another version of pytest-kvmsnap")
    if content["found"] is not None:
        content["found"] = Found(**content["found"])
    content["conversions"] = [
        Conversion(c["target"], *(Path(c[key]) for key in ("raw", "qcow2", "temporary")))
        for c in content["conversions"]
    ]
    if content["clone"] is not None:
        content["clone"] = Path(content["clone"])
    return Journal(path=path, **content)
