"""What is kept of machines when a test is over, before they are put back: evidence, states.

pytest makes the report of a phase before it tears anything down, and before it enters the debugger;
so the machine is still as the test left it.
"""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap import results, run
from pytest_kvmsnap.course import has_failed, is_over, machines_after
from pytest_kvmsnap.errors import KvmsnapError

if TYPE_CHECKING:
    from pytest_kvmsnap.lab.machine import Machine
    from pytest_kvmsnap.report.evidence import Collector

_FOLDER = "kvmsnap-results"
_SECTION = "kvmsnap"


def look(item: pytest.Item, report: pytest.TestReport) -> None:
    """Look at the machines of a test whose set-up or call is over."""
    machines = machines_after(item, report)
    if not machines:
        return
    if report.failed:
        _collect(item, list(machines), report)
    if is_over(item) and _is_to_keep(item, report):
        for machine, start in machines.items():
            if start:  # else it is where another test, or nobody, left it
                _keep(item, machine, report)


def _is_to_keep(item: pytest.Item, report: pytest.TestReport) -> bool:
    keep = run.settings_of(item.config).keep
    is_last = report.failed or report.when == "call"
    return is_last and (keep == "always" or (keep == "on-failure" and has_failed(item)))


def _collect(item: pytest.Item, machines: "list[Machine]", report: pytest.TestReport) -> None:
    from pytest_kvmsnap.report import evidence, html

    folder_of_command = item.config.invocation_params.dir
    base = run.settings_of(item.config).output or folder_of_command / _FOLDER
    try:
        folder = evidence.folder_for(base, item.nodeid)
    except OSError as error:
        report.sections.append((_SECTION, f"what the test left could not be collected: {error}"))
        return
    told = []
    for machine in machines:
        place = folder if len(machines) == 1 else folder / machine.domain.name
        collected = _collect_of(item, machine, place)
        told += [f"{machine.domain.name}: {', '.join(collected.files)}"]
        told += [f"{machine.domain.name}: not collected: {note}" for note in collected.notes]
        html.attach(item.config, report, collected)
    shown = os.path.relpath(folder, folder_of_command)
    item.user_properties.append((results.EVIDENCE, shown))
    report.sections.append((_SECTION, "\n".join([f"what the test left is in {shown}", *told])))


def _collect_of(item: pytest.Item, machine: "Machine", place: Path) -> "Collector":
    from pytest_kvmsnap.report.evidence import Collector

    place.mkdir(exist_ok=True)
    collector = Collector(machine.domain.name, place)
    collector.machine(machine.guest)
    hook = item.config.hook.pytest_kvmsnap_collect
    vm = machine.vm(collector.while_it_lasts(machine.touched))
    collector.attempt("pytest_kvmsnap_collect", partial(hook, vm=vm, item=item, folder=place))
    collector.close()
    return collector


def _keep(item: pytest.Item, machine: "Machine", report: pytest.TestReport) -> None:
    from pytest_kvmsnap.report import properties

    name = machine.domain.name
    try:
        kept = run.lab_of(item.config).keep(machine, item.nodeid)
    except KvmsnapError as error:
        told = f"the state of {name} could not be kept\n{error}"
    else:
        properties.add(item, name, results.KEPT, kept)
        told = f"{name}: kept as the snapshot {kept}; see the end of the run"
    report.sections.append((_SECTION, told))
