"""`--kvmsnap-plan`: what would be done, and nothing is done."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from testdriver import Calls, Host, Suite, disk

from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.lab.locks import folder_for
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import connect

TESTS = """
import pytest

@pytest.fixture(scope="module")
def database(module_vm): assert False, "nothing is set up"

@pytest.fixture(scope="class")
def tables(database, class_vm): assert False, "nothing is set up"

def test_plain(vm): assert False, "nothing is run"

@pytest.mark.kvm_domain("other")
@pytest.mark.kvm_snapshot("installed")
def test_named(vm): pass

class TestPrepared:
    def test_rows(self, tables, vm): pass

@pytest.mark.skip(reason="never run")
@pytest.mark.kvm_domain("unknown")
def test_skipped(vm): pass

def test_without(): assert False, "nothing is run"
"""


@pytest.fixture
def two_machines(host: Host) -> Host:
    host.define("box", disk("/images/box.qcow2"), disk("/images/more.qcow2", target="vdb"))
    host.define("other", state="running")
    host.snapshot("installed", of="other")
    return host


def planned(suite: Suite, *args: str) -> Any:
    result = suite.run("--kvmsnap-plan", "--kvmsnap-plan-format=json", *args)
    return json.loads(result.stdout.str())


def test_the_table_tells_machine_state_and_images_of_each_test(
    suite: Suite, two_machines: Host, calls: Calls
) -> None:
    suite.write(TESTS)
    before = two_machines.looks()
    result = suite.run("--kvmsnap-plan")
    result.stdout.re_match_lines(
        [
            r"test +machine +state +image$",
            r"\S+::test_plain +box +baseline +/images/box.qcow2, /images/more.qcow2$",
            r"\S+::test_named +other +installed +/images/other.qcow2$",
            r"\S+::test_rows +box +baseline > database > tables +/images/box.qcow2, .*",
            r"nothing to convert",
            r"nothing stands in the way",
        ],
        consecutive=False,
    )
    result.stdout.no_fnmatch_line("*test_skipped*")
    result.stdout.no_fnmatch_line("*test_without*")
    result.assert_outcomes()
    assert result.ret == pytest.ExitCode.OK
    assert calls.log == []
    assert two_machines.looks() == before
    assert not suite.locks.exists()


def test_json_is_the_plan_and_nothing_else(suite: Suite, two_machines: Host) -> None:
    assert two_machines.looks()
    suite.write(TESTS)
    plan = planned(suite)
    assert plan.keys() == {"version", "tests", "conversions", "blockers", "notes"}
    assert plan["version"] == 1
    named, prepared = plan["tests"][1:]
    assert named["test"].endswith("::test_named")
    assert {key: named[key] for key in named if key != "test"} == {
        "domain": "other",
        "golden": None,
        "snapshot": "installed",
        "prepared": [],
        "images": ["/images/other.qcow2"],
    }
    assert prepared["prepared"] == ["database", "tables"]
    assert (prepared["domain"], prepared["snapshot"]) == ("box", None)
    assert plan["conversions"] == plan["blockers"] == plan["notes"] == []


@pytest.mark.usefixtures("xdist")
@pytest.mark.parametrize("more", [(), ("-v",), ("-n2",), ("-s",), ("-p", "no:terminal")])
def test_json_can_be_read_with_whatever_else_is_given(suite: Suite, more: tuple[str, ...]) -> None:
    """In a process of its own, whose standard output is what a program reads."""
    suite.write("def test_it(vm): pass\n")
    result = suite.run_apart("--kvmsnap-plan", "--kvmsnap-plan-format=json", *more, domain="test")
    assert [test["domain"] for test in json.loads(result.stdout.str())["tests"]] == ["test"]
    assert result.ret == pytest.ExitCode.OK


def test_all_that_stands_in_the_way_is_told_and_ends_with_1(
    suite: Suite, host: Host, calls: Calls
) -> None:
    host.define("box", disk("/images/box.img", "raw"))
    host.define("no-disk", disk(None, device="cdrom"))
    suite.write(
        """
import pytest
def test_raw(vm): pass

@pytest.mark.kvm_domain("no-disk")
def test_no_disk(vm): pass

@pytest.mark.kvm_domain("unknown")
def test_unknown(vm): pass

@pytest.mark.kvm_snapshot("unknown")
def test_no_snapshot(vm): pass

@pytest.mark.kvm_domain()
def test_wrong(vm): pass

@pytest.mark.kvm_golden("no.qcow2")
def test_no_image(vm): pass
"""
    )
    result = suite.run("--kvmsnap-plan", "--kvmsnap-convert=never")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["6 blockers:"])
    said = result.stdout.str()
    for problem in (
        "box has raw disks",
        "it has no writable disk",
        "there is no domain 'unknown'",
        "there is no snapshot 'unknown' of box",
        "wrong arguments: @pytest.mark.kvm_domain()",
        "there is no golden image 'no.qcow2'",
    ):
        assert said.count(problem) == 1
    assert said.count("cure: ") == 6
    assert calls.log == []
    blockers = planned(suite, "--kvmsnap-convert=never")["blockers"]
    assert len(blockers) == 6
    assert {tuple(blocker) for blocker in blockers} == {("what", "where", "why", "cure")}


def test_what_would_be_converted_is_told(
    suite: Suite, host: Host, tmp_path: Path, qemu_img: str
) -> None:
    assert qemu_img
    raw = tmp_path / "two words.img"
    raw.write_bytes(b"x" * 2**20)
    host.define("box", disk(raw, "raw"))
    suite.write("def test_it(vm): pass\n")
    result = suite.run("--kvmsnap-plan")
    qcow2 = raw.with_suffix(".qcow2")
    result.stdout.re_match_lines([rf"  {raw} -> {qcow2} \(up to 1\.[3-9] MiB\), for box"])
    assert result.ret == pytest.ExitCode.OK
    (conversion,) = planned(suite)["conversions"]
    assert 2**20 < conversion.pop("bytes") < 2**21
    assert conversion == {"machine": "box", "raw": str(raw), "qcow2": str(qcow2)}
    assert not qcow2.exists()


def test_a_host_that_cannot_be_reached_stands_in_the_way(suite: Suite) -> None:
    suite.write("def test_it(vm): pass\n")
    result = suite.run("--kvmsnap-plan", "--kvmsnap-uri=test:///nowhere.xml")
    result.stdout.fnmatch_lines(["*::test_it * box *", "1 blocker:", "cannot connect to *"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("tests", ["def test_it(): assert 0\n", TESTS])
def test_without_machines_there_is_nothing_to_plan(suite: Suite, tests: str) -> None:
    suite.write(tests)
    result = suite.run("--kvmsnap-plan", "-m", "not kvm", domain=None)
    result.stdout.fnmatch_lines(["no test uses a machine", "nothing stands in the way"])
    assert result.ret == pytest.ExitCode.OK


def test_a_wrong_option_is_told_as_in_a_run(suite: Suite) -> None:
    suite.write("def test_it(vm): pass\n")
    result = suite.run("--kvmsnap-plan", "--kvmsnap-live=perhaps")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_tests_that_cannot_be_collected_are_told_as_in_a_run(suite: Suite) -> None:
    suite.write("import nothing_of_that_name\n")
    result = suite.run("--kvmsnap-plan")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.no_fnmatch_line("*stands in the way*")


def test_a_machine_in_use_and_one_that_a_dead_run_left_are_noted(suite: Suite, host: Host) -> None:
    host.define("box", state="running")
    suite.write("def test_it(vm): pass\n")
    hypervisor = connect("test:///default")
    domain = Domain(hypervisor, host.domain().UUIDString(), "box")
    lease = Lease.of(domain, folder_for(hypervisor.uri, suite.locks))
    assert lease.try_take()
    journal = Journal(lease.journal_path, "abc", hypervisor.uri, "box", domain.uuid)
    journal.save()
    try:
        (note,) = planned(suite)["notes"]
        assert note.startswith("box is in use, so tests on it would wait (pid ")
        lease.release()
        (note,) = planned(suite)["notes"]
        assert note.startswith("box was left by a dead run, which the next one undoes")
        assert suite.left_over() == [lease.journal_path.name]
    finally:
        lease.release()
        shutil.rmtree(suite.locks)
        hypervisor.close()
