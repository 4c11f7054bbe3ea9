"""What a failed test leaves, and hooks at the edges of its life: here without a guest.

The test driver has a screen and a definition; console, guest and QEMU's log are missing, which must
be noted and hide nothing.
"""

import json
import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from testdriver import fail_when

from pytest_kvmsnap.errors import RevertError, SnapshotError
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.report import evidence

if TYPE_CHECKING:
    from sharedhost import SharedSuite
    from testdriver import Calls, Host, Suite

LOG = """
def note(*words):
    with open("log", "a") as log:
        print(*words, file=log)
"""
FAILS = "def test_fails(vm): assert not 'reached'"


def folders(suite: "Suite", base: str = "kvmsnap-results") -> dict[str, set[str]]:
    """Return what is in each folder, by its name without the digits of the test."""
    place = suite.pytester.path / base
    return {
        re.sub(r"-[0-9a-f]{6}(?=-|$)", "", str(folder.relative_to(place))): {
            file.name for file in folder.iterdir() if file.is_file()
        }
        for folder in sorted(place.rglob("*"))
        if folder.is_dir()
    }


# when


def test_a_test_fails_with_its_subtests(suite: "Suite", host: "Host") -> None:
    if int(pytest.__version__.partition(".")[0]) < 9:
        pytest.skip("subtests are a part of pytest from 9 on")
    host.define(state="running")
    suite.write(
        """
        def test_fails(vm, subtests):
            with subtests.test("one"):
                assert 0
            with subtests.test("two"):
                pass
        """,
        LOG + "def pytest_kvmsnap_before_revert(vm, item, failed): note(failed)",
    )
    suite.run("--kvmsnap-keep=on-failure")
    assert (suite.pytester.path / "log").read_text() == "True\n"
    assert len(host.look().snapshots) == 1


def test_a_failed_call_and_a_failed_set_up_leave_a_folder_each(
    suite: "Suite", host: "Host"
) -> None:
    host.define(state="running")
    suite.write(
        """
        import pytest

        @pytest.fixture
        def broken(vm): raise ValueError
        @pytest.fixture
        def ends_badly(vm):
            yield
            raise ValueError

        def test_passes(vm): pass
        def test_fails(vm): assert 0
        def test_error(broken): pass
        def test_in_teardown(ends_badly): pass
        def test_skips(vm): pytest.skip("no")
        @pytest.mark.xfail
        def test_xfails(vm): assert 0
        @pytest.mark.xfail(strict=True)
        def test_xpasses(vm): pass
        def test_without_machine(): assert 0
        """
    )
    suite.run().assert_outcomes(passed=2, failed=3, errors=2, skipped=1, xfailed=1)
    stem = Path(suite.pytester.path.name).name.rstrip("0123456789")
    assert sorted(folders(suite)) == sorted(
        f"{stem}.py-{name}" for name in ("test_fails", "test_error", "test_xpasses")
    )


def test_what_cannot_be_had_is_noted_and_hides_nothing(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write(FAILS)
    result = suite.run()
    result.assert_outcomes(failed=1)
    (files,) = folders(suite).values()
    assert files == {"screen.png", "domain.xml", "not-collected.txt"}
    (folder,) = (suite.pytester.path / "kvmsnap-results").iterdir()
    notes = (folder / "not-collected.txt").read_text().splitlines()
    assert [note.partition(":")[0] for note in notes] == ["console", "guest's log", "QEMU's log"]
    told = "\n".join(result.outlines)
    assert "assert not 'reached'" in told
    assert f"what the test left is in kvmsnap-results/{folder.name}" in told
    assert "box: screen.png, domain.xml" in told
    assert "box: not collected: QEMU's log: it is on another host, or no machine of QEMU" in told


def test_collectors_that_break_or_hang_hide_nothing(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mocks: neither can be provoked."""
    monkeypatch.setattr(evidence, "_EACH", 0.2)

    def breaking(*_: object) -> str:
        raise RuntimeError("broken")

    def hanging(*_: object) -> str:
        time.sleep(1)
        return ""

    monkeypatch.setattr(evidence, "_screen", breaking)
    monkeypatch.setattr(evidence, "_definition", hanging)
    host.define(state="running")
    suite.write(FAILS)
    result = suite.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert not 'reached'*"])
    (folder,) = (suite.pytester.path / "kvmsnap-results").iterdir()
    notes = (folder / "not-collected.txt").read_text()
    assert "screen: RuntimeError: broken" in notes
    assert "definition: it took more than 0 s" in notes


def test_a_place_where_no_folder_can_be_made_hides_nothing(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write(FAILS)
    (suite.pytester.path / "file").touch()
    result = suite.run("--kvmsnap-output=file/results")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert not 'reached'*", "*could not be collected: *file*"])


# where


@pytest.mark.usefixtures("rerunfailures")
def test_each_try_has_a_folder_and_what_was_there_stays(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write(FAILS)
    suite.run("--reruns=1", "--kvmsnap-output=out/deep").assert_outcomes(failed=1)
    suite.run("--kvmsnap-output=out/deep").assert_outcomes(failed=1)
    names = sorted(folders(suite, "out/deep"))
    assert [name.partition("test_fails")[2] for name in names] == ["", "-2", "-3"]


@pytest.mark.parametrize(
    "word", ["a/b", "a b", "a:b", "..", "CON", "a" * 200, "ä", "A", "x[1-2]", "-"]
)
def test_names_of_folders_are_safe_everywhere(tmp_path: Path, word: str) -> None:
    made = [evidence.folder_for(tmp_path, f"tests/test_a.py::{name}") for name in (word, word, "x")]
    names = {folder.name for folder in made}
    assert len(names) == 3
    assert all(re.fullmatch(r"\w[\w.-]{,90}", name, re.ASCII) for name in names)


@pytest.mark.usefixtures("xdist")
def test_workers_have_folders_of_their_own(shared: "SharedSuite") -> None:
    shared.host.define(state="running")
    shared.write(
        """
        import pytest
        @pytest.mark.parametrize("number", range(6))
        def test_fails(vm, number): assert 0
        """
    )
    result = shared.run_apart("-n2")
    result.assert_outcomes(failed=6)
    assert len(list((shared.pytester.path / "kvmsnap-results").iterdir())) == 6
    result.stdout.fnmatch_lines(["what the test left is in kvmsnap-results/*"] * 6)


def test_a_test_on_several_machines_has_a_folder_for_each(suite: "Suite", host: "Host") -> None:
    host.define("box", state="running")
    host.define("other", state="running")
    suite.write(
        """
        import pytest
        pytestmark = pytest.mark.kvm_domain("other")
        @pytest.mark.kvm_domain("box")
        def test_fails(vm, module_vm): assert 0
        """
    )
    suite.run(domain=None).assert_outcomes(failed=1)
    below = [name.partition("/")[2] for name in folders(suite)]
    assert sorted(below) == ["", "box", "other"]


# kept states


def test_states_are_kept_where_it_is_asked_for(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    host.define(state="shut off")
    suite.write(
        """
        def test_passes(vm): pass
        def test_fails(vm): assert 0
        """
    )
    suite.run().assert_outcomes(passed=1, failed=1)
    assert host.look().snapshots == ()
    suite.run("--kvmsnap-keep=on-failure").assert_outcomes(passed=1, failed=1)
    (kept,) = host.look().snapshots
    assert re.fullmatch(r"kvmsnap-kept-test_fails-\d{8}-\d{6}", kept)
    suite.run("--kvmsnap-keep=always").assert_outcomes(passed=1, failed=1)
    assert len(host.look().snapshots) == 3
    assert host.look().state == "shut off"
    assert suite.left_over() == []


def test_the_oldest_one_goes_but_never_one_that_is_in_use(suite: "Suite", host: "Host") -> None:
    host.define(state="shut off")
    suite.write(FAILS)
    suite.run("--kvmsnap-keep=on-failure").assert_outcomes(failed=1)
    (first,) = host.look().snapshots
    options = ("--kvmsnap-keep=on-failure", "--kvmsnap-keep-max=1")
    suite.run(*options, f"--kvmsnap-snapshot={first}").assert_outcomes(failed=1)
    assert len(host.look().snapshots) == 2
    assert first in host.look().snapshots
    suite.run(*options).assert_outcomes(failed=1)
    assert len(host.look().snapshots) == 1


def test_snapshots_of_the_owner_are_none_of_ours(suite: "Suite", host: "Host") -> None:
    host.define(state="shut off")
    host.snapshot("kvmsnap-kept-by-me")
    suite.write(FAILS)
    suite.run("--kvmsnap-keep=on-failure", "--kvmsnap-keep-max=1").assert_outcomes(failed=1)
    assert len(host.look().snapshots) == 2


def test_a_state_that_cannot_be_kept_is_told_and_hides_nothing(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Domain.take_snapshot

    def failing(self: Domain, name: str, description: str) -> object:
        if name.startswith("kvmsnap-kept"):
            raise SnapshotError("cannot take the snapshot", why="the mock says so")
        return original(self, name, description)

    monkeypatch.setattr(Domain, "take_snapshot", failing)
    host.define(state="running")
    before = host.look()
    suite.write(FAILS)
    result = suite.run("--kvmsnap-keep=on-failure")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["the state of box could not be kept", "*the mock says so"])
    assert host.look() == before


def test_a_test_that_undefines_the_machine_takes_no_kept_state_with_it(
    suite: "Suite", host: "Host"
) -> None:
    """Its parent, a state of the run's own, may be gone by then."""
    host.define(state="shut off")
    suite.write(
        """
        import pytest

        @pytest.fixture(scope="class")
        def prepared(class_vm): pass

        class TestPrepared:
            def test_fails(self, prepared, vm): assert 0

        def test_undefines(vm):
            vm.destroy()
            vm.domain.undefineFlags(2)
        """
    )
    suite.run("--kvmsnap-keep=on-failure").assert_outcomes(passed=1, failed=1)
    (kept,) = host.look().snapshots
    assert "-test_fails-" in kept
    assert suite.left_over() == []


def test_a_machine_in_quarantine_shows_nothing_of_later_tests(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define(state="running")
    fail_when(monkeypatch, "revert", RevertError("cannot revert"), lambda *_: True)
    suite.write("def test_one(vm): pass\ndef test_two(vm): pass\ndef test_three(vm): pass")
    result = suite.run("--kvmsnap-keep=on-failure")
    result.assert_outcomes(passed=1, errors=3)
    assert not (suite.pytester.path / "kvmsnap-results").exists()
    assert not any("kvmsnap-kept" in name for name in host.look().snapshots)


def test_no_state_goes_that_a_later_test_starts_from(suite: "Suite", host: "Host") -> None:
    host.define(state="shut off")
    suite.write(FAILS)
    suite.run("--kvmsnap-keep=on-failure").assert_outcomes(failed=1)
    (first,) = host.look().snapshots
    suite.write(
        f"""
        import pytest
        def test_fails(vm): assert 0
        @pytest.mark.kvm_snapshot("{first}")
        def test_goes_on(vm): pass
        """
    )
    options = ("--kvmsnap-keep=on-failure", "--kvmsnap-keep-max=1")
    suite.run(*options).assert_outcomes(passed=1, failed=1)
    assert first in host.look().snapshots


# hooks


def test_hooks_are_called_around_each_test(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write(
        """
        import pytest

        @pytest.fixture(scope="module")
        def prepared(module_vm): pass

        def test_one(vm): pass
        def test_two(prepared, vm): assert 0
        def test_held(module_vm): pass
        def test_goes_on(module_vm): pass
        """,
        LOG
        + """
def pytest_kvmsnap_vm_ready(vm): note("ready", vm.state)
def pytest_kvmsnap_before_revert(vm, item, failed): note("revert", item.name, failed)
def pytest_kvmsnap_collect(vm, item, folder): note("collect", item.name, folder.is_dir())
""",
    )
    suite.run().assert_outcomes(passed=3, failed=1)
    assert (suite.pytester.path / "log").read_text().splitlines() == [
        "ready running",
        "revert test_one False",
        "ready running",  # for the preparation
        "ready running",
        "collect test_two True",
        "revert test_two True",
        "ready running",  # where the tests without vm go on from
    ]


def test_a_hook_that_fails_is_an_error_and_the_machine_is_put_back(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    host.define(state="running")
    before = host.look()
    suite.write(
        "def test_one(vm): vm.destroy()\ndef test_two(vm): assert vm.state == 'running'",
        """
def pytest_kvmsnap_before_revert(vm, item, failed):
    if item.name == "test_one":
        raise ValueError("of the hook")
""",
    )
    suite.run().assert_outcomes(passed=2, errors=1)
    assert host.look() == before
    suite.pytester.makeconftest("def pytest_kvmsnap_vm_ready(vm): raise ValueError('of the hook')")
    suite.run().assert_outcomes(errors=2)
    assert host.look() == before


@pytest.mark.parametrize("raised", ["ValueError('mine')", "pytest.fail.Exception('mine')"])
def test_a_collecting_hook_that_fails_is_noted(suite: "Suite", host: "Host", raised: str) -> None:
    host.define(state="running")
    suite.write(
        FAILS,
        f"import pytest\ndef pytest_kvmsnap_collect(vm, item, folder): raise {raised}",
    )
    result = suite.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert not 'reached'*", "*pytest_kvmsnap_collect: *: mine"])


def test_a_collecting_hook_that_does_not_end_in_time_has_no_machine_any_more(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "_EACH", 0.3)
    host.define(state="running")
    suite.write(
        FAILS + "\ndef test_waits(vm):\n    __import__('time').sleep(1)",
        LOG
        + """
import time

def pytest_kvmsnap_collect(vm, item, folder):
    time.sleep(0.6)
    try:
        vm.destroy()
    except Exception as error:
        note(error)
""",
    )
    suite.run().assert_outcomes(passed=1, failed=1)
    told = (suite.pytester.path / "log").read_text()
    assert told == "the time to collect what a test left is over\n"


def test_what_a_hook_adds_is_told(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    suite.write(
        FAILS,
        "def pytest_kvmsnap_collect(vm, item, folder): (folder / 'mine.txt').write_text(vm.name)",
    )
    result = suite.run()
    result.stdout.fnmatch_lines(["box: screen.png, domain.xml, mine.txt"])


# other reports


def test_junit_and_the_json_report_name_the_folder_and_the_kept_state(
    suite: "Suite", host: "Host"
) -> None:
    host.define(state="running")
    suite.write(FAILS)
    suite.run("--junitxml=j.xml", "--kvmsnap-report=r.json", "--kvmsnap-keep=on-failure")
    (folder,) = (suite.pytester.path / "kvmsnap-results").iterdir()
    properties = ET.parse(suite.pytester.path / "j.xml").iter("property")
    told = {each.get("name"): each.get("value") for each in properties}
    assert told["kvmsnap_evidence"] == f"kvmsnap-results/{folder.name}"
    assert told["kvmsnap_kept"] in host.look().snapshots
    report = json.loads((suite.pytester.path / "r.json").read_text())
    (test,) = report["tests"]
    assert test["evidence"] == f"kvmsnap-results/{folder.name}"
    assert test["machines"][0]["kept"] == told["kvmsnap_kept"]


@pytest.mark.usefixtures("all_plugins")
@pytest.mark.parametrize("option", [(), ("--self-contained-html",)])
def test_pytest_html_shows_the_screen_and_links_to_the_rest(
    suite: "Suite", host: "Host", option: tuple[str, ...]
) -> None:
    pytest.importorskip("pytest_html", reason="pytest-html is not installed")
    host.define(state="running")
    suite.write("def test_passes(vm): pass\n" + FAILS)
    suite.run("--html=sub/report.html", *option, "-pno:asyncio").assert_outcomes(passed=1, failed=1)
    (folder,) = (suite.pytester.path / "kvmsnap-results").iterdir()
    report = (suite.pytester.path / "sub" / "report.html").read_text()
    assert "box: screen.png" in report
    assert f"../kvmsnap-results/{folder.name}/domain.xml" in report
    pictures = list((suite.pytester.path / "sub").rglob("*.png"))
    assert len(pictures) == (0 if option else 1)
