"""A plugin for the runs inside of the real tests: reaps dead QEMUs and records what is done.

Each line of the file named by KVMSNAP_RECORD is one call: `take_snapshot NAME`, `revert NAME`,
`load NAME` (a revert inside QEMU), …
"""

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import reap_orphans

RECORDED = ("take_snapshot", "revert", "delete_snapshot", "start", "resume", "destroy", "shutdown")


def pytest_configure(config: pytest.Config) -> None:
    stack = contextlib.ExitStack()
    stack.enter_context(reap_orphans())
    config.add_cleanup(stack.close)
    if "KVMSNAP_RECORD" in os.environ:
        _record(Path(os.environ["KVMSNAP_RECORD"]))


def _record(path: Path) -> None:
    from pytest_kvmsnap.machine import fast_revert
    from pytest_kvmsnap.machine.domain import Domain

    def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(domain: Domain, *args: Any, **kwargs: Any) -> Any:
            with path.open("a") as file:
                named = args[0] if args and isinstance(args[0], str) else ""
                print(domain.name, name, named, file=file)
            return call(domain, *args, **kwargs)

        return wrapper

    for name in RECORDED:
        setattr(Domain, name, recorded(name, getattr(Domain, name)))
    fast_revert.load = recorded("load", fast_revert.load)
