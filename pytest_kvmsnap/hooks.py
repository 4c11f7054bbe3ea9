"""The hooks that suites may implement."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_kvmsnap.vm import VM


@pytest.hookspec(firstresult=True)
def pytest_kvmsnap_lab(config: pytest.Config) -> Mapping[str, object] | None:
    """Return option names and values, for a suite whose conftest builds or finds its machines.

    Called once per process, before anything is connected, and only when a machine will be used or
    `--kvmsnap-clean` is given. The command line beats what is returned; that beats ini. A name is
    an option's, such as `uri` or `ready-timeout`.
    """


@pytest.hookspec
def pytest_kvmsnap_vm_ready(vm: "VM") -> None:
    """Do something with a machine that is running, ready and clean, before a test or fixture does.

    Called each time that a machine was brought to where a test with `vm` starts, or a fixture that
    prepares `class_vm`, `module_vm` or `session_vm`; or where tests without `vm` go on from. What
    it does to the machine is undone with what they do. An error is one of the set-up.
    """


@pytest.hookspec
def pytest_kvmsnap_before_revert(vm: "VM", item: pytest.Item, failed: bool) -> None:
    """Look at the machine of a test with `vm` before it is put back.

    `failed` tells whether the set-up or the call of the test failed. The machine may be off, or
    broken. It is put back whatever happens here; an error is one of the teardown.
    """


@pytest.hookspec
def pytest_kvmsnap_collect(vm: "VM", item: pytest.Item, folder: Path) -> None:
    """Add files of your own to the folder with what a failed test left.

    Called for each machine of the test, after screen, console and logs were collected and before
    the machine is put back. It has 10 seconds. An error is noted in the folder, and hides nothing.
    """
