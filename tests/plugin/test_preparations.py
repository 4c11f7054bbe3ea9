"""Preparations that fail, tear down, take snapshots, or are asked for in unusual ways."""

from typing import TYPE_CHECKING

import pytest
from notes import DATABASE, write
from testdriver import fail_when

from pytest_kvmsnap.errors import RevertError, SnapshotError
from pytest_kvmsnap.machine.domain import Domain

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite

NO_ROOM = SnapshotError("cannot take the snapshot", where="box", why="no room")
NO_REVERT = RevertError("cannot revert", where="box", why="the mock says so")
PLAIN = """
def test_plain(vm):
    assert read(vm) == []
"""


@pytest.fixture(autouse=True)
def machine(host: "Host") -> None:
    host.define(state="running")


# failures


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        ("raise OSError('no space in the guest')", {"errors": 2}),
        ("pytest.fail('told so')", {"errors": 2}),
        ("pytest.skip('not here')", {"skipped": 2}),
    ],
)
def test_a_preparation_that_fails_is_undone_and_others_go_on(
    suite: "Suite", host: "Host", calls: "Calls", failure: str, outcome: dict[str, int]
) -> None:
    before = host.look()
    write(
        suite,
        f"""
@pytest.fixture(scope="module")
def broken(module_vm):
    write(module_vm, "half")
    module_vm.snapshot("of the preparation")
    {failure}

def test_one(broken, vm): pass
def test_two(broken): pass
def test_plain(vm):
    assert read(vm) == []
    assert [s.name for s in vm.snapshots()] == [vm.current_snapshot.name]
""",
    )
    result = suite.run()
    result.assert_outcomes(passed=1, **outcome)
    assert calls.snapshots == [
        "take found",
        "take of the preparation",
        "revert found",
        "delete of the preparation",
        "revert found",
        "delete found",
    ]
    assert host.look() == before


def test_the_cause_is_told_with_the_users_own_lines_only(suite: "Suite") -> None:
    write(
        suite,
        """
@pytest.fixture(scope="module")
def broken(module_vm):
    raise OSError("no space in the guest")

def test_one(broken, vm): pass
def test_two(broken, vm): pass
""",
    )
    out = suite.run().stdout.str()
    assert out.count("E       OSError: no space in the guest") == 2
    assert "pytest_kvmsnap/" not in out


def test_a_preparation_on_one_that_fails_is_not_begun(suite: "Suite", calls: "Calls") -> None:
    write(
        suite,
        """
@pytest.fixture(scope="module")
def broken(module_vm): raise OSError("broken")

@pytest.fixture(scope="module")
def never(broken, module_vm): print("never begun")

def test_one(never, vm): pass
"""
        + PLAIN,
    )
    result = suite.run("-s")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.no_fnmatch_line("*never begun*")
    assert calls.count("take") == 1


def test_a_preparation_that_fails_on_another_leaves_that_one_as_it_was(
    suite: "Suite", host: "Host"
) -> None:
    write(
        suite,
        DATABASE
        + """
@pytest.fixture(scope="class")
def broken(database, class_vm):
    write(class_vm, "half")
    raise OSError("broken")

def test_broken(broken, vm): pass
def test_database(database, vm): assert read(vm) == ["database"]
""",
    )
    suite.run().assert_outcomes(passed=1, errors=1)


def test_a_state_that_cannot_be_kept_is_an_error_of_each_test_that_needs_it(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since the test driver's disks are never full."""
    fail_when(monkeypatch, "take_snapshot", NO_ROOM, lambda name, _: "database" in name)
    before = host.look()
    write(
        suite,
        """
@pytest.fixture(scope="module")
def database(module_vm):
    module_vm.snapshot("of the preparation")
    yield
    print("torn down")

def test_one(database, vm): pass
def test_two(database, vm): pass

def test_plain(vm):
    assert [s.name for s in vm.snapshots()] == [vm.current_snapshot.name]
""",
    )
    result = suite.run("-s")
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(
        ["*ERROR at setup of test_one*", "cannot take the snapshot", "  why:   no room"]
    )
    out = result.stdout.str()
    assert out.count("torn down") == 2
    assert "Traceback" not in out
    assert host.look() == before


def test_a_machine_that_cannot_be_brought_back_fails_later_tests_at_once(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock: the test driver's reverts never fail."""
    before = host.look()
    once = [NO_REVERT]
    fail_when(
        monkeypatch,
        "revert",
        NO_REVERT,
        lambda name, _: bool("database" in name and once and once.pop()),
    )
    write(
        suite,
        DATABASE.replace("return", "yield")
        + """    print("torn down")

def test_one(database, vm): pass
def test_two(database, vm): pass
def test_three(module_vm): pass
"""
        + PLAIN,
    )
    result = suite.run()
    result.assert_outcomes(passed=1, errors=4)
    assert result.stdout.str().count("the machine is in quarantine, since it failed before") == 3
    assert host.look() == before
    assert suite.left_over() == []


def test_a_state_that_cannot_be_kept_on_one_machine_is_undone_on_the_other(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since the test driver's disks are never full."""
    host.define("server", state="running")
    take = Domain.take_snapshot

    def full(self: Domain, name: str, description: str) -> object:
        if (self.name, "both" in name) == ("box", True):
            raise NO_ROOM
        return take(self, name, description)

    monkeypatch.setattr(Domain, "take_snapshot", full)
    write(
        suite,
        """
pytestmark = pytest.mark.kvm_domain("server")

@pytest.fixture(scope="module")
def both(session_vm, module_vm):
    write(session_vm, "both")
    write(module_vm, "both")

def test_both(both, vm): pass

def test_plain(vm):
    assert read(vm) == []
    assert [s.name for s in vm.snapshots()] == [vm.current_snapshot.name]
""",
    )
    suite.run().assert_outcomes(passed=1, errors=1)


# what is torn down


WATCH = """
import libvirt

def pytest_runtest_logfinish(nodeid):
    box = libvirt.open("test:///default").lookupByName("box")
    vm = type("VM", (), {"domain": box})
    print("after", nodeid.partition("::")[2] + ":", *read(vm))
"""


def test_what_is_over_is_undone_at_once(suite: "Suite") -> None:
    """Not only when the machine is needed next, which may be much later."""
    write(
        suite,
        DATABASE
        + """
@pytest.fixture(scope="class")
def broken(class_vm):
    write(class_vm, "half")
    raise OSError("broken")

def test_broken(broken): pass
def test_plain(vm): write(vm, "dirt")

class TestSteps:
    def test_step(self, class_vm): write(class_vm, "step")
    def test_last(self, class_vm): pass

def test_database(database, vm): pass
def test_last_of_all(database): write(database_machine(), "late")

def database_machine():
    import libvirt
    box = libvirt.open("test:///default").lookupByName("box")
    return type("VM", (), {"domain": box})
""",
        conftest=WATCH,
    )
    result = suite.run("-s")
    result.assert_outcomes(passed=5, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*after test_broken:",
            "*after test_plain:",
            "*after TestSteps::test_step: step",
            "*after TestSteps::test_last:",
            "*after test_database: database",
            "*after test_last_of_all:",
        ],
        consecutive=True,
    )


def test_what_cannot_be_undone_at_once_is_told(
    suite: "Suite", host: "Host", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock: the test driver's reverts never fail."""
    before = host.look()
    once = [NO_REVERT]
    fail_when(monkeypatch, "revert", NO_REVERT, lambda *_: bool(once and once.pop()))
    write(suite, "def test_step(module_vm): write(module_vm, 'step')")
    result = suite.run()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_step*", "cannot revert"])
    assert host.look() == before


@pytest.mark.parametrize("how", ["yield", "addfinalizer"])
def test_a_teardown_finds_the_machine_as_its_preparation_left_it(
    suite: "Suite", host: "Host", calls: "Calls", how: str
) -> None:
    """The last test before it was one on another state."""
    body = {
        "yield": "    yield\n    assert read(module_vm) == ['database']; print('torn down')",
        "addfinalizer": "    request.addfinalizer(lambda: print('torn down', read(module_vm)))",
    }[how]
    write(
        suite,
        f"""
@pytest.fixture(scope="module")
def database(module_vm, request):
    write(module_vm, "database")
{body}

def test_database(database, vm): write(vm, "dirt")
def test_plain(vm): write(vm, "dirt")
""",
    )
    result = suite.run("-s")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*torn down*"])
    if how == "addfinalizer":
        assert "torn down ['database']" in result.stdout.str()
    # database's test; to the baseline and back there after the other one; the teardown; undone
    assert calls.snapshots[2:-2] == [
        "revert database",
        *["revert found"] * 2,
        "revert database",
        "revert found",
    ]


def test_a_teardown_finds_what_tests_did_without_vm(suite: "Suite") -> None:
    write(
        suite,
        """
@pytest.fixture(scope="module")
def database(module_vm):
    yield
    print("at the end:", *read(module_vm))

def test_step(database, module_vm): write(module_vm, "step")
"""
        + PLAIN,
    )
    result = suite.run("-s")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*at the end: step"])


def test_a_teardown_that_fails_is_told_and_the_machine_is_undone(
    suite: "Suite", host: "Host"
) -> None:
    before = host.look()
    write(
        suite,
        """
@pytest.fixture(scope="class")
def database(class_vm):
    write(class_vm, "database")
    yield
    raise OSError("broken teardown")

class TestIt:
    def test_one(self, database, vm): pass

def test_plain(vm): assert read(vm) == []
""",
    )
    result = suite.run()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*OSError: broken teardown*"])
    assert host.look() == before


def test_a_preparation_that_is_made_anew_may_fail_to_tear_down(
    suite: "Suite", host: "Host"
) -> None:
    """It is told in the set-up of the test that has it torn down, and the run goes on."""
    before = host.look()
    write(
        suite,
        DATABASE
        + """
@pytest.fixture(scope="module")
def web(module_vm):
    write(module_vm, "web")
    yield
    if read(module_vm) == ["web"]:
        raise OSError("broken teardown")

def test_web(web, vm): pass
def test_both(database, web, vm): pass
def test_both_again(database, web, vm): assert read(vm) == ["database", "web"]
def test_plain(vm): assert read(vm) == []
""",
    )
    result = suite.run()
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at setup of test_both*", "*OSError: broken teardown*"])
    assert host.look() == before


def test_tests_without_vm_go_on_from_each_other_and_come_back(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    before = host.look()
    write(
        suite,
        DATABASE
        + """
def test_step_one(module_vm): write(module_vm, "one")
def test_step_two(module_vm):
    assert read(module_vm) == ["one"]
    module_vm.snapshot("mine")
    module_vm.domain.destroy()

def test_plain(vm): assert (vm.state, read(vm)) == ("running", [])

def test_step_three(module_vm):
    assert (module_vm.state, read(module_vm)) == ("shut off", [])
    module_vm.revert("mine")
    assert read(module_vm) == ["one"]

def test_database_step(database, module_vm):
    assert read(module_vm) == ["database"]
    write(module_vm, "step")

def test_database(database, vm): assert read(vm) == ["database"]

def test_step_four(module_vm):
    assert read(module_vm) == ["one"]
    assert "mine" in [s.name for s in module_vm.snapshots()]

def test_database_second_step(database, module_vm):
    assert read(module_vm) == ["database", "step"]
""",
    )
    suite.run().assert_outcomes(passed=8)
    assert host.look() == before


def test_snapshots_of_tests_without_vm_are_gone_with_their_scope(suite: "Suite") -> None:
    write(
        suite,
        """
class TestSteps:
    def test_one(self, class_vm): class_vm.snapshot("mine")
    def test_plain(self, vm): pass
    def test_two(self, class_vm): class_vm.snapshot("mine too")
    def test_plain_again(self, vm): pass
    def test_three(self, class_vm):
        names = {s.name for s in class_vm.snapshots()}
        assert {"mine", "mine too"} <= names
        assert len([n for n in names if "held" in n]) <= 2  # the one before is deleted

def test_plain(vm):
    assert [s.name for s in vm.snapshots()] == [vm.current_snapshot.name]
""",
    )
    suite.run().assert_outcomes(passed=6)


def test_class_vm_outside_of_a_class_lasts_for_one_test(suite: "Suite") -> None:
    write(
        suite,
        """
@pytest.mark.parametrize("turn", [1, 2])
def test_alone(class_vm, turn):
    assert read(class_vm) == []
    write(class_vm, "dirt")
""",
    )
    suite.run().assert_outcomes(passed=2)


def test_what_cannot_be_kept_is_told_to_those_who_come_back_only(
    suite: "Suite", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since the test driver's disks are never full."""
    fail_when(monkeypatch, "take_snapshot", NO_ROOM, lambda name, _: "held" in name)
    write(suite, "def test_one(module_vm): pass" + PLAIN + "def test_two(module_vm): pass")
    result = suite.run()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at setup of test_two*", "cannot take the snapshot"])


# snapshots of the user


def test_a_fixture_may_have_any_name(suite: "Suite", host: "Host") -> None:
    """Snapshots are named after preparations, and ours have names too."""
    before = host.look()
    fixtures = [
        f"""
@pytest.fixture(scope="class", params=["a", "b"])
def {name}(class_vm): write(class_vm, "{name}")

class Test_{name}:
    def test_it(self, {name}, vm): assert read(vm) == ["{name}"]
    def test_step(self, class_vm): write(class_vm, "step")
"""
        for name in ("found", "base", "held", "one", "one_2", "one2", "f" * 80, "größe")
    ]
    write(suite, "\n".join(fixtures))
    suite.run().assert_outcomes(passed=8 * 3)
    assert host.look() == before


def test_snapshots_of_a_preparation_are_there_for_its_tests_only(
    suite: "Suite", host: "Host"
) -> None:
    before = host.look()
    write(
        suite,
        """
@pytest.fixture(scope="module")
def steps(module_vm):
    first = module_vm.snapshot()
    write(module_vm, "one")
    module_vm.snapshot("second")
    write(module_vm, "two")
    return first

@pytest.mark.parametrize("turn", [1, 2])
def test_goes_back(steps, vm, turn):
    assert read(vm) == ["one", "two"]
    vm.snapshot("deeper")
    vm.revert("second")
    assert read(vm) == ["one"]
    vm.snapshot("deepest")
    vm.revert(steps)
    assert read(vm) == []
    vm.delete_snapshot("deeper")
    assert sorted(s.name for s in vm.snapshots() if "kvmsnap" not in s.name) == [
        "deepest", "second"]

def test_plain(vm):
    assert [s.name for s in vm.snapshots() if "deep" in s.name] == []
""",
    )
    suite.run().assert_outcomes(passed=3)
    assert host.look() == before


# getfixturevalue


def test_what_is_asked_for_by_getfixturevalue_is_found_where_it_was_made(
    suite: "Suite", host: "Host"
) -> None:
    before = host.look()
    write(
        suite,
        DATABASE
        + """
def test_first(request):
    request.getfixturevalue("database")
    vm = request.getfixturevalue("vm")
    assert read(vm) == ["database"]
    write(vm, "dirt")

def test_plain(vm): assert read(vm) == []

def test_again(request):
    request.getfixturevalue("database")
    assert read(request.getfixturevalue("vm")) == ["database"]

def test_without_vm(request):
    machine = request.getfixturevalue("module_vm")
    assert read(machine) == []
    write(machine, "step")

def test_plain_again(vm): assert read(vm) == []

def test_goes_on(request):
    assert read(request.getfixturevalue("module_vm")) == ["step"]
""",
    )
    suite.run().assert_outcomes(passed=6)
    assert host.look() == before


def test_a_preparation_that_is_asked_for_while_vm_is_in_use_is_refused(
    suite: "Suite", host: "Host"
) -> None:
    write(
        suite,
        DATABASE
        + """
def test_late(vm, request):
    write(vm, "mine")
    with pytest.raises(pytest.fail.Exception, match="'database' prepares the machine 'box'"):
        request.getfixturevalue("database")
    assert read(vm) == ["mine"]

def test_named(database, vm): assert read(vm) == ["database"]
""",
    )
    suite.run().assert_outcomes(passed=2)


def test_a_fixture_that_is_the_first_to_use_a_machine_is_refused_too(suite: "Suite") -> None:
    """Nothing names our fixtures, so that nobody listened to pytest when it was set up."""
    write(
        suite,
        """
@pytest.fixture(scope="module")
def hidden(request): write(request.getfixturevalue("module_vm"), "hidden")

def test_hidden(hidden): pass
""",
    )
    result = suite.run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*'hidden' uses the machine of 'module_vm' without naming it"])


@pytest.mark.parametrize("order", ["hidden first", "machine first"])
def test_a_fixture_that_uses_the_machine_without_naming_it_is_refused(
    suite: "Suite", host: "Host", order: str
) -> None:
    tests = ["def test_hidden(hidden, vm): pass\n", "def test_machine(module_vm): pass\n"]
    write(
        suite,
        """
@pytest.fixture(scope="module")
def hidden(request): write(request.getfixturevalue("module_vm"), "hidden")
"""
        + "".join(tests if order == "hidden first" else reversed(tests))
        + PLAIN,
    )
    result = suite.run()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*the fixture 'hidden' uses the machine of 'module_vm' without naming it",
            "*  cure:  name module_vm among the arguments of hidden",
        ]
    )


def test_a_machine_that_is_used_after_its_test_is_clean_for_the_next(suite: "Suite") -> None:
    write(
        suite,
        """
def test_one(vm): pass
def test_two(vm): assert read(vm) == []
""",
        conftest="""
HELD = []

@pytest.fixture(autouse=True)
def keep(vm): HELD.append(vm)

def pytest_runtest_logfinish(nodeid):
    write(HELD[0], "between the tests")
""",
    )
    suite.run().assert_outcomes(passed=2)


# several machines, markers and parameters


def test_preparations_of_two_machines_do_not_get_into_each_others_way(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    host.define("server", state="running")
    before = host.looks()
    write(
        suite,
        """
@pytest.fixture(scope="session")
def on_box(session_vm): write(session_vm, "prepared box")

@pytest.fixture(scope="class")
def on_server(class_vm): write(class_vm, "prepared-server")

@pytest.fixture(scope="class")
def on_both(session_vm, class_vm):
    write(session_vm, "both")
    write(class_vm, "both")

@pytest.mark.kvm_domain("server")
class TestServer:
    def test_server(self, on_server, vm):
        assert (vm.name, read(vm)) == ("server", ["prepared-server"])

    def test_box_and_server(self, on_box, on_server, vm, session_vm):
        assert (vm.name, read(vm)) == ("server", ["prepared-server"])
        assert (session_vm.name, read(session_vm)) == ("box", ["prepared", "box"])

    def test_both(self, on_both, vm, session_vm):
        assert (read(vm), read(session_vm)) == (["both"], ["both"])

    @pytest.mark.kvm_domain("box")
    def test_other(self, on_server, vm, class_vm):
        assert (vm.name, read(vm)) == ("box", [])
        assert (class_vm.name, read(class_vm)) == ("server", ["prepared-server"])

def test_box(on_box, vm):
    assert (vm.name, read(vm)) == ("box", ["prepared", "box"])
""",
    )
    suite.run().assert_outcomes(passed=5)
    assert host.looks() == before
    assert [c for c in calls.log if c.startswith("take on")] == [
        "take on_server",
        "take on_box",
        "take on_both",
        "take on_both",
    ]


def test_a_snapshot_marker_nearer_than_the_preparation_replaces_its_state(
    suite: "Suite", host: "Host"
) -> None:
    host.snapshot("installed")
    write(
        suite,
        DATABASE
        + """
def test_database(database, vm): assert read(vm) == ["database"]

@pytest.mark.kvm_snapshot("installed")
def test_snapshot(database, vm):
    assert (vm.current_snapshot.name, read(vm)) == ("installed", [])
""",
    )
    suite.run().assert_outcomes(passed=2)


def test_a_parameter_of_a_wide_fixture_names_the_machine_of_its_tests(
    suite: "Suite", host: "Host"
) -> None:
    host.define("one", state="running")
    host.define("two", state="running")
    write(
        suite,
        """
@pytest.fixture(scope="module")
def prepared(module_vm): write(module_vm, f"for-{module_vm.name}")

@pytest.mark.parametrize("module_vm", ["one", "two"], indirect=True)
def test_it(prepared, module_vm, vm, request):
    assert vm.name == module_vm.name == request.node.callspec.params["module_vm"]
    assert read(vm) == [f"for-{vm.name}"]
""",
    )
    suite.run(domain="box").assert_outcomes(passed=2)


def test_a_wide_fixture_sees_the_markers_above_it_only(suite: "Suite", host: "Host") -> None:
    write(
        suite,
        """
@pytest.mark.kvm_domain("box")
def test_it(module_vm): pass
""",
    )
    result = suite.run(domain=None)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*no machine is named*", "*  why:   module_vm sees the markers of its module and above*"]
    )


@pytest.mark.parametrize("left", ["destroy()", "domain.suspend()"])
def test_a_preparation_may_leave_the_machine_off_or_paused(suite: "Suite", left: str) -> None:
    write(
        suite,
        f"""
@pytest.fixture(scope="module")
def prepared(module_vm): module_vm.{left}

@pytest.mark.parametrize("turn", [1, 2])
def test_it(prepared, vm, turn): assert vm.state == "running"
""",
    )
    suite.run().assert_outcomes(passed=2)
