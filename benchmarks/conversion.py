"""What a conversion costs: `.venv/bin/python benchmarks/conversion.py [ROUNDS] [FOLDER]`.

A is a bare `qemu-img convert`, B is ours with all around it: checks, on disk, named, the definition
switched (libvirt's test driver's). They take turns, and only ratios mean something. A bare convert
leaves its copy in the host's memory, so it is timed with a `sync` of the copy too.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pytest_kvmsnap.machine import conversion
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import connect

MIB = 2**20
SIZE, DATA = 1024 * MIB, 512 * MIB
DISK = "<disk type='file'><driver type='raw'/><source file='{}'/><target dev='{}'/></disk>"


def make_raw(path: Path) -> Path:
    with path.open("wb") as file:
        for _ in range(DATA // MIB):
            file.write(os.urandom(MIB))
        file.truncate(SIZE)
    return path


def bare(raws: list[Path], *, sync: bool) -> None:
    for raw in raws:
        copy = raw.with_suffix(".bare")
        convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
        subprocess.run([*convert, str(raw), str(copy)], check=True)
        if sync:
            subprocess.run(["sync", str(copy)], check=True)


class Ours:
    """A domain with raw disks, which is defined anew after each conversion."""

    def __init__(self, raws: list[Path]) -> None:
        self._hypervisor = connect("test:///default")
        disks = "".join(DISK.format(raw, f"vd{n}") for n, raw in zip("ab", raws, strict=False))
        self._xml = (
            "<domain type='test'><name>bench</name><memory>8192</memory>"
            f"<os><type>hvm</type></os><devices>{disks}</devices></domain>"
        )

    def __call__(self) -> None:
        raw_domain = self._hypervisor.connection.defineXML(self._xml)
        domain = Domain(self._hypervisor, raw_domain.UUIDString(), "bench")
        conversions = conversion.planned(domain, "bench")
        problems = conversion.problems(domain, conversions, "auto")
        problems += conversion.problems_together([(domain, conversions)], live=False)
        assert problems == []
        conversion.perform([(domain, conversions)], lambda _: None, lambda _: None)
        raw_domain.undefine()


def timed(folder: Path, call: Callable[[], None]) -> float:
    for old in (*folder.glob("*.qcow2"), *folder.glob("*.bare")):
        old.unlink()
    os.sync()  # what others wrote is not to be waited for here
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else ".") as name:
        folder = Path(name).absolute()
        raws = [make_raw(folder / "one.raw"), make_raw(folder / "two.raw")]
        one, two = raws[:1], raws
        calls: dict[str, Callable[[], None]] = {
            "bare": lambda: bare(one, sync=False),
            "ours": Ours(one),
            "bare, synced": lambda: bare(one, sync=True),
            "bare, two in turn": lambda: bare(two, sync=False),
            "ours, two at once": Ours(two),
            "bare, synced, two in turn": lambda: bare(two, sync=True),
        }
        times: dict[str, list[float]] = {label: [] for label in calls}
        for _ in range(rounds):
            for label, call in calls.items():
                times[label].append(timed(folder, call))
    print(f"{rounds} rounds, images of {SIZE // MIB} MiB with {DATA // MIB} MiB of random data,")
    print(f"{os.cpu_count()} cores; seconds\n")
    print(f"{'':30} {'min':>7} {'median':>7} {'max':>7}")
    for label, values in times.items():
        print(f"{label:30}", *(f"{f(values):7.2f}" for f in (min, statistics.median, max)))
    print()
    for a, b in (
        ("ours", "bare, synced"),
        ("ours", "bare"),
        ("ours, two at once", "bare, synced, two in turn"),
        ("ours, two at once", "bare, two in turn"),
    ):
        ratio = statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
        print(f"{a} / {b}: {ratio:.2f}")


if __name__ == "__main__":
    main()
