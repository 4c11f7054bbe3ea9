"""What workers gain: `.venv/bin/python benchmarks/parallel_runs.py [ROUNDS]`.

The same 24 tests by one worker on one machine, two on two, four on two, and two on one, in turn, on
a libvirt daemon of this benchmark's own. The machines run before, so nothing is booted. Each figure
is a ratio within one round: what one worker took over what the others took.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
for folder in ("example_suite", "tests", "tests/real"):
    sys.path.insert(0, str(ROOT / folder))

from daemon import running_daemon  # noqa: E402
from daemonlab import DaemonLab  # noqa: E402

import guest as guests  # noqa: E402
from lab import reap_orphans  # noqa: E402

TESTS = 24
CASES = {"1 on 1": (1, 1), "2 on 2": (2, 2), "4 on 2": (4, 2), "2 on 1": (2, 1)}
SUITE = f"""
import pytest

@pytest.mark.parametrize("number", range({TESTS}))
def test_writes(vm, number):
    vm.run(f"echo {{number}} >/opt/number", check=True)
"""
# Notes how long each worker waited for a machine, each time that it did.
CONFTEST = """
import time
from pytest_kvmsnap.lab import lab

def timed(leases, wait, take=lab.take_first_free):
    begin = time.monotonic()
    try:
        return take(leases, wait)
    finally:
        with open("waits", "a") as file:
            file.write(f"{time.monotonic() - begin}\\n")

lab.take_first_free = timed
"""


class Runs:
    """A suite in a folder, run on the machines `box-1` and `box-2`."""

    def __init__(self, folder: Path, uri: str) -> None:
        self._folder = folder
        self._uri = uri
        (folder / "test_it.py").write_text(SUITE)
        (folder / "conftest.py").write_text(CONFTEST)

    def seconds(self, workers: int, machines: int) -> float:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"-n{workers}"]
        command += [f"--kvmsnap-uri={self._uri}", f"--kvmsnap-lock-dir={self._folder}/locks"]
        command += [f"--kvmsnap-domain=box-{n + 1}" for n in range(machines)]
        begin = time.monotonic()
        subprocess.run(command, cwd=self._folder, stdout=subprocess.DEVNULL, check=True)
        return time.monotonic() - begin

    def waits(self) -> list[float]:
        """Return the waits since the last call that were worth the name."""
        file = self._folder / "waits"
        waits = [float(line) for line in file.read_text().splitlines()]
        file.unlink()
        return [wait for wait in waits if wait > 0.05]


def main(rounds: int) -> None:
    os.environ["LIBVIRT_LOG_OUTPUTS"] = "4:file:/dev/null"
    ratios: dict[str, list[float]] = {case: [] for case in CASES}
    waits: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder, running_daemon() as daemon, reap_orphans():
        lab = DaemonLab(daemon, guests.build())
        machines = [lab.make(f"box-{n + 1}") for n in range(2)]
        for machine in machines:
            machine.start()
        runs = Runs(Path(folder), lab.uri)
        for _ in range(rounds):
            took = {}
            for case, (workers, count) in CASES.items():
                took[case] = runs.seconds(workers, count)
                waits[case] += runs.waits()
            for case, seconds in took.items():
                ratios[case].append(took["1 on 1"] / seconds)
        for machine in machines:
            lab.discard(machine)
    print(f"{TESTS} tests, {rounds} rounds, {os.cpu_count()} cores, orphans reaped\n")
    print("| workers on machines | throughput of one worker's | waits | median (s) | longest (s) |")
    print("|---|---|---|---|---|")
    for case, values in ratios.items():
        middle = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        longest = sorted(waits[case]) or [0.0]
        print(
            f"| {case} | {middle} | {len(waits[case])} | {statistics.median(longest):.2f}"
            f" | {longest[-1]:.2f} |"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
