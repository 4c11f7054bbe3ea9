"""What a run tells of its machines: a header line, a summary, properties of tests, JSON."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from notes import DATABASE, write
from testdriver import fail_when

from pytest_kvmsnap.errors import RevertError
from pytest_kvmsnap.lab import ledger
from pytest_kvmsnap.lab.ledger import KINDS

if TYPE_CHECKING:
    from sharedhost import SharedSuite
    from testdriver import Host, Suite

THREE_TESTS = "def test_one(vm): pass\ndef test_two(vm): pass\ndef test_three(vm): pass\n"
HEADER = "kvmsnap: test:///default (libvirt "
REPORTS = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes a while by the clock that it is counted by, if not as long as a wait."""

    class Time:
        now = 0.0

        def perf_counter(self) -> float:
            Time.now += 0.04
            return Time.now

    clock = Time()
    original = ledger.Ledger.__init__

    def init(self: ledger.Ledger, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs | {"clock": clock.perf_counter})

    monkeypatch.setattr(ledger.Ledger, "__init__", init)


def after_section(result: pytest.RunResult) -> list[str]:
    """Return the lines of our section, empty when there is none."""
    starts = [n for n, line in enumerate(result.outlines) if " pytest-kvmsnap ==" in line]
    if not starts:
        return []
    assert len(starts) == 1
    lines = result.outlines[starts[0] + 1 :]
    ends = [n for n, line in enumerate(lines) if re.match(r"===|\d+ passed|$", line)]
    return lines[: ends[0]]


def properties(path: Path) -> dict[str, list[list[tuple[str, str]]]]:
    """Return what JUnit's XML has of each test, a list for each time that it is there."""
    found: dict[str, list[list[tuple[str, str]]]] = {}
    for case in ET.parse(path).iter("testcase"):
        told = [(each.attrib["name"], each.attrib["value"]) for each in case.iter("property")]
        found.setdefault(case.attrib["name"], []).append(told)
    return found


def report(suite: "Suite") -> Any:
    return json.loads((suite.pytester.path / "report.json").read_text())


# header


def test_one_line_tells_before_the_first_test_what_it_runs_on(suite: "Suite", host: "Host") -> None:
    for name in ("box", "bob"):
        host.define(name, state="running")
    suite.write(
        """
        import pytest

        def test_pool(vm): pass

        @pytest.mark.kvm_domain("box")
        def test_box(vm): pass
        """
    )
    result = suite.run("-v", domain="bo*")
    told = [line for line in result.outlines if line.startswith("kvmsnap: ")]
    assert len(told) == 1
    assert re.fullmatch(
        r"kvmsnap: test:///default \(libvirt [\d.]+, TEST [\d.]+\), machines: bo\* \(2\), box,"
        " revert: force",
        told[0],
    )
    result.stdout.fnmatch_lines(["*collected 2 items", "kvmsnap: *", "*::test_pool PASSED*"])


@pytest.mark.parametrize("option", ["-q", "--no-header"])
def test_no_header_where_pytest_shows_none(suite: "Suite", host: "Host", option: str) -> None:
    host.define(state="running")
    suite.write(THREE_TESTS)
    result = suite.run(option)
    result.assert_outcomes(passed=3)
    assert HEADER not in result.stdout.str()


# summary


def test_the_summary_has_a_line_for_each_machine(suite: "Suite", host: "Host") -> None:
    host.define("box", state="running")
    host.define("other")
    suite.write(THREE_TESTS + "import pytest\n@pytest.mark.kvm_domain('other')\ndef test_4(vm): 0")
    lines = after_section(suite.run())
    assert [re.sub(r"[\d.]+ s\b", "T", line) for line in lines] == [
        "box:   3 tests, 1 snapshot,  3 reverts, clean in T (median) to T (max)",
        "other: 1 test,  2 snapshots, 1 revert,  clean in T (median) to T (max)",
    ]


def test_a_machine_in_quarantine_is_told_with_the_cause(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define(state="running")
    fail_when(monkeypatch, "revert", RevertError("no way back", why="of the mock"), lambda *_: True)
    suite.write(THREE_TESTS)
    lines = after_section(suite.run("--kvmsnap-report=report.json"))
    assert lines[0].startswith("box: 3 tests, 1 snapshot")
    assert lines[1] == "  in quarantine: no way back: of the mock"
    assert report(suite)["machines"][0]["quarantine"] == "no way back: of the mock"
    assert [each["outcome"] for each in report(suite)["tests"]] == ["error"] * 3
    assert [len(each["machines"]) for each in report(suite)["tests"]] == [1] * 3


def test_kept_states_are_told_of_their_machine(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write("def test_one(vm): assert 0\ndef test_two(vm): pass")
    result = suite.run("--kvmsnap-keep=on-failure", "--kvmsnap-report=report.json")
    told = report(suite)
    (kept,) = told["machines"][0]["kept"]
    assert kept in host.look().snapshots
    assert [each["machines"][0].get("kept") for each in told["tests"]] == [kept, None]
    assert [bool(each.get("evidence")) for each in told["tests"]] == [True, False]
    assert f"  kept: {kept}" in after_section(result)


def test_quiet_runs_have_no_summary(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write(THREE_TESTS)
    assert after_section(suite.run("-q")) == []


def test_runs_without_summary_have_none(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write(THREE_TESTS)
    result = suite.run("--no-summary", "--kvmsnap-durations=3")
    result.assert_outcomes(passed=3)
    assert after_section(result) == []
    assert "slowest" not in result.stdout.str()


def test_a_machine_that_is_asked_for_late_is_told_too(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write("def test_one(request): request.getfixturevalue('vm')")
    result = suite.run("--junitxml=junit.xml", "--kvmsnap-report=report.json")
    assert HEADER not in result.stdout.str()
    assert after_section(result)[0].startswith("box: 1 test, 1 snapshot, 1 revert")
    assert report(suite)["tests"][0]["outcome"] == "passed"


def test_a_run_without_machines_tells_nothing(suite: "Suite") -> None:
    suite.write("def test_one(): pass")
    result = suite.run("--kvmsnap-durations=3", "--kvmsnap-report=folder/report.json")
    result.assert_outcomes(passed=1)
    assert after_section(result) == []
    assert "slowest" not in result.stdout.str()
    assert not (suite.pytester.path / "folder").exists()


@pytest.mark.parametrize("is_folder", [False, True])
def test_runs_without_a_terminal_write_their_report(
    suite: "Suite", host: "Host", is_folder: bool
) -> None:
    host.define(state="running")
    made = "__import__('pathlib').Path('report.json').mkdir()" if is_folder else "pass"
    suite.write(f"def test_one(vm): {made}")
    result = suite.run("-pno:terminal", "--kvmsnap-report=report.json")
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if is_folder else pytest.ExitCode.OK)
    told = "the report could not be written: " in result.stderr.str()
    assert told == is_folder
    if not is_folder:
        assert report(suite)["machines"][0]["tests"] == 1


# durations


@pytest.mark.usefixtures("slow_clock")
@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_durations_list_the_slowest_preparations(
    suite: "Suite", host: "Host", quiet: list[str]
) -> None:
    host.define()
    suite.write(THREE_TESTS)
    lines = after_section(suite.run("--kvmsnap-durations=2", *quiet))
    lines = lines[lines.index("slowest 2 preparations:") :]
    assert len(lines) == 3
    slowest = r"  +[\d.]+ s  \S+::test_one on box \(take [\d.]+, revert [\d.]+, ready [\d.]+.*\)"
    assert re.fullmatch(slowest, lines[1])
    assert re.fullmatch(r"  +[\d.]+ s  \S+::test_t\w+ on box \(revert [\d.]+.*\)", lines[2])
    seconds = [float(line.split()[0]) for line in lines[1:]]
    assert seconds == sorted(seconds, reverse=True)


# properties


def test_junit_tells_of_each_machine_of_a_test(suite: "Suite", host: "Host") -> None:
    host.define("box", state="running")
    host.define("other")
    suite.write(
        """
        import pytest

        @pytest.fixture
        def broken(vm): assert 0

        def test_one(vm, record_property):
            record_property("mine", "1")
        def test_without(): pass
        def test_broken(broken): pass
        def test_fails(vm): assert 0
        @pytest.mark.parametrize("vm", ["other"], indirect=True)
        def test_two(vm, module_vm): pass
        """
    )
    suite.run("--junitxml=junit.xml", "-ojunit_family=xunit1")
    found = properties(suite.pytester.path / "junit.xml")
    ours = ["machine", "snapshot", "image", *(f"{kind}_seconds" for kind in KINDS)]
    names = [f"kvmsnap_{name}" for name in ours]
    assert [name for name, _ in found["test_one"][0]] == ["mine", *names]
    assert found["test_without"] == [[]]
    for test in ("test_broken", "test_fails"):
        assert [name for name, _ in found[test][0]] == ["kvmsnap_evidence", *names]
    assert [name for name, _ in found["test_two[other]"][0]] == names * 2
    assert {dict(found[test][0])["kvmsnap_machine"] for test in found if found[test][0]} == {
        "box",
        "other",
    }
    told = dict(found["test_one"][0])
    assert told["kvmsnap_machine"] == "box"
    assert told["kvmsnap_snapshot"].startswith("kvmsnap-found-")
    assert told["kvmsnap_image"] == "/images/box.qcow2"
    for kind in KINDS:
        assert re.fullmatch(r"\d+\.\d{1,3}", told[f"kvmsnap_{kind}_seconds"])


@pytest.mark.usefixtures("slow_clock")
def test_each_test_has_what_was_spent_for_it_alone(suite: "Suite", host: "Host") -> None:
    host.define()
    write(
        suite,
        DATABASE
        + """
def test_first(vm): pass
def test_second(vm): pass
def test_database(database, vm): pass
def test_with_it(database): pass
""",
    )
    suite.run("--kvmsnap-report=report.json")
    told = {each["test"].partition("::")[2]: each["machines"][0] for each in report(suite)["tests"]}
    spent = {
        test: [kind for kind in KINDS if used[f"{kind}_seconds"]] for test, used in told.items()
    }
    assert spent["test_first"] == ["take", "revert", "ready"], "it makes the baseline"
    assert spent["test_second"] == ["revert", "ready"]
    assert "take" in spent["test_database"], "it keeps what the fixture prepared"
    assert told["test_second"]["snapshot"].startswith("kvmsnap-base-")
    assert told["test_database"]["snapshot"].startswith("kvmsnap-database-")
    assert told["test_with_it"]["snapshot"] == told["test_database"]["snapshot"]
    (box,) = report(suite)["machines"]
    assert box["boots"] == 1
    for kind in KINDS:
        spent_by_tests = sum(used[f"{kind}_seconds"] for used in told.values())
        assert box[f"{kind}_seconds"] == pytest.approx(spent_by_tests)


@pytest.mark.usefixtures("rerunfailures")
def test_each_try_of_a_test_has_its_own(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write(
        """
        tries = []

        def test_flaky(vm):
            tries.append("try")
            assert len(tries) == 3

        def test_next(vm): pass
        """
    )
    result = suite.run("--reruns=2", "--junitxml=junit.xml", "--kvmsnap-report=report.json")
    assert after_section(result)[0].startswith("box: 2 tests (2 reruns), 1 snapshot, 4 reverts")
    tests = report(suite)["tests"]
    assert [each["outcome"] for each in tests] == ["rerun", "rerun", "passed", "passed"]
    assert [len(each["machines"]) for each in tests] == [1] * 4
    for told in properties(suite.pytester.path / "junit.xml")["test_flaky"]:
        names = [name for name, _ in told]
        assert len(names) == len(set(names)), "no doubles"
        assert "kvmsnap_machine" in names


# JSON


def test_the_report_has_the_run_its_machines_and_tests(suite: "Suite", host: "Host") -> None:
    host.define("box", state="running")
    suite.write(
        """
        import pytest

        def test_one(vm): pass
        def test_fails(vm): assert 0
        def test_skips(vm): pytest.skip("no")
        @pytest.mark.xfail
        def test_xfails(vm): assert 0
        @pytest.fixture
        def broken(vm):
            yield
            assert 0
        def test_error(broken): pass
        def test_without(): pass
        """
    )
    suite.run("--kvmsnap-report=deep/down/report.json")
    folder = suite.pytester.path / "deep" / "down"
    assert [path.name for path in folder.iterdir()] == ["report.json"]
    told = json.loads((folder / "report.json").read_text())
    assert (told["version"], told["uri"], told["revert"]) == (1, "test:///default", "force")
    assert re.fullmatch(r"[\d.]+", told["libvirt"])
    assert told["qemu"] is None
    assert told["started"] < told["ended"]
    assert {each["test"].partition("::")[2]: each["outcome"] for each in told["tests"]} == {
        "test_one": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_xfails": "xfailed",
        "test_error": "error",
    }
    (box,) = told["machines"]
    assert (box["machine"], box["image"]) == ("box", "/images/box.qcow2")
    assert (box["tests"], box["snapshots"], box["reverts"]) == (5, 1, 5)
    assert (box["quarantine"], box["kept"], box["growth_bytes"]) == (None, [], 0)


# What is kept and left of a failed test is told the same way as the rest.
FAILS = """
    from pytest_kvmsnap.report import properties

    def test_fails(vm, request):
        request.node.user_properties.append(("kvmsnap_evidence", "folder"))
        properties.add(request.node, "box", "kvmsnap_kept", "snapshot")
        assert 0
"""


def test_the_report_is_as_its_documentation_says(suite: "Suite", host: "Host") -> None:
    host.define()
    suite.write(FAILS)
    suite.run("--kvmsnap-report=report.json")
    (example,) = re.findall(r"^```json\n(.*?)^```$", REPORTS, re.DOTALL | re.MULTILINE)
    assert shape(report(suite)) == shape(json.loads(example))
    written = re.findall(r"`([a-z_.\[\]]+)`", REPORTS)
    meant = {name.rpartition(".")[2].removeprefix("kvmsnap_") for name in written}
    assert fields(report(suite)) <= meant


def fields(value: Any) -> set[str]:
    """Return the names of all fields."""
    if isinstance(value, list):
        return {name for each in value for name in fields(each)}
    if not isinstance(value, dict):
        return set()
    return set(value) | fields(list(value.values()))


def shape(value: Any) -> Any:
    """Return the fields with their types; a text may be null instead."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value if isinstance(each, dict)]
    return "number" if isinstance(value, int | float) else "text"


@pytest.mark.parametrize("place", ["", "file.txt/report.json"], ids=["folder", "below a file"])
def test_a_report_that_cannot_be_written_is_told_before_the_first_test(
    suite: "Suite", host: "Host", place: str
) -> None:
    host.define(state="running")
    (suite.pytester.path / "file.txt").write_text("")
    suite.write(THREE_TESTS)
    result = suite.run(f"--kvmsnap-report={suite.pytester.path / place}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.assert_outcomes()
    result.stderr.fnmatch_lines(["*the report of --kvmsnap-report cannot be written"])
    assert (suite.pytester.path / "file.txt").read_text() == ""


def test_a_report_that_cannot_be_written_at_the_end_fails_the_run(
    suite: "Suite", host: "Host"
) -> None:
    host.define(state="running")
    suite.write(
        "def test_one(vm, tmp_path):\n    __import__('pathlib').Path('report.json').mkdir()"
    )
    result = suite.run("--kvmsnap-report=report.json")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert after_section(result)[-1].startswith("the report could not be written: ")
    assert not list(suite.pytester.path.glob(".report*"))


# workers


@pytest.mark.usefixtures("xdist")
def test_the_controller_tells_what_its_workers_counted(shared: "SharedSuite") -> None:
    shared.host.define(state="running")
    write(
        shared,
        """
@pytest.mark.parametrize("number", range(8))
def test_machine(vm, number): pass

def test_without(): pass
""",
    )
    result = shared.run_apart(
        "-n2", "--kvmsnap-report=report.json", "--junitxml=junit.xml", "--kvmsnap-durations=1"
    )
    result.assert_outcomes(passed=9)
    lines = after_section(result)
    assert lines[0].startswith(f"{shared.uri} (libvirt ")
    assert lines[0].endswith("machines: box, revert: force")
    assert lines[1].startswith("box: 8 tests, "), "one line, though two workers had it"
    assert result.stdout.str().count("slowest preparation:") == 1
    told = report(shared)
    (box,) = told["machines"]
    assert box["tests"] == len(told["tests"]) == 8
    assert box["snapshots"] >= 1
    assert box["reverts"] >= 8
    found = properties(shared.pytester.path / "junit.xml")
    assert sum(dict(each[0]).get("kvmsnap_machine") == "box" for each in found.values()) == 8


@pytest.mark.usefixtures("xdist")
def test_who_waits_for_a_machine_is_counted(shared: "SharedSuite") -> None:
    shared.host.define(state="running")
    tests = (f"def test_{name}(vm): time.sleep(0.4)" for name in ("one", "two", "three", "four"))
    shared.write("\n".join(["import time", *tests]))
    result = shared.run_apart("-n2", "--kvmsnap-report=report.json")
    assert [line for line in after_section(result) if line.startswith("  waited ")]
    assert report(shared)["machines"][0]["waits"] >= 1
    assert sum(bool(each["machines"][0]["wait_seconds"]) for each in report(shared)["tests"]) >= 1


@pytest.mark.usefixtures("xdist")
def test_what_the_hook_says_of_the_report_goes_for_workers_too(suite: "Suite") -> None:
    path = suite.pytester.path / "report.json"
    suite.write(
        "def test_one(vm): pass",
        f"def pytest_kvmsnap_lab(config): return {{'report': {str(path)!r}}}",
    )
    suite.run_apart("-n1", domain="test").assert_outcomes(passed=1)
    assert report(suite)["machines"][0]["tests"] == 1


@pytest.mark.usefixtures("xdist")
def test_workers_without_machines_tell_nothing(suite: "Suite") -> None:
    suite.write("def test_one(): pass\ndef test_two(): pass")
    result = suite.run_apart("-n2", "--kvmsnap-report=report.json", "--kvmsnap-durations=3")
    result.assert_outcomes(passed=2)
    assert after_section(result) == []
    assert not (suite.pytester.path / "report.json").exists()


@pytest.mark.usefixtures("xdist")
def test_a_worker_that_crashed_lacks_its_part(suite: "Suite") -> None:
    suite.write("import os\ndef test_one(vm): pass\ndef test_two(vm): os._exit(1)")
    result = suite.run_apart(
        "-n1", "--max-worker-restart=0", "--kvmsnap-report=report.json", domain="test"
    )
    assert after_section(result)[0].startswith("test: 1 test, clean in ")
    assert [each["outcome"] for each in report(suite)["tests"]] == ["passed"]
