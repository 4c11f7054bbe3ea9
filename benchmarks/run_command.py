"""What `vm.run` adds to the agent's calls: `.venv/bin/python benchmarks/run_command.py`.

Bare are libvirt's `guest-exec` and `guest-exec-status` of the same command, asked as often, in the
same process. They take turns, and only ratios mean something.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# At the end, so that what is installed comes before the checkout.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.boxes import finish, site, timed
from pytest_kvmsnap import VM
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import connect
from pytest_kvmsnap.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    begin = time.monotonic()
    with site() as where:
        found: dict[str, Any] = {"host": where.words()}
        box = where.make("commands")
        box.start()
        hypervisor = connect(where.uri)
        domain = Domain(hypervisor, hypervisor.find(box.name), box.name)
        vm = VM(Guest(domain, Settings(ready="agent")), revert_timeout=60, description="")
        bare = functools.partial(box.run, "/bin/sh", "-c", "true")
        ways: dict[str, Callable[[], object]] = {
            "bare": bare,
            "vm.run": functools.partial(vm.run, "true"),
            "vm.run, text=False": functools.partial(vm.run, "true", text=False),
        }
        took: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds + 1):
            for name, way in ways.items():
                seconds = timed(way)
                if number:  # the first one warms up
                    took[name].append(seconds)
        hypervisor.close()
        box.remove()
    found["seconds_of"] = took
    print(f"{found['host']}; {options.rounds} rounds\n")
    print("| way | median (ms) | to bare | middle half |")
    print("|---|---|---|---|")
    for name, times in took.items():
        ratios = [a / b for a, b in zip(times, took["bare"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"| {name} | {1000 * statistics.median(times):.1f} | {middle:.2f}"
            f" | {low:.2f} to {high:.2f} |"
        )
    finish(found, begin, options.json)


if __name__ == "__main__":
    main()
