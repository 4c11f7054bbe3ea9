"""Several processes, users and runs on the machines of one libvirt daemon, and what breaks it."""

import os
import pwd
from collections import Counter
from collections.abc import Callable

import pytest
from bench import NO_TRACE
from daemon import Daemon
from daemonlab import (
    OTHER_USER,
    DaemonLab,
    DaemonSuite,
    SharedMachine,
    another_user,
    at_sign,
    await_file,
)

Make = Callable[[str], SharedMachine]

# Each test leaves a mark with its name in the guest, in memory and on the disk, sees no other one,
# and notes when it begins and ends.
OWNERS = """
import os, time

def note(what):
    with open("diary", "a") as file:
        file.write(f"{what}\\n")

@pytest.fixture
def own(vm, request):
    me = f"{os.getpid()}-{request.node.name}"
    note(f"begin {vm.name} {me}")
    marks = vm.run(f"cd /root; touch '{me}' '/run/{me}.m'; sleep 0.2; ls -A . /run/*.m", check=True)
    assert marks.stdout == f"/run/{me}.m\\n\\n.:\\n{me}\\n"
    note(f"end {vm.name} {me}")
"""
WAITS = """
import pathlib, time

def await_file(name):
    for _ in range(6000):
        if pathlib.Path(name).exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"there is no {name}")

def ask(name):
    pathlib.Path(name).touch()
    for _ in range(6000):
        if not pathlib.Path(name).exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"{name} was not answered")
"""


def owners(suite: DaemonSuite, machine: SharedMachine) -> list[str]:
    """Return the tests that had a machine, in order; check that none came into another's way."""
    notes = [line.split() for line in suite.file("diary")]
    ours = [(what, owner) for what, name, owner in notes if name == machine.name]
    for (begin, one), (end, other) in zip(ours[::2], ours[1::2], strict=True):
        assert (begin, end, one) == ("begin", "end", other)
    return [owner for what, owner in ours if what == "begin"]


def processes(owners: list[str]) -> set[str]:
    return {owner.partition("-")[0] for owner in owners}


def test_four_workers_on_one_machine(
    make_shared: Make, daemon_suite: DaemonSuite, xdist: None
) -> None:
    """They hand it on as it is: there is one boot, and one snapshot to start from.

    Fast, since who takes it over knows nothing of how it looked before; the pool goes by force.
    """
    machine = make_shared("one")
    daemon_suite.write(
        OWNERS + "@pytest.mark.parametrize('n', range(12))\ndef test_owns_it(own, n): pass\n"
    )
    result = daemon_suite.run("--kvmsnap-domain=one", "-n4", "--kvmsnap-revert=fast")
    result.assert_outcomes(passed=12)
    told = owners(daemon_suite, machine)
    assert len(set(told)) == 12
    assert len(processes(told)) == 4
    assert Counter(daemon_suite.calls(machine)) == {
        "take_snapshot kvmsnap-found": 1,
        "start": 1,
        "take_snapshot kvmsnap-base": 1,
        "load kvmsnap-base": 12,
        "revert kvmsnap-found": 1,
        "delete_snapshot kvmsnap-base": 1,
        "delete_snapshot kvmsnap-found": 1,
    }
    assert machine.differences() == []
    assert daemon_suite.left_over() == []


@pytest.mark.long
def test_two_runs_that_spell_the_host_differently(
    make_shared: Make, daemon_suite: DaemonSuite, daemon_lab: DaemonLab
) -> None:
    """Each waits before its first test until the other is as far, so that they do meet."""
    machine = make_shared("one")
    machine.start("touch /run/found")
    daemon = daemon_lab.daemon
    link = daemon_suite.folder / "link"
    link.symlink_to(daemon.socket)
    daemon_suite.write(
        OWNERS + "def test_first(own): pass\ndef test_second(own): pass\n",
        WAITS
        + """
def pytest_addoption(parser): parser.addoption("--me")

def pytest_runtest_setup(item):
    pathlib.Path("is-there-" + item.config.getoption("me")).touch()
    await_file("is-there-one")
    await_file("is-there-other")
""",
    )
    runs = [
        daemon_suite.start_run("--kvmsnap-domain=one", f"--kvmsnap-uri={uri}", f"--me={me}")
        for me, uri in (("one", daemon.uri()), ("other", daemon.uri(socket=link, transport="")))
    ]
    for run in runs:
        run.result().assert_outcomes(passed=2)
    told = owners(daemon_suite, machine)
    assert (len(set(told)), len(processes(told))) == (4, 2)
    assert (machine.state, machine.snapshots) == ("running", [])
    assert machine.start("ls /run/found /root /run/*.m") == "/run/found\n\n/root:\n"
    assert daemon_suite.left_over() == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
def test_two_users(make_shared: Make, daemon_suite: DaemonSuite, daemon_lab: DaemonLab) -> None:
    """Whoever comes second fails, with the name of the user who holds the machine."""
    machine = make_shared("one")
    machine.start()
    daemon_suite.locks.mkdir()
    daemon_suite.locks.chmod(0o1777)
    for name in ("diary", "record"):
        (daemon_suite.folder / name).touch()
        (daemon_suite.folder / name).chmod(0o666)
    daemon_suite.write(
        OWNERS + WAITS + "def test_holds(own): ask(f'held-by-{os.getuid()}')\n"
        "def test_passes(own): pass\n"
    )
    option = "--kvmsnap-domain=one"
    with another_user(daemon_suite, daemon_lab) as other:
        users: dict[int, list[str]] = {0: [], OTHER_USER: other}
        for first, second in ((0, OTHER_USER), (OTHER_USER, 0)):
            holder = daemon_suite.start_run(option, "-k", "holds", before=users[first])
            sign = daemon_suite.folder / f"held-by-{first}"
            await_file(sign)
            late = ["-k", "passes", "--kvmsnap-lock-timeout=3"]
            result = daemon_suite.start_run(option, *late, before=users[second]).result()
            sign.unlink()
            holder.result().assert_outcomes(passed=1, deselected=1)
            result.assert_outcomes(errors=1, deselected=1)
            name = pwd.getpwuid(first).pw_name
            refusal = ["the machine belongs to another process", f"  why: *{name}*"]
            result.stdout.fnmatch_lines(refusal)
            assert [trace for trace in NO_TRACE if trace in result.stdout.str()] == []
    assert len(owners(daemon_suite, machine)) == 2
    assert (machine.state, machine.snapshots) == ("running", [])
    assert daemon_suite.left_over() == []


# --- the machine is broken behind our back ------------------------------------------------------

BEHIND_OUR_BACK = """
import os, pathlib, signal

def virsh(*words):
    done = subprocess.run(["virsh", "-q", "-c", URI, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

def undefine():
    virsh("destroy", "one")
    virsh("undefine", "one", "--snapshots-metadata")

def define(xml):
    file = pathlib.Path("other.xml")
    file.write_text(xml)
    virsh("define", str(file))

def test_qemu_is_killed(own, vm):
    (file,) = pathlib.Path(FOLDER).glob(f"run/libvirt/qemu/**/{vm.name}.pid")
    os.kill(int(file.read_text()), signal.SIGKILL)
    vm.run("true")

def test_is_undefined(own, vm):
    undefine()
    vm.run("true")

def test_is_redefined(own):
    define(virsh("dumpxml", "--inactive", "one").replace("131072</", "100352</"))

def test_is_renamed(own):
    virsh("destroy", "one")
    virsh("domrename", "one", "another")

@pytest.mark.kvm_domain("two")
def test_image_is_deleted(vm):
    os.unlink(vm.disks()[0].path)

@pytest.mark.kvm_domain("two")
def test_after_the_deletion(vm): pass

@pytest.mark.kvm_domain("two")
def test_later(vm): pass

def test_name_is_taken(own, vm):
    xml = virsh("dumpxml", "--inactive", "one")
    undefine()
    define(xml.replace(vm.uuid, "11111111-2222-4333-8444-555555555555"))

def test_after_that(vm): pass
"""
TOLD = """\
FAILED test_inner.py::test_qemu_is_killed*
FAILED test_inner.py::test_is_undefined*
ERROR test_inner.py::test_image_is_deleted*
ERROR test_inner.py::test_after_the_deletion*
ERROR test_inner.py::test_later*
ERROR test_inner.py::test_name_is_taken*
ERROR test_inner.py::test_after_that*
"""


def test_broken_behind_our_back(
    make_shared: Make, daemon_suite: DaemonSuite, daemon_lab: DaemonLab
) -> None:
    """Each test finds a clean machine, whatever the one before it did.

    What no revert cures fails the later tests at once. --kvmsnap-clean puts the machine right when
    that is over; the one whose image is gone stays broken.
    """
    one, two = make_shared("one"), make_shared("two")
    names = f"URI, FOLDER = {daemon_lab.uri!r}, {str(daemon_lab.folder)!r}\n"
    daemon_suite.write(names + OWNERS + BEHIND_OUR_BACK)
    result = daemon_suite.run("--kvmsnap-domain=one", "--tb=line")
    result.assert_outcomes(passed=4, failed=2, errors=5)
    result.stdout.fnmatch_lines(TOLD.splitlines(), consecutive=True)
    said = result.stdout.str()
    assert [trace for trace in NO_TRACE if trace in said] == []
    assert len(owners(daemon_suite, one)) == 5
    assert daemon_suite.calls(two, "revert") == ["revert kvmsnap-base", "revert kvmsnap-found"]
    assert two.state == "shut off"

    one.virsh("undefine")
    result = daemon_suite.run_elsewhere("--kvmsnap-clean")
    assert result.ret == pytest.ExitCode.TESTS_FAILED, "of the machine whose image is gone"
    result.stdout.fnmatch_lines(["*put one back as found (shut off)*"])
    assert one.differences() == []


# --- the daemon goes ----------------------------------------------------------------------------

RESTARTS = """
@pytest.fixture(scope="module")
def prepared(module_vm):
    module_vm.run("echo before >> /opt/prepared", check=True)
    ask("restart")
    module_vm.run("echo after >> /opt/prepared", check=True)

def test_restart_between_two_calls(own, vm):
    boot = vm.run("cat /proc/sys/kernel/random/boot_id").stdout
    ask("restart")
    assert vm.state == "running"
    assert vm.run("cat /proc/sys/kernel/random/boot_id").stdout == boot

def test_crash_in_a_call(own, vm):
    vm.run("sleep 600", timeout=600)

def test_after_the_crash(own): pass

def test_restart_in_a_preparation(prepared, own, vm):
    assert vm.read_text("/opt/prepared") == "before\\nafter\\n"

def test_without_it(own, vm):
    assert vm.run("ls /opt").stdout == "abc\\n"
"""
# The daemon dies once the command that takes so long has been started.
CRASH = """
from pytest_kvmsnap.guest import agent

def pytest_runtest_call(item):
    if item.name == "test_crash_in_a_call":
        call = agent.libvirt_qemu.qemuAgentCommand

        def crashing(domain, request, *more):
            if "guest-exec-status" in request:
                agent.libvirt_qemu.qemuAgentCommand = call
                ask("crash")
            return call(domain, request, *more)

        agent.libvirt_qemu.qemuAgentCommand = crashing
"""


def test_daemon_restarts_and_crashes(
    make_shared: Make, daemon_suite: DaemonSuite, daemon_lab: DaemonLab
) -> None:
    """A test that goes on afterwards passes; one in a call fails, and the next one is clean."""
    machine = make_shared("one")
    daemon, folder = daemon_lab.daemon, daemon_suite.folder
    daemon_suite.write(OWNERS + WAITS + RESTARTS, WAITS + CRASH)
    with (
        at_sign(folder / "restart", daemon.restart),
        at_sign(folder / "crash", lambda: daemon.restart(Daemon.kill)),
    ):
        result = daemon_suite.run("--kvmsnap-domain=one", "--tb=line")
    result.assert_outcomes(passed=4, failed=1)
    said = result.stdout.str()
    assert said.count("the connection to libvirt broke") == 1
    assert [trace for trace in NO_TRACE if trace in said] == []
    assert len(owners(daemon_suite, machine)) == 5
    assert machine.differences() == []
    assert daemon_suite.left_over() == []


@pytest.mark.long
def test_four_workers_on_a_pool(make_shared: Make, daemon_suite: DaemonSuite, xdist: None) -> None:
    """Each of them boots one machine, and keeps it."""
    machines = [make_shared(f"web-{number}") for number in range(1, 5)]
    daemon_suite.write(
        OWNERS + "@pytest.mark.parametrize('n', range(8))\ndef test_owns_it(own, n): pass\n"
    )
    daemon_suite.run("--kvmsnap-domain=web-*", "-n4").assert_outcomes(passed=8)
    told = [owners(daemon_suite, machine) for machine in machines]
    assert sum(map(len, told)) == 8
    for machine, ours in zip(machines, told, strict=True):
        assert len(processes(ours)) == 1
        calls = Counter(daemon_suite.calls(machine, "take_snapshot", "start", "revert"))
        assert calls == {
            "take_snapshot kvmsnap-found": 1,
            "start": 1,
            "take_snapshot kvmsnap-base": 1,
            "revert kvmsnap-base": len(ours),
            "revert kvmsnap-found": 1,
        }
        assert machine.differences() == []
    assert daemon_suite.left_over() == []
