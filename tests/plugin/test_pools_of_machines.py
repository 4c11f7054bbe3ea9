"""Pools of machines: any will do, the first free one serves, one that fails is left out."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from notes import DATABASE, write
from records import RECORDS, Record
from testdriver import fail_when

from pytest_kvmsnap.errors import BlockedError, MachineError, RevertError
from pytest_kvmsnap.lab.checks import Checks
from pytest_kvmsnap.lab.journal import Journal
from pytest_kvmsnap.lab.lease import Lease
from pytest_kvmsnap.lab.slots import Slots
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import connect

if TYPE_CHECKING:
    from sharedhost import SharedSuite
    from testdriver import Calls, Host, Suite

# A test ends when all of MACHINES are in use.
MEETING = """
import pathlib

@pytest.fixture
def meeting(diary):
    for _ in range(3000):
        lines = [line.split() for line in pathlib.Path("record").read_text().splitlines()]
        if len({machine for _, machine, verb, *_ in lines if verb == "begin"}) == MACHINES:
            return
        time.sleep(0.02)
    raise AssertionError("the machines were not used at the same time")
"""


@pytest.fixture
def web(host: "Host") -> "Host":
    """A host with the machines web-1, web-2 and db."""
    for name in ("web-1", "web-2", "db"):
        host.define(name, state="running")
    return host


@contextmanager
def held_by_another(suite: "Suite", *machines: str) -> Iterator[Callable[[str], None]]:
    """Hold machines as another run would; they may be released earlier, one by one."""
    hypervisor = connect(suite.uri)
    suite.locks.mkdir(exist_ok=True)
    leases = {}
    for name in machines:
        uuid = suite.host.domain(name).UUIDString()
        lease = leases[name] = Lease.of(Domain(hypervisor, uuid, name), suite.locks)
        assert lease.try_take()
        Journal(lease.journal_path, "other", suite.uri, name, uuid, user="ann").save()

    def release(name: str) -> None:
        lease = leases.pop(name)
        lease.journal_path.unlink()
        lease.release()

    yield release
    for name in list(leases):
        release(name)
    hypervisor.close()


# with workers


@pytest.mark.usefixtures("xdist")
@pytest.mark.parametrize(("count", "state"), [(2, "shut off"), (4, "running")])
def test_each_of_as_many_workers_has_a_machine_of_its_own(
    shared: "SharedSuite", count: int, state: str
) -> None:
    names = [f"web-{number}" for number in range(count)]
    for name in names:
        shared.host.define(name, state=state)
    before = shared.host.looks()
    write(
        shared,
        f"""
@pytest.mark.parametrize("number", range({3 * count}))
def test_machine(vm, meeting, number):
    assert read(vm) == []
    write(vm, "dirt")
""",
        RECORDS + MEETING.replace("MACHINES", str(count)),
    )
    result = shared.run_apart(f"-n{count}", domain="web-*")
    result.assert_outcomes(passed=3 * count)
    record = Record(shared.pytester.path)
    assert record.machines == set(names)
    for name in names:
        assert len(set(record.users(name))) == 1, "nobody changes machines"
        assert record.count("take", "found", name) == 1
        assert record.count("take", "base", name) == (state == "shut off")
    assert "waiting for" not in result.stdout.str() + result.stderr.str()
    assert shared.left_over() == []
    assert shared.host.looks() == before


@pytest.mark.usefixtures("xdist")
def test_more_workers_than_machines_take_turns(shared: "SharedSuite") -> None:
    for name in ("web-1", "web-2"):
        shared.host.define(name)
    before = shared.host.looks()
    write(
        shared,
        """
@pytest.mark.parametrize("number", range(12))
def test_machine(vm, diary, number):
    assert read(vm) == []
    write(vm, "dirt")
""",
        RECORDS,
    )
    shared.run_apart("-n3", domain="web-*").assert_outcomes(passed=12)
    record = Record(shared.pytester.path)
    users = [record.users(name) for name in ("web-1", "web-2")]
    assert len(users[0] + users[1]) == 12
    assert len({*users[0], *users[1]}) == 3
    assert shared.left_over() == []
    assert shared.host.looks() == before


# ways to name one; the first machine is another run's, which is skipped

WAYS = {
    "marker": ("@pytest.mark.kvm_domain('web-1', 'web-2')", ""),
    "marker with a pattern": ("@pytest.mark.kvm_domain('web-?')", ""),
    "ini": ("", "kvmsnap_domain =\n  web-1\n  web-2"),
    "ini with a pattern": ("", "kvmsnap_domain = web-*"),
    "parameter": ("@pytest.mark.parametrize('vm', ['web-[12]'], indirect=True)", ""),
    "hook": ("", ""),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_first_free_one_serves_however_the_pool_is_named(
    suite: "Suite", web: "Host", way: str
) -> None:
    before = web.looks()
    marker, ini = WAYS[way]
    if ini:
        suite.pytester.makeini(f"[pytest]\n{ini}")
    if way == "hook":
        suite.pytester.makeconftest(
            "def pytest_kvmsnap_lab(config): return {'domain': ['web-1', 'web-2']}"
        )
    suite.write(
        f"""
import pytest

{marker}
def test_machine(vm, pytestconfig):
    with open(pytestconfig.rootpath / "used", "a") as file:
        print(vm.name, file=file)
"""
    )
    used = suite.pytester.path / "used"
    suite.run(domain=None).assert_outcomes(passed=1)
    assert used.read_text() == "web-1\n"
    with held_by_another(suite, "web-1"):
        suite.run("--kvmsnap-lock-timeout=30", domain=None).assert_outcomes(passed=1)
    assert used.read_text() == "web-1\nweb-2\n"
    assert web.looks() == before
    assert suite.left_over() == []


def test_a_repeated_option_is_a_pool(suite: "Suite", web: "Host") -> None:
    suite.write("def test_machine(vm): assert vm.name == 'db'")
    suite.run("--kvmsnap-domain=web-1", domain="db").assert_outcomes(passed=1)
    with held_by_another(suite, "web-1"):
        args = ("--kvmsnap-domain=db", "--kvmsnap-lock-timeout=30")
        suite.run(*args, domain="web-1").assert_outcomes(passed=1)


def test_a_run_waits_for_a_pool_that_others_hold(shared: "SharedSuite") -> None:
    for name in ("web-1", "web-2"):
        shared.host.define(name, state="running")
    shared.write("def test_machine(vm): assert vm.name == 'web-2'")
    with held_by_another(shared, "web-1", "web-2") as release:
        run = shared.start_run(domain="web-*")
        while len(list(shared.locks.glob("*.next.lock"))) < 2:
            assert run.process.poll() is None
            time.sleep(0.02)
        release("web-2")
        run.result().assert_outcomes(passed=1)
    assert shared.left_over() == []


def test_who_waits_for_a_pool_too_long_is_told_all_owners(suite: "Suite", web: "Host") -> None:
    suite.write("def test_machine(vm): assert 0")
    with held_by_another(suite, "web-1", "web-2"):
        result = suite.run("--kvmsnap-lock-timeout=0.1", domain="web-*")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "*the machine belongs to another process",
            "*where: any of web-1, web-2",
            "*waited 0.1 s for pid * of ann on *",
        ]
    )


def test_our_throwaway_machines_are_no_members(suite: "Suite", host: "Host") -> None:
    """They are some run's, and gone at its end."""
    host.define("kvmsnap-debian-0a1b2c3d-1", state="running")
    host.define("web", state="running")
    suite.write("def test_machine(vm): assert vm.name == 'web'")
    suite.run(domain="*").assert_outcomes(passed=1)


# what is wrong


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["web-1", "wep-2"], "there is no domain 'wep-2'"),
        (["x*"], "there is no domain that matches 'x*'"),
        (["web-*", "x*", "y*"], "there is no domain that matches 'x*'"),
    ],
)
def test_a_name_that_stands_for_nothing_is_told_once(
    suite: "Suite", web: "Host", names: list[str], message: str
) -> None:
    before = web.looks()
    suite.write("def test_one(vm): pass\ndef test_two(module_vm): pass\n")
    result = suite.run(*[f"--kvmsnap-domain={name}" for name in names], domain=None)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = result.stdout.str() + result.stderr.str()
    assert said.count(message) == 1
    assert said.count("there is no") == 1
    assert web.looks() == before


def test_what_stands_in_the_way_of_any_member_is_told(suite: "Suite", web: "Host") -> None:
    web.domain("web-2").managedSave()
    suite.write("def test_machine(vm): pass")
    result = suite.run(domain="web-*")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*web-2 cannot be used*", "*managed save*"])


@pytest.mark.parametrize("have_it", [["web-1"], ["web-1", "web-2"]])
def test_a_snapshot_to_start_from_must_be_there_in_all_members(
    suite: "Suite", web: "Host", have_it: list[str]
) -> None:
    for name in have_it:
        web.snapshot("installed", of=name)
    before = web.looks()
    suite.write(
        """
import pytest

@pytest.mark.kvm_snapshot("installed")
def test_machine(vm): assert vm.current_snapshot.name == "installed"
"""
    )
    result = suite.run(domain="web-*")
    if len(have_it) == 2:
        result.assert_outcomes(passed=1)
    else:
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        said = result.stderr.str()
        assert said.count("there is no snapshot 'installed' of web-2") == 1
        assert "of web-1" not in said
    assert web.looks() == before


PAIR = """
import pytest

pytestmark = pytest.mark.kvm_domain("web-*")

@pytest.mark.kvm_domain({other})
def test_machine(module_vm, vm): assert module_vm.name != vm.name
"""


@pytest.mark.parametrize("args", [[], ["--kvmsnap-plan"]])
def test_a_pool_beside_a_member_of_it_is_refused(
    suite: "Suite", web: "Host", args: list[str]
) -> None:
    suite.write(PAIR.format(other="'web-2'"))
    result = suite.run(*args, domain=None)
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if args else pytest.ExitCode.USAGE_ERROR)
    said = result.stdout.str() + result.stderr.str()
    assert said.count("this test asks for the pool web-*, and for web-2 beside it") == 1
    assert "::test_machine" in said


@pytest.mark.parametrize("other", ["'db'", "'db', 'd*'"])
def test_a_pool_beside_another_machine_is_fine(suite: "Suite", web: "Host", other: str) -> None:
    before = web.looks()
    suite.write(PAIR.format(other=other))
    suite.run(domain=None).assert_outcomes(passed=1)
    assert web.looks() == before


# machines that fail


def fail_on(
    monkeypatch: pytest.MonkeyPatch, *machines: str, method: str = "revert"
) -> Callable[[], int]:
    """Let a method fail on some machines; return how often it was called."""
    calls: list[str] = []
    original = getattr(Domain, method)

    def failing(self: Domain, *args: Any, **kwargs: Any) -> object:
        calls.append(self.name)
        if self.name in machines:
            raise RevertError(f"cannot {method} {self.name}", where=self.where)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Domain, method, failing)
    return lambda: len(calls)


TESTS = """
@pytest.mark.parametrize("number", range(4))
def test_machine(vm, number, pytestconfig):
    with open(pytestconfig.rootpath / "used", "a") as file:
        print(vm.name, file=file)
    held = pytestconfig.rootpath.parent / f"{pytestconfig.rootpath.name}-locks"
    assert len(list(held.glob("*.lock"))) == 1, "one that failed is let go, for others to try"
"""


def test_another_machine_serves_after_one_failed(
    suite: "Suite", web: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on(monkeypatch, "web-1")
    suite.write("import pytest\n" + TESTS)
    result = suite.run(domain="web-*")
    result.assert_outcomes(passed=4, errors=1)  # the first one's teardown
    used = (suite.pytester.path / "used").read_text().split()
    assert used == ["web-1", "web-2", "web-2", "web-2"]
    result.stdout.fnmatch_lines(["*cannot revert web-1*"])
    result.stdout.no_fnmatch_line("*in quarantine, since*")
    assert web.look("web-2").snapshots == ()


def test_tests_fail_at_once_when_all_machines_have_failed(
    suite: "Suite", web: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    reverts = fail_on(monkeypatch, "web-1", "web-2")
    suite.write("import pytest\n" + TESTS)
    result = suite.run(domain="web-*")
    result.assert_outcomes(passed=2, errors=4)
    assert (suite.pytester.path / "used").read_text().split() == ["web-1", "web-2"]
    assert reverts() == 4, "one for each machine, and one more each at the end"
    said = result.stdout.str()
    assert said.count("all machines of the pool web-* are in quarantine") == 2
    assert "cannot revert web-1" in said


def test_a_machine_that_cannot_be_had_is_left_out_too(
    suite: "Suite", web: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run held it at first, and left it in some state that is no good."""

    def late(self: Checks, domain: Domain, *_: object) -> None:
        if domain.name == "web-1":
            raise BlockedError("web-1 cannot be used for tests", where=domain.where)

    monkeypatch.setattr(Checks, "late", late)
    suite.write("import pytest\n" + TESTS)
    result = suite.run(domain="web-*")
    result.assert_outcomes(passed=3, errors=1)
    assert (suite.pytester.path / "used").read_text().split() == ["web-2"] * 3
    assert suite.left_over() == []
    result = suite.run("--kvmsnap-domain=web-?", domain="web-1")
    result.assert_outcomes(passed=3, errors=1)
    result = suite.run(domain="web-1")
    result.assert_outcomes(errors=4)
    result.stdout.no_fnmatch_line("*quarantine*")


def test_none_can_be_had(suite: "Suite", web: "Host", monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def late(self: Checks, domain: Domain, *_: object) -> None:
        asked.append(domain.name)
        raise MachineError(f"{domain.name} is no good", where=domain.where)

    monkeypatch.setattr(Checks, "late", late)
    suite.write("import pytest\n" + TESTS)
    result = suite.run(domain="web-*")
    result.assert_outcomes(errors=4)
    assert asked == ["web-1", "web-2"]
    result.stdout.fnmatch_lines(
        ["*all machines of the pool web-* are in quarantine*", "*web-1 is no*"]
    )


# wide fixtures


def test_all_fixtures_of_a_test_get_the_same_machine(
    suite: "Suite", web: "Host", calls: "Calls"
) -> None:
    before = web.looks()
    write(
        suite,
        DATABASE
        + """
@pytest.fixture(scope="session")
def installed(session_vm): write(session_vm, "installed")

def test_prepared(installed, database, vm, module_vm, session_vm):
    assert vm.name == module_vm.name == session_vm.name == "web-1"
    assert read(vm) == ["installed", "database"]
    write(vm, "dirt")

def test_again(database, installed, vm):
    assert read(vm) == ["installed", "database"]

def test_plain(vm):
    assert (vm.name, read(vm)) == ("web-1", [])

@pytest.mark.kvm_domain("web-1")
def test_the_same_machine_by_its_name(vm):
    assert read(vm) == []
""",
    )
    suite.run(domain="web-*").assert_outcomes(passed=4)
    assert calls.count("take") == 3
    assert web.looks() == before


def test_a_preparation_is_made_again_on_the_machine_that_takes_over(
    suite: "Suite", web: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = iter([True])
    error = RevertError("cannot revert", where="web-1")
    fail_when(monkeypatch, "revert", error, lambda *_: next(fails, False))
    write(
        suite,
        DATABASE
        + """
@pytest.mark.parametrize("number", range(3))
def test_prepared(database, vm, number):
    assert vm.name == ("web-1" if number == 0 else "web-2")
    assert read(vm) == ["database"]
    write(vm, "dirt")
""",
    )
    suite.run(domain="web-*").assert_outcomes(passed=3, errors=1)
    assert web.look("web-2").snapshots == web.look("web-1").snapshots == ()


def test_a_machine_that_is_ours_already_serves_the_pool(suite: "Suite", web: "Host") -> None:
    suite.write(
        """
import pytest

@pytest.mark.kvm_domain("web-2")
def test_named(vm): pass

def test_any(module_vm, vm): assert module_vm.name == vm.name == "web-2"

@pytest.mark.kvm_domain("web-1")
def test_another_by_its_name(vm): assert vm.name == "web-1"

def test_still_the_same(module_vm, vm): assert module_vm.name == vm.name == "web-2"
"""
    )
    suite.run(domain="web-*").assert_outcomes(passed=4)


# the plan


def test_the_plan_names_the_pool_and_the_images_of_all_members(suite: "Suite", web: "Host") -> None:
    suite.write("def test_machine(vm): pass")
    before = web.looks()
    result = suite.run("--kvmsnap-plan", domain="web-*")
    images = [f"/images/web-{number}.qcow2" for number in (1, 2)]
    line = rf"\S+::test_machine +any of web-\* +baseline +{', '.join(images)}$"
    result.stdout.re_match_lines([line, "nothing stands in the way"])
    assert result.ret == pytest.ExitCode.OK
    result = suite.run("--kvmsnap-plan", "--kvmsnap-plan-format=json", domain="web-*")
    (test,) = json.loads(result.stdout.str())["tests"]
    assert (test["domain"], test["images"]) == ("web-*", images)
    assert web.looks() == before
    assert not suite.locks.exists()


def test_the_plan_tells_what_stands_in_the_way_of_a_pool(suite: "Suite", web: "Host") -> None:
    web.domain("web-2").managedSave()
    suite.write("def test_machine(vm): pass")
    result = suite.run("--kvmsnap-plan", domain="web-*")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["1 blocker:", "*web-2 cannot be used*"])
    result = suite.run("--kvmsnap-plan", "--kvmsnap-domain=x*", domain="web-1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["1 blocker:", "*there is no domain that matches 'x?'*"])


# how many at once


@pytest.mark.parametrize("state", ["running", "shut off"])
def test_reverts_and_boots_have_a_slot(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    host.define(state=state)
    counts: list[int] = []
    seen: list[int] = []
    one = Slots.one

    @contextmanager
    def counted(self: Slots) -> Iterator[None]:
        counts.append(len(self._locks))
        with one(self):
            yield

    def record(method: str) -> None:
        original = getattr(Domain, method)

        def recording(self: Domain, *args: Any, **kwargs: Any) -> object:
            seen.append(len(list(Path(suite.locks).glob("slot-*.lock"))))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Domain, method, recording)

    monkeypatch.setattr(Slots, "one", counted)
    record("revert")
    record("start")
    suite.write("def test_one(vm): pass\ndef test_two(vm): pass\n")
    suite.run("--kvmsnap-max-concurrent=3").assert_outcomes(passed=2)
    assert len(seen) == (2 if state == "running" else 4)
    assert set(seen) == {1}
    assert set(counts) == {3}
    assert suite.left_over() == []
