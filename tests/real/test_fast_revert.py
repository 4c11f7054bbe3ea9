"""revert=fast on a real guest: inside QEMU while that is the same, by force when it is not."""

import pytest
from bench import Machine, Suite

FAST = "--kvmsnap-revert=fast"
BY_FORCE = "reverted by force, not fast:"

# Whatever a test does to the domain is undone, though not by QEMU alone. Each of these changes what
# QEMU would leave as it is, and the one after it finds nothing of it.
CHANGES = """
import contextlib, json, subprocess, time
from pytest_kvmsnap import KvmsnapError
import xml.etree.ElementTree as ET
import libvirt, libvirt_qemu

LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE

@pytest.fixture(autouse=True)
def clean(vm):
    assert vm.state == "running"
    assert vm.read_text("/opt/abc") == "123\\n"
    assert vm.run("test -e /run/made").returncode == 1
    live = ET.fromstring(vm.domain.XMLDesc())
    assert len(live.findall("./devices/disk")) == 1
    assert live.find("./devices/disk/iotune") is None
    assert not vm.domain.autostart() and not vm.domain.hasManagedSaveImage()
    assert vm.domain.maxVcpus() == 1
    assert len(vm.snapshots()) == 2
    yield
    with contextlib.suppress(KvmsnapError):  # it is off, or gone
        vm.run("echo 456 >> /opt/abc; touch /run/made; sync")

def test_disk_is_plugged_in(vm, tmp_path):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "more", "1M"], check=True)
    vm.domain.attachDeviceFlags(
        f"<disk type='file'><driver name='qemu' type='qcow2'/><source file='{tmp_path}/more'/>"
        "<target dev='vdb' bus='virtio'/></disk>", LIVE)

def test_disk_is_slowed_down(vm):
    vm.domain.setBlockIoTune("vda", {"total_iops_sec": 1000}, LIVE)

def test_device_is_added_past_libvirt(vm):
    arguments = {"driver": "virtio-rng-pci", "id": "extra"}
    command = {"execute": "device_add", "arguments": arguments}
    assert "error" not in libvirt_qemu.qemuMonitorCommand(vm.domain, json.dumps(command), 0)

def test_is_redefined(vm):
    root = ET.fromstring(vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    root.find("vcpu").text = "2"
    vm.domain.connect().defineXML(ET.tostring(root, encoding="unicode"))

def test_is_undefined(vm):
    vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)

def test_is_undefined_while_off(vm):
    vm.destroy()
    vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)

def test_is_paused(vm):
    vm.domain.suspend()

def test_reboots_inside(vm):
    vm.reboot()
    vm.wait_ready()

def test_is_saved_and_restored(vm, tmp_path):
    vm.domain.save(str(tmp_path / "saved"))
    vm.domain.connect().restore(str(tmp_path / "saved"))

def test_has_a_managed_save(vm):
    vm.domain.managedSave()

def test_starts_by_itself(vm):
    vm.domain.setAutostart(1)

def test_takes_snapshots(vm):
    vm.snapshot("one")
    vm.write_text("/opt/abc", "changed")
    vm.snapshot("two")
    vm.revert("one")
    assert vm.read_text("/opt/abc") == "123\\n"

def test_copies_its_disk(vm, tmp_path):
    target = f"<disk type='file'><source file='{tmp_path}/copy'/><driver type='qcow2'/></disk>"
    flags = libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
    vm.domain.blockCopy("vda", target, {"bandwidth": 1024}, flags)
"""
REASONS = [
    "its live definition changed",
    "QEMU has other devices",
    "it was redefined",
    "it was undefined",
    "its state is another",
    "it is another QEMU process",
    "the guest rebooted",
    "its autostart flag changed",
    "another snapshot is the current one",
    "QEMU is busy with a job",
]


def test_falls_back_by_itself_and_says_so(machine: Machine, suite: Suite) -> None:
    definition = machine.definition
    suite.write(CHANGES)
    result = suite.run(f"--kvmsnap-domain={machine.name}", FAST)
    count = CHANGES.count("\ndef test_")
    result.assert_outcomes(passed=count)
    ours = [call for call in suite.calls(machine, "revert", "load") if call != "revert one"]
    assert ours == [*["revert kvmsnap-base"] * count, "revert kvmsnap-found"]
    told = [line for line in result.outlines if BY_FORCE in line]
    assert len(told) == len(set(told)), "each reason is said once"
    for reason in REASONS:
        assert [line for line in told if reason in line], f"{reason}: not in {told}"
    assert (machine.state, machine.snapshots, machine.image_snapshots()) == ("shut off", [], [])
    assert machine.definition == definition


STORY = """
import json, os, time
import libvirt_qemu

@pytest.mark.parametrize("turn", range(4))
def test_is_clean(vm, turn):
    assert vm.read_text("/opt/abc") == "123\\n"
    assert vm.run("test -e /run/made").returncode == 1
    assert "4321" not in vm.run("cat /proc/[0-9]*/cmdline 2>/dev/null").stdout
    assert abs(int(vm.run("date +%s").stdout) - time.time()) < 2
    vm.run("echo 456 >> /opt/abc; touch /run/made; sync; date -s @1000000000", check=True)
    vm.run("sleep 4321 >/dev/null 2>&1 &", check=True)

def test_much_goes_through_while_libvirt_does_not_see_the_agent(vm, tmp_path):
    (tmp_path / "sent").write_bytes(os.urandom(300_000))
    vm.put(tmp_path / "sent", "/root/sent")
    vm.get("/root/sent", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "sent").read_bytes()
    with pytest.raises(Exception, match="No such file"):
        vm.read_text("/no/such/file")
    assert vm.run("cat", input=b"\\n\\xff" * 1000, text=False).stdout == b"\\n\\xff" * 1000
    assert vm.run("echo begun; sleep 2; echo done").stdout == "begun\\ndone\\n"

def test_libvirt_has_the_agent_to_itself_soon(vm):
    vm.run("true", check=True)
    time.sleep(1.5)  # longer than libvirt takes, and nothing asks meanwhile
    begin = time.monotonic()
    libvirt_qemu.qemuAgentCommand(vm.domain, json.dumps({"execute": "guest-ping"}), 30, 0)
    assert time.monotonic() - begin < 4  # its first command takes 5 s when somebody is in the way

def test_reboots_at_once(vm):
    vm.reboot()  # by libvirt's own way to the agent
"""


def test_reverts_inside_qemu(machine: Machine, suite: Suite) -> None:
    machine.start("touch /run/made-before-the-run")
    pid = (machine.lab.folder / "run" / "qemu" / f"{machine.name}.pid").read_text()
    suite.write(STORY)
    result = suite.run(f"--kvmsnap-domain={machine.name}", FAST, "-k", "not reboots")
    result.assert_outcomes(passed=6, deselected=1)
    assert suite.calls(machine, "revert", "load") == ["load kvmsnap-found"] * 6
    told = f"{machine.name}: 6 tests, 1 snapshot, 6 reverts (6 fast), clean in *"
    result.stdout.fnmatch_lines(["kvmsnap: qemu:* (libvirt *, QEMU *), machines: *", told])
    assert BY_FORCE not in result.stdout.str()
    assert (machine.state, machine.snapshots) == ("running", [])
    assert (machine.lab.folder / "run" / "qemu" / f"{machine.name}.pid").read_text() == pid
    left = "ls -d /run/made* /run/*canary* /var/tmp/* 2>/dev/null; cat /opt/abc"
    assert machine.start(left) == "/run/made-before-the-run\n123\n"


def test_reboot_right_after_a_fast_revert(machine: Machine, suite: Suite) -> None:
    suite.write(STORY)
    result = suite.run(f"--kvmsnap-domain={machine.name}", FAST, "-k", "clean or reboots")
    result.assert_outcomes(passed=5, deselected=2)
    assert suite.calls(machine, "revert", "load") == [
        *["load kvmsnap-base"] * 4,
        "revert kvmsnap-base",
        "revert kvmsnap-found",
    ]
    assert (machine.state, machine.snapshots) == ("shut off", [])


def test_preparations_and_their_states(machine: Machine, suite: Suite) -> None:
    """libvirt brings the machine from one state to another, QEMU back to where a test started."""
    suite.write(
        """
@pytest.fixture(scope="module")
def prepared(module_vm):
    module_vm.write_text("/root/prepared", "yes")

def test_plain(vm):
    assert vm.run("test -e /root/prepared").returncode == 1

@pytest.mark.parametrize("turn", range(3))
def test_prepared(prepared, vm, turn):
    assert vm.read_text("/root/prepared") == "yes"
    vm.write_text("/root/prepared", "no")

def test_plain_again(vm):
    assert vm.run("test -e /root/prepared").returncode == 1
"""
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}", FAST)
    result.assert_outcomes(passed=5)
    assert suite.calls(machine, "take_snapshot", "revert", "load") == [
        "take_snapshot kvmsnap-found",
        "take_snapshot kvmsnap-base",
        "load kvmsnap-base",
        "take_snapshot kvmsnap-prepared",
        *["load kvmsnap-prepared"] * 3,
        "revert kvmsnap-base",
        "load kvmsnap-base",
        "revert kvmsnap-found",
    ]
    assert BY_FORCE not in result.stdout.str()
    assert (machine.state, machine.snapshots) == ("shut off", [])


# QEMU has stopped the guest by the time that it finds out.
BREAKING = """
from pytest_kvmsnap.machine.domain import Domain
real = Domain.monitor
once = iter([True])

def monitor(self, command, arguments=None):
    if command == "snapshot-load" and next(once, False):
        arguments["devices"].append("no-such-drive")
    return real(self, command, arguments)

Domain.monitor = monitor
"""


def test_failed_load_leaves_nothing_to_a_test(machine: Machine, suite: Suite) -> None:
    suite.write(STORY, conftest=BREAKING)
    result = suite.run(f"--kvmsnap-domain={machine.name}", FAST, "-k", "clean")
    result.assert_outcomes(passed=4, deselected=3)
    assert suite.calls(machine, "revert", "load") == [
        "load kvmsnap-base",
        "revert kvmsnap-base",
        *["load kvmsnap-base"] * 3,
        "revert kvmsnap-found",
    ]
    result.stdout.fnmatch_lines([f"*{BY_FORCE}*no-such-drive*"])
    assert (machine.state, machine.snapshots) == ("shut off", [])


@pytest.mark.parametrize("verify", ["canary", "state"])
def test_without_agent_or_canary(machine: Machine, suite: Suite, verify: str) -> None:
    suite.write(
        """
@pytest.mark.parametrize("turn", range(2))
def test_runs(vm, turn):
    assert vm.state == "running"
"""
    )
    options = ["--kvmsnap-ready=none"] if verify == "canary" else ["--kvmsnap-verify=state"]
    result = suite.run(f"--kvmsnap-domain={machine.name}", FAST, *options)
    result.assert_outcomes(passed=2)
    assert suite.calls(machine, "load") == ["load kvmsnap-base"] * 2
