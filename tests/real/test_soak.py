"""Many tests on few machines, while workers, the daemon and machines are killed all the time.

20 tests, or as many as `KVMSNAP_SOAK` says; then chance decides what is killed when, unless
`KVMSNAP_SOAK_SEED` repeats an earlier run. `tox -e soak` tries 500.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from daemonlab import DaemonLab, DaemonSuite
from keeping import Kept

WORKERS = 4
PASSED = {"setup passed", "call passed", "teardown passed"}
ENDS = ("teardown", "???")
"""What the last part of a test is called; the second one is pytest-xdist's, for its worker died."""
STUCK = 300
"""Seconds without a test that begins or ends, after which a run is taken for stuck."""

# Each test leaves marks with its number in the guest, in memory and on the disk, and sees no other.
TESTS = """
import os, pathlib, random, signal, time

def note(*words):
    with open("diary", "a") as diary:
        print(*words, file=diary)

def die_if_doomed(vm):
    time.sleep(random.random() / 4)
    doom = pathlib.Path("doomed", vm.name)
    if doom.exists():
        os.kill(int(next(pathlib.Path(PIDS).glob(f"**/{vm.name}.pid")).read_text()), signal.SIGKILL)
        doom.unlink()

@pytest.mark.parametrize("number", pathlib.Path("untried").read_text().split())
def test_owns_it(vm, number):
    note("begin", number, vm.name, os.getpid())
    try:
        die_if_doomed(vm)
        marks = vm.run(f"cd /root; touch {number} /run/{number}.m; ls -A . /run/*.m", check=True)
        assert marks.stdout == f"/run/{number}.m\\n\\n.:\\n{number}\\n"
        if int(number) % 4 == 0:
            vm.snapshot("of-the-test")
        die_if_doomed(vm)
        vm.run("true", check=True)
    finally:
        note("end", number, vm.name, os.getpid())
"""
# Only the controller hears of all tests, those of dead workers included.
CONFTEST = """
import pathlib

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results())

class Results:
    def pytest_runtest_logreport(self, report):
        number = report.nodeid.partition("[")[2].rstrip("]")
        with open("results", "a") as results:
            print(number, report.when, self.outcome(report), file=results)

    def outcome(self, report):
        crash = getattr(report.longrepr, "reprcrash", None)  # text for a test of a dead worker
        saw_others = crash is not None and crash.message.startswith(("assert", "AssertionError"))
        return "mixed" if saw_others else report.outcome
"""


class Soak:
    """Tests that are all to be tried, whatever is killed meanwhile.

    A kill comes about every `pace` tests, and each kind as often as the others.
    """

    def __init__(
        self,
        suite: DaemonSuite,
        lab: DaemonLab,
        machines: Sequence[str],
        count: int,
        pace: int,
        chance: random.Random,
    ) -> None:
        self.kills: Counter[str] = Counter()
        self._machines = machines
        self._suite = suite
        self._lab = lab
        self._numbers = [str(number) for number in range(1, count + 1)]
        self._pace = pace
        self._chance = chance
        self._run: subprocess.Popen[bytes] | None = None
        pids = lab.folder / "run" / "libvirt" / "qemu"
        suite.write(f"PIDS = {str(pids)!r}\n{TESTS}", CONFTEST)
        (suite.folder / "doomed").mkdir()
        for name in ("diary", "results"):
            (suite.folder / name).touch()

    # what became of the tests

    def results(self) -> dict[str, set[str]]:
        """Return, by the tests, the outcomes of their parts as far as these were tried."""
        found: dict[str, set[str]] = {}
        for line in self._suite.file("results"):
            number, _, outcome = line.partition(" ")
            found.setdefault(number, set()).add(outcome)
        return found

    def untried(self) -> list[str]:
        """Return the tests that have not come to their end, which may be that of their worker."""
        results = self.results()
        tried = [n for n, parts in results.items() if any(part.startswith(ENDS) for part in parts)]
        return [number for number in self._numbers if number not in tried]

    def passed(self) -> int:
        return sum(outcomes == PASSED for outcomes in self.results().values())

    def lost(self) -> int:
        return sum(outcomes != PASSED for outcomes in self.results().values())

    def mixed_up(self) -> list[str]:
        """Return the tests that saw marks of others."""
        return [number for number, parts in self.results().items() if "call mixed" in parts]

    def _begun(self) -> int:
        """Return how many tests began."""
        return sum(note.startswith("begin") for note in self._suite.file("diary"))

    # the runs

    def run(self, *options: str) -> int:
        """Run until all tests were tried; return how many runs that took."""
        for runs in range(len(self._numbers)):
            untried = self.untried()
            if not untried:
                return runs
            (self._suite.folder / "untried").write_text(" ".join(untried))
            self._run_once(runs, f"-n{WORKERS}", "--max-worker-restart=1000", *options)
        raise AssertionError("the runs end before all tests were tried")

    def _run_once(self, number: int, *options: str) -> None:
        command = [sys.executable, "-m", "pytest", *self._suite.arguments(*options)]
        command.append(f"--basetemp={self._suite.folder}/temporary-{number}")
        said = self._suite.folder / f"said-{number}"
        with said.open("wb") as file:
            self._run = subprocess.Popen(
                command,
                cwd=self._suite.folder,
                env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        is_stuck = self._wait_for(self._run)
        self._run = None
        sys.stdout.write(said.read_text())
        assert not is_stuck, f"nothing happened for {STUCK} s"

    def _wait_for(self, run: subprocess.Popen[bytes]) -> bool:
        """Wait for the end of a run; tell whether it was stuck, and killed."""
        seen, since = -1, time.monotonic()
        while run.poll() is None:
            time.sleep(0.1)
            now = len(self._suite.file("diary")) + len(self._suite.file("results"))
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > STUCK:
                run.kill()
                run.wait()
                return True
        return False

    # the kills

    @contextlib.contextmanager
    def killing(self) -> Iterator[None]:
        """Kill something now and then; what goes wrong with that is raised at the end."""
        is_over = threading.Event()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._kill_until(is_over)
            except BaseException as failure:  # noqa: BLE001 - raised below
                failures.append(failure)

        killer = threading.Thread(target=work, name="killer")
        killer.start()
        try:
            yield
        finally:
            is_over.set()
            killer.join()
            if failures:
                raise failures[0]

    def _kill_until(self, is_over: threading.Event) -> None:
        acts = {"worker": self._kill_worker, "daemon": self._kill_daemon, "QEMU": self._kill_qemu}
        due = 0
        kinds: list[str] = []
        while not is_over.wait(0.05):
            if self._begun() < due:
                continue
            time.sleep(self._chance.random())  # at any moment of a test's way
            kinds = kinds or self._chance.sample(sorted(acts), len(acts))
            if acts[kinds[-1]]():
                self.kills[kinds.pop()] += 1
                due = self._begun() + self._chance.randint(1, 2 * self._pace - 1)

    def _workers(self) -> list[str]:
        """Return the processes of the workers that live."""
        run, pids = self._run, []
        if run is not None:
            with contextlib.suppress(OSError):  # it has just ended
                for children in Path(f"/proc/{run.pid}").glob("task/*/children"):
                    pids += children.read_text().split()
        return pids

    def _kill_worker(self) -> bool:
        workers = self._workers()
        if workers:
            os.kill(int(self._chance.choice(workers)), signal.SIGKILL)
        return bool(workers)

    def _kill_daemon(self) -> bool:
        self._lab.daemon.kill()
        time.sleep(self._chance.random())
        self._lab.daemon.start()
        return True

    def _kill_qemu(self) -> bool:
        """Have the next test on a machine kill it: elsewhere a machine that dies is in quarantine.

        And one that was found running would not come back, once the run has given it up.
        """
        doom = self._suite.folder / "doomed" / self._chance.choice(self._machines)
        doom.touch()
        while self._run is not None and doom.exists():
            time.sleep(0.05)
        is_done = not doom.exists()
        doom.unlink(missing_ok=True)
        return is_done


@pytest.mark.long
def test_all_tests_are_tried_and_machines_are_as_found(
    daemon_lab: DaemonLab, daemon_suite: DaemonSuite, xdist: None
) -> None:
    """What a kill hits fails: a test for a worker or a machine, one of each worker for libvirt."""
    count = int(os.environ.get("KVMSNAP_SOAK", "20"))
    is_short = "KVMSNAP_SOAK" not in os.environ
    seed = os.environ.get("KVMSNAP_SOAK_SEED", "1" if is_short else str(random.randrange(10**6)))
    sys.stdout.write(f"KVMSNAP_SOAK_SEED={seed}\n")
    machines: list[Kept] = []
    try:
        machines.append(Kept(daemon_lab, "soak-on", "running"))
        machines.append(Kept(daemon_lab, "soak-off", "shut off"))
        pace = 3 if is_short else 6
        names, chance = [machine.name for machine in machines], random.Random(seed)
        soak = Soak(daemon_suite, daemon_lab, names, count, pace, chance)
        with soak.killing():
            runs = soak.run("--kvmsnap-domain=soak-*")
        passed, lost, kills = soak.passed(), soak.lost(), soak.kills
        killed = ", ".join(f"{number} times {kind}" for kind, number in sorted(kills.items()))
        words = f"{count} tests in {runs} runs: {passed} passed, {lost} lost; killed {killed}\n"
        sys.stdout.write(words)
        assert daemon_suite.run("--kvmsnap-clean").ret == 0
        assert [machine.look() for machine in machines] == [each.found for each in machines]
        assert daemon_suite.left_over() == []
        assert daemon_lab.daemon.running() == ["soak-on"]
        assert soak.mixed_up() == []
        assert passed + lost == count
        assert len(kills) == 3
        assert lost <= kills["worker"] + kills["QEMU"] + WORKERS * kills["daemon"]
    finally:
        for machine in machines:
            machine.discard()
