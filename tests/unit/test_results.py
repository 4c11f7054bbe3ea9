"""What tests came to, from their reports in whatever order those of several workers come."""

from typing import Any, Literal

import pytest

from pytest_kvmsnap.results import Results, Try, machines_of, outcome_of

PASSED = [("setup", "passed", False), ("call", "passed", False), ("teardown", "passed", False)]


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [
        ({}, "passed"),
        ({"setup": ("failed", False)}, "error"),
        ({"setup": ("skipped", False)}, "skipped"),
        ({"call": ("failed", False)}, "failed"),
        ({"call": ("skipped", False)}, "skipped"),
        ({"call": ("skipped", True)}, "xfailed"),
        ({"call": ("passed", True)}, "xpassed"),
        ({"call": ("rerun", False)}, "rerun"),
        ({"teardown": ("failed", False)}, "error"),
        ({"call": ("failed", False), "teardown": ("failed", False)}, "failed"),
        ({"call": ("skipped", False), "teardown": ("failed", False)}, "error"),
        ({"setup": ("rerun", False), "teardown": ("failed", False)}, "rerun"),
    ],
)
def test_outcome(changed: dict[str, tuple[str, bool]], outcome: str) -> None:
    phases = [(when, *changed.get(when, rest)) for when, *rest in PASSED]
    assert outcome_of(phases) == outcome


def test_a_failed_subtest_fails_its_test() -> None:
    assert outcome_of([PASSED[0], ("call", "failed", False), *PASSED[1:]]) == "failed"


def test_what_is_told_belongs_to_the_machine_before_it() -> None:
    told = [
        ("theirs", 1),
        ("kvmsnap_machine", "one"),
        ("kvmsnap_image", "/one"),
        ("kvmsnap_unknown", "of a user"),
        ("kvmsnap_machine", "two"),
        ("kvmsnap_kept", "state"),
    ]
    assert machines_of(told) == [
        {"machine": "one", "image": "/one"},
        {"machine": "two", "kept": "state"},
    ]


def test_what_comes_before_all_machines_is_of_the_first() -> None:
    told = [("kvmsnap_kept", "state"), ("kvmsnap_machine", "one"), ("kvmsnap_machine", "two")]
    assert machines_of(told) == [{"kept": "state", "machine": "one"}, {"machine": "two"}]


def report(
    when: Literal["setup", "call", "teardown"],
    test: str = "test_one",
    worker: str = "",
    outcome: Any = "passed",
    **told: str,
) -> pytest.TestReport:
    properties = [(f"kvmsnap_{name}", value) for name, value in told.items()]
    made = pytest.TestReport(test, ("", 0, ""), {}, outcome, None, when, (), 0, 0, 0, properties)
    if worker:
        made.worker_id = worker  # type: ignore[attr-defined]
    return made


def tries(*reports: pytest.TestReport) -> list[Try]:
    results = Results()
    for each in reports:
        results.pytest_runtest_logreport(each)
    results.end()
    return results.tries


def test_a_test_without_machines_is_no_concern_of_ours() -> None:
    assert tries(report("setup"), report("call"), report("teardown")) == []


def test_evidence_is_of_the_test() -> None:
    (one,) = tries(report("teardown", evidence="/left", machine="box"))
    assert one == Try("test_one", "passed", [{"machine": "box"}], "/left")


def test_workers_that_run_the_same_test_do_not_get_mixed_up() -> None:
    found = tries(
        report("setup", worker="gw0"),
        report("setup", worker="gw1"),
        report("call", worker="gw1", outcome="failed"),
        report("teardown", worker="gw0", machine="one"),
        report("teardown", worker="gw1", machine="two"),
    )
    assert [(each.outcome, each.machines[0]["machine"]) for each in found] == [
        ("passed", "one"),
        ("failed", "two"),
    ]


@pytest.mark.parametrize("is_told", [True, False], ids=["with", "without"])
def test_tries_with_or_without_their_teardown(is_told: bool) -> None:
    """pytest-rerunfailures tells that of all tries or, in older versions, of the last one."""
    first = [report("teardown", machine="box")] if is_told else []
    found = tries(
        report("setup"),
        report("call", outcome="rerun", machine="box"),
        *first,
        report("setup"),
        report("call"),
        report("teardown", machine="box"),
    )
    assert [each.outcome for each in found] == ["rerun", "passed"]


def test_a_try_that_its_worker_died_in_has_told_of_no_machine() -> None:
    assert tries(report("setup"), report("call")) == []
