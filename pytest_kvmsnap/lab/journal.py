"""What a run did to a machine and must undo, on disk before each step, for whoever comes after."""

import contextlib
import dataclasses
import getpass
import json
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_kvmsnap.errors import LeaseError
from pytest_kvmsnap.machine.conversion import Conversion
from pytest_kvmsnap.machine.preflight import OURS

_VERSION = 2
_saving = threading.Lock()  # a test may take snapshots in several threads


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
class Clean:
    """A machine as a worker of pytest-xdist left it for the next worker of the same run.

    `snapshot` is the one that it stands at, proven, `fingerprint` how it looks from outside there,
    and `baseline` the snapshot that tests start from. `made_by` are the settings that it depends
    on.
    """

    snapshot: str
    fingerprint: list[Any]
    baseline: str | None
    made_by: list[Any]


@dataclass
class Journal:
    """One run on one machine.

    `found_snapshot` is the one that the machine goes back to at the end. `taken` are the snapshots
    of this run, oldest first, with their XML, which is empty until they stand. `by_tests` are the
    names that tests gave to snapshots, noted before these are taken, `kept` the snapshots that are
    kept for people, with their XML, which is empty until they stand. `planted` tells that the
    canary's block was put on the disk of a machine that was found running. `clone` is the folder of
    a throwaway machine, which is removed rather than put back. `waits_for` are the
    journals' names of the machines that the run waits for while it keeps this one, and `clean`
    tells that it was left for another worker.
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
    by_tests: list[str] = field(default_factory=list)
    planted: bool = False
    conversions: list[Conversion] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    clone: Path | None = None
    waits_for: list[str] = field(default_factory=list)
    clean: Clean | None = None

    def owner(self) -> str:
        """Return who it is, for people."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        doing = f", in {self.test}" if self.test else ""
        return f"pid {self.pid} of {self.user} on {self.host}, since {since}{doing}"

    def description(self) -> str:
        """Return what stands in the description of every snapshot of this run."""
        return f"{OURS}{self.run} on {self.host}, pid {self.pid}"

    def is_of_run(self, description: str) -> bool:
        """Tell whether a snapshot is one of this run, by its description.

        The pid there is another one where another worker of the run took the machine over.
        """
        return description.startswith(f"{OURS}{self.run} ")

    def save(self) -> None:
        """Write it whole or not at all, readable by the owner alone: it holds definitions.

        Raises:
            LeaseError: somebody else keeps the place of its draft.
        """
        with _saving:
            content = dataclasses.asdict(self) | {"version": _VERSION}
            del content["path"]
            draft = draft_of(self.path)
            try:
                with os.fdopen(_new(draft), "w") as file:
                    file.write(json.dumps(content, default=str))  # in one go: ten times as fast
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(self.path)
            except BaseException:
                remove_draft(self.path)
                raise

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        remove_draft(self.path)


def draft_of(path: Path) -> Path:
    """Return where a journal is written before it takes its place.

    It is one name, so that the next one who holds the lease finds what a kill left there.
    """
    return path.with_name(f"{path.name}.draft")


def places_in(folder: Path) -> list[Path]:
    """Return where journals of a folder are, or would be if a kill had not left a draft alone."""
    drafts = (path.with_suffix("") for path in folder.glob("*.json.draft"))
    return sorted({*folder.glob("*.json"), *drafts})


def remove_draft(path: Path) -> None:
    """Remove what a run that was killed while it saved this journal left beside it."""
    with contextlib.suppress(OSError):  # another user's, which `save` tells
        draft_of(path).unlink()


def _new(draft: Path) -> int:
    """Open a new private file; nothing that stood in its place, and no link, is written to."""
    try:
        draft.unlink(missing_ok=True)
        return os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise LeaseError(
            "cannot write down what this run must undo",
            where=str(draft),
            why=error.strerror or str(error),
            cure="remove what is there, or give another folder with --kvmsnap-lock-dir",
        ) from None


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
    if content["clean"] is not None:
        content["clean"] = Clean(**content["clean"])
    if content["clone"] is not None:
        content["clone"] = Path(content["clone"])
    return Journal(path=path, **content)
