"""What the real tests hold: a machine as seen from outside, and a suite that is run against it."""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guest import Guest, Network
from lab import Lab

HERE = Path(__file__).parent
ONE_TEST = "def test_runs(vm):\n    assert vm.state == 'running'\n"
NO_TRACE = ("Traceback", "libvirtError", "INTERNALERROR")
EXAMPLE = HERE.parents[1] / "example_suite"
# an embedded libvirt says on stderr what a daemon writes into its log
QUIET = os.environ | {"LIBVIRT_LOG_OUTPUTS": "4:file:/dev/null"}
# virsh commands that only look, and may be tried again
LOOKS = {"domstate", "dumpxml", "snapshot-list", "snapshot-current", "snapshot-dumpxml"}


class Machine:
    """One machine of the lab as somebody outside of a run sees and handles it."""

    def __init__(self, lab: Lab, name: str, disk: Path) -> None:
        self.lab = lab
        self.name = name
        self.disk = disk

    def define(self, xml: Path) -> None:
        """Change the definition."""
        command = ["virsh", "-q", "-c", self.lab.uri, "define", str(xml)]
        subprocess.run(command, capture_output=True, env=QUIET, check=True)

    def virsh(self, command: str, *arguments: str) -> str:
        """Run `virsh COMMAND NAME ARGUMENTS…` in the lab; return what it says.

        Once, just after a snapshot of a running guest, it failed without a word; why is unknown.
        Who only looks tries again then, and the exit status is told if that does not help.
        """
        for _ in range(3 if command in LOOKS else 1):
            done = subprocess.run(
                ["virsh", "-q", "-c", self.lab.uri, command, self.name, *arguments],
                capture_output=True,
                text=True,
                env=QUIET,
                check=False,
            )
            if done.returncode == 0 or done.stderr:
                break
        assert done.returncode == 0, f"virsh {command} ended with {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    @property
    def state(self) -> str:
        return self.virsh("domstate")

    @property
    def snapshots(self) -> list[str]:
        return self.virsh("snapshot-list", "--name").split()

    @property
    def current(self) -> str:
        listed = self.virsh("snapshot-list", "--name")
        return self.virsh("snapshot-current", "--name") if listed else ""

    @property
    def definition(self) -> str:
        return self.virsh("dumpxml", "--inactive", "--security-info")

    def image_snapshots(self) -> list[str]:
        """Return the snapshots in the image itself; the machine must be off."""
        command = ["qemu-img", "snapshot", "-U", "-l", str(self.disk)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [line.split()[1] for line in listed.splitlines()[2:]]

    def start(self, command: str = "true") -> str:
        """Start it unless it runs, wait for its agent and return what a shell command says."""
        done = subprocess.run(
            [sys.executable, str(HERE / "outside.py"), self.lab.uri, self.name, command],
            capture_output=True,
            text=True,
            env=QUIET,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def destroy(self) -> None:
        """Pull the plug. Just after it connected, virsh may say that it failed and do it still."""
        for _ in range(100):
            if self.state == "shut off":
                return
            with contextlib.suppress(AssertionError):
                self.virsh("destroy")
        raise AssertionError(f"{self.name} cannot be destroyed")


class Suite:
    """A test suite of somebody, run against machines of the lab in a process of its own."""

    def __init__(
        self, pytester: pytest.Pytester, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._pytester = pytester
        self._lab = lab
        self._monkeypatch = monkeypatch
        self.record = pytester.path / "record"
        self.locks = pytester.path / "locks"
        self.keep_images_in(pytester.mkdir("store"))
        monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{EXAMPLE}")
        monkeypatch.setenv("KVMSNAP_RECORD", str(self.record))
        monkeypatch.setenv("LIBVIRT_LOG_OUTPUTS", QUIET["LIBVIRT_LOG_OUTPUTS"])

    def keep_images_in(self, folder: Path) -> None:
        """Have throwaway machines and converted golden images in a folder."""
        self.store = folder
        self._monkeypatch.setenv("TMPDIR", str(folder))

    def write(self, tests: str, conftest: str = "") -> None:
        self._pytester.makepyfile(test_inner="import pytest, subprocess\n" + tests)
        if conftest:
            self._pytester.makeconftest(conftest)

    def write_ini(self, *lines: str) -> Path:
        return self._pytester.makeini("[pytest]\n" + "\n".join(lines))

    def arguments(self, *extra: str) -> list[str]:
        return [f"--kvmsnap-uri={self._lab.uri}", *self._elsewhere(), *extra]

    def _elsewhere(self) -> list[str]:
        return ["-p", "inside", f"--kvmsnap-lock-dir={self.locks}"]

    def run(self, *extra: str) -> pytest.RunResult:
        self.record.unlink(missing_ok=True)
        return self._pytester.runpytest_subprocess(*self.arguments(*extra), timeout=180)

    def run_elsewhere(self, *extra: str) -> pytest.RunResult:
        """Run on the hypervisor that the suite itself names."""
        return self._pytester.runpytest_subprocess(*self._elsewhere(), *extra, timeout=180)

    def run_with_input(self, typed: bytes, *extra: str) -> pytest.RunResult:
        """Run with somebody at the keyboard."""
        self.record.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", *self.arguments(*extra)]
        return self._pytester.run(*command, timeout=180, stdin=typed)

    def run_until(self, sign: Path, *extra: str) -> None:
        """Run in the background, and kill the run once it made the file `sign`."""
        command = [sys.executable, "-m", "pytest", *self.arguments(*extra)]
        with subprocess.Popen(command, cwd=self._pytester.path) as process:
            while process.poll() is None and not sign.exists():
                time.sleep(0.02)
            assert process.poll() is None, "it ended before it could be killed"
            process.kill()

    def left_over(self) -> list[str]:
        """Return the locks and journals that are there, and what throwaway machines left."""
        clones = self.store.glob("*/clones/*")
        locks = self.locks.iterdir() if self.locks.exists() else ()
        domains = (self._lab.folder / "etc" / "qemu").glob("kvmsnap-*.xml")
        return sorted(path.name for path in (*clones, *locks, *domains))

    def converted(self) -> list[Path]:
        """Return what the cache of converted golden images holds."""
        return sorted(self.store.glob("*/images/*.qcow2"))

    def calls_on_clones(self, *kinds: str) -> list[str]:
        """Return what the last run did to throwaway machines: `NUMBER KIND SNAPSHOT`."""
        found = []
        for line in self.record.read_text().splitlines():
            name, kind, argument = line.split(" ")
            if not kinds or kind in kinds:
                snapshot = re.sub(r"^kvmsnap-(.*)-[0-9a-f]{8}$", r"\1", argument)
                found.append(f"{name.rpartition('-')[2]} {kind} {snapshot}".strip())
        return found

    def calls(self, machine: Machine, *kinds: str) -> list[str]:
        """Return what the last run did to a machine, without the run's own id."""
        found = []
        for line in self.record.read_text().splitlines():
            name, kind, argument = line.split(" ")
            if name == machine.name and (not kinds or kind in kinds):
                found.append(f"{kind} {re.sub(r'-[0-9a-f]{8}$', '', argument)}".strip())
        return found


class Maker:
    """Makes machines for one test, with the options of `Lab.add_machine`."""

    numbers = itertools.count(1)

    def __init__(self, lab: Lab, linux: Guest) -> None:
        self._lab = lab
        self._linux = linux  # given, since pytester moves the home folder with the guest's cache
        self.made: list[Machine] = []

    def __call__(
        self,
        disk_format: str = "qcow2",
        agent: bool = True,
        console_log: Path | None = None,
        network: Network | None = None,
        memory_mib: int = 128,
    ) -> Machine:
        name = f"m{next(self.numbers)}"
        disk = self._lab.add_machine(
            name,
            guest=self._linux,
            disk_format=disk_format,
            agent=agent,
            console_log=console_log,
            network=network,
            memory_mib=memory_mib,
        )
        self.made.append(Machine(self._lab, name, disk))
        return self.made[-1]


def assert_told_before_the_first_test(result: pytest.RunResult, *parts: str) -> str:
    """Check that a run ended with one message before the first test; return all that it said."""
    said = result.stdout.str() + result.stderr.str()
    assert result.ret == pytest.ExitCode.USAGE_ERROR, said
    for part in parts:
        assert part in said
    assert [trace for trace in NO_TRACE if trace in said] == []
    assert said.count(parts[0]) == 1
    result.assert_outcomes()
    return said


def move(machine: Machine, folder: Path) -> None:
    """Move the image of a machine into another folder."""
    moved = folder / machine.disk.name
    subprocess.run(["cp", "--sparse=always", machine.disk, moved], check=True)
    changed = machine.definition.replace(str(machine.disk), str(moved))
    file = folder.parent / "changed.xml"
    file.write_text(changed)
    machine.define(file)
    machine.disk = moved


def fill(folder: Path, leaving: int) -> None:
    """Leave so many bytes free on the file system of a folder."""
    (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - leaving))
