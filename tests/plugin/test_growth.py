"""An image that grows beyond the limit is told, with the test that it was noticed after."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from testdriver import disk, node_file

if TYPE_CHECKING:
    from testdriver import Host, Suite

MIB = 2**20
# The host's part in a guest's writing: a test makes the file of the image larger.
TESTS = """
import os, pathlib

def grow(path, size):
    with open(path, "ab") as file:
        file.write(os.urandom(size))
        os.fsync(file.fileno())

def test_small(vm): grow({path!r}, 2**19)
def test_large(vm): grow({path!r}, 2**20)
def test_more(vm): grow({path!r}, 2**20)
"""


@pytest.fixture
def image(suite: "Suite") -> Path:
    image = suite.pytester.path / "box.qcow2"
    image.write_bytes(bytes(MIB))
    return image


def test_growth_is_told_once_and_again_at_the_end(
    suite: "Suite", host: "Host", image: Path
) -> None:
    host.define("box", disk(image), state="running")
    suite.write(TESTS.format(path=str(image)))
    result = suite.run("--kvmsnap-growth-limit=1 MiB", "-v")
    result.assert_outcomes(passed=3)
    assert result.ret == 0
    words = f"box: its image {image} grew by 1.5 MiB since this run took the machine, as seen after"
    told = [line for line in result.outlines if "grew by" in line]
    assert [line.partition(words)[0] for line in told] == ["kvmsnap: ", ""]
    for line in told:
        assert "test_large. Its snapshots hold memory and disk" in line
        assert line.endswith("raise --kvmsnap-growth-limit (now 1.0 MiB).")
    result.stdout.fnmatch_lines(["*test_large*", "kvmsnap: box: *", "*test_more*", "box: its *"])
    assert "  growth of its images: 2.5 MiB" in result.outlines


def test_growth_within_the_limit_is_not_told(suite: "Suite", host: "Host", image: Path) -> None:
    host.define("box", disk(image), state="running")
    suite.write(TESTS.format(path=str(image)))
    result = suite.run("--kvmsnap-growth-limit=3M")
    result.assert_outcomes(passed=3)
    assert "grew by" not in result.stdout.str()


def test_each_image_is_told_for_itself(suite: "Suite", host: "Host", image: Path) -> None:
    other = image.with_name("data.qcow2")
    other.write_bytes(bytes(MIB))
    fixed = image.with_name("fixed.qcow2")
    fixed.write_bytes(bytes(MIB))
    host.define(
        "box",
        disk(image),
        disk(other, target="vdb"),
        disk(fixed, target="vdc", more="<readonly/>"),
        disk("/images/none.qcow2", target="vdd"),
        state="running",
    )
    grown = "".join(f"    grow({str(each)!r}, 2**21)\n" for each in (other, fixed))
    suite.write(TESTS.format(path=str(image)) + f"\ndef test_others(vm):\n{grown}")
    result = suite.run("--kvmsnap-growth-limit=1 MiB")
    result.assert_outcomes(passed=4)
    told = [line.split(" grew")[0] for line in result.outlines if line.startswith("box: its")]
    assert told == [f"box: its image {each}" for each in (image, other)]


@pytest.mark.usefixtures("xdist")
def test_growth_in_a_worker_is_told_at_the_end(suite: "Suite", image: Path) -> None:
    node = suite.pytester.path / "node.xml"
    node.write_text(node_file(disk(image)))
    suite.write(TESTS.format(path=str(image)))
    result = suite.run_apart("-n1", f"--kvmsnap-uri=test://{node}", "--kvmsnap-growth-limit=1 MiB")
    result.assert_outcomes(passed=3)
    assert sum("grew by 1.5 MiB" in line for line in result.outlines) == 1
    result.stdout.fnmatch_lines(["*=== pytest-kvmsnap ===*", "box: its image *"])
