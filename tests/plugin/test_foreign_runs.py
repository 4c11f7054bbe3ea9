"""What runs of other hosts and containers left is undone by --kvmsnap-clean --kvmsnap-force.

Their journals are not here: all that is known of them stands in their snapshots.
"""

import os
import re
import socket
from typing import TYPE_CHECKING

import pytest
from testdriver import URI, fail_when

from pytest_kvmsnap.errors import RevertError
from pytest_kvmsnap.lab.foreign import _DESCRIPTION
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import connect

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite

THEIRS = "pytest-kvmsnap run 1234 on elsewhere, pid 5"
DEAD = 2**22 + 1  # higher than any pid


def took(host: "Host", *labels: str, of: str = "box", by: str = THEIRS) -> None:
    """Have a run of another host take snapshots, as it names them."""
    match = _DESCRIPTION.fullmatch(by)
    assert match is not None
    for label in labels:
        host.snapshot(f"kvmsnap-{label}-{match[1]}", of=of, description=by)


def force(
    suite: "Suite",
    *texts: str,
    args: tuple[str, ...] = (),
    domain: str | None = "box",
    status: int = 0,
) -> str:
    """Clean by force; each text must be said once."""
    suite.write("raise OSError('collected')")
    result = suite.run("--kvmsnap-clean", "--kvmsnap-force", *args, domain=domain)
    out = result.stdout.str() + result.stderr.str()
    assert result.ret == status, out
    for text in texts:
        assert out.count(text) == 1, out
    for unwanted in ("Traceback", "collected"):
        assert unwanted not in out
    assert suite.left_over() == []
    return out


def test_the_description_is_read_as_it_is_written(suite: "Suite") -> None:
    journal = Journal(suite.locks / "x.json", "12ab", "uri", "box", "uuid", host="lab, on 7")
    match = _DESCRIPTION.fullmatch(journal.description())
    assert match is not None
    assert match.groups() == ("12ab", "lab, on 7")


@pytest.mark.parametrize("state", ["running", "paused", "shut off"])
def test_a_machine_is_put_back_as_that_run_found_it(
    suite: "Suite", host: "Host", state: str
) -> None:
    domain = host.define(state=state)
    host.snapshot("of the owner")
    before = host.look()
    took(host, "found")
    if state != "running":
        domain.resume() if state == "paused" else domain.create()
    took(host, "base", "database-2")
    host.snapshot("of the test", description=THEIRS)
    domain.destroy()
    host.connection.defineXML(before.definition.replace("8192", "16384"))
    force(
        suite,
        f"kvmsnap: put box back as found ({state}), which was left by {THEIRS}",
        "nothing to clean: no run of this host left anything",
    )
    assert host.look() == before


def test_without_force_it_is_left_alone_and_the_next_run_names_the_cure(
    suite: "Suite", host: "Host"
) -> None:
    host.define(state="running")
    took(host, "found")
    before = host.look()
    assert suite.run("--kvmsnap-clean").ret == 0
    assert host.look() == before
    suite.write("def test_machine(vm): pass")
    result = suite.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    cure = re.search(r"pytest (--kvmsnap-clean .*?) \(by hand", result.stderr.str())
    assert cure is not None
    command = [*cure[1].split(), f"--kvmsnap-lock-dir={suite.locks}"]
    assert suite.pytester.runpytest_inprocess(*command).ret == 0
    suite.run().assert_outcomes(passed=1)


def test_runs_that_nest_are_undone_from_the_newest_on(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    """The second one was let in before its host refused such machines, say."""
    domain = host.define(state="shut off")
    host.snapshot("of the owner")
    before = host.look()
    took(host, "found")
    domain.create()
    took(host, "base")
    newer = "pytest-kvmsnap run 0abc on another host, pid 7"
    took(host, "found", "base", by=newer)
    out = force(suite)
    lines = [line for line in out.splitlines() if "which was left by" in line]
    assert lines == [
        f"kvmsnap: put box back as found (running), which was left by {newer}",
        f"kvmsnap: put box back as found (shut off), which was left by {THEIRS}",
    ]
    assert calls.snapshots == [
        *("revert found", "delete base", "delete found"),
        *("revert found", "delete base", "delete found"),
    ]
    assert host.look() == before


def test_several_processes_of_one_run_are_one_run(suite: "Suite", host: "Host") -> None:
    """Workers of pytest-xdist hand a machine on with its snapshots."""
    host.define(state="running")
    before = host.look()
    took(host, "found")
    took(host, "database", by=THEIRS.replace("pid 5", "pid 6"))
    force(suite, "put box back as found (running)", THEIRS)
    assert host.look() == before


def test_without_a_found_snapshot_the_machine_stays_as_it_is(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    domain = host.define(state="running")
    host.snapshot("kvmsnap-found-9999")  # somebody's, whatever its name
    took(host, "base", "found-2")  # the second is of a preparation `found`
    domain.suspend()
    force(
        suite,
        f"kvmsnap: deleted the snapshots of box that were left by {THEIRS}; none of them held",
    )
    assert (host.look().state, host.look().snapshots) == ("paused", ("kvmsnap-found-9999",))
    assert calls.count("revert") == 0


def test_a_running_machine_that_was_undefined_is_defined_again(
    suite: "Suite", host: "Host"
) -> None:
    domain = host.define()
    before = host.look()
    took(host, "found")
    domain.create()
    domain.undefineFlags(0)
    assert not host.domain().isPersistent()
    force(suite, "put box back as found (shut off)")
    assert host.domain().isPersistent()
    assert host.look() == before


def test_a_throwaway_machine_is_put_back_and_not_removed(suite: "Suite", host: "Host") -> None:
    name = "kvmsnap-debian-1234-1"
    domain = host.define(name)
    before = host.look(name)
    took(host, "found", of=name)
    domain.create()
    force(suite, f"put {name} back as found (shut off)", domain=None)
    assert host.look(name) == before


# which machines


@pytest.mark.parametrize(
    ("domain", "undone"), [("box", {"box"}), ("bo*", {"box", "bot"}), (None, {"box", "bot", "web"})]
)
def test_the_machines_that_are_named_or_all(
    suite: "Suite", host: "Host", domain: str | None, undone: set[str]
) -> None:
    for name in ("box", "bot", "web"):
        host.define(name, state="running")
        took(host, "found", of=name)
    force(suite, domain=domain)
    assert {name for name, look in host.looks().items() if look.snapshots == ()} == undone


def test_one_that_fails_does_not_keep_the_others(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("box", "web"):
        host.define(name, state="running")
        took(host, "found", of=name)
    fails = iter([True, False])
    error = RevertError("cannot revert", where="the first one")
    fail_when(monkeypatch, "revert", error, lambda *_: next(fails))
    force(suite, "cannot revert", "put web back as found (running)", domain=None, status=1)
    assert host.look("web").snapshots == ()


def test_nothing_to_force(suite: "Suite", host: "Host") -> None:
    host.define()
    host.snapshot("of the owner", description="pytest-kvmsnap run is what I use")
    before = host.look()
    force(suite, "kvmsnap: nothing to force: no run of another host or container left anything")
    assert host.look() == before


# machines of this host's processes


@pytest.mark.parametrize("has_journal", [True, False])
def test_what_a_process_of_this_host_holds_is_left_alone(
    suite: "Suite", host: "Host", has_journal: bool
) -> None:
    uuid = host.define(state="running").UUIDString()
    took(host, "found")
    before = host.look()
    hypervisor = connect(URI)
    domain = Domain(hypervisor, uuid, "box")
    suite.locks.mkdir()
    lease = Lease.of(domain, suite.locks)
    journal = Journal(lease.journal_path, "1234", URI, "box", uuid, user="ann")
    if has_journal:
        journal.save()
    assert lease.try_take()
    suite.write("")
    result = suite.run("--kvmsnap-clean", "--kvmsnap-force")
    lease.release()
    hypervisor.close()
    out = result.stdout.str()
    assert result.ret == 0, out
    assert out.count("left box alone: ") == 1
    assert (f"in use by pid {os.getpid()} of ann" in out) == has_journal
    assert "nothing to force" not in out
    assert host.look() == before


@pytest.mark.parametrize("lives", [True, False])
def test_a_process_of_this_host_with_other_locks_is_left_alone(
    suite: "Suite", host: "Host", lives: bool
) -> None:
    pid = os.getpid() if lives else DEAD
    host.define(state="running")
    by = f"pytest-kvmsnap run 1234 on {socket.gethostname()}, pid {pid}"
    took(host, "found", by=by)
    words = f"put box back as found (running), which was left by {by}"
    if lives:
        words = f"left box alone: a living process of this host may be the {by}, with another"
    force(suite, words)
    assert bool(host.look().snapshots) == lives


# wrong use


def told(suite: "Suite", *args: str) -> str:
    suite.write("def test_nothing(): pass")
    locks = f"--kvmsnap-lock-dir={suite.locks}"
    result = suite.pytester.runpytest_inprocess("-Werror", locks, *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in result.stdout.str() + result.stderr.str()
    return result.stderr.str()


def test_force_alone_is_wrong(suite: "Suite") -> None:
    assert "--kvmsnap-force goes with --kvmsnap-clean only" in told(suite, "--kvmsnap-force")


def test_force_must_be_told_where(suite: "Suite") -> None:
    said = told(suite, "--kvmsnap-clean", "--kvmsnap-force")
    assert "it is not said on which libvirt --kvmsnap-force is to undo what others left" in said
    assert "give --kvmsnap-uri" in said


def test_a_domain_that_is_not_there_is_told(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    took(host, "found")
    args = ("--kvmsnap-clean", "--kvmsnap-force", f"--kvmsnap-uri={URI}", "--kvmsnap-domain=bux")
    assert "did you mean 'box'?" in told(suite, *args)
    assert host.look().snapshots == ("kvmsnap-found-1234",)
