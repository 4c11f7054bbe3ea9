"""What reverts leave in the image: `.venv/bin/python benchmarks/disk_growth.py [TESTS]`.

Each test writes 20 MiB of random data on the guest's disk and has it synced. The space that the
image takes on the host's disk must not grow with the number of tests.
"""

import sys
import tempfile
import textwrap
from collections.abc import Generator
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "example_suite"
sys.path.insert(0, str(EXAMPLE))

import pytest  # noqa: E402

from lab import open_lab, reap_orphans  # noqa: E402

MIB = 2**20


class Sizes:
    """A plugin of pytest: the space that the image takes, after each test's call and revert."""

    def __init__(self, image: Path) -> None:
        self._image = image
        self.before = self.image_size()
        self.written: list[float] = []
        self.reverted: list[float] = []

    def image_size(self) -> float:
        return self._image.stat().st_blocks * 512 / MIB

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        result = yield
        self.written.append(self.image_size())
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        result = yield
        self.reverted.append(self.image_size())
        return result


def main() -> None:
    tests = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with (
        tempfile.TemporaryDirectory(prefix="kvm-") as folder,
        tempfile.TemporaryDirectory() as suite,
        reap_orphans(),
        open_lab(Path(folder) / "lab") as lab,
    ):
        sizes = Sizes(lab.add_machine("bench", disk_format="qcow2"))
        test = f"""
            import pytest
            @pytest.mark.parametrize("turn", range({tests}))
            def test_writes(vm, turn):
                vm.run("dd if=/dev/urandom of=/root/data bs=1M count=20 conv=fsync", check=True)
        """
        Path(suite, "test_bench.py").write_text(textwrap.dedent(test))
        options = [f"--kvmsnap-uri={lab.uri}", "--kvmsnap-domain=bench"]
        options += [f"--kvmsnap-lock-dir={folder}/locks", "-p", "no:cacheprovider", "-q", suite]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = pytest.main(options, plugins=[sizes])
        after = sizes.image_size()
    first, last = sizes.reverted[0], sizes.reverted[-1]
    print(f"\n{tests} tests that write 20 MiB each, exit status {int(status)};")
    print("MiB that the image takes on the disk\n")
    print(f"{'before the run':42} {sizes.before:9.1f}")
    print(f"{'after the first test':42} {first:9.1f}")
    print(f"{'after the last test':42} {last:9.1f}")
    print(f"{'at most, before a revert':42} {max(sizes.written):9.1f}")
    print(f"{'after the run':42} {after:9.1f}")
    print(f"\nlast to first: {last / first:.3f}")


if __name__ == "__main__":
    main()
