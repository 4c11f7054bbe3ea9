"""What a dead run left is undone by the next one, or by --kvmsnap-clean.

The test driver's domains die with their process, so that here the dead run is a journal that the
test writes, and a machine that it brings to where such a run leaves it.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from testdriver import URI, disk, node_file

from pytest_kvmsnap.lab import restore
from pytest_kvmsnap.lab.journal import Journal, draft_of
from pytest_kvmsnap.lab.kept import description_for
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.machine.conversion import Conversion
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import Hypervisor, connect

if TYPE_CHECKING:
    from testdriver import Host, Look, Suite

ONE_TEST = "def test_machine(vm): assert vm.state == 'running'"
DEAD = 2**22 + 1  # higher than any pid


@pytest.fixture
def hypervisor(host: "Host") -> Iterator[Hypervisor]:
    hypervisor = connect(URI)
    yield hypervisor
    hypervisor.close()


class DeadRun:
    """A run that was killed in a test, and the machine as it had found it."""

    def __init__(self, suite: "Suite", hypervisor: Hypervisor) -> None:
        host = suite.host
        uuid = host.domain().UUIDString()
        self.domain = Domain(hypervisor, uuid, "box")
        suite.locks.mkdir(exist_ok=True)
        self.lease = Lease.of(self.domain, suite.locks)
        self.found: Look = host.look()
        self.journal = Journal(
            self.lease.journal_path, "dead", URI, "box", uuid, pid=DEAD, user="ann", host="lab1"
        )
        self.journal.test = "test_x.py::test_killed"
        self.journal.found = restore.look(self.domain)
        self.journal.save()

    def take(self, name: str = "kvmsnap-found-dead") -> None:
        self.domain.take_snapshot(name, self.journal.description())
        self.journal.taken[name] = self.domain.snapshot_xmls()[name]
        self.journal.found_snapshot = self.journal.found_snapshot or name
        self.journal.save()


@pytest.fixture(params=["next run", "clean"])
def next_one(request: pytest.FixtureRequest) -> str:
    """Who comes after the dead run."""
    kind: str = request.param
    return kind


def come_after(suite: "Suite", next_one: str, *texts: str, status: int = 0) -> pytest.RunResult:
    suite.write(ONE_TEST)
    result = suite.run(*(["--kvmsnap-clean"] if next_one == "clean" else []))
    out = result.stdout.str() + result.stderr.str()
    assert result.ret == status, out
    for text in texts:
        assert out.count(text) == 1, out
    assert "Traceback" not in out
    if next_one == "clean":
        result.assert_outcomes()
    return result


@pytest.mark.parametrize("state", ["running", "paused", "shut off"])
def test_a_run_that_was_killed_in_a_test(
    suite: "Suite", host: "Host", hypervisor: Hypervisor, state: str, next_one: str
) -> None:
    domain = host.define(state=state)
    host.snapshot("of the owner")
    dead = DeadRun(suite, hypervisor)
    dead.take()
    dead.take("kvmsnap-base-dead")
    host.snapshot("of the test", description=dead.journal.description())
    domain.setAutostart(1)
    if domain.isActive():
        domain.destroy()
    come_after(
        suite,
        next_one,
        f"kvmsnap: put box back as found ({state}): a run ended without doing so"
        f" (pid {DEAD} of ann on lab1, since ",
        "in test_x.py::test_killed)",
    )
    assert host.look() == dead.found
    assert suite.left_over() == []


def test_a_run_that_was_killed_while_it_took_its_first_snapshot(
    suite: "Suite", host: "Host", hypervisor: Hypervisor, next_one: str
) -> None:
    """QEMU finishes it, and leaves the guest paused."""
    domain = host.define(state="running")
    dead = DeadRun(suite, hypervisor)
    dead.journal.taken["kvmsnap-found-dead"] = ""
    dead.journal.found_snapshot = "kvmsnap-found-dead"
    dead.journal.save()
    domain.suspend()
    come_after(suite, next_one, "kvmsnap: put box back as found (running)")
    assert host.look() == dead.found
    assert suite.left_over() == []


def test_a_run_that_was_killed_before_it_did_anything(
    suite: "Suite", host: "Host", hypervisor: Hypervisor, next_one: str
) -> None:
    host.define(state="running")
    dead = DeadRun(suite, hypervisor)
    come_after(suite, next_one, "kvmsnap: put box back as found (running)")
    assert host.look() == dead.found
    assert suite.left_over() == []


@pytest.mark.parametrize("is_first", [True, False])
def test_a_run_that_was_killed_while_it_saved_its_journal(
    suite: "Suite", host: "Host", hypervisor: Hypervisor, next_one: str, is_first: bool
) -> None:
    host.define(state="running")
    dead = DeadRun(suite, hypervisor)
    draft_of(dead.journal.path).write_text("{")
    words = ["kvmsnap: put box back as found (running)"]
    if is_first:
        dead.journal.path.unlink()
        words = ["nothing to clean"] if next_one == "clean" else []
    come_after(suite, next_one, *words)
    assert host.look() == dead.found
    assert suite.left_over() == []


def test_a_domain_that_the_killed_test_had_undefined(
    suite: "Suite", host: "Host", hypervisor: Hypervisor
) -> None:
    domain = host.define(state="running")
    dead = DeadRun(suite, hypervisor)
    dead.take()
    domain.destroy()
    domain.undefineFlags(3)
    come_after(suite, "clean", "kvmsnap: put box back as found (running)")
    assert host.look() == dead.found


def test_a_run_that_was_killed_while_it_kept_a_state_is_put_right(
    suite: "Suite", host: "Host", hypervisor: Hypervisor
) -> None:
    """It was announced, and stands in libvirt; nobody was told of it."""
    host.define(state="shut off")
    before = host.look()
    dead = DeadRun(suite, hypervisor)
    dead.take()
    host.snapshot("kvmsnap-kept-test_it-20260101-000000", description=description_for("test_it"))
    dead.journal.kept["kvmsnap-kept-test_it-20260101-000000"] = ""
    dead.journal.save()
    come_after(suite, "clean")
    assert host.look() == before
    assert suite.left_over() == []


def test_a_run_that_was_killed_while_it_converted(
    suite: "Suite", host: "Host", hypervisor: Hypervisor, qemu_img: str, next_one: str
) -> None:
    raw = suite.pytester.path / "box.raw"
    raw.write_bytes(bytes(2**20))
    host.define("box", disk(raw, "raw"))
    dead = DeadRun(suite, hypervisor)
    dead.journal.found = None
    half, qcow2 = raw.with_name(".box.qcow2.kvmsnap-dead.tmp"), raw.with_name("box.qcow2")
    half.write_text("half")
    qcow2.hardlink_to(half)
    dead.journal.conversions = [Conversion("vda", raw, qcow2, half)]
    dead.journal.save()
    come_after(suite, next_one, "kvmsnap: put box back as found: a run ended")
    assert not half.exists()
    assert raw.read_bytes() == bytes(2**20)
    assert qcow2.exists() == (next_one == "next run"), "the next run converts it anew"
    assert suite.left_over() == []


def test_a_run_that_was_killed_after_it_had_switched_the_definition(
    suite: "Suite", host: "Host", hypervisor: Hypervisor, next_one: str
) -> None:
    qcow2 = suite.pytester.path / "box.qcow2"
    qcow2.write_text("whole")
    half = qcow2.with_name(".box.qcow2.kvmsnap-dead.tmp")
    half.hardlink_to(qcow2)
    host.define("box", disk(qcow2))
    dead = DeadRun(suite, hypervisor)
    dead.journal.found = None
    dead.journal.conversions = [Conversion("vda", qcow2.with_suffix(".raw"), qcow2, half)]
    dead.journal.save()
    come_after(suite, next_one)
    assert qcow2.read_text() == "whole"
    assert not half.exists()


def test_a_live_run_is_left_alone(suite: "Suite", host: "Host", hypervisor: Hypervisor) -> None:
    host.define(state="running")
    run = DeadRun(suite, hypervisor)
    run.take()
    before = host.look()
    with held_elsewhere(run.lease):
        come_after(
            suite, "clean", "kvmsnap: left box alone: it is in use by pid", "test_x.py::test_killed"
        )
        assert host.look() == before
        assert run.journal.path.exists()


def test_the_next_run_waits_for_a_live_one_and_names_it(
    suite: "Suite", host: "Host", hypervisor: Hypervisor
) -> None:
    host.define(state="running")
    run = DeadRun(suite, hypervisor)
    with held_elsewhere(run.lease):
        suite.write(ONE_TEST)
        result = suite.run("--kvmsnap-lock-timeout=0.1")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "the machine belongs to another process",
            "  where: box at test:///default",
            f"  why:   waited 0.1 s for pid {DEAD} of ann on lab1, since *",
            "  cure:  *--kvmsnap-lock-timeout",
        ]
    )
    assert host.look() == run.found


@contextlib.contextmanager
def held_elsewhere(lease: Lease) -> Iterator[None]:
    """Hold the lock of a lease in another process."""
    script = (
        "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        " print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(lease.journal_path.with_suffix(".lock"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate()


# the command


def test_nothing_to_clean(suite: "Suite") -> None:
    come_after(suite, "clean", "kvmsnap: nothing to clean: no run of this host left anything")
    assert suite.left_over() == []


def test_clean_runs_and_collects_no_test(suite: "Suite") -> None:
    suite.write("raise OSError('collected')")
    result = suite.run("--kvmsnap-clean")
    assert result.ret == 0
    assert "collected" not in result.stdout.str()


def test_clean_works_without_a_uri_from_the_journals_alone(
    suite: "Suite", host: "Host", hypervisor: Hypervisor
) -> None:
    host.define(state="running")
    dead = DeadRun(suite, hypervisor)
    dead.take()
    result = suite.pytester.runpytest_inprocess(
        "-Werror", "--kvmsnap-clean", f"--kvmsnap-lock-dir={suite.locks}"
    )
    assert result.ret == 0
    assert host.look() == dead.found


def test_a_journal_of_an_embedded_libvirt_that_is_gone_is_forgotten(suite: "Suite") -> None:
    suite.locks.mkdir()
    path = suite.locks / "gone.json"
    Journal(path, "dead", "qemu:///embed?root=/nonexistent", "box", "uuid").save()
    come_after(suite, "clean", "kvmsnap: forgot box: its libvirt is gone (pid ")
    assert suite.left_over() == []


def test_a_damaged_journal_is_told_and_kept(suite: "Suite") -> None:
    suite.locks.mkdir()
    (suite.locks / "damaged.json").write_text("{")
    come_after(suite, "clean", "cannot read what an earlier run left", "remove the file", status=1)
    assert "damaged.json" in suite.left_over()


def test_one_that_cannot_be_cleaned_does_not_keep_the_others(
    suite: "Suite", host: "Host", hypervisor: Hypervisor
) -> None:
    host.define(state="running")
    dead = DeadRun(suite, hypervisor)
    dead.take()
    (suite.locks / "0.json").write_text("{")
    (suite.locks / "z.json").write_text("{")
    come_after(suite, "clean", "kvmsnap: put box back as found", status=1)
    assert host.look() == dead.found


def test_a_damaged_journal_of_the_machine_stops_the_next_run(
    suite: "Suite", host: "Host", hypervisor: Hypervisor
) -> None:
    host.define(state="running")
    dead = DeadRun(suite, hypervisor)
    dead.journal.path.write_text("{}")
    before = host.look()
    suite.write(ONE_TEST)
    result = suite.run()
    out = result.stdout.str() + result.stderr.str()
    assert "cannot read what an earlier run left to be undone" in out
    assert "Traceback" not in out
    assert "INTERNALERROR" not in out
    result.assert_outcomes()
    assert host.look() == before
    assert dead.journal.path.exists()


def test_clean_with_an_unreachable_uri(suite: "Suite") -> None:
    suite.write(ONE_TEST)
    result = suite.run("--kvmsnap-clean", "--kvmsnap-uri=qemu+unix:///system?socket=/nonexistent")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "cannot connect to qemu+unix:///system" in result.stderr.str()
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


def test_the_journal_knows_the_snapshots_of_tests_before_they_are_taken(
    suite: "Suite", host: "Host"
) -> None:
    """A kill may leave them in the image alone, where only their names tell whose they are."""
    host.define(state="running")
    suite.write(
        f"""
        import json, pathlib, pytest
        from pytest_kvmsnap.machine.domain import Domain

        def known():
            (journal,) = pathlib.Path({str(suite.locks)!r}).glob("*.json")
            return json.loads(journal.read_text())["by_tests"]

        @pytest.fixture(scope="module")
        def prepared(module_vm):
            module_vm.domain.snapshotCreateXML("<domainsnapshot><name>raw</name></domainsnapshot>")

        def test_names(prepared, vm, monkeypatch):
            taken, take = [], Domain.take_snapshot
            def taking(self, name, description):
                assert known() == ["raw", *taken, name]
                taken.append(name)
                return take(self, name, description)
            monkeypatch.setattr(Domain, "take_snapshot", taking)
            vm.snapshot("mine")
            vm.snapshot()
        """
    )
    suite.run().assert_outcomes(passed=1)


# killed for real, with a test driver that comes from a file


def test_a_kill_in_a_test_leaves_a_journal_that_the_next_run_works_off(suite: "Suite") -> None:
    node: Path = suite.pytester.path / "node.xml"
    node.write_text(node_file(disk("/images/box.qcow2")))
    uri = f"--kvmsnap-uri=test://{node}"
    suite.write("import os\ndef test_kill(vm): os.kill(os.getpid(), 9)")
    assert suite.run_apart(uri).ret == -signal.SIGKILL
    (journal,) = suite.locks.glob("*.json")
    assert journal.stat().st_mode & 0o777 == 0o600
    suite.write(ONE_TEST)
    result = suite.run_apart(uri)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["kvmsnap: put box back as found (running): *::test_kill)"])
    assert suite.left_over() == []
