"""What a clean machine costs: `.venv/bin/python benchmarks/main_job.py [TESTS]`.

Boots the example's guest in an embedded libvirt and runs empty tests on it. Wall time less the time
in libvirt's and the agent's calls is our own overhead. The figures of one run belong together:
machines differ, and so does one machine from minute to minute.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "example_suite"
sys.path.insert(0, str(EXAMPLE))

import pytest  # noqa: E402

from lab import open_lab, reap_orphans  # noqa: E402


class Clock:
    """Adds up the time in the calls that are not ours, by kind."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = defaultdict(list)
        self.spent = 0.0
        self._depth = 0

    def watch(self, owner: type, name: str, kind: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return call(*args, **kwargs)
            self._depth += 1
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                self._depth -= 1
                self.calls[kind].append(taken)
                if self._depth == 0:
                    self.spent += taken

        setattr(owner, name, watched)


class Overhead:
    """A plugin of pytest: wall time of each test's set-up and teardown, and what was not ours."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.ours: list[float] = []
        self.walls: list[float] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Any:
        start, before = time.perf_counter(), self.clock.spent
        result = yield
        wall = time.perf_counter() - start
        self.walls.append(wall)
        self.ours.append(wall - (self.clock.spent - before))
        return result


def watch_everything(clock: Clock) -> None:
    import libvirt
    import libvirt_qemu

    from pytest_kvmsnap.guest import ready
    from pytest_kvmsnap.guest.agent import Agent
    from pytest_kvmsnap.machine.domain import Domain

    clock.watch(Domain, "start", "start")
    clock.watch(Domain, "take_snapshot", "snapshot")
    clock.watch(Domain, "revert", "forced revert")
    clock.watch(Domain, "delete_snapshot", "delete")
    clock.watch(Agent, "run", "agent command")
    for name in [n for n in vars(libvirt.virDomain) if n[0].islower()]:
        clock.watch(libvirt.virDomain, name, "libvirt")
    for name in ("lookupByUUIDString", "lookupByName", "defineXML", "listAllDomains"):
        clock.watch(libvirt.virConnect, name, "libvirt")
    for name in ("getXMLDesc", "getName", "delete"):
        clock.watch(libvirt.virDomainSnapshot, name, "libvirt")
    clock.watch(libvirt_qemu, "qemuAgentCommand", "agent")  # type: ignore[arg-type]
    clock.watch(time, "sleep", "agent wait")  # type: ignore[arg-type]
    waited = ready.wait_ready

    def wait_ready(*args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        waited(*args, **kwargs)
        clock.calls["until the agent answers"].append(time.perf_counter() - start)

    from pytest_kvmsnap.lab import machine, restore

    machine.wait_ready = restore.wait_ready = wait_ready  # type: ignore[attr-defined]


def row(name: str, values: list[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{name:42} {len(values):4} {low * 1000:9.1f} {middle * 1000:9.1f} {high * 1000:9.1f}"


def main() -> None:
    tests = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    clock = Clock()
    overhead = Overhead(clock)
    with (
        tempfile.TemporaryDirectory(prefix="kvm-") as folder,
        tempfile.TemporaryDirectory() as suite,
        reap_orphans(),
        open_lab(Path(folder) / "lab") as lab,
    ):
        lab.add_machine("bench", disk_format="qcow2")
        lab.add_snapshot("bench", "probe")  # so that libvirt's look at QEMU is not in the figures
        test = f"""
            import pytest
            @pytest.mark.parametrize("turn", range({tests}))
            def test_nothing(vm, turn): pass
        """
        Path(suite, "test_bench.py").write_text(textwrap.dedent(test))
        watch_everything(clock)
        options = [f"--kvmsnap-uri={lab.uri}", "--kvmsnap-domain=bench"]
        options += [f"--kvmsnap-lock-dir={folder}/locks", "-p", "no:cacheprovider", "-q", suite]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = pytest.main(options, plugins=[overhead])
    qemu = subprocess.run(
        ["qemu-img", "--version"], capture_output=True, text=True, check=True
    ).stdout.split("\n")[0]
    print(f"\n{tests} tests, exit status {int(status)}, {os.cpu_count()} cores, {qemu},")
    print("128 MiB guest, QEMU's orphans reaped at once; milliseconds\n")
    print(f"{'':42} {'n':>4} {'min':>9} {'median':>9} {'max':>9}")
    boot = clock.calls["start"][0] + clock.calls["until the agent answers"][0]
    print(row("boot to an answering agent", [boot]))
    print(row("snapshot, off", clock.calls["snapshot"][:1]))
    print(row("snapshot, running", clock.calls["snapshot"][1:]))
    print(row("forced revert to running", clock.calls["forced revert"][:-1]))
    print(row("then until the agent answers", clock.calls["until the agent answers"][1:]))
    print(row("agent command (marks, their check)", clock.calls["agent command"]))
    print(row("delete", clock.calls["delete"]))
    print(row("a test, wall", overhead.walls[1:]))
    print(row("of it ours: not in libvirt, not in the agent", overhead.ours[1:]))


if __name__ == "__main__":
    main()
