"""A plugin for the runs inside of test_kill_points: it kills them at one point of what they do.

`KVMSNAP_KILL="[early] WHEN MODULE:CALL [TEXT] [NUMBER]"` names the point: a call in the package,
the first of them or the one with this number, of those that have the text in an argument. Calls
before the first test count with `early` only: by these a run puts right what others left. WHEN is

- `before` or `after` the call; after one that says False it goes on,
- `amid`: while libvirt is at work on it, as it says itself when it is asked a second time,
- `halfway`: when QEMU has taken or deleted a snapshot, and libvirt does not know.

A worker of pytest-xdist takes its whole run along. `KVMSNAP_KILL_TOO` is a further process to kill,
such as the daemon; `KVMSNAP_HOLD` one to stop before the call, such as the machine's QEMU, so that
libvirt is still at work when others come.
"""

import contextlib
import functools
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import libvirt
import libvirt_qemu
import pytest

if TYPE_CHECKING:
    from pytest_kvmsnap.machine.domain import Domain

Call = Callable[..., Any]


def pytest_configure(config: pytest.Config) -> None:
    if "KVMSNAP_KILL" in os.environ:
        words = os.environ["KVMSNAP_KILL"].split()
        config.pluginmanager.register(Killer(words, is_worker=hasattr(config, "workerinput")))


class Killer:
    """Has a call of the package pass through it, and one of these calls end in a kill."""

    def __init__(self, words: list[str], *, is_worker: bool) -> None:
        self._is_worker = is_worker
        self._counts = words[0] == "early"
        when, where, *which = words[self._counts :]
        self._number = int(which.pop()) if which and which[-1].isdigit() else 1
        self._text = which[0] if which else ""
        self._watch(where, getattr(self, f"_{when}"))

    def pytest_runtest_logstart(self) -> None:
        self._counts = True

    def _watch(self, where: str, end: Call) -> None:
        module, _, path = where.partition(":")
        owner: Any = importlib.import_module(f"pytest_kvmsnap.{module}")
        *owners, name = path.split(".")
        for each in owners:
            owner = getattr(owner, each)
        real: Call = getattr(owner, name)

        @functools.wraps(real)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._counts and any(self._text in str(argument) for argument in args):
                self._number -= 1
                if self._number == 0:
                    return end(real, *args, **kwargs)
            return real(*args, **kwargs)

        setattr(owner, name, watched)

    def _before(self, _real: Call, *_args: Any, **_kwargs: Any) -> None:
        self._kill()

    def _after(self, real: Call, *args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if result is not False:
            self._kill()
        return result

    def _amid(self, real: Call, domain: "Domain", *args: Any, **kwargs: Any) -> None:
        """Kill while libvirt is busy with the machine; at the latest, after the call."""
        asked = libvirt.open(domain.hypervisor.uri).lookupByUUIDString(domain.uuid)
        was_active = bool(asked.isActive())

        def is_at_work() -> bool:
            try:
                control: Any = asked.controlInfo()  # the binding's annotation is wrong
            except libvirt.libvirtError:  # it is off: not yet started, or going to be reverted
                return was_active
            return bool(control[0] != libvirt.VIR_DOMAIN_CONTROL_OK)

        def watch() -> None:
            while not is_at_work():
                pass
            self._kill()

        if "KVMSNAP_HOLD" in os.environ:
            os.kill(int(os.environ["KVMSNAP_HOLD"]), signal.SIGSTOP)
        threading.Thread(target=watch, daemon=True).start()
        real(domain, *args, **kwargs)
        self._kill()

    def _halfway(
        self, real: Call, domain: "Domain", name: str, *_args: Any, **_kwargs: Any
    ) -> None:
        is_taken = real.__name__ == "take_snapshot"
        if is_taken:
            domain.raw.suspend()
        flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        command = f"{'savevm' if is_taken else 'delvm'} {name}"
        libvirt_qemu.qemuMonitorCommand(domain.raw, command, flags)
        self._kill()

    def _kill(self) -> None:
        me = str(os.getpid())
        others = [os.environ["KVMSNAP_KILL_TOO"]] if "KVMSNAP_KILL_TOO" in os.environ else []
        if self._is_worker:
            controller = Path(f"/proc/{os.getppid()}")
            for children in controller.glob("task/*/children"):
                others += children.read_text().split()
            others.append(controller.name)
        for pid in [*(other for other in others if other != me), me]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(60)  # the thread that is to die may be another one
