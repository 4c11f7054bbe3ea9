"""SSH into a real guest: as what tells that it is ready, and for tests, over jumps in time."""

import re
from pathlib import Path

import pytest
from bench import Maker, Suite

from conftest import Wire

# `adjtimex` is what tells the guest's time with fractions there.
HELPERS = r"""
import os, re, time

def seconds_off(vm):
    before = time.time()
    said = vm.ssh.run("adjtimex").stdout
    after = time.time()
    whole, fraction = (int(re.search(rf"tv_{part}: *(\d+)", said)[1]) for part in ("sec", "usec"))
    guest = whole + fraction / 1e6
    return max(before - guest, guest - after, 0)

def note(vm):  # for the test outside
    with open("folders", "a") as file:
        print(*re.findall(r'ControlPath="(.*)/s"', " ".join(vm.ssh.options)), file=file)
"""


def traces(folder: Path) -> list[str]:
    """Return which of the connections that were noted left a folder or a process."""
    noted = (folder / "folders").read_text().split()
    assert len(noted) == len(set(noted)) > 0
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    left = [place for place in noted if Path(place).exists()]
    return left + [place for place in noted if any(place.encode() in line for line in lines)]


WITHOUT_AGENT = (
    HELPERS
    + r"""
def test_spoils(vm):
    note(vm)
    assert vm.ip_address() == ADDRESS
    assert seconds_off(vm) < 1
    spoil = '''
        echo dirt > /root/dirt
        key=/etc/dropbear/host_key
        rm $key && dropbearkey -t ed25519 -f $key && kill $(cat /run/dropbear.pid)
        dropbear -s -r $key -P /run/dropbear.pid
        date -s '2001-02-03 04:05'
    '''
    vm.ssh.run(spoil, check=True)
    vm.ssh.hang_up()  # the next ones meet the new key
    assert vm.ssh.run("date +%Y").stdout == "2001\n"

def test_is_clean(vm):
    note(vm)
    shells = vm.ssh.run("ps | grep -c '[d]ropbear -s'").stdout
    assert shells == "2\n"  # the server, and our connection: none that was open before
    assert vm.ssh.run("cat /root/dirt").returncode == 1
    assert seconds_off(vm) < 1
    assert vm.ip_address() == ADDRESS

def test_runs_like_vm_run(vm):
    assert vm.ssh.run("echo $((6 * 7)) | tr 4 x").stdout == "x2\n"
    assert vm.ssh.run(["echo", "$((6 * 7))", "a  'b'"]).stdout == "$((6 * 7)) a  'b'\n"
    done = vm.ssh.run("echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        vm.ssh.run("echo why >&2; exit 255", check=True)
    assert (caught.value.returncode, caught.value.stderr) == (255, "why\n")
    data = bytes(range(256)) * 1000
    assert vm.ssh.run(["cat"], input=data, text=False).stdout == data
    with pytest.raises(subprocess.TimeoutExpired):
        vm.ssh.run("echo before; exec cat /dev/zero", timeout=0.5)
    for _ in range(9):
        if ended := vm.ssh.run("pidof cat").returncode == 1:
            break
        time.sleep(1)
    assert ended
    by_hand = subprocess.run([*vm.ssh.command, "echo", "$((1 + 1))"], stdout=subprocess.PIPE)
    assert by_hand.stdout == b"2\n"

    # at last, the server goes
    with pytest.raises(pytest_kvmsnap.SshError, match="the connection by ssh broke") as caught:
        vm.ssh.run("kill -9 $(pidof dropbear)")
    assert vm.name in str(caught.value)
    with pytest.raises(pytest_kvmsnap.SshError, match="cannot log in by ssh as root@"):
        vm.ssh.run("true")
"""
)
REBOOTS = """
def test_reboots(vm):
    vm.ssh.run("touch /run/before")
    vm.domain.reset()
    vm.wait_ready()
    assert vm.ssh.run("ls /run/before").returncode == 1
"""


@pytest.mark.parametrize("live", ["yes", pytest.param("no", marks=pytest.mark.long)])
def test_machine_without_an_agent(
    make_machine: Maker, suite: Suite, wire: Wire, live: str, pytester: pytest.Pytester
) -> None:
    machine = make_machine(agent=False, network=wire.network)
    address = wire.network.address.partition("/")[0]
    tests = WITHOUT_AGENT + (REBOOTS if live == "no" else "")
    suite.write(f"import pytest_kvmsnap\nADDRESS = '{address}'\n" + tests)
    options = [f"--kvmsnap-domain={machine.name}", "--kvmsnap-ready=ssh", f"--kvmsnap-live={live}"]
    options += [f"--kvmsnap-ssh-key={wire.key}"]
    suite.run(*options).assert_outcomes(passed=tests.count("def test_"))
    assert traces(pytester.path) == []
    assert (machine.state, machine.snapshots, suite.left_over()) == ("shut off", [], [])


@pytest.mark.long
def test_user_whom_the_guest_does_not_let_in_is_told_at_once(
    make_machine: Maker, suite: Suite, wire: Wire
) -> None:
    machine = make_machine(agent=False, network=wire.network)
    suite.write("def test_it(vm): pass")
    options = [f"--kvmsnap-domain={machine.name}", "--kvmsnap-ready=ssh"]
    options += [f"--kvmsnap-ssh-key={wire.key}", "--kvmsnap-ssh-user=nobody"]
    result = suite.run(*options, "--kvmsnap-ready-timeout=1000")
    result.assert_outcomes(errors=1)
    said = result.stdout.str()
    assert re.search(r"why: +ssh does not let us in: nobody@\S+: Permission denied", said)
    assert "--kvmsnap-ssh-user and --kvmsnap-ssh-key" in said
    assert machine.state == "shut off"


BESIDE_THE_AGENT = (
    HELPERS
    + r"""
@pytest.mark.parametrize("time", [1, 2])
def test_it(vm, time):
    vm.run("until [ -s /run/dropbear.pid ]; do usleep 10000; done", check=True)
    subprocess.run([*IP, "neighbour", "flush", "dev", TAP], check=True)  # leaves the agent
    assert vm.ip_address() == ADDRESS
    note(vm)
    vm.ssh.run("! cat /root/dirt && echo dirt > /root/dirt", check=True)
    assert vm.read_text("/root/dirt") == "dirt\n"

def test_wrong_user_is_told_at_once(vm):  # not after an hour
    settings = Settings(ready="ssh", ssh_user="nobody", ssh_key=pathlib.Path(KEY))
    guest = Guest(vm._domain, settings)
    with pytest.raises(pytest_kvmsnap.NotReadyError) as caught:
        guest.wait_ready(3600)
    assert caught.value.why.startswith("ssh does not let us in: nobody@")
    assert "--kvmsnap-ssh-user and --kvmsnap-ssh-key" in caught.value.cure
"""
)
IMPORTS = """
import pathlib, pytest_kvmsnap
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.settings import Settings
"""


def test_beside_the_agent_and_over_a_fast_revert(
    make_machine: Maker, suite: Suite, wire: Wire, pytester: pytest.Pytester
) -> None:
    machine = make_machine(network=wire.network)
    address = wire.network.address.partition("/")[0]
    facts = (address, wire.network.tap, str(wire.key), wire.ip)
    suite.write(IMPORTS + f"ADDRESS, TAP, KEY, IP = {facts!r}\n" + BESIDE_THE_AGENT)
    options = [f"--kvmsnap-domain={machine.name}", f"--kvmsnap-ssh-key={wire.key}"]
    suite.run(*options, "--kvmsnap-revert=fast").assert_outcomes(passed=3)
    assert suite.calls(machine, "load") == ["load kvmsnap-base"] * 3
    assert traces(pytester.path) == []
