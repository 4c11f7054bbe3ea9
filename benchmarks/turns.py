"""A plugin of pytest for the runs within `clean_machine.py`: they go on one test at a time.

It tells by a pipe how long each step of a machine's way from one test to the next took, and then
waits for a byte from another pipe.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Generator
from importlib import import_module
from typing import Any

import pytest

from pytest_kvmsnap.vm import VM

STEPS = (
    ("pytest_kvmsnap.lab.machine", "Machine", "_mark", "mark"),
    ("pytest_kvmsnap.lab.machine", "Machine", "_revert", "back"),
    ("pytest_kvmsnap.lab.machine", "Machine", "_arrive", "arrive"),
    ("pytest_kvmsnap.machine.domain", "Domain", "revert", "revert"),
    ("pytest_kvmsnap.machine.fast_revert", "", "load", "revert"),
    ("pytest_kvmsnap.machine.fast_revert", "", "look", "look"),
)
_spent: dict[str, float] = defaultdict(float)
_begin = time.monotonic()


def _watch(module: str, owner: str, name: str, step: str) -> None:
    """Add up the time in a function, under the name of a step."""
    try:
        place = import_module(module)
    except ModuleNotFoundError:  # a version without fast reverts
        return
    place = getattr(place, owner) if owner else place
    function = getattr(place, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        begin = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            _spent[step] += time.monotonic() - begin

    setattr(place, name, watched)


def pytest_configure() -> None:
    for step in STEPS:
        _watch(*step)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown() -> Generator[None, object, object]:
    global _begin  # noqa: PLW0603
    _begin = time.monotonic()
    _spent.clear()
    return (yield)


def wait_for_turn(vm: VM) -> None:
    """Use the machine, tell how it came to be clean, and wait until it is to be cleaned again."""
    is_clean = time.monotonic() - _begin
    vm.run(["true"], check=True)
    told = {**_spent, "set_up": is_clean, "command": time.monotonic() - _begin}
    vm.run(["test", "!", "-e", "/spoiled"], check=True)
    vm.run(["touch", "/spoiled"], check=True)
    source, target = (int(word) for word in os.environ["KVMSNAP_TURNS"].split())
    os.write(target, json.dumps(told).encode() + b"\n")
    if not os.read(source, 1):
        pytest.exit("there are no further turns", returncode=0)
