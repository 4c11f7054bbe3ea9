"""What stands in the way of real machines is told before the first test, and libvirt agrees.

Many machines here have no system: they start in half a second, and nobody waits for them.
"""

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import libvirt
import pytest
from bench import ONE_TEST, QUIET, Machine, Maker, Suite, assert_told_before_the_first_test

from lab import Lab
from pytest_kvmsnap.machine.blockers import LIVE_WITH_VIRTIOFS

BLIND = """
from pytest_kvmsnap.machine import preflight
preflight.problems = lambda *_, **__: []
"""


def disk(
    path: Path,
    image_format: str = "qcow2",
    *,
    target: str = "vdb",
    more: str = "",
    device: str = "disk",
) -> str:
    return (
        f"<disk type='file' device='{device}'><driver name='qemu' type='{image_format}'/>"
        f"<source file='{path}'/><target dev='{target}'/>{more}</disk>"
    )


def create(path: Path, image_format: str = "qcow2", *options: str, size: str = "1M") -> Path:
    subprocess.run(["qemu-img", "create", "-qf", image_format, *options, path, size], check=True)
    return path


class Odd(NamedTuple):
    """Something in a definition."""

    devices: str = ""
    system: str = ""
    more: str = ""


class MakeTiny:
    """Makes machines without a system, with a disk of 1 MiB and what else is given."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.made: list[Machine] = []

    def __call__(self, odd: Odd = Odd(), image: Path | None = None) -> Machine:  # noqa: B008
        name = f"m{next(Maker.numbers)}"
        tiny = Machine(self._lab, name, image or create(self._lab.images / f"{name}.qcow2"))
        # libvirt reads it when it starts, as with the lab's own
        (self._lab.folder / "etc" / "qemu" / f"{name}.xml").write_text(
            f"<domain type='qemu'><name>{name}</name><uuid>{uuid.uuid4()}</uuid>"
            f"<memory unit='MiB'>32</memory>{odd.more}"
            f"<os><type arch='x86_64' machine='pc'>hvm</type>{odd.system}</os>"
            "<features><acpi/></features>"
            f"<devices>{disk(tiny.disk, target='vda')}{odd.devices}<memballoon model='none'/>"
            "</devices></domain>"
        )
        self.made.append(tiny)
        return tiny

    def remove_all(self) -> None:
        """End and undefine them in one go: a process for each call takes its time."""
        kept = "--snapshots-metadata --managed-save --keep-nvram"
        calls = [f"destroy {m.name}; undefine {m.name} {kept}" for m in self.made]
        command = ["virsh", "-q", "-c", self._lab.uri, "; ".join(calls)]
        subprocess.run(command, capture_output=True, env=QUIET, check=False)
        left = {path.stem for path in (self._lab.folder / "etc" / "qemu").glob("*.xml")}
        assert left & {tiny.name for tiny in self.made} == set()


@pytest.fixture
def make_tiny(lab: Lab) -> Iterator[MakeTiny]:
    maker = MakeTiny(lab)
    yield maker
    maker.remove_all()


def run_on(suite: Suite, *given: Machine | str, conftest: str = "") -> pytest.RunResult:
    """Run one test on each of the machines, with the options that are given too."""
    names = [each.name for each in given if isinstance(each, Machine)]
    suite.write(f"@pytest.mark.parametrize('vm', {names!r}, indirect=True)\n{ONE_TEST}", conftest)
    return suite.run(*[each for each in given if isinstance(each, str)])


# --- definitions ------------------------------------------------------------------------------

RUNS = "which cannot be snapshotted while it runs"
USB = "<controller type='usb' model='qemu-xhci'/>"
MEMORY = "<model type='ivshmem-plain'/><size unit='M'>4</size></shmem>"
SHARED_WITH_PROCESSES = (
    "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
)
ODD_DEVICES = {
    f"shared memory whose master it is not, {RUNS}": f"<shmem name='kvmsnap-a'>{MEMORY}",
    f"a USB sound card, {RUNS}": f"{USB}<sound model='usb'/>",
    f"a USB serial port, {RUNS}": (f"{USB}<serial type='pty'><target type='usb-serial'/></serial>"),
    f"a qemu-vdagent channel, {RUNS}": (
        "<graphics type='vnc' listen='127.0.0.1'/><channel type='qemu-vdagent'>"
        "<source><clipboard copypaste='yes'/></source>"
        "<target type='virtio' name='com.redhat.spice.0'/></channel>"
    ),
    "its disk vdb is on the network (nbd), where internal snapshots do not work": (
        "<disk type='network'><driver type='qcow2'/><source protocol='nbd' name='x'>"
        "<host name='localhost'/></source><target dev='vdb'/></disk>"
    ),
}


def refused(folder: Path) -> dict[str, Odd]:
    """Return what must be told by what is in the definition; needed files are made."""
    (folder / "shared").mkdir()
    (folder / "code").write_bytes(bytes(2**18))
    (folder / "settings").write_bytes(bytes(2**16))
    secret = "secret,id=key,data=x"
    luks = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    hidden = create(folder / "hidden.qcow2", "qcow2", "--object", secret, "-o", luks)
    key = (
        f"<encryption format='luks'><secret type='passphrase' uuid='{uuid.uuid4()}'/></encryption>"
    )
    apart = create(folder / "apart.qcow2", "qcow2", "-o", f"data_file={folder / 'data'}")
    floppy = create(folder / "floppy", "raw", size="1440k")
    found = {
        "its disk vdb has the format vmdk": Odd(disk(create(folder / "x.vmdk", "vmdk"), "vmdk")),
        "its disk vdb is encrypted": Odd(
            disk(hidden, more=f"<encryption format='luks'>{key}</encryption>")
        ),
        "its disk vdb keeps its data outside of the qcow2 image": Odd(disk(apart)),
        "its disk vdb is transient": Odd(
            disk(create(folder / "transient.qcow2"), more="<transient/>")
        ),
        "its floppy disk fda is writable": Odd(disk(floppy, "raw", target="fda", device="floppy")),
        "UEFI": Odd(
            system=f"<loader readonly='yes' type='pflash'>{folder / 'code'}</loader>"
            f"<nvram>{folder / 'settings'}</nvram>"
        ),
        **{why: Odd(devices) for why, devices in ODD_DEVICES.items()},
    }
    if libvirt.getVersion() < LIVE_WITH_VIRTIOFS:
        found[f"a folder that is shared by virtiofs, {RUNS}"] = Odd(
            "<filesystem type='mount'><driver type='virtiofs'/>"
            f"<source dir='{folder / 'shared'}'/><target dir='tag'/></filesystem>",
            more=SHARED_WITH_PROCESSES,
        )
    return found


def test_what_is_told_of_a_definition_is_what_libvirt_refuses(
    make_tiny: MakeTiny, suite: Suite, tmp_path: Path
) -> None:
    """The same machines twice, first with a preflight that is blind: libvirt says no by itself."""
    machines = {why: make_tiny(odd) for why, odd in refused(tmp_path).items()}
    blind = run_on(suite, *machines.values(), conftest=BLIND)
    blind.assert_outcomes(errors=len(machines))
    refusals = blind.stdout.str().count("\ncannot take the snapshot ")
    assert refusals >= len(machines) - 1, "one does not start where virtiofsd is not installed"
    assert [(m.state, m.snapshots) for m in machines.values()] == [("shut off", [])] * len(machines)

    result = run_on(suite, *machines.values(), conftest="# sees again")
    said = assert_told_before_the_first_test(result, f"{len(machines)} problems", *machines)
    for machine in machines.values():
        assert said.count(f"{machine.name} cannot be used for tests") == 1


FINE = {
    "shared memory of its own": Odd(f"<shmem name='kvmsnap-b' role='master'>{MEMORY}"),
    "memory that is shared with processes": Odd(more=SHARED_WITH_PROCESSES),
    "USB tablet": Odd(f"{USB}<input type='tablet' bus='usb'/>"),
}


def test_what_is_not_told_of_a_definition_is_no_trouble(
    make_tiny: MakeTiny, suite: Suite, tmp_path: Path
) -> None:
    base = create(tmp_path / "base.qcow2")
    top = create(tmp_path / "top.qcow2", "qcow2", "-b", str(base), "-F", "qcow2")
    floppy = create(tmp_path / "floppy", "raw", size="1440k")
    left_out = disk(create(tmp_path / "x.qcow2")).replace("<disk", "<disk snapshot='no'")
    machines = [
        *map(make_tiny, FINE.values()),
        make_tiny(image=top),
        make_tiny(Odd(left_out)),
        make_tiny(Odd(disk(floppy, "raw", more="<readonly/>"))),
        make_tiny(Odd(disk(floppy, "raw", target="fda", device="floppy", more="<readonly/>"))),
    ]
    run_on(suite, *machines).assert_outcomes(passed=len(machines))
    assert [machine.snapshots for machine in machines] == [[]] * len(machines)


def test_without_the_memory_more_is_taken(
    make_tiny: MakeTiny, suite: Suite, tmp_path: Path
) -> None:
    machines = [
        make_tiny(Odd(f"{USB}<sound model='usb'/>")),
        make_tiny(Odd(disk(create(tmp_path / "x.qcow2"), more="<transient/>"))),
    ]
    run_on(suite, *machines, "--kvmsnap-live=no").assert_outcomes(passed=len(machines))
    assert [machine.snapshots for machine in machines] == [[]] * len(machines)


def test_persistent_memory_is_put_back_only_by_snapshots_that_hold_it(
    make_tiny: MakeTiny, suite: Suite, tmp_path: Path
) -> None:
    file = tmp_path / "nvdimm"
    file.write_bytes(b"found".ljust(2**22))
    machine = make_tiny(
        Odd(
            "<memory model='nvdimm' access='shared'>"
            f"<source><path>{file}</path></source>"
            "<target><size unit='MiB'>4</size><node>0</node></target></memory>",
            more="<maxMemory slots='1' unit='MiB'>64</maxMemory>"
            "<cpu><numa><cell id='0' cpus='0' memory='32' unit='MiB'/></numa></cpu>",
        )
    )
    write = f"with open({str(file)!r}, 'r+b') as file: file.write(b'dirty')"
    test = f"def test_writes(vm):\n    {write}\n"
    told = "it has persistent memory, which a snapshot of a machine that is off leaves out"
    assert_told_before_the_first_test(run_on(suite, machine), told)
    suite.write(test, conftest=BLIND)
    options = [f"--kvmsnap-domain={machine.name}", "--kvmsnap-live=no"]
    suite.run(*options).assert_outcomes(passed=1)
    assert file.read_bytes()[:5] == b"dirty"

    file.write_bytes(b"found".ljust(2**22))
    machine.virsh("start", "--paused")
    suite.write(test, conftest="# sees again")
    suite.run(options[0]).assert_outcomes(passed=1)
    assert (machine.state, file.read_bytes()[:5]) == ("paused", b"found")


# --- what goes on -----------------------------------------------------------------------------


def test_block_job(make_tiny: MakeTiny, suite: Suite, tmp_path: Path) -> None:
    machine = make_tiny()
    machine.virsh("start", "--paused")
    target = ("--path", "vda", "--dest", str(tmp_path / "copy"), "--transient-job")
    machine.virsh("blockcopy", *target)
    result = run_on(suite, machine)
    assert_told_before_the_first_test(
        result,
        f"{machine.name} cannot be used for tests",
        "its disk vda is just being copied or merged (a block job)",
        f"blockjob {machine.name} vda --abort",
    )
    assert "Block Copy" in machine.virsh("blockjob", "vda", "--info", "--raw"), "it goes on"
    machine.virsh("blockjob", "vda", "--abort")
    run_on(suite, machine).assert_outcomes(passed=1)
    assert machine.state == "paused"


def test_a_running_qemu_is_asked_about_9p(
    make_tiny: MakeTiny, suite: Suite, lab: Lab, tmp_path: Path
) -> None:
    """The example's kernel has no 9p, so nobody mounts it here; QEMU's answer to that is a mock."""
    machine = make_tiny(
        Odd(
            "<filesystem type='mount' accessmode='mapped'>"
            f"<source dir='{tmp_path}'/><target dir='tag'/></filesystem>"
        )
    )
    log = lab.folder / "log" / "qemu" / f"{machine.name}.log"
    machine.virsh("start", "--paused")
    assert "custom-monitor" not in log.read_text()
    run_on(suite, machine).assert_outcomes(passed=1)
    assert "custom-monitor" in log.read_text()


# --- snapshots and images ---------------------------------------------------------------------


def test_external_snapshot(make_tiny: MakeTiny, suite: Suite) -> None:
    """And why: the overlay reads differently after a revert to what lies beneath, and back."""
    machine = make_tiny()
    overlay = machine.disk.with_suffix(".overlay")
    qemu_io(machine.disk, "write -P 1 0 4k")
    machine.virsh("snapshot-create-as", "before")
    qemu_io(machine.disk, "write -P 2 0 4k")
    machine.virsh("snapshot-create-as", "overlay", "--disk-only", "--atomic")
    for snapshots in ([], ["--kvmsnap-snapshot=before"]):
        result = run_on(suite, machine, *snapshots)
        assert_told_before_the_first_test(
            result,
            f"{machine.name} cannot be used for tests",
            "its snapshot 'overlay' is external",
            f"blockcommit {machine.name} DISK",
        )
    qemu_io(overlay, "read -P 2 0 4k")
    machine.virsh("snapshot-create-as", "after", "--diskspec", "vda,snapshot=internal")
    machine.virsh("snapshot-revert", "before")
    machine.virsh("snapshot-revert", "after")
    qemu_io(overlay, "read -P 1 0 4k")


def qemu_io(image: Path, command: str) -> None:
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", command, image], capture_output=True, text=True, check=True
    )
    assert "failed" not in done.stdout


@pytest.mark.parametrize("found", ["shut off", "paused"])
def test_snapshots_that_libvirt_does_not_know(
    make_tiny: MakeTiny, suite: Suite, found: str
) -> None:
    machine = make_tiny()
    machine.virsh("snapshot-create-as", "known")
    for name in ("mine", "kvmsnap-base-0123abcd"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, machine.disk], check=True)
    if found == "paused":
        machine.virsh("start", "--paused")
    told = "the image of its disk vda holds snapshots that libvirt does not know: mine\n"
    assert_told_before_the_first_test(run_on(suite, machine), told, "qemu-img snapshot -l")
    machine.destroy()
    subprocess.run(["qemu-img", "snapshot", "-d", "mine", machine.disk], check=True)
    run_on(suite, machine).assert_outcomes(passed=1)


def test_image_of_another_domain(make_tiny: MakeTiny, suite: Suite) -> None:
    """Running or not, by another path, or as what it stands on."""
    one, beneath = make_tiny(), make_tiny()
    link = one.disk.with_suffix(".link")
    link.symlink_to(one.disk)
    other = make_tiny(image=link)
    top = create(
        *(beneath.disk.with_suffix(".top"), "qcow2", "-b", str(beneath.disk), "-F", "qcow2")
    )
    upper = make_tiny(image=top)
    upper.virsh("start", "--paused")
    said = assert_told_before_the_first_test(
        run_on(suite, one, other, beneath),
        "3 problems",
        f"the domain {other.name} uses the image of its disk vda too: {one.disk}",
        f"the domain {one.name} uses the image of its disk vda too: {link}",
        f"the domain {upper.name} uses the image of its disk vda too: {beneath.disk}",
    )
    assert f"{upper.name} cannot be used" not in said
    run_on(suite, upper).assert_outcomes(passed=1)


# --- libvirt ----------------------------------------------------------------------------------


def test_a_libvirt_that_might_be_unable_to_revert_is_tried(
    make_tiny: MakeTiny, suite: Suite, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one can; those that cannot are a mock in tests/unit, since none is at hand."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    machines = [make_tiny(), make_tiny()]
    suspicious = """
from pytest_kvmsnap.machine import probe
probe.SUSPICIOUS = range(10**9)
"""
    run_on(suite, *machines, conftest=suspicious).assert_outcomes(passed=2)
    (log,) = (lab.folder / "log" / "qemu").glob("kvmsnap-probe-*.log")
    assert log.read_text().count("starting up") == 2, "it was started, and again by the revert"
    assert list(tmp_path.glob("kvmsnap-probe-*")) == []
    listed = subprocess.run(
        ["virsh", "-q", "-c", lab.uri, "list", "--all", "--name"],
        capture_output=True,
        text=True,
        env=QUIET,
        check=True,
    )
    assert "kvmsnap-probe" not in listed.stdout


# --- machines with a system -------------------------------------------------------------------


def test_managed_save_is_refused_and_kept(machine: Machine, suite: Suite) -> None:
    machine.start()
    machine.virsh("managedsave")
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    assert_told_before_the_first_test(
        result, f"{machine.name} cannot be used for tests", "managed save", "managedsave-remove"
    )
    assert "Managed save:   yes" in machine.virsh("dominfo")


def test_missing_image(machine: Machine, suite: Suite) -> None:
    machine.disk.rename(machine.disk.with_suffix(".away"))
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    assert_told_before_the_first_test(
        result, f"{machine.name} cannot be used for tests", str(machine.disk), "put the file back"
    )


@pytest.mark.parametrize("disk_format", ["qcow2", "raw"])
def test_image_in_use_by_another_process(
    make_machine: Maker, suite: Suite, disk_format: str
) -> None:
    machine = make_machine(disk_format=disk_format)
    suite.write(ONE_TEST)
    holder = ["qemu-io", "-f", disk_format, str(machine.disk)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(8) == b"qemu-io>"
        result = suite.run(f"--kvmsnap-domain={machine.name}")
        process.terminate()
    assert_told_before_the_first_test(
        result, f"{machine.name} cannot be used for tests", "another process is using", "lsof"
    )


def test_image_of_another_format_than_the_definition_says(machine: Machine, suite: Suite) -> None:
    machine.disk.write_bytes(bytes(2**20))
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    assert_told_before_the_first_test(
        result, f"{machine.name} cannot be used for tests", "not in qcow2 format", "definition"
    )


def test_snapshot_whose_data_is_gone(machine: Machine, suite: Suite) -> None:
    machine.virsh("snapshot-create-as", "installed")
    subprocess.run(["qemu-img", "snapshot", "-d", "installed", machine.disk], check=True)
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-domain={machine.name}", "--kvmsnap-snapshot=installed")
    assert_told_before_the_first_test(
        result, f"the data of the snapshot 'installed' of {machine.name} is gone", "--metadata"
    )
    assert machine.snapshots == ["installed"]


def test_unknown_names(machine: Machine, suite: Suite) -> None:
    machine.virsh("snapshot-create-as", "installed")
    suite.write(
        f"""
@pytest.mark.kvm_domain("{machine.name}x")
def test_domain(vm): pass

@pytest.mark.kvm_snapshot("instaled")
def test_snapshot(vm): pass
"""
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    assert_told_before_the_first_test(
        result,
        "2 problems",
        f"there is no domain '{machine.name}x'",
        f"did you mean '{machine.name}'",
        f"there is no snapshot 'instaled' of {machine.name}",
        "snapshots there: installed",
    )


@pytest.mark.long
def test_embedded_libvirt_in_use_by_another_process(
    machine: Machine, suite: Suite, pytester: pytest.Pytester
) -> None:
    sign = pytester.path / "sign"
    suite.write(
        f"""
import pathlib, time
def test_stays(vm):
    pathlib.Path({str(sign)!r}).touch()
    time.sleep(60)
"""
    )
    arguments = suite.arguments(f"--kvmsnap-domain={machine.name}")
    with subprocess.Popen([os.sys.executable, "-m", "pytest", *arguments]) as process:  # type: ignore[attr-defined]
        while not sign.exists():
            assert process.poll() is None
        result = suite.run(f"--kvmsnap-domain={machine.name}")
        process.terminate()
    assert_told_before_the_first_test(
        result, "cannot connect to qemu:///embed", "another process is using"
    )
    suite.run("--kvmsnap-clean")


def test_socket_that_this_user_may_not_open(tmp_path: Path) -> None:
    """As an ordinary user: in a forked child, which may still use what is imported already."""
    from pytest_kvmsnap.errors import HypervisorError
    from pytest_kvmsnap.machine.libvirt_api import connect

    folder = Path("/tmp") / f"kvmsnap-socket-{os.getpid()}"
    folder.mkdir(mode=0o755)
    sock = folder / "libvirt-sock"
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sock))
        server.listen()
        sock.chmod(0o000)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            try:
                connect(f"qemu+unix:///system?socket={sock}")
            except HypervisorError as error:
                os.write(writing, str(error).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        said = os.read(reading, 65536).decode()
    sock.unlink()
    folder.rmdir()
    assert "cannot connect to qemu+unix:///system" in said
    assert "Permission denied" in said
    assert "usermod -aG libvirt" in said
