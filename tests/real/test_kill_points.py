"""A run is killed at each step of what it does to a machine; whoever comes next puts that right.

The machines are those of a daemon, which lives on, or dies with the run where that is said. Kills
in a test that has `vm` alone are in test_bad_luck, in qemu-img in test_conversions, of throwaway
machines when they have an overlay, boot, or are in a test in test_golden_images.
"""

import hashlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bench import NO_TRACE
from daemon import Daemon
from daemonlab import DaemonLab, DaemonSuite, SharedMachine, await_file
from keeping import Kept

import guest as guests

SUITE = """
import pathlib, time

def spoil(vm):
    vm.snapshot("of-the-test")
    vm.domain.setAutostart(0)
    definition = vm.domain.XMLDesc(2)
    vm.domain.connect().defineXML(definition.replace("131072</", "100352</"))
    vm.wait_ready()

def ask(name):
    pathlib.Path(name).touch()
    for _ in range(6000):
        if not pathlib.Path(name).exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"{name} was not answered")

@pytest.fixture(scope="module")
def prepared(module_vm):
    module_vm.write_text("/opt/abc", "prepared")
    module_vm.snapshot("of-the-preparation")

def test_first(vm):
    vm.run("echo dirt > /opt/abc; touch /run/dirt /root/dirt; sync", check=True)
    spoil(vm)

def test_prepared(prepared, vm):
    vm.run("touch /run/dirt /root/dirt; sync", check=True)
    vm.wait_ready()

def test_bare(vm):
    spoil(vm)

def test_passes(vm):
    pass

def test_holds(vm):
    ask("held")

@pytest.mark.parametrize("turn", range(2))
def test_hands_over(vm, turn):
    for _ in range(6000):
        if any(pathlib.Path("locks").glob("*.next-*.lock")):
            return
        time.sleep(0.02)
    raise AssertionError("the other worker does not wait for it")
"""
# The answer takes seconds; test_kvm_or_not asks.
NO_KVM = """
from pytest_kvmsnap.machine import accelerator
accelerator.boots = lambda emulator, accelerator: accelerator == "tcg"
"""
NOTHING = "kvmsnap: nothing to clean: no run of this host left anything"


@pytest.fixture(scope="module")
def keeper(daemon_lab: DaemonLab) -> Iterator[dict[str, Kept]]:
    """What all tests here use, by the state that it is found in; and one that is none of theirs."""
    made = {"not asked for": Kept(daemon_lab, "bystander", "shut off", boots=False)}
    yield made
    found = [each.look() for each in made.values()]
    for each in made.values():
        each.discard()
    assert found == [each.found for each in made.values()]


@pytest.fixture
def kept(
    request: pytest.FixtureRequest, keeper: dict[str, Kept], daemon_lab: DaemonLab
) -> Iterator[Kept]:
    """A machine in the state that the parameter names; one that a test failed on is done with."""
    state: str = getattr(request, "param", "running")
    failed = request.session.testsfailed
    if state not in keeper:
        name = state.replace(" ", "-")
        keeper[state] = Kept(daemon_lab, name, state, boots=state == "running")
    yield keeper[state]
    if request.session.testsfailed != failed:
        keeper.pop(state).discard()


class Kills:
    """Kills runs of a suite, and has others come after them."""

    def __init__(self, suite: DaemonSuite, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
        self.suite = suite
        self._daemon = daemon
        self._monkeypatch = monkeypatch
        suite.write(SUITE)

    def kill(
        self, point: str, *arguments: str, with_daemon: bool = False, hold: int | None = None
    ) -> list[str]:
        """Kill a run at a point, and libvirt at the same moment if so; return what the run said.

        `hold` is a process to stop before that.
        """
        with self._monkeypatch.context() as patched:
            patched.setenv("KVMSNAP_KILL", point)
            if with_daemon:
                patched.setenv("KVMSNAP_KILL_TOO", str(self._daemon.pid))
            if hold is not None:
                patched.setenv("KVMSNAP_HOLD", str(hold))
            killed = self.suite.run("-p", "killing", *arguments)
        assert killed.ret == -signal.SIGKILL, "it came to its end"
        if with_daemon:
            self._daemon.restart(Daemon.kill)
        return told(killed)

    def clean(self) -> list[str]:
        """Have `--kvmsnap-clean` put right what is left; return what it said."""
        result = self.suite.run("--kvmsnap-clean")
        assert result.ret == 0
        return told(result)


def told(result: pytest.RunResult) -> list[str]:
    """Return what a run said of machines, without who had left them."""
    said = result.stdout.str() + result.stderr.str()
    assert [trace for trace in NO_TRACE if trace in said] == []
    lines = [line for line in said.splitlines() if line.startswith("kvmsnap: ")]
    # such as that of a step which only so many processes may do at once, and what runs say first
    of_all = (" that dead runs left in ", ", revert: force")
    lines = [line for line in lines if not any(words in line for words in of_all)]
    return [re.sub(r" \(?(by )?pid .*", "", line) for line in lines]


@pytest.fixture
def kills(
    daemon_suite: DaemonSuite, daemon_lab: DaemonLab, monkeypatch: pytest.MonkeyPatch
) -> Kills:
    return Kills(daemon_suite, daemon_lab.daemon, monkeypatch)


class Point(NamedTuple):
    """Where to kill, as `killing` is told, and in which test.

    `is_told` tells whether something is left that whoever comes next speaks of.
    """

    where: str
    test: str = "first"
    with_daemon: bool = False
    is_told: bool = True


DOMAIN, JOURNAL, CANARY = "machine.domain:Domain", "lab.journal:Journal", "guest.canary:Canary"
TAKE, DELETE = f"{DOMAIN}.take_snapshot", f"{DOMAIN}.delete_snapshot"
DRAFT = "lab.journal:Path.replace draft"

# Read two by two: a second run is killed at the other point, after it met what the first one left.
RUNNING = {
    "leased, no journal": Point(f"before {JOURNAL}.save", is_told=False),
    "first journal is a draft": Point(f"before {DRAFT}", is_told=False),
    "journal written": Point(f"after {JOURNAL}.save"),
    "block planted": Point(f"after {CANARY}.plant"),
    "found taken, journal of it is a draft": Point(f"before {DRAFT} 4"),
    "found being taken": Point(f"amid {TAKE} found"),
    "found being taken, with libvirt": Point(f"amid {TAKE} found", with_daemon=True),
    "found in the image alone": Point(f"halfway {TAKE} found"),
    "found taken": Point(f"after {TAKE} found"),
    "prepared being taken, with libvirt": Point(f"amid {TAKE} prepared", "prepared", True),
    "in a test of a prepared state": Point("before vm:VM.wait_ready", "prepared"),
    "marked": Point(f"before {DOMAIN}.revert"),
    "being reverted": Point(f"amid {DOMAIN}.revert"),
    "being reverted, with libvirt": Point(f"amid {DOMAIN}.revert", with_daemon=True),
    "reverted": Point(f"after {DOMAIN}.revert"),
    "marks to be looked for": Point(f"before {CANARY}.look"),
    "of-the-test being deleted": Point(f"amid {DELETE} of-the-test"),
    "of-the-test being deleted, with libvirt": Point(
        f"amid {DELETE} of-the-test", with_daemon=True
    ),
    "of-the-test known to libvirt alone": Point(f"halfway {DELETE} of-the-test"),
    "prepared deleted": Point(f"after {DELETE} prepared", "prepared"),
    "guest to be tidied up": Point(f"before {CANARY}.remove", "passes"),
    "found known to libvirt alone": Point(f"halfway {DELETE} found", "passes"),
    "found deleted": Point(f"after {DELETE} found", "passes"),
    "journal removed": Point(f"after {JOURNAL}.remove", "passes", is_told=False),
}
# What only such a machine goes through; it is paired like the above.
OFF = {
    "being started": Point(f"amid {DOMAIN}.start", "bare"),
    "being started, with libvirt": Point(f"amid {DOMAIN}.start", "bare", True),
    "started": Point(f"after {DOMAIN}.start", "bare"),
    "base being taken": Point(f"amid {TAKE} base", "bare"),
    "base being taken, with libvirt": Point(f"amid {TAKE} base", "bare", True),
    "being put back": Point(f"amid {DOMAIN}.revert found", "bare"),
    "being put back, with libvirt": Point(f"amid {DOMAIN}.revert found", "bare", True),
    "put back": Point(f"after {DOMAIN}.revert found", "bare"),
    "base deleted": Point(f"after {DELETE} base", "bare"),
    "journal to be removed": Point(f"before {JOURNAL}.remove", "bare"),
}


def pairs(points: dict[str, Point]) -> list[Any]:
    """Return the points two by two, every other pair marked `long`."""
    names = iter(points)
    return [
        pytest.param(
            points[one],
            points[other],
            id=f"{one}; {other}",
            marks=[pytest.mark.long] if number % 2 else [],
        )
        for number, (one, other) in enumerate(zip(names, names, strict=True))
    ]


def put_back(kept: Kept, why: str = "a run ended without doing so") -> str:
    return f"kvmsnap: put {kept.name} back as found ({kept.found['state']}): {why}"


def kill_twice(kills: Kills, kept: Kept, one: Point, other: Point, *options: str) -> None:
    """Kill a run, then the next one, which put right what the first left, and clean up after that.

    Had the next one forgotten something, it would have taken that for how the machine was found.
    """
    options = (f"--kvmsnap-domain={kept.name}", *options)
    kills.kill(one.where, *options, "-k", one.test, with_daemon=one.with_daemon)
    said = kills.kill(other.where, *options, "-k", other.test, with_daemon=other.with_daemon)
    assert said == ([put_back(kept)] if one.is_told else [])
    assert kills.clean() == [put_back(kept) if other.is_told else NOTHING]
    assert kept.look() == kept.found
    assert kills.suite.left_over() == []


@pytest.mark.parametrize(("one", "other"), pairs(RUNNING))
def test_machine_that_was_found_running(kept: Kept, kills: Kills, one: Point, other: Point) -> None:
    kill_twice(kills, kept, one, other)


@pytest.mark.parametrize("kept", ["shut off"], indirect=True)
@pytest.mark.parametrize(("one", "other"), pairs(OFF))
def test_machine_that_was_found_off(kept: Kept, kills: Kills, one: Point, other: Point) -> None:
    """It never gets beyond its firmware, and nobody waits for that: this saves the boots."""
    kill_twice(kills, kept, one, other, "--kvmsnap-ready=none")


def test_those_who_clean_up_are_killed_too(kept: Kept, kills: Kills) -> None:
    kills.kill("before vm:VM.wait_ready", f"--kvmsnap-domain={kept.name}", "-k", "first")
    for point, with_daemon in (
        (f"early amid {DOMAIN}.revert found", True),
        (f"early after {DOMAIN}.revert found", False),
        (f"early halfway {DELETE} found", False),
    ):
        assert kills.kill(point, "--kvmsnap-clean", with_daemon=with_daemon) == []
    assert kills.clean() == [put_back(kept)]
    assert kept.look() == kept.found
    assert kills.suite.left_over() == []


def test_libvirt_is_still_at_work_for_the_dead_run(kept: Kept, kills: Kills) -> None:
    """The machine's QEMU stands still, and with it the snapshot, until somebody looks at it."""
    qemu = kept.qemu()
    option = f"--kvmsnap-domain={kept.name}"
    kills.kill(f"amid {TAKE} found", option, "-k", "first", hold=qemu)
    cleaning = kills.suite.start_run("--kvmsnap-clean")
    time.sleep(3)  # it shows in no other way how far it is; were it slower, that would show less
    os.kill(qemu, signal.SIGCONT)
    assert told(cleaning.result()) == [put_back(kept)]
    assert kept.look() == kept.found
    assert kills.suite.left_over() == []


def test_machine_of_a_living_run_is_left_alone(
    kept: Kept, kills: Kills, daemon_lab: DaemonLab
) -> None:
    machine = daemon_lab.make("held")
    try:
        bare = ["--kvmsnap-domain=held", "--kvmsnap-ready=none"]
        holder = kills.suite.start_run(*bare, "-k", "holds")
        await_file(kills.suite.folder / "held")
        kills.kill(f"after {TAKE} found", f"--kvmsnap-domain={kept.name}", "-k", "first")
        said = kills.clean()
        (kills.suite.folder / "held").unlink()
        holder.result().assert_outcomes(passed=1)
        assert sorted(said) == ["kvmsnap: left held alone: it is in use", put_back(kept)]
        assert machine.differences() == []
    finally:
        daemon_lab.discard(machine)
    assert kept.look() == kept.found
    assert kills.suite.left_over() == []


def test_machine_that_was_left_clean_for_a_worker_that_never_came(
    kept: Kept, kills: Kills, xdist: None
) -> None:
    """All of the run dies when one worker has left it, and the other one is about to take it."""
    option = f"--kvmsnap-domain={kept.name}"
    kills.kill("after lab.machine:Machine.leave_clean", option, "-n2", "-k", "hands_over")
    result = kills.suite.run(option, "-k", "passes")
    result.assert_outcomes(passed=1)
    why = "a worker had left it clean for another one of its run"
    assert told(result) == [put_back(kept, why)]
    assert kept.look() == kept.found
    assert kills.suite.left_over() == []


@pytest.fixture
def raw(daemon_lab: DaemonLab, tmp_path: Path) -> Iterator[tuple[SharedMachine, Path]]:
    """A machine that is off, on a raw image."""
    machine = daemon_lab.make("raw")
    image = machine.disk.with_suffix(".raw")
    convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(machine.disk), str(image)]
    subprocess.run(convert, check=True)
    machine.disk.unlink()
    xml = tmp_path / "raw.xml"
    xml.write_text(machine.as_made.replace(f"{machine.disk}", f"{image}").replace("qcow2", "raw"))
    machine.define(xml)
    yield machine, image
    daemon_lab.discard(machine)
    image.unlink()


def test_conversion(raw: tuple[SharedMachine, Path], kills: Kills, daemon_lab: DaemonLab) -> None:
    """Killed when the image has its name already, before and after the machine is put on it."""
    machine, image = raw
    options = ["--kvmsnap-domain=raw", "--kvmsnap-ready=none", "-k", "passes"]
    found, files = machine.definition, sorted(daemon_lab.images.iterdir())
    content = hashlib.sha256(image.read_bytes()).digest()
    put_back = "kvmsnap: put raw back as found: a run ended without doing so"

    kills.kill("early before machine.libvirt_api:Hypervisor.define", *options)
    assert machine.disk.exists()
    assert kills.clean() == [put_back]
    assert (machine.definition, sorted(daemon_lab.images.iterdir())) == (found, files)

    kills.kill("early after machine.libvirt_api:Hypervisor.define", *options)
    result = kills.suite.run(*options)
    result.assert_outcomes(passed=1)
    assert told(result) == [put_back]
    assert machine.differences() == []
    assert sorted(daemon_lab.images.iterdir()) == sorted([*files, machine.disk])
    assert hashlib.sha256(image.read_bytes()).digest() == content
    assert kills.suite.left_over() == []


def test_throwaway_machine(
    kills: Kills, daemon_lab: DaemonLab, linux: guests.Guest, tmp_path: Path
) -> None:
    """Killed when it is defined, then when it is half removed: nothing is left but its images."""
    image, template = tmp_path / "golden.qcow2", tmp_path / "machine.xml"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"]
    subprocess.run(create, check=True)
    template.write_text(guests.domain_xml(linux, "theirs", image, kind="qemu"))
    options = [f"--kvmsnap-golden={image}", f"--kvmsnap-template={template}"]
    options += ["--kvmsnap-ready=none", "-k", "passes"]
    before = domains(daemon_lab)
    kills.suite.write(SUITE, conftest=NO_KVM)

    kills.kill("after machine.clone:make", *options)
    assert len(domains(daemon_lab)) == len(before) + 1
    said = kills.kill("before machine.clone:remove_folder", *options)
    assert domains(daemon_lab) == before
    assert clones(kills.suite) != []
    for words in (said, kills.clean()):
        (line,) = words
        assert line.startswith("kvmsnap: removed the throwaway machine kvmsnap-golden-")
    assert domains(daemon_lab) == before
    assert clones(kills.suite) + kills.suite.left_over() == []


def domains(lab: DaemonLab) -> list[str]:
    listed = ["virsh", "-q", "-c", lab.uri, "list", "--all", "--name"]
    return subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()


def clones(suite: DaemonSuite) -> list[Path]:
    return list(suite.store.glob("*/clones/*"))
