"""What a clean machine costs, by six ways: `.venv/bin/python benchmarks/clean_machine.py`.

Each way has a machine of its own, and they take turns on one libvirt daemon of the benchmark's own:
machines differ, and so does one machine from minute to minute, so that only the ratios within one
round mean something. With `--json` all single turns are kept.
"""

import argparse
import contextlib
import itertools
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

# At the end, so that what is installed comes before the checkout.
sys.path.append(str(Path(__file__).parents[1]))

import libvirt
import libvirt_qemu

from benchmarks.boxes import (
    MIB,
    PATIENCE,
    Box,
    Meter,
    Site,
    call,
    finish,
    is_taken,
    pytest_command,
    run_in_guest,
    site,
    timed,
    until_true,
)

SIZES = "128,1536+0,1536+256,1536+768"
SUITE = """
import pytest
import turns

@pytest.mark.parametrize("turn", range({turns}))
def test_turn(vm, turn):
    turns.wait_for_turn(vm)
"""
EXPLANATION = """\
clean: the machine is back; by hand that is a snapshot, a revert and a deletion. revert: the call
that goes back alone. mark, arrive: what the plugin does beside it (marks in the guest; then the
agent, the clock, and a look for the marks). command: from the end of a test until the next one's
first command in the guest is done. of by hand: `command` as a share of that by hand in the same
round, median and extremes. of revert: `clean` as a share of libvirt-python's revert alone. CPU: of
QEMU, libvirt and their client. peak: the most memory of QEMU, of the new one where there is one.
written: the bytes in all calls of write. A boot does not bring back the data in memory.
"""


class Size(NamedTuple):
    """MiB of memory, and of random data in it."""

    memory: int
    data: int

    def __str__(self) -> str:
        return f"{self.memory} MiB, {self.data} MiB of random data in it"


Seconds = dict[str, float]
"""How long parts of a turn took, by the names of the columns."""


class Way:
    """One way to a clean machine; `process` does it where this process does not."""

    label = ""
    process: int | None = None

    def __init__(self, box: Box) -> None:
        self.box = box
        self.remarks: list[str] = []
        """What is to be said of it, when it is closed."""

    def open(self) -> None:
        """Get ready for the first turn, on a machine that runs."""

    def turn(self) -> Seconds:
        """Make a machine clean that a test used."""
        raise NotImplementedError

    def close(self) -> None:
        """End what goes on."""


def by_calls(
    box: Box, take: Callable[[], object], revert: Callable[[], object], *rest: Callable[[], object]
) -> Seconds:
    """Take a snapshot, use the machine, go back, have it answer, and delete the snapshot."""
    answer, delete = rest
    taken = timed(take)
    box.spoil()
    reverted = timed(revert)
    answered = timed(answer)
    clean = taken + reverted + timed(delete)
    return {"clean": clean, "revert": reverted, "command": clean + answered}


class ByHand(Way):
    label = "1 virsh by hand"

    def turn(self) -> Seconds:
        return by_calls(
            self.box,
            lambda: self._virsh("snapshot-create-as", "--name", "turn", "--atomic"),
            lambda: self._virsh("snapshot-revert", "--snapshotname", "turn", "--force"),
            lambda: until_true(self._is_answered, subprocess.CalledProcessError),
            lambda: self._virsh("snapshot-delete", "--snapshotname", "turn"),
        )

    def _virsh(self, command: str, *arguments: str) -> str:
        return call("virsh", "-q", "-c", self.box.site.uri, command, self.box.name, *arguments)

    def _is_answered(self) -> bool:
        return run_in_guest(lambda words: self._virsh("qemu-agent-command", words), ("true",)) == 0


class Binding(Way):
    label = "2 libvirt-python"

    def turn(self) -> Seconds:
        box = self.box
        return by_calls(
            box,
            lambda: box.snapshot("turn"),
            self._revert,
            box.until_answered,
            lambda: box.domain.snapshotLookupByName("turn").delete(0),
        )

    def _revert(self) -> None:
        domain = self.box.domain
        snapshot = domain.snapshotLookupByName("turn")
        domain.revertToSnapshot(snapshot, libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE)


class Plugin(Way):
    """A run of pytest that goes on to the next test when it is told to."""

    def __init__(self, box: Box, label: str, options: Sequence[str], turns: int) -> None:
        super().__init__(box)
        self.label = label
        self._options = options
        self._turns = turns
        self._stack = contextlib.ExitStack()
        self._lines: IO[str]
        self._go: int

    def open(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "test_it.py").write_text(SUITE.format(turns=self._turns + 1))
        (folder / "pytest.ini").write_text("[pytest]\n")
        self._said = folder / "said"
        source, self._go = os.pipe()
        told, target = os.pipe()
        self._lines = self._stack.enter_context(os.fdopen(told))
        with self._said.open("wb") as said:
            run = subprocess.Popen(
                pytest_command("-p", "turns", *self._options, *self._place(folder)),
                cwd=folder,
                env=self._environment(f"{source} {target}"),
                stdout=said,
                stderr=said,
                pass_fds=(source, target),
            )
        os.close(source)
        os.close(target)
        self.process = run.pid
        self._stack.callback(self._end, run)
        self._next()  # the first test has its machine

    def _place(self, folder: Path) -> list[str]:
        where = [f"--kvmsnap-uri={self.box.site.uri}", f"--kvmsnap-domain={self.box.name}"]
        return [*where, f"--kvmsnap-lock-dir={folder}/locks"]

    @staticmethod
    def _environment(pipes: str) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(Path(__file__).parent), "KVMSNAP_TURNS": pipes}

    def turn(self) -> Seconds:
        os.write(self._go, b"\n")
        told = self._next()
        return {**told, "clean": told["back"] - told["mark"] - told["arrive"]}

    def _next(self) -> Seconds:
        ready, *_ = select.select([self._lines], [], [], PATIENCE)
        line = self._lines.readline() if ready else ""
        assert line, f"the run of pytest does not go on: {self._said.read_text()}"
        told: Seconds = json.loads(line)
        return told

    def _end(self, run: "subprocess.Popen[bytes]") -> None:
        os.close(self._go)
        try:
            run.wait(PATIENCE)
        except subprocess.TimeoutExpired:  # what was measured is not lost for that
            self.remarks.append(f"{self.label}: the run of pytest did not end, and was killed")
        finally:
            run.kill()  # nothing, when it has ended
            run.wait()
        said = self._said.read_text().splitlines()
        self.remarks += dict.fromkeys(line for line in said if "reverted by force" in line)

    def close(self) -> None:
        self._stack.close()


class Bare(Way):
    """QEMU's own load of a snapshot, without a look whether it brings back everything."""

    label = "5 bare snapshot-load"

    def open(self) -> None:
        self.box.snapshot("bare")
        self._numbers = itertools.count(1)

    def turn(self) -> Seconds:
        self.box.spoil()
        clean = timed(self._load)
        answered = timed(self.box.until_answered)
        return {"clean": clean, "revert": clean, "command": clean + answered}

    def _load(self) -> None:
        job = f"load-{next(self._numbers)}"
        nodes = [drive["inserted"]["node-name"] for drive in self._ask("query-block")]
        self._ask(
            "snapshot-load", {"job-id": job, "tag": "bare", "vmstate": nodes[0], "devices": nodes}
        )
        while (told := self._job(job))["status"] != "concluded":
            time.sleep(0.001)
        assert "error" not in told, told["error"]
        self._ask("job-dismiss", {"id": job})

    def _job(self, name: str) -> dict[str, str]:
        return next(job for job in self._ask("query-jobs") if job["id"] == name)

    def _ask(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments or {}})
        told = json.loads(libvirt_qemu.qemuMonitorCommand(self.box.domain, request, 0))
        assert "return" in told, told
        return told["return"]


class Boot(Way):
    label = "6 overlay and boot"

    def turn(self) -> Seconds:
        self.box.spoil()
        took = timed(self._renew)
        return {"clean": took, "command": took}

    def _renew(self) -> None:
        self.box.domain.destroy()
        self.box.renew_disk()
        self.box.start()


def ways(where: Site, size: Size, turns: int, engines: dict[str, list[str]]) -> list[Way]:
    """Return the ways, each with a new machine."""

    def box(name: str) -> Box:
        return where.make(name, size.memory)

    plugin = [
        Plugin(box(name), f"{number} the plugin, {name}", options, turns)
        for number, (name, options) in enumerate(engines.items(), 3)
    ]
    calls = [ByHand(box("hand")), Binding(box("binding"))]
    return [*calls, *plugin, Bare(box("bare")), Boot(box("boot"))]


def measured(way: Way) -> dict[str, Any]:
    """Do one turn; return what it took."""
    if isinstance(way, Plugin):
        meter = Meter(way.box, way.process)
        return way.turn() | meter.read()
    meter = Meter(way.box, None)
    turn = way.turn() | meter.read()
    way.box.check_clean()
    return turn


@contextlib.contextmanager
def opened(all_ways: list[Way], size: Size) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for way in all_ways:  # which boot side by side
            stack.callback(way.box.remove)
            way.box.domain.create()
        for way in all_ways:
            way.box.until_answered()
            way.box.fill(size.data)
            stack.callback(way.close)
            way.open()
        yield


def rounds_of(all_ways: list[Way], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Let the ways take turns. Each begins a round once; the first round does not count."""
    turns: dict[str, list[dict[str, Any]]] = {way.label: [] for way in all_ways}
    for number in range(rounds + 1):
        first = number % len(all_ways)
        for way in all_ways[first:] + all_ways[:first]:
            turn = measured(way)
            if number:
                turns[way.label].append(turn)
    return turns


def share(values: list[float], of: list[float]) -> str:
    ratios = [value / whole for value, whole in zip(values, of, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def row(label: str, turns: list[dict[str, Any]], hand: list[float], revert: list[float]) -> str:
    def middle(name: str, pattern: str = ".2f", unit: int = 1) -> str:
        values = [turn[name] / unit for turn in turns if name in turn]
        return format(statistics.median(values), pattern) if values else "-"

    cells = [label, *(middle(name) for name in ("clean", "revert", "mark", "arrive", "command"))]
    cells.append(share([turn["command"] for turn in turns], hand))
    cells.append(share([turn["clean"] for turn in turns], revert))
    cells += [middle("cpu"), middle("peak", ".0f", MIB), middle("written", ".1f", MIB)]
    return "| " + " | ".join(cells) + " |"


COLUMNS = (
    "way",
    *(f"{name} (s)" for name in ("clean", "revert", "mark", "arrive", "command")),
    "of by hand",
    "of revert",
    "CPU (s)",
    "peak (MiB)",
    "written (MiB)",
)


FORCE, FAST = "3 the plugin, force", "4 the plugin, fast"
TARGETS = (
    (FORCE, "clean", Binding.label, "revert"),
    (FAST, "clean", Bare.label, "clean"),
    (FAST, "command", ByHand.label, "command"),
    (FAST, "command", FORCE, "command"),
)


def table(turns: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    hand = [turn["command"] for turn in turns[ByHand.label]]
    revert = [turn["revert"] for turn in turns[Binding.label]]
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---" * len(COLUMNS) + "|"
    for label, its in turns.items():
        yield row(label, its, hand, revert)
        moved = sum(not turn["same_process"] for turn in its)
        if "fast" in label and moved:
            yield f"(fast: {moved} of {len(its)} turns went to a new QEMU, so they were not fast)"


def targets(turns: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Compare, turn by turn, what the plugin takes with what QEMU and libvirt need themselves."""
    for ours, part, theirs, reference in TARGETS:
        if ours in turns:
            mine = [turn[part] for turn in turns[ours]]
            other = [turn[reference] for turn in turns[theirs]]
            yield f"{ours}, {part}: {share(mine, other)} of {theirs}, {reference}"


def engines_here() -> tuple[dict[str, list[str]], list[str]]:
    """Return the options of the ways of the plugin, and what is to be said of those left out."""
    with tempfile.TemporaryDirectory() as folder:
        takes = {
            name: is_taken(f"--kvmsnap-revert={name}", Path(folder)) for name in ("force", "fast")
        }
    options = {name: [f"--kvmsnap-revert={name}"] for name, is_known in takes.items() if is_known}
    remarks = [] if takes["fast"] else ["The plugin refuses --kvmsnap-revert=fast: no such row."]
    return {"force": [], **options}, remarks


def sizes(text: str) -> list[Size]:
    parts = [word.partition("+") for word in text.split(",")]
    return [Size(int(memory), int(data or 0)) for memory, _, data in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sizes", type=sizes, default=SIZES, help="MiB, and + MiB of random data")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    begin = time.monotonic()
    engines, remarks = engines_here()
    found: dict[str, Any] = {"rounds": options.rounds, "remarks": remarks, "sizes": []}
    with site() as where:
        found["host"] = where.words()
        print(f"{options.rounds} rounds, medians; {found['host']}\n")
        print(EXPLANATION, *remarks, sep="\n")
        for size in options.sizes:
            all_ways = ways(where, size, options.rounds + 1, engines)
            with opened(all_ways, size):
                turns = rounds_of(all_ways, options.rounds)
            found["sizes"].append({**size._asdict(), "turns": turns})
            print(f"\n{size}:\n", *table(turns), "", *targets(turns), sep="\n", flush=True)
            for way in all_ways:
                for remark in way.remarks:
                    print(remark)
    finish(found, begin, options.json)


if __name__ == "__main__":
    main()
