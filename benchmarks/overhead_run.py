"""A plugin of pytest for the runs within `overhead.py`: what of each test's time is our own.

Wall time less that in libvirt's calls and in waits: for the agent, for a job of QEMU, for a thread
that is in a call of libvirt. The main thread's time on a CPU is counted the same way: on a busy
computer the wall time holds what others took.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from pytest_kvmsnap.guest import agent
from pytest_kvmsnap.machine import calls


class Clock:
    """Adds up the time in the calls that are not ours; one within another counts once."""

    def __init__(self) -> None:
        self.spent = 0.0
        self.spent_cpu = 0.0
        self._depth = 0

    def watch(self, owner: object, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            # What other threads do takes none of a test's time.
            if self._depth or threading.current_thread() is not threading.main_thread():
                return call(*args, **kwargs)
            self._depth += 1
            start, start_cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent += time.perf_counter() - start
                self.spent_cpu += time.thread_time() - start_cpu
                self._depth -= 1

        setattr(owner, name, watched)


# Without the talk with the agent, of which some is ours: texts are made, parsed and passed on.
CLOCK = Clock()
STRICT = Clock()
_tests: list[dict[str, float]] = []


def pytest_configure() -> None:
    classes = (libvirt.virDomain, libvirt.virConnect, libvirt.virDomainSnapshot, libvirt.virStream)
    for owner in classes:
        for name, member in list(vars(owner).items()):
            if name[0].islower() and callable(member):
                watch(owner, name)
    for name in ("qemuAgentCommand", "qemuMonitorCommand"):
        watch(libvirt_qemu, name)
    watch(calls.Call, "ended_within")
    watch(time, "sleep")
    for name in ("run", "silence"):
        CLOCK.watch(agent.Agent, name)


def watch(owner: object, name: str) -> None:
    STRICT.watch(owner, name)
    CLOCK.watch(owner, name)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    start, start_cpu = time.perf_counter(), time.thread_time()
    spent, strict, strict_cpu = CLOCK.spent, STRICT.spent, STRICT.spent_cpu
    result = yield
    wall, cpu = time.perf_counter() - start, time.thread_time() - start_cpu
    _tests.append(
        {
            "wall": wall,
            "ours": wall - (CLOCK.spent - spent),
            "strict": wall - (STRICT.spent - strict),
            "cpu": cpu - (STRICT.spent_cpu - strict_cpu),
        }
    )
    return result


def pytest_unconfigure() -> None:
    Path(os.environ["KVMSNAP_OVERHEAD"]).write_text(json.dumps(_tests))
