"""A cap on reverts and boots at once on a host, across processes."""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pytest_kvmsnap.lab.locks import Lock

_POLL = 0.05


class Slots:
    """So many locks as there may be reverts and boots at once; each dies with its owner.

    Each user of a host has slots of its own, since one cannot use the lock files of another.
    """

    def __init__(self, folder: Path, host: str, count: int, tell: Callable[[str], None]) -> None:
        label = hashlib.sha256(f"{host}-{os.geteuid()}".encode()).hexdigest()[:12]
        self._locks = [Lock(folder / f"slot-{label}-{n}.lock") for n in range(count)]
        self._tell = tell

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Hold a slot, waiting for one if need be."""
        lock = self._take()
        try:
            yield
        finally:
            lock.release()

    def _take(self) -> Lock:
        told_at, pause = time.monotonic(), 2.0
        while True:
            for lock in self._locks:
                if not lock.is_held and lock.try_take():
                    return lock
            if time.monotonic() - told_at > pause:
                told_at, pause = time.monotonic(), pause * 2
                self._tell(
                    f"waiting for one of {len(self._locks)} reverts or boots to end, which is how"
                    " many --kvmsnap-max-concurrent allows at once"
                )
            time.sleep(_POLL)
