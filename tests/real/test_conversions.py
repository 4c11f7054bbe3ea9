"""Raw disks of real machines become qcow2: all of a machine or none, and nothing is lost."""

import hashlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from bench import (
    ONE_TEST,
    QUIET,
    Machine,
    Maker,
    Suite,
    assert_told_before_the_first_test,
    fill,
    move,
)
from qemuimg import CONVERTING, fake_qemu_img

README = Path(__file__).parents[2] / "README.md"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def attach(machine: Machine, raw: Path, target: str) -> None:
    """Give a machine that is off one more raw disk."""
    machine.virsh("attach-disk", str(raw), target, "--config", "--subdriver", "raw")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_all_raw_disks_are_converted_and_snapshotted(
    make_machine: Maker, suite: Suite, tmp_path: Path
) -> None:
    machine = make_machine(disk_format="raw")
    folder = tmp_path / "meine Images & ü"
    folder.mkdir()
    data, seed = folder / "data 1.img", folder / "cidata.raw"
    data.write_bytes(os.urandom(2**16).ljust(2**17, b"\0"))
    seed.write_bytes(b"#cloud-config\n".ljust(2**12, b"\0"))
    attach(machine, data, "vdb")
    attach(machine, seed, "vdc")
    raws = {path: digest(path) for path in (machine.disk, data, seed)}
    suite.write(
        f"""
import hashlib, pathlib

@pytest.mark.parametrize("turn", [1, 2])
def test_is_clean(vm, turn):
    assert vm.read_bytes("/dev/vdb") == pathlib.Path({str(data)!r}).read_bytes()
    assert vm.read_bytes("/dev/vdc") == pathlib.Path({str(seed)!r}).read_bytes()
    vm.run("echo dirt > /dev/vdb; echo dirt > /dev/vdc; echo dirt > /opt/abc; sync", check=True)
    assert vm.read_bytes("/dev/vdb").startswith(b"dirt")
    assert [disk.format for disk in vm.disks()] == ["qcow2"] * 3
    assert [len(disk.snapshots) for disk in vm.disks()] == [2] * 3
"""
    )
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            f"kvmsnap: converted {machine.disk} to {machine.disk.stem}.qcow2 (*the raw file stays",
            f"kvmsnap: converted {data} to data 1.qcow2 (*the raw file stays",
            f"kvmsnap: converted {seed} to cidata.qcow2 (*the raw file stays",
            f"kvmsnap: back to raw: virsh * edit {machine.name}, with *",
        ]
    )
    assert {path: digest(path) for path in raws} == raws
    assert names(folder) == ["cidata.qcow2", "cidata.raw", "data 1.img", "data 1.qcow2"]
    assert list(machine.disk.parent.glob(".*.tmp")) == []


def test_raw_disk_that_begins_like_qcow2_stays_what_it_is(
    make_machine: Maker, suite: Suite, tmp_path: Path
) -> None:
    """A guest may write such a header. Whoever guesses hands the guest a file of the host then."""
    machine = make_machine(disk_format="raw")
    secret, raw = tmp_path / "secret", tmp_path / "hostile.raw"
    secret.write_bytes(b"the host's secret".ljust(2**20, b"\0"))
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(secret), "-F", "raw"]
    subprocess.run([*create, str(raw)], check=True)
    guessed = tmp_path / "guessed"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(raw), str(guessed)], check=True)
    assert b"the host's secret" in guessed.read_bytes()
    os.truncate(raw, -(-raw.stat().st_size // 512) * 512)
    attach(machine, raw, "vdb")
    suite.write(
        f"""
import pathlib

def test_disk(vm):
    seen = vm.read_bytes("/dev/vdb")
    assert seen == pathlib.Path({str(raw)!r}).read_bytes()
    assert seen.startswith(b"QFI")
    assert b"the host's secret" not in seen
"""
    )
    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=1)
    made = ["qemu-img", "info", "-f", "qcow2", str(raw.with_suffix(".qcow2"))]
    assert "backing" not in subprocess.run(made, capture_output=True, text=True, check=True).stdout


def converters(folder: Path) -> list[str]:
    """Return the processes that convert an image in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:
            continue
        if b"convert" in command and os.fsencode(f"file:{folder}/.") in command:
            found.append(entry.parent.name)
    return found


@pytest.mark.long
def test_run_killed_while_it_converts_leaves_the_machine_usable(
    make_machine: Maker, suite: Suite, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real qemu-img, but it takes its time. It goes on when the run is killed."""
    machine = make_machine(disk_format="raw")
    data = pytester.mkdir("data") / "data.raw"
    data.write_bytes(os.urandom(2**20))
    attach(machine, data, "vdb")
    raws, definition = [digest(machine.disk), digest(data)], machine.definition
    sign = pytester.path / "converting"
    suite.write(ONE_TEST)
    with monkeypatch.context() as patched:
        slow = f'set -- convert -r 50k "$@"; (sleep 1; touch "{sign}") &'
        script = f'if {CONVERTING}; then shift; {slow} fi; exec $real "$@"'
        fake_qemu_img(patched, pytester.path / "bin", script)
        suite.run_until(sign, f"--kvmsnap-domain={machine.name}")
    assert ([digest(machine.disk), digest(data)], machine.definition) == (raws, definition)
    assert not machine.disk.with_suffix(".qcow2").exists()
    assert converters(machine.disk.parent) != []

    suite.run(f"--kvmsnap-domain={machine.name}").assert_outcomes(passed=1)
    assert converters(machine.disk.parent) + converters(data.parent) == []
    assert list(machine.disk.parent.glob(".*.tmp")) == []
    assert names(data.parent) == ["data.qcow2", "data.raw"]


@pytest.mark.parametrize("convert", ["never", "check"])
def test_raw_image_is_refused_when_it_may_not_be_converted(
    make_machine: Maker, suite: Suite, convert: str
) -> None:
    machine = make_machine(disk_format="raw")
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-domain={machine.name}", f"--kvmsnap-convert={convert}")
    assert_told_before_the_first_test(
        result,
        f"{machine.name} has raw disks",
        f"vda: {machine.disk} (would become {machine.disk.with_suffix('.qcow2')}, and take up to",
        "--kvmsnap-convert=auto",
    )


@pytest.fixture
def two_machines(make_machine: Maker, small_disk: Path) -> list[Machine]:
    """Two raw ones; the image of the second is on a disk that is nearly full."""
    machines = [make_machine(disk_format="raw"), make_machine(disk_format="raw")]
    move(machines[1], small_disk)
    fill(small_disk, leaving=4 * 2**20)
    return machines


@pytest.mark.parametrize("is_seen_coming", [True, False])
def test_full_disk_of_one_machine_keeps_all_raw(
    two_machines: list[Machine], suite: Suite, small_disk: Path, is_seen_coming: bool
) -> None:
    """The look at the free space is made blind, as if others filled the disk since."""
    room, full = two_machines
    blind = "from pytest_kvmsnap.machine import images\nimages.space_needed = lambda raw: 0\n"
    both = f"[{room.name!r}, {full.name!r}]"
    suite.write(
        f"@pytest.mark.parametrize('vm', {both}, indirect=True)\n{ONE_TEST}",
        conftest="" if is_seen_coming else blind,
    )
    definitions = [machine.definition for machine in two_machines]
    result = suite.run() if is_seen_coming else suite.run("--kvmsnap-live=no")
    if is_seen_coming:
        words = ("not enough space to convert the images of", "needs up to", "room")
        assert f"images of {full.name}\n" in result.stderr.str()
    else:
        words = (f"cannot convert the raw disk vda of {full.name}", "No space left on device", "")
    assert_told_before_the_first_test(result, *words)
    assert names(small_disk) == ["filler", full.disk.name]
    assert not room.disk.with_suffix(".qcow2").exists()
    assert list(room.disk.parent.glob(".*.tmp")) == []
    assert [machine.definition for machine in two_machines] == definitions
    assert list(suite.locks.iterdir()) == []


@pytest.mark.long
def test_readme_tells_the_way_back_to_raw(
    make_machine: Maker, suite: Suite, tmp_path: Path
) -> None:
    machine = make_machine(disk_format="raw")
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-domain={machine.name}")
    result.assert_outcomes(passed=1)
    machine.start("echo since > /opt/abc; sync")
    machine.destroy()
    machine.virsh("snapshot-create-as", "taken-since")

    told = README.read_text().partition("\nBack to raw by hand")[2].partition("\n## ")[0]
    (command,) = re.findall(r"```\n *(qemu-img .*)\n *```", told)
    folder, qcow2 = machine.disk.parent, machine.disk.with_suffix(".qcow2")
    subprocess.run(command.replace("centos", machine.name).split(), cwd=folder, check=True)
    raw = folder / f"{machine.name}-new.img"
    (edit,) = re.findall(
        r"^kvmsnap: back to raw: (virsh .*), with the raw file", "\n".join(result.outlines), re.M
    )
    changes = tmp_path / "changes"
    changes.write_text(f"s/type='qcow2'/type='raw'/; s/{qcow2.name}/{raw.name}/")
    subprocess.run(shlex.split(edit), env=QUIET | {"EDITOR": f"sed -i -f {changes}"}, check=True)
    for snapshot in machine.snapshots:
        machine.virsh("snapshot-delete", snapshot, "--metadata")
    qcow2.rename(tmp_path / qcow2.name)

    assert (machine.snapshots, str(raw) in machine.virsh("domblklist")) == ([], True)
    suite.write("def test_goes_on(vm): assert vm.read_text('/opt/abc') == 'since\\n'")
    again = suite.run(f"--kvmsnap-domain={machine.name}")
    again.assert_outcomes(passed=1)
    again.stdout.fnmatch_lines([f"kvmsnap: converted {raw} to {raw.stem}.qcow2 (*"])
