"""Talking to a real guest: commands and files."""

import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from bench import Machine, Suite

from guest import Guest

# One machine for all tests of an inner suite: what a revert does is shown elsewhere.
WITHOUT_REVERTS = """
@pytest.fixture
def vm(module_vm):
    return module_vm
"""


def test_commands(machine: Machine, suite: Suite) -> None:
    suite.write(
        WITHOUT_REVERTS
        + r"""
def test_a_string_is_for_the_shell_and_a_list_is_executed(vm):
    assert vm.run("echo $((6 * 7)) | tr 4 x").stdout == "x2\n"
    assert vm.run(["echo", "$((6 * 7))", "a b"]).stdout == "$((6 * 7)) a b\n"

def test_status_and_outputs(vm):
    done = vm.run("echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        vm.run("echo why >&2; false", check=True)
    assert (caught.value.returncode, caught.value.stderr) == (1, "why\n")
    assert vm.run("kill -9 $$").returncode == -9

def test_input_environment_and_folder(vm):
    assert vm.run("cat; pwd; echo $COLOUR", input="in\n", env={"COLOUR": "a 'b' $c"},
                  cwd="/opt").stdout == "in\n/opt\na 'b' $c\n"
    assert vm.run("pwd", cwd="/no where").returncode != 0

def test_bytes(vm):
    data = bytes(range(256))
    assert vm.run(["cat"], input=data, text=False).stdout == data
    assert vm.run(["cat"], input=b"\xff").stdout == "\ufffd"

def test_input_too_long_for_one_message(vm):
    data = bytes(range(256)) * 2000
    assert vm.run(["cat"], input=data, text=False).stdout == data
    assert vm.run("ls -A /tmp").stdout == ""

def test_long_binary_output_arrives_whole(vm):  # libvirt takes no answer of more than 10 MiB
    done = vm.run("head -c 5242880 /dev/urandom > /tmp/data; cat /tmp/data /tmp/data;"
                  " echo err >&2; exit 3", text=False)
    assert (done.returncode, len(done.stdout), done.stderr) == (3, 10_485_760, b"err\n")
    assert done.stdout[:5_242_880] == done.stdout[5_242_880:]
    assert vm.run("rm /tmp/data; ls -A /tmp").stdout == ""

def test_what_takes_too_long_is_killed_with_its_children(vm):
    with pytest.raises(subprocess.TimeoutExpired):
        vm.run("(sleep 4321; true) & sleep 1234; true", timeout=0.5)
    running = vm.run("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '").stdout
    assert "sleep 4321" not in running and "sleep 1234" not in running

def test_command_that_is_not_there(vm):
    with pytest.raises(Exception, match="No such file or directory") as caught:
        vm.run(["no-such-command"])
    assert type(caught.value).__name__ == "AgentError"
    assert vm.name in str(caught.value)
"""
    )
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=8)


LOSSES = r"""
import time

ENDS = {
    "kill -9 $PPID": "the guest agent was started anew",
    "poweroff -f": "the machine went off",
    "reboot -f": "reboot",  # it did, or, where it boots slowly, it may just do so
    "echo c > /proc/sysrq-trigger": "the guest does not answer any more",
}

@pytest.mark.parametrize("command", WHICH)
def test_a_command_that_takes_the_agent_with_it(vm, command):
    begin = time.monotonic()
    with pytest.raises(Exception, match="the command was lost: ") as caught:
        vm.run(f"{command}; sleep 600", timeout=5)
    assert type(caught.value).__name__ == "AgentError"
    assert ENDS[command] in caught.value.why, str(caught.value)
    assert vm.name in caught.value.where
    assert time.monotonic() - begin < 100

def test_it_is_clean(vm):
    assert vm.run("echo clean", check=True).stdout == "clean\n"
"""


def test_commands_that_take_the_agent_with_them(machine: Machine, suite: Suite) -> None:
    suite.write('WHICH = ["kill -9 $PPID", "poweroff -f"]\n' + LOSSES)
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=3)


@pytest.mark.long
def test_commands_that_take_the_guest_with_them(machine: Machine, suite: Suite) -> None:
    suite.write('WHICH = ["reboot -f", "echo c > /proc/sysrq-trigger"]\n' + LOSSES)
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=3)


@pytest.mark.long
def test_libvirt_loses_an_agent_that_talks_nonsense_and_has_it_back_after_a_revert(
    machine: Machine, suite: Suite
) -> None:
    suite.write(
        r"""
import time

NONSENSE = r'''
mv /usr/sbin/start-agent /root
pidof qemu-ga | xargs kill
port=/dev/$(ls /sys/class/virtio-ports | head -n 1)
sleep 1
exec 3<>$port
while :; do
    read -r line <&3 || { sleep 0.1; continue; }  # no host yet
    id=$(echo "$line" | sed -n 's/.*guest-sync.*"id":\([0-9]*\).*/\1/p')
    [ "$id" ] && echo "{\"return\": $id}" >&3 || echo "{nonsense" >&3
done
'''

def test_loses_it(vm):
    vm.run(["sh", "-c", "(sleep 0.5; eval \"$0\") >/dev/null 2>&1 &", NONSENSE], check=True)
    told = ""
    for _ in range(600):  # the guest, and then libvirt, may take their time
        try:
            vm.run("true")
        except Exception as error:
            told = str(error)
        if "not available due to an error" in told:
            break
        time.sleep(0.1)
    assert "talks to it again after a revert" in told
    with pytest.raises(Exception, match="libvirt lost the guest agent"):
        vm.wait_ready()

def test_has_it_back(vm):
    vm.run("true", check=True)
"""
    )
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=2)


def test_files(machine: Machine, suite: Suite) -> None:
    suite.write(
        WITHOUT_REVERTS
        + r"""
import os

def test_text_and_bytes(vm):
    vm.write_text("/root/a b ä", "Grüße\n")
    assert vm.read_text("/root/a b ä") == "Grüße\n"
    vm.write_bytes("/root/a b ä", b"")
    assert vm.read_bytes("/root/a b ä") == b""

def test_large_file_with_its_mode(vm, tmp_path):
    here, back = tmp_path / "here", tmp_path / "back"
    here.write_bytes(os.urandom(3 * 1024 * 1024 + 17))
    here.chmod(0o751)
    vm.put(here, "/root/there")
    assert vm.run("stat -c %a /root/there").stdout == "751\n"
    vm.get("/root/there", back)
    assert back.read_bytes() == here.read_bytes()
    assert back.stat().st_mode == here.stat().st_mode

def test_missing_file(vm, tmp_path):
    with pytest.raises(Exception, match="cannot open /no/file in the guest") as caught:
        vm.get("/no/file", tmp_path / "none")
    assert "No such file or directory" in str(caught.value)
    assert not (tmp_path / "none").exists()
"""
    )
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=3)


def test_disks_and_snapshots(machine: Machine, suite: Suite) -> None:
    suite.write(
        f"""
def test_what_it_is(vm):
    assert (vm.name, vm.state, len(vm.uuid)) == ("{machine.name}", "running", 36)
    assert vm.domain.name() == vm.name
    [disk] = vm.disks()
    assert (disk.target, str(disk.path), disk.format) == ("vda", "{machine.disk}", "qcow2")
    assert disk.virtual_size == 256 * 2**20 and 0 < disk.disk_size
    assert {{s.name for s in vm.snapshots()}} == set(disk.snapshots)

def test_disks_of_a_machine_that_runs(vm):
    [before] = vm.disks()
    vm.run("dd if=/dev/urandom of=/root/data bs=1M count=20 conv=fsync", check=True)
    [written] = vm.disks()
    assert 20 <= (written.disk_size - before.disk_size) / 2**20 < 40
    vm.snapshot("of-the-data")
    [taken] = vm.disks()
    assert set(taken.snapshots) == {{*before.snapshots, "of-the-data"}}

def test_snapshots(vm):
    start = vm.current_snapshot
    vm.write_text("/root/state", "one")
    one = vm.snapshot("one")
    assert (vm.current_snapshot, one.parent, one.state) == (one, start.name, "running")
    vm.write_text("/root/state", "two")
    two = vm.snapshot()
    vm.revert("one")
    assert vm.read_text("/root/state") == "one"
    vm.revert(two)
    assert vm.read_text("/root/state") == "two"
    vm.delete_snapshot(two)
    assert two.name not in [s.name for s in vm.snapshots()]

@pytest.mark.parametrize("name", ["a/b", ".a"])
def test_name_that_qemu_refuses(vm, name):
    with pytest.raises(Exception, match="wrong name for a snapshot"):
        vm.snapshot(name)

@pytest.fixture(scope="class")
def prepared(class_vm): class_vm.write_text("/root/state", "prepared")

class TestPrepared:
    def test_prepared(self, prepared, vm):
        assert vm.read_text("/root/state") == "prepared"
        assert len(vm.disks()[0].snapshots) == 3
    def test_elsewhere(self, vm): pass

def test_nothing_of_it_is_left(vm):  # though the machine was not reverted since
    assert len(vm.snapshots()) == len(vm.disks()[0].snapshots) == 2
"""
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}", "--kvmsnap-growth-limit=40 MiB")
    result.assert_outcomes(passed=8)
    words = f"its image {machine.disk} grew by * since this run took the machine, as seen after*"
    result.stdout.fnmatch_lines([f"kvmsnap: {machine.name}: {words}::test_what_it_is.*"])
    assert sum("grew by" in line for line in result.outlines) == 2  # then, and at the end


@pytest.mark.long
def test_guest_that_boots_from_its_disk(
    machine: Machine, linux: Guest, suite: Suite, tmp_path: Path
) -> None:
    """The example's disk needs nothing but a BIOS, as the image of somebody's machine does."""
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
    subprocess.run([*command, str(linux.disk), str(machine.disk)], check=True)
    definition = ET.fromstring(machine.definition)
    system = definition.find("os")
    assert system is not None
    for part in ("kernel", "initrd", "cmdline"):
        system.remove(system.findall(part)[0])
    changed = tmp_path / "machine.xml"
    changed.write_text(ET.tostring(definition, encoding="unicode"))
    machine.define(changed)
    suite.write("def test_root(vm): assert '/dev/vda1 / ext4' in vm.read_text('/proc/mounts')")
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=1)
