"""What a failed test leaves: a folder with all that can be seen of its machine.

Failing is not what you want of an example, so this is for `pytest example_suite --example-failure`.
The first test fails then, and the second one looks at its folder.
"""

from pathlib import Path

import pytest

from pytest_kvmsnap import VM


def test_fails_with_something_to_see(vm: VM) -> None:
    vm.run("echo this is why > /dev/kmsg", check=True)
    assert vm.run(["test", "-e", "/no/such/file"]).returncode == 0, "fails on purpose"


def test_left_a_folder(pytestconfig: pytest.Config) -> None:
    results = Path(pytestconfig.getoption("kvmsnap_output") or "kvmsnap-results")
    folders = sorted(results.glob("*test_fails_with_something_to_see*"))
    assert folders, "run both tests of this file"
    left = {path.name for path in folders[-1].iterdir()}
    assert {"console.log", "domain.xml", "guest.log"} <= left
    assert "this is why" in (folders[-1] / "guest.log").read_text(errors="replace")
