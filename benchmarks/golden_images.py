"""What a throwaway machine costs: `.venv/bin/python benchmarks/golden_images.py [ROUNDS]`.

A is ten tests on one golden image, B is a new machine for each of ten tests; they take turns, and
only their ratio means something. The making of a machine, without its boot, is timed alone.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "example_suite"
sys.path.insert(0, str(EXAMPLE))

import pytest  # noqa: E402

import guest as guests  # noqa: E402
from lab import open_lab, reap_orphans  # noqa: E402

TESTS = 10
SUITE = f"""
import pytest
@pytest.mark.kvm_golden("golden.qcow2", memory="128 MiB")
@pytest.mark.parametrize("turn", range({TESTS}))
def test_nothing(vm, turn): pass
"""


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Machines:
    """Throwaway machines, made and removed as the plugin does it."""

    def __init__(self, uri: str, image: Path, folder: Path) -> None:
        from pytest_kvmsnap.golden import Golden
        from pytest_kvmsnap.lab.clones import Clones
        from pytest_kvmsnap.lab.site import Site
        from pytest_kvmsnap.lab.voice import Voice
        from pytest_kvmsnap.settings import Settings

        settings = Settings(uri=uri, lock_dir=folder)
        self._clones = Clones(Site(settings, Voice(print, lambda *_: None)))
        self._golden = Golden(image, "qcow2", memory=128 * 2**20, folders=(image.parent,))
        self.making: list[float] = []
        self.removing: list[float] = []

    def make_and_remove(self, *, boot: bool) -> None:
        from pytest_kvmsnap.guest.ready import AgentSign, wait_ready

        start = time.perf_counter()
        machine, lease = self._clones.make(self._golden)
        self.making.append(time.perf_counter() - start)
        if boot:
            machine.domain.start()
            wait_ready(machine.domain, AgentSign(machine.domain), 60)
        start = time.perf_counter()
        machine.close()
        lease.release()
        if not boot:
            self.removing.append(time.perf_counter() - start)

    def ten_boots(self) -> None:
        for _ in range(TESTS):
            self.make_and_remove(boot=True)


def row(name: str, values: list[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{name:42} {len(values):4} {low * 1000:9.1f} {middle * 1000:9.1f} {high * 1000:9.1f}"


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with (
        tempfile.TemporaryDirectory(prefix="kvm-") as folder,
        tempfile.TemporaryDirectory() as suite,
        reap_orphans(),
        open_lab(Path(folder) / "lab") as lab,
    ):
        image = Path(suite, "golden.qcow2")
        to_qcow2 = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
        subprocess.run([*to_qcow2, guests.build().disk, image], check=True)
        Path(suite, "test_bench.py").write_text(SUITE)
        machines = Machines(lab.uri, image, Path(folder))
        machines.make_and_remove(boot=True)  # libvirt's look at QEMU is not in the figures
        options = [f"--kvmsnap-uri={lab.uri}", f"--kvmsnap-lock-dir={folder}/locks", "-q"]
        options += ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        one_image, ten_boots = [], []
        for _ in range(rounds):
            one_image.append(timed(lambda: pytest.main([*options, suite])))
            ten_boots.append(timed(machines.ten_boots))
        machines.making.clear()
        for _ in range(20):
            machines.make_and_remove(boot=False)
    print("\n128 MiB guest, software emulation unless KVM works, orphans reaped; milliseconds\n")
    print(f"{'':42} {'n':>4} {'min':>9} {'median':>9} {'max':>9}")
    print(row("overlay, definition, journal", machines.making))
    print(row("removal, never started", machines.removing))
    print(row(f"{TESTS} tests on one golden image", one_image))
    print(row(f"{TESTS} machines made, booted and removed", ten_boots))
    ratio = statistics.median(a / b for a, b in zip(one_image, ten_boots, strict=True))
    print(f"\nratio of the two, median of {rounds} rounds: {ratio:.2f}")


if __name__ == "__main__":
    main()
