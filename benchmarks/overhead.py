"""What the plugin itself takes of a test: `.venv/bin/python benchmarks/overhead.py`.

That is a test's wall time less what libvirt and the guest's agent took: over many tests, over many
snapshots in the image, and for a suite that uses no machine. pytest's own share is in it, and shown
apart, as that of tests without a machine. The tests do nothing, on the example's guest, by the
fastest way back that the plugin has here.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# At the end, so that what is installed comes before the checkout.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.boxes import Box, Site, finish, is_taken, pytest_command, site, timed

TESTS_PER_IMAGE = 12
FAST = "--kvmsnap-revert=fast"
WITH_MACHINE = """
import pytest
@pytest.mark.parametrize("turn", range({tests}))
def test_nothing(vm, turn): pass
"""
WITHOUT = """
import pytest
@pytest.mark.parametrize("turn", range({tests}))
def test_nothing(turn): pass
"""
COUNTING = """
import pathlib, sys
def pytest_sessionfinish():
    names = [name for name in sys.modules if name.startswith("libvirt")]
    pathlib.Path("loaded").write_text("\\n".join(names))
"""

Test = dict[str, float]
"""Seconds of one test: `wall`, of it `ours`, and in the `strict` sense, of which on a `cpu`.

Ours is all but the calls of libvirt and of the agent; strictly, what we do within the agent's too.
"""


def suite(folder: Path, tests: str, count: int) -> None:
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(tests.format(tests=count))


def run(folder: Path, *options: str) -> None:
    """Run the suite in a folder; all of it passes."""
    more = {"PYTHONPATH": str(Path(__file__).parent), "KVMSNAP_OVERHEAD": f"{folder}/took"}
    done = subprocess.run(
        pytest_command(*options),
        cwd=folder,
        env=os.environ | more,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()


def tests_without(count: int) -> list[Test]:
    """Run so many tests without a machine; return what each took, which is pytest's own share."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suite(folder, WITHOUT, count + 1)
        run(folder, "-p", "overhead_run")
        took: list[Test] = json.loads((folder / "took").read_text())
        return took[1:]


def tests_on(box: Box, count: int, engine: Sequence[str]) -> list[Test]:
    """Run so many tests; return what each took, without the first, which takes the snapshot."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suite(folder, WITH_MACHINE, count + 1)
        where = [f"--kvmsnap-uri={box.site.uri}", f"--kvmsnap-domain={box.name}"]
        run(folder, "-p", "overhead_run", *where, f"--kvmsnap-lock-dir={folder}/locks", *engine)
        took: list[Test] = json.loads((folder / "took").read_text())
        return took[1:]


def over_tests(where: Site, counts: list[int], engine: Sequence[str]) -> dict[str, Any]:
    box = where.make("tests")
    box.start()
    took = {"none with a machine": tests_without(100)}
    took |= {str(count): tests_on(box, count, engine) for count in counts}
    box.remove()
    return took


def over_snapshots(
    where: Site, counts: list[int], rounds: int, engine: Sequence[str]
) -> dict[str, Any]:
    """Let machines with so many snapshots in their images take turns, the run's own included."""
    boxes = {count: where.make(f"image-{count}") for count in counts}
    took: dict[str, list[Test]] = {str(count): [] for count in counts}
    for count, box in boxes.items():
        for number in range(1, count):
            box.snapshot(f"other-{number}")  # while it is off: without memory, and at once
        box.start()
    for _ in range(rounds):
        for count, box in boxes.items():
            took[str(count)] += tests_on(box, TESTS_PER_IMAGE, engine)
    for box in boxes.values():
        box.remove()
    return took


def unused(tests: int, rounds: int) -> dict[str, Any]:
    """Let a suite without machines run with the plugin and without it, in turn."""
    found: dict[str, Any] = {"tests": tests, "with": [], "without": []}
    cases: list[tuple[str, list[str]]] = [("with", []), ("without", ["-p", "no:kvmsnap"])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suite(folder, WITHOUT, tests)
        (folder / "conftest.py").write_text(COUNTING)
        for number in range(rounds + 1):
            for case, options in cases:
                seconds = {"cpu": -cpu_of_children()}
                seconds["wall"] = timed(functools.partial(run, folder, *options))
                seconds["cpu"] += cpu_of_children()
                if number:  # the first one compiles
                    found[case].append(seconds)
                if case == "with":
                    found["libvirt"] = (folder / "loaded").read_text().split()
            cases.reverse()
    return found


def cpu_of_children() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def tell_tests(title: str, took: dict[str, list[Test]]) -> None:
    print(
        f"\n| {title} | wall (ms) | ours (ms) | longest | last tenth | strict (ms) | its CPU (ms) |"
    )
    print("|---|---|---|---|---|---|---|")
    for label, tests in took.items():
        wall, ours, strict, cpu = (
            [1000 * test[part] for test in tests] for part in ("wall", "ours", "strict", "cpu")
        )
        last = ours[-max(1, len(ours) // 10) :]
        middles = [f"{statistics.median(values):.1f}" for values in (last, strict, cpu)]
        cells = [label, f"{statistics.median(wall):.0f}", f"{statistics.median(ours):.1f}"]
        print("| " + " | ".join([*cells, f"{max(ours):.1f}", *middles]) + " |")


def tell_unused(found: dict[str, Any]) -> None:
    print(
        f"\n{found['tests']} empty tests without a machine, with the plugin installed or blocked;"
    )
    print(f"modules of libvirt that were loaded: {len(found['libvirt'])}\n")
    print("| time | blocked (s) | with to blocked | extremes | more (ms) |")
    print("|---|---|---|---|---|")
    for part in ("wall", "cpu"):
        pairs = [(a[part], b[part]) for a, b in zip(found["with"], found["without"], strict=True)]
        ratios = [a / b for a, b in pairs]
        more = statistics.median(1000 * (a - b) for a, b in pairs)
        blocked = statistics.median(b for _, b in pairs)
        print(
            f"| {part} | {blocked:.2f} | {statistics.median(ratios):.3f}"
            f" | {min(ratios):.3f} to {max(ratios):.3f} | {more:.0f} |"
        )


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tests", type=numbers, default="10,100", help="1000 take a quarter of an hour"
    )
    parser.add_argument("--snapshots", type=numbers, default="1,10,50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unused-tests", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        engine = [FAST] if is_taken(FAST, Path(folder)) else []
    found: dict[str, Any] = {"engine": engine}
    with site() as where:
        found["host"] = where.words()
        print(f"{found['host']}; options: {' '.join(engine) or 'none'}; medians")
        found["tests"] = over_tests(where, options.tests, engine)
        tell_tests("tests", found["tests"])
        found["snapshots"] = over_snapshots(where, options.snapshots, options.rounds, engine)
        tell_tests("snapshots", found["snapshots"])
    found["unused"] = unused(options.unused_tests, options.rounds)
    tell_unused(found["unused"])
    finish(found, begin, options.json)


if __name__ == "__main__":
    main()
