"""`--kvmsnap-plan`: what each test would run on, what would be converted, what stands in the way.

For people as a table, for programs as JSON (the README describes it).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap import run
from pytest_kvmsnap.errors import ConfigError, UsageProblem
from pytest_kvmsnap.golden import Golden
from pytest_kvmsnap.markers import Request, check_pools, requests_of
from pytest_kvmsnap.pools import Pool
from pytest_kvmsnap.preparations import prepared_by
from pytest_kvmsnap.sizes import mib
from pytest_kvmsnap.usage import closure_of, is_ours

if TYPE_CHECKING:
    from pytest_kvmsnap.lab.outlook import Outlook, PlannedConversion
    from pytest_kvmsnap.settings import Settings

VERSION = 1


@dataclass(frozen=True)
class PlannedTest:
    """One machine of one test. `prepared` are its preparations, in the order of their set-up."""

    nodeid: str
    request: Request
    prepared: tuple[str, ...]
    images: tuple[Path, ...] = ()

    @property
    def state(self) -> str:
        return " > ".join([self.request.snapshot or "baseline", *self.prepared])


@dataclass
class Plan:
    """All of it. `notes` are what could not be looked at, and why."""

    tests: list[PlannedTest] = field(default_factory=list)
    conversions: "list[PlannedConversion]" = field(default_factory=list)
    blockers: list[UsageProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


_BLOCKED = pytest.StashKey[bool]()


def show(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Print the plan for these tests, all of which use a machine.

    Raises:
        ConfigError: a wrong option, as in a run.
    """
    plan = make(config, items)
    config.stash[_BLOCKED] = bool(plan.blockers)
    is_json = config.getoption("kvmsnap_plan_format") == "json"
    run.write(config, as_json(plan) if is_json else as_table(plan))


def is_blocked(config: pytest.Config) -> bool:
    """Tell whether a plan was shown that cannot be carried out."""
    return config.stash.get(_BLOCKED, False)


def make(config: pytest.Config, items: Sequence[pytest.Item]) -> Plan:
    """Look at all machines of these tests; start and change nothing."""
    plan = Plan()
    settings = run.settings_of(config)
    wrong: dict[str, ConfigError] = {}
    for item in items:
        try:
            plan.tests += _tests(item, settings)
        except ConfigError as problem:
            wrong.setdefault(str(problem), problem)
    plan.blockers += wrong.values()
    if plan.tests:
        try:
            outlook = run.lab_of(config).outlook([test.request for test in plan.tests])
        except UsageProblem as problem:  # no connection, or no libvirt
            plan.blockers.append(problem)
        else:
            _add(outlook, plan)
    return plan


def _add(outlook: "Outlook", plan: Plan) -> None:
    plan.conversions += outlook.conversions
    plan.blockers += outlook.problems
    plan.notes += outlook.notes
    plan.tests = [
        PlannedTest(
            test.nodeid,
            test.request,
            test.prepared,
            tuple(outlook.images.get(test.request.machine, ())),
        )
        for test in plan.tests
    ]


def _tests(item: pytest.Item, settings: "Settings") -> list[PlannedTest]:
    closure = closure_of(item)
    scopes = {definition.scope for definition in closure if is_ours(definition)}
    requests = requests_of(item, scopes, settings)
    check_pools(list(requests), item.nodeid)
    return [
        PlannedTest(
            item.nodeid,
            request,
            tuple(
                definition.argname
                for definition, ours in closure.items()
                if request in prepared_by(item, definition, ours, settings)
            ),
        )
        for request in requests
    ]


def as_table(plan: Plan) -> str:
    """Return the plan for people."""
    rows = [("test", "machine", "state", "image")]
    rows += [
        (test.nodeid, _named(test.request), test.state, ", ".join(map(str, test.images)))
        for test in plan.tests
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    lines = [line.rstrip() for line in lines] if plan.tests else ["no test uses a machine"]
    lines += ["", "conversions:" if plan.conversions else "nothing to convert"]
    lines += [
        f"  {each.raw} -> {each.qcow2 or 'the cache'} (up to {mib(each.size)}), for {each.machine}"
        for each in plan.conversions
    ]
    lines += ["", *(f"note: {note}" for note in plan.notes)]
    count = len(plan.blockers)
    some = f"{count} blocker{'s' if count > 1 else ''}:"
    lines += [some if count else "nothing stands in the way"]
    for blocker in plan.blockers:
        lines += ["", str(blocker)]
    return "\n".join(lines)


def _named(request: Request) -> str:
    machine = request.machine
    if isinstance(machine, Pool):
        return f"any of {machine}"
    return machine if isinstance(machine, str) else f"a new one on {machine}"


def _machine(request: Request) -> dict[str, str | None]:
    machine = request.machine
    if isinstance(machine, Golden):
        return {"domain": None, "golden": str(machine.image)}
    return {"domain": str(machine), "golden": None}


def as_json(plan: Plan) -> str:
    """Return the plan for programs."""
    return json.dumps(
        {
            "version": VERSION,
            "tests": [
                {
                    "test": test.nodeid,
                    **_machine(test.request),
                    "snapshot": test.request.snapshot,
                    "prepared": list(test.prepared),
                    "images": [str(image) for image in test.images],
                }
                for test in plan.tests
            ],
            "conversions": [
                {
                    "machine": each.machine,
                    "raw": str(each.raw),
                    "qcow2": str(each.qcow2) if each.qcow2 is not None else None,
                    "bytes": each.size,
                }
                for each in plan.conversions
            ],
            "blockers": [
                {"what": each.what, "where": each.where, "why": each.why, "cure": each.cure}
                for each in plan.blockers
            ],
            "notes": plan.notes,
        },
        indent=2,
    )
