"""What is asked of libvirt and of the images before a machine is used, beyond its definition.

The domains are the test driver's, told to be QEMU's. It has neither jobs nor a monitor, so those
are mocks here, with what a real one answered; real ones are in tests/real.
"""

import json
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import libvirt
import pytest
from testdriver import Host, disk

from pytest_kvmsnap.errors import SnapshotError
from pytest_kvmsnap.machine import domainxml, images, preflight, probe, space
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import Hypervisor, connect, libvirt_qemu

MIB = 2**20


@pytest.fixture
def there(host: Host) -> Iterator[Hypervisor]:
    """The connection to the machines of `host`, as if they were QEMU's."""
    hypervisor = connect("test:///default")
    hypervisor.kind = "QEMU"
    yield hypervisor
    hypervisor.close()


def machine(there: Hypervisor, name: str = "box") -> Domain:
    return Domain(there, there.find(name), name)


def whys(there: Hypervisor, name: str = "box", *, live: bool = True) -> list[str]:
    return [problem.why for problem in preflight.problems(machine(there, name), None, live=live)]


@pytest.fixture
def image(qemu_img: str, tmp_path: Path) -> Path:
    path = tmp_path / "box.qcow2"
    images.create(path, "1M")
    return path


def error_of_libvirt(code: int) -> libvirt.libvirtError:
    error = libvirt.libvirtError("the mock says so")
    error.err = (code, 0, "the mock says so", 2, "", "", "", 0, 0)
    return error


# the images


def test_an_image_is_looked_at_once(
    host: Host, there: Hypervisor, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []
    run = subprocess.run

    def counted(command: list[str], **options: Any) -> Any:
        commands.append(command[1])
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    host.define("box", disk(image))
    assert whys(there) == []
    assert commands == ["info"]


def test_data_outside_of_the_image_is_told(
    host: Host, there: Hypervisor, image: Path, tmp_path: Path
) -> None:
    image.unlink()
    data = tmp_path / "data.raw"
    create = ["qemu-img", "create", "-qf", "qcow2"]
    subprocess.run([*create, "-o", f"data_file={data}", image, "1M"], check=True)
    host.define("box", disk(image))
    (problem,) = preflight.problems(machine(there), None)
    assert problem.why == (
        f"its disk vda keeps its data outside of the qcow2 image, in {data}, and internal"
        " snapshots do not work with that"
    )
    assert f"qemu-img convert -f qcow2 -O qcow2 {image} NEW" in problem.cure


def test_a_backing_file_is_no_blocker(
    host: Host, there: Hypervisor, image: Path, tmp_path: Path
) -> None:
    top = tmp_path / "top.qcow2"
    base = ["-b", str(image), "-F", "qcow2"]
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", *base, top], check=True)
    host.define("box", disk(top))
    assert whys(there) == []


@pytest.mark.parametrize(
    ("in_image", "unknown"),
    [
        (["installed"], ""),
        (["installed", "mine", "zwei ü"], "mine, zwei ü"),
        (["kvmsnap-base-0123abcd", "kvmsnap-database-2-0123abcd"], ""),
        (["kvmsnap-of-mine"], "kvmsnap-of-mine"),
    ],
)
def test_snapshots_that_libvirt_does_not_know(
    host: Host, there: Hypervisor, image: Path, in_image: list[str], unknown: str
) -> None:
    """Those of a dead run of ours are none of them: their names are never used again."""
    host.define("box", disk(image))
    host.snapshot("installed")
    for name in in_image:
        subprocess.run(["qemu-img", "snapshot", "-c", name, image], check=True)
    told = f"the image of its disk vda holds snapshots that libvirt does not know: {unknown}"
    assert whys(there) == ([told] if unknown else [])


@pytest.mark.parametrize("path", ["same", "symbolic link", "hard link", "folder link"])
@pytest.mark.parametrize("state", ["running", "shut off"])
def test_an_image_of_another_domain_is_found_by_whatever_path(
    host: Host, there: Hypervisor, image: Path, path: str, state: str
) -> None:
    other = image.with_name("other.qcow2")
    if path == "same":
        other = image
    elif path == "symbolic link":
        other.symlink_to(image)
    elif path == "hard link":
        other.hardlink_to(image)
    else:
        folder = image.parent / "folder"
        folder.symlink_to(image.parent)
        other = folder / image.name
    host.define("box", disk(image))
    host.define("other", disk(other), state=state)
    (problem,) = preflight.problems(machine(there), None)
    assert problem.why == f"the domain other uses the image of its disk vda too: {image}"
    assert "an image of its own" in problem.cure
    assert whys(there, "other") == [f"the domain box uses the image of its disk vda too: {other}"]


@pytest.mark.parametrize("more", ["<readonly/>", "<shareable/>"])
def test_an_image_that_another_domain_does_not_write_to_is_no_blocker(
    host: Host, there: Hypervisor, image: Path, more: str
) -> None:
    host.define("box", disk(image))
    host.define("other", disk(image, more=more))
    assert whys(there) == []


def test_an_image_that_another_domain_stands_on_is_told(
    host: Host, there: Hypervisor, image: Path
) -> None:
    beneath = (
        "<backingStore type='file'><format type='qcow2'/>"
        f"<source file='{image}'/><backingStore/></backingStore>"
    )
    host.define("box", disk(image))
    host.define("other", disk("/elsewhere.qcow2", more=beneath))
    assert whys(there) == [f"the domain other uses the image of its disk vda too: {image}"]


def test_paths_of_another_host_are_compared_as_they_are(
    host: Host, there: Hypervisor, image: Path
) -> None:
    link = image.with_name("link")
    link.symlink_to(image)
    there.is_local = False
    host.define("box", disk(image))
    host.define("linked", disk(link))
    assert whys(there) == []
    host.define("other", disk(image))
    assert whys(there) == [f"the domain other uses the image of its disk vda too: {image}"]


# snapshots and jobs


def test_an_external_snapshot_is_told(
    host: Host, there: Hypervisor, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since the test driver makes no external ones."""
    host.define("box", disk(image))
    host.snapshot("overlay")
    xml = libvirt.virDomainSnapshot.getXMLDesc
    monkeypatch.setattr(
        libvirt.virDomainSnapshot,
        "getXMLDesc",
        lambda self, flags=0: xml(self, flags).replace("'internal'", "'external'"),
    )
    (problem,) = preflight.problems(machine(there), None)
    assert "its snapshot 'overlay' is external" in problem.why
    assert "blockcommit box DISK --active --pivot" in problem.cure
    assert "snapshot-delete box overlay --metadata" in problem.cure


def test_that_the_data_of_a_snapshot_is_gone_is_not_said_where_it_may_be_beneath(
    host: Host, there: Hypervisor, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.define("box", disk(image))
    for name in ("installed", "overlay"):
        host.snapshot(name)
    xml = libvirt.virDomainSnapshot.getXMLDesc

    def external(self: libvirt.virDomainSnapshot, flags: int = 0) -> str:
        told = xml(self, flags)
        return told.replace("'internal'", "'external'") if "overlay" in told else told

    assert preflight.snapshot_problem(machine(there), "installed") is not None
    monkeypatch.setattr(libvirt.virDomainSnapshot, "getXMLDesc", external)
    assert preflight.snapshot_problem(machine(there), "installed") is None


CONTROL_OK, CONTROL_JOB = [0, 0, 0], [1, 0, 6]
NO_JOB, JOB, JOB_THAT_ENDED = [0] * 12, [2, 10] + [0] * 10, [3, 147] + [0] * 10
BUSY = "libvirt is busy with it: it is just being saved, dumped, moved or snapshotted"


@pytest.mark.parametrize(
    ("control", "job", "busy"),
    [
        (CONTROL_OK, NO_JOB, False),
        (CONTROL_JOB, None, True),  # its answer would have to be waited for
        (CONTROL_OK, JOB, True),
        (CONTROL_OK, JOB_THAT_ENDED, False),
        (CONTROL_OK, libvirt.VIR_ERR_OPERATION_TIMEOUT, True),
        (CONTROL_OK, libvirt.VIR_ERR_OPERATION_INVALID, False),
    ],
)
def test_a_job_under_way_is_told(
    host: Host,
    there: Hypervisor,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    control: list[int],
    job: list[int] | int | None,
    busy: bool,
) -> None:
    asked: list[libvirt.virDomain] = []

    def memory(domain: libvirt.virDomain) -> dict[str, int]:
        asked.append(domain)
        return {}

    def job_info(_: libvirt.virDomain) -> list[int]:
        assert job is not None
        if isinstance(job, int):
            raise error_of_libvirt(job)
        return job

    monkeypatch.setattr(libvirt.virDomain, "controlInfo", lambda _: control)
    monkeypatch.setattr(libvirt.virDomain, "jobInfo", job_info)
    monkeypatch.setattr(libvirt.virDomain, "memoryStats", memory)
    host.define("box", disk(image), state="running")
    assert whys(there) == ([BUSY] if busy else [])
    assert len(asked) == (not busy), "while it is busy nothing is asked that waits for it"


def test_a_block_job_is_told(
    host: Host, there: Hypervisor, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt.virDomain, "blockJobInfo", lambda _, target: {"type": 2})
    host.define("box", disk(image), state="running")
    (problem,) = preflight.problems(machine(there), None)
    assert problem.why == "its disk vda is just being copied or merged (a block job)"
    assert "virsh -c test:///default blockjob box vda --info" in problem.cure


# 9p


MOUNTED = (
    "Migration is disabled when VirtFS export path '/x' is mounted in the guest using mount_tag 't'"
)
SHARED = "<filesystem type='mount'><source dir='/x'/><target dir='t'/></filesystem>"


@pytest.mark.parametrize(
    ("devices", "state", "answer", "told"),
    [
        ([SHARED], "running", {"blocked-reasons": [MOUNTED]}, [MOUNTED]),
        ([SHARED], "running", {}, []),
        ([SHARED], "running", {"status": "completed"}, []),
        ([SHARED], "shut off", None, []),
        ([], "running", None, []),
    ],
    ids=["mounted", "not mounted", "not mounted, saved once", "off", "nothing shared"],
)
def test_qemu_is_asked_where_a_folder_is_shared_by_9p(
    host: Host,
    there: Hypervisor,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices: list[str],
    state: str,
    answer: dict[str, Any] | None,
    told: list[str],
) -> None:
    """The answers of a QEMU 7.2, whose guest had mounted it, not yet, and no longer."""

    def ask(_: libvirt.virDomain, command: str, _flags: int) -> str:
        assert json.loads(command) == {"execute": "query-migrate"}
        assert answer is not None, "it is not asked in vain: libvirt marks the machine for it"
        return json.dumps({"return": answer, "id": "libvirt-413"})

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", ask)
    host.define("box", disk(image), *devices, state=state)
    assert whys(there) == [f"QEMU cannot snapshot it while it runs: {reason}" for reason in told]


def test_a_folder_that_is_mounted_later_is_explained(
    host: Host, there: Hypervisor, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise libvirt.libvirtError(f"cannot migrate domain: {MOUNTED}")

    host.define("box", disk(image), state="running")
    monkeypatch.setattr(libvirt.virDomain, "snapshotCreateXML", refuse)
    with pytest.raises(SnapshotError) as caught:
        machine(there).take_snapshot("one", "")
    assert MOUNTED in caught.value.why
    assert "unmount in the guest" in caught.value.cure


# room


@pytest.mark.parametrize(
    ("memory", "least", "measured"),
    [
        (96, 49.5, 75.5),
        (128, 66, 89.9),
        (256, 68, 92.3),
        (1024, 80, 112),
        (4096, 128, 172),
    ],
)
def test_what_is_asked_for_is_less_than_a_tiny_linux_takes(
    memory: int, least: float, measured: float
) -> None:
    """In MiB; measured: what `qemu-img snapshot -l` said of the example's guest, just booted."""
    assert space.least_memory(memory * MIB) == least * MIB
    assert least < measured


@pytest.mark.parametrize(
    ("state", "live", "needed"),
    [
        ("shut off", True, 4 * MIB + 8 * MIB // 64),
        ("shut off", False, 0),
        ("running", True, 8 * MIB),
        ("running", False, 8 * MIB),
    ],
)
def test_a_lack_of_room_is_told(
    host: Host,
    there: Hypervisor,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    live: bool,
    needed: int,
) -> None:
    host.define("box", disk(image), state=state)
    free = SimpleNamespace(free=needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert whys(there, live=live) == []
    free.free -= 1
    told = [f"a snapshot of it while it runs takes about {needed / MIB:.1f} MiB in {image.parent}"]
    assert [why.partition(",")[0] for why in whys(there, live=live)] == (told if needed else [])


# a libvirt that cannot revert


class Probed:
    """Stands in for the tiny machine, which the test driver cannot run: no QEMU, no image.

    The failure is a mock in any case: no libvirt that has it is at hand. tests/real tries the real
    machine on a libvirt that can revert.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: str | None) -> None:
        self.log: list[str] = []
        self.failing = failing
        self.image = Path()
        monkeypatch.setattr(libvirt.virConnect, "createXML", lambda _, *given: self.create(*given))

    def create(self, xml: str, flags: int) -> "Probed":
        assert flags == libvirt.VIR_DOMAIN_START_PAUSED
        root = ET.fromstring(xml)
        source = root.find("./devices/disk/source")
        assert source is not None
        self.image = Path(source.get("file", ""))
        self.log.append(f"{root.get('type')} {root.findtext('name', '')[:14]}")
        return self

    def snapshotCreateXML(self, xml: str) -> str:
        self.do("snapshot")
        return xml

    def revertToSnapshot(self, _: str, flags: int) -> None:
        assert flags == libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE
        self.do("revert")

    def destroy(self) -> None:
        self.log.append("destroy")

    def do(self, what: str) -> None:
        assert self.image.stat().st_mode & 0o777 == 0o666, "whoever QEMU runs as may use it"
        assert self.image.parent.stat().st_mode & 0o777 == 0o711, "nobody else finds it"
        self.log.append(what)
        if self.failing == what:
            raise libvirt.libvirtError("Device 'x' is writable but does not support snapshots")


TRIED = ["test kvmsnap-probe-", "snapshot", "revert", "destroy"]


@pytest.mark.parametrize("failing", ["revert", "snapshot", None])
def test_a_libvirt_that_may_be_unable_to_revert_is_tried_once(
    host: Host,
    there: Hypervisor,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str | None,
) -> None:
    monkeypatch.setattr(Hypervisor, "version", 11_003_000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    probed = Probed(monkeypatch, failing)
    host.define("box", disk(image))
    second = tmp_path / "second.qcow2"
    images.create(second, "1M")
    host.define("second", disk(second))
    told = [
        "the libvirt there, 11.3.0, cannot revert to a snapshot of a running machine (tried on a"
        " tiny one): Device 'x' is writable but does not support snapshots"
    ]
    assert whys(there) == (told if failing == "revert" else [])
    assert whys(there, "second") == (told if failing == "revert" else [])
    assert probed.log == [step for step in TRIED if step != "revert" or failing != "snapshot"]
    assert list(tmp_path.glob("kvmsnap-probe-*")) == []


@pytest.mark.parametrize(
    ("version", "kind", "is_local", "live"),
    [
        (11_001_000, "QEMU", True, True),
        (11_004_000, "QEMU", True, True),
        (11_003_000, "TEST", True, True),
        (11_003_000, "QEMU", False, True),
        (11_003_000, "QEMU", True, False),
    ],
)
def test_others_are_not_tried(
    host: Host,
    there: Hypervisor,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    kind: str,
    is_local: bool,
    live: bool,
) -> None:
    monkeypatch.setattr(Hypervisor, "version", version)
    there.kind, there.is_local = kind, is_local
    probed = Probed(monkeypatch, "revert")
    host.define("box", disk(image))
    assert whys(there, live=live) == []
    assert probed.log == []


def test_the_machine_that_is_tried_is_of_the_kind_that_will_be_used() -> None:
    like = ET.fromstring(
        "<domain type='kvm'><os><type arch='aarch64' machine='virt'>hvm</type></os><devices>"
        "<emulator>/usr/bin/qemu-x</emulator><disk/><interface/></devices></domain>"
    )
    image = Path("/x & y")
    made = ET.fromstring(probe.definition("tiny", image, like))
    assert made.get("type") == "kvm"
    kind = made.find("./os/type")
    assert kind is not None
    assert (kind.attrib, kind.text) == ({"arch": "aarch64", "machine": "virt"}, "hvm")
    assert made.findtext("./devices/emulator") == "/usr/bin/qemu-x"
    assert [(each.path, each.format) for each in domainxml.disks(made)] == [(image, "qcow2")]
    assert made.find("./devices/interface") is None
