"""Images by the real qemu-img, and what is looked at before a machine is used.

The domains are the test driver's, told to be QEMU's where the code looks at images of those only.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import libvirt
import pytest
from testdriver import Host, disk

from pytest_kvmsnap.errors import ImageError, MachineError, SnapshotError, UsageProblem
from pytest_kvmsnap.machine import conversion, images, libvirt_api, preflight, space
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import Hypervisor, connect

MIB = 2**20


@pytest.fixture
def hypervisor(host: Host) -> Iterator[Hypervisor]:
    hypervisor = connect("test:///default")
    hypervisor.kind = "QEMU"
    yield hypervisor
    hypervisor.close()


def box(host: Host, hypervisor: Hypervisor, *devices: str, state: str = "shut off") -> Domain:
    return Domain(hypervisor, host.define("box", *devices, state=state).UUIDString(), "box")


def qcow2(qemu_img: str, path: Path, *more: str) -> Path:
    subprocess.run([qemu_img, "create", "-qf", "qcow2", *more, path, "3M"], check=True)
    return path


# qemu-img


ODD_NAMES = ["plain", "two words", "json:{}", "nbd:host", "file:x", "a,b=c", "ü☃", "-f", "a:b"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_image_of_any_name_is_measured_converted_and_compared(
    qemu_img: str, tmp_path: Path, name: str
) -> None:
    assert qemu_img
    raw, made = tmp_path / f"{name}.raw", tmp_path / f"{name}.qcow2"
    raw.write_bytes(os.urandom(MIB).ljust(3 * MIB, b"\0"))
    heard: list[float] = []
    images.to_qcow2(raw, made, heard.append)
    images.check_raw_is_free(raw)
    told = images.info(made, "qcow2", in_use=False)
    assert (told.virtual_size, told.snapshots, told.backing_file) == (3 * MIB, (), None)
    assert made.stat().st_size <= images.space_needed(raw)
    assert images.is_same(raw, made)
    assert heard[-1] == 100
    assert heard == sorted(heard)
    with raw.open("r+b") as file:
        file.write(b"changed")
    assert not images.is_same(raw, made)


def test_a_raw_image_that_pretends_to_be_another_is_copied_and_not_followed(
    qemu_img: str, tmp_path: Path
) -> None:
    """A guest can write a qcow2 header into its raw disk, and point it at a file of the host."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret".ljust(3 * MIB, b"\0"))
    raw = qcow2(qemu_img, tmp_path / "box.raw", "-b", str(secret), "-F", "raw")
    size = raw.stat().st_size
    images.to_qcow2(raw, tmp_path / "box.qcow2", lambda _: None)
    told = images.info(tmp_path / "box.qcow2", "qcow2", in_use=False)
    assert told.backing_file is None
    assert told.virtual_size == -(-size // 512) * 512
    assert images.info(raw, "raw", in_use=False).backing_file is None
    assert b"secret" not in (tmp_path / "box.qcow2").read_bytes().replace(str(secret).encode(), b"")


def test_snapshots_and_backing_files_are_told(qemu_img: str, tmp_path: Path) -> None:
    base = qcow2(qemu_img, tmp_path / "base.qcow2")
    top = qcow2(qemu_img, tmp_path / "top.qcow2", "-b", str(base), "-F", "qcow2")
    for name in ("one", "zwei ü"):
        subprocess.run([qemu_img, "snapshot", "-c", name, top], check=True)
    told = images.info(top, "qcow2", in_use=True)
    assert told.snapshots == ("one", "zwei ü")
    assert told.backing_file == str(base)


@pytest.mark.parametrize("content", [None, b"no qcow2"])
def test_an_image_that_cannot_be_read_is_told(
    qemu_img: str, tmp_path: Path, content: bytes | None
) -> None:
    assert qemu_img
    path = tmp_path / "box.qcow2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match="qemu-img info failed") as caught:
        images.info(path, "qcow2", in_use=False)
    assert caught.value.where == str(path)
    assert "box.qcow2" in caught.value.why


def test_without_qemu_img_its_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (
        lambda: images.space_needed(tmp_path),
        lambda: images.to_qcow2(tmp_path, tmp_path, lambda _: None),
    ):
        with pytest.raises(ImageError, match="cannot run qemu-img") as caught:
            call()
        assert "qemu-utils on Debian" in caught.value.cure


def test_a_conversion_that_is_broken_off_ends_qemu_img(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake that would go on for ever, and says who it is first."""
    (tmp_path / "qemu-img").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{FOREVER}")
    (tmp_path / "qemu-img").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        images.to_qcow2(tmp_path / "raw", tmp_path / "made", interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


FOREVER = "echo '    (1.00/100%)'\nexec sleep 600\n"


# the preflight


def test_a_good_machine_has_no_problems(
    host: Host, hypervisor: Hypervisor, qemu_img: str, tmp_path: Path
) -> None:
    image = qcow2(qemu_img, tmp_path / "box.qcow2")
    domain = box(host, hypervisor, disk(image), disk(None, None, target="sda", device="cdrom"))
    assert preflight.problems(domain, None) == []


class Bad(NamedTuple):
    """A disk with something wrong, and what is said of it."""

    image_format: str
    device: str
    content: bytes | None
    why: str
    cure: str


BAD = {
    "lost": Bad("qcow2", "disk", None, "the image of its disk vda cannot be used", "put the file"),
    "lost cdrom": Bad("raw", "cdrom", None, "No such file or directory", "put the file back"),
    "wrong format": Bad("qcow2", "disk", b"x" * 1024, "cannot be read as qcow2", "is the format"),
}


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_told(host: Host, hypervisor: Hypervisor, tmp_path: Path, kind: str) -> None:
    bad = BAD[kind]
    path = tmp_path / "box.image"
    if bad.content is not None:
        path.write_bytes(bad.content)
    good = tmp_path / "good.raw"
    good.write_bytes(bytes(MIB))
    second = disk(good, "raw", target="vdb")
    first = disk(path, bad.image_format, device=bad.device)
    domain = box(host, hypervisor, first, second)
    (problem,) = preflight.problems(domain, None)
    assert (problem.what, problem.where) == (
        "box cannot be used for tests",
        "box at test:///default",
    )
    assert bad.why in problem.why
    assert str(path) in problem.why
    assert bad.cure in problem.cure


@pytest.mark.parametrize(
    ("why", "told"),
    [
        ("Failed to get shared lock\nIs another process using the image [/x]?", "another process"),
        ("Could not open '/x': Permission denied", None),
    ],
)
def test_what_qemu_img_complains_of_is_understood(
    host: Host,
    hypervisor: Hypervisor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
    told: str | None,
) -> None:
    """A mock: a lock needs a QEMU, and a refusal another user than root."""

    def complain(*_: object, **__: object) -> None:
        raise ImageError("qemu-img info failed", where="/x", why=why)

    monkeypatch.setattr(images, "info", complain)
    (tmp_path / "box.qcow2").touch()
    problems = preflight.problems(box(host, hypervisor, disk(tmp_path / "box.qcow2")), None)
    assert [told in problem.why for problem in problems if told] == ([True] if told else [])


def test_a_raw_image_that_we_may_not_even_look_at_is_told(
    host: Host, hypervisor: Hypervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since root may look at everything."""
    raw, stat = tmp_path / "private" / "box.raw", os.stat

    def denied(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path).startswith(str(raw.parent)):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    domain = box(host, hypervisor, disk(raw, "raw"))
    monkeypatch.setattr(os, "stat", denied)
    (problem,) = conversion.problems(domain, conversion.planned(domain, "1"), "auto")
    assert "this user may not read it" in problem.why


def test_images_on_another_host_are_not_looked_at(host: Host, hypervisor: Hypervisor) -> None:
    hypervisor.is_local = False
    assert preflight.problems(box(host, hypervisor, disk("/lost.qcow2")), None) == []


@pytest.mark.parametrize("has_data", [True, False])
def test_a_snapshot_must_have_its_data_in_the_image(
    host: Host, hypervisor: Hypervisor, qemu_img: str, tmp_path: Path, has_data: bool
) -> None:
    image = qcow2(qemu_img, tmp_path / "box.qcow2")
    domain = box(host, hypervisor, disk(image))
    host.snapshot("installed")
    if has_data:
        subprocess.run([qemu_img, "snapshot", "-c", "installed", image], check=True)
    problem = preflight.snapshot_problem(domain, "installed")
    assert (problem is None) == has_data
    if problem is not None:
        assert problem.what == "the data of the snapshot 'installed' of box is gone"
        assert "the image of vda does not hold it" in problem.why
        assert "--metadata" in problem.cure


def test_an_external_snapshot_is_refused(
    host: Host, hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since the test driver makes no external ones."""
    domain = box(host, hypervisor)
    host.snapshot("installed")
    xml = libvirt.virDomainSnapshot.getXMLDesc
    monkeypatch.setattr(
        libvirt.virDomainSnapshot,
        "getXMLDesc",
        lambda self, flags=0: xml(self, flags).replace("'internal'", "'external'"),
    )
    problem = preflight.snapshot_problem(domain, "installed")
    assert problem is not None
    assert "it is an external one" in problem.why


# space for a snapshot


@pytest.mark.parametrize("state", ["running", "paused"])
def test_memory_that_does_not_fit_beside_the_image_is_refused(
    host: Host,
    hypervisor: Hypervisor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    """A mock of the free space: the real tier has a full disk."""
    domain = box(host, hypervisor, disk(tmp_path / "box.qcow2"), state=state)
    set_free(monkeypatch, 8 * MIB)
    space.check_space(domain)
    set_free(monkeypatch, 8 * MIB - 1)
    with pytest.raises(SnapshotError, match="there is no room for a snapshot") as caught:
        space.check_space(domain)
    assert f"up to 8.0 MiB in {tmp_path}" in caught.value.why
    assert "--kvmsnap-live=no" in caught.value.cure


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_a_machine_that_is_off_needs_no_room_for_memory(
    host: Host, hypervisor: Hypervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(monkeypatch, 0)
    space.check_space(box(host, hypervisor, disk(tmp_path / "box.qcow2")))


def test_a_failed_snapshot_is_explained_with_the_room_that_is_left(
    host: Host, hypervisor: Hypervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = box(host, hypervisor, disk(tmp_path / "box.qcow2"), state="running")
    set_free(monkeypatch, MIB)
    error = space.explain(domain, SnapshotError("it failed"))
    assert error.cure == f"is the disk full? 1.0 MiB are free in {tmp_path}"
    assert space.explain(domain, SnapshotError("it failed", cure="known")).cure == "known"


@pytest.mark.parametrize(("rss", "expected"), [({"rss": 5}, 5 * 1024), ({}, 8 * MIB)])
def test_the_memory_in_use_is_what_the_host_gives_else_all(
    host: Host,
    hypervisor: Hypervisor,
    monkeypatch: pytest.MonkeyPatch,
    rss: dict[str, int],
    expected: int,
) -> None:
    monkeypatch.setattr(libvirt.virDomain, "memoryStats", lambda _: rss)
    assert box(host, hypervisor, state="running").memory_in_use() == expected


# a domain that does not do as it is told


def refuse(*_: object, **__: object) -> None:
    raise libvirt.libvirtError("the mock says so")


def test_a_destroy_that_complains_and_works_is_no_error(
    host: Host, hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen after libvirt reconnected to a QEMU whose client had been killed."""
    domain = box(host, hypervisor, state="running")
    destroy = libvirt.virDomain.destroy

    def complaining(raw: libvirt.virDomain) -> None:
        destroy(raw)
        refuse()

    monkeypatch.setattr(libvirt.virDomain, "destroy", complaining)
    domain.destroy()
    assert domain.state() == "shut off"


def test_a_machine_that_does_not_shut_down_is_told(
    host: Host, hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = box(host, hypervisor, state="running")
    monkeypatch.setattr(libvirt.virDomain, "shutdown", lambda _: 0)
    with pytest.raises(MachineError, match="it did not shut down") as caught:
        domain.shutdown(0.05)
    assert caught.value.why == "waited 0.05 s"


def test_block_jobs_are_aborted(
    host: Host, hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = box(host, hypervisor, disk("/a"), disk("/b", target="vdb"), state="running")
    aborted: list[str] = []
    monkeypatch.setattr(
        libvirt.virDomain, "blockJobInfo", lambda _, target: {"type": 1} if target == "vdb" else {}
    )
    monkeypatch.setattr(
        libvirt.virDomain, "blockJobAbort", lambda _, target: aborted.append(target)
    )
    domain.end_block_jobs()
    assert aborted == ["vdb"]


@pytest.mark.parametrize(
    "call",
    ["state", "autostart", "snapshots", "snapshot_xmls", "current", "fingerprint", "xml", "start"],
)
def test_errors_of_libvirt_are_told_in_our_words(
    host: Host, hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    domain = box(host, hypervisor)
    for method in (
        *("state", "autostart", "listAllSnapshots", "hasCurrentSnapshot", "XMLDesc", "create"),
    ):
        monkeypatch.setattr(libvirt.virDomain, method, refuse)
    with pytest.raises(MachineError) as caught:
        getattr(domain, call)()
    assert caught.value.where == "box at test:///default"
    assert caught.value.why == "the mock says so"
    assert caught.value.__suppress_context__


# connections


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("Failed to acquire pid file '/r/run/driver.pid'", "another process is using /r,"),
        ("authentication unavailable: no polkit agent", "sudo usermod -aG libvirt "),
        ("Failed to connect socket to '/x': Permission denied", "sudo usermod -aG libvirt "),
        ("Failed to connect socket to '/x': No such file or directory", "start libvirtd"),
        ("unable to connect to server at 'h:1': Connection refused", "start libvirtd"),
        ("Name or service not known", "check the URI"),
    ],
)
def test_a_connection_that_fails_is_told_with_its_cure(
    host: Host, monkeypatch: pytest.MonkeyPatch, text: str, cure: str
) -> None:
    def failing(_: str | None) -> None:
        raise libvirt.libvirtError(text)

    monkeypatch.setattr(libvirt_api.libvirt, "open", failing)
    with pytest.raises(UsageProblem) as caught:
        connect("qemu:///embed?root=/r")
    assert caught.value.what == "cannot connect to qemu:///embed?root=/r"
    assert caught.value.why == text
    assert cure in caught.value.cure


@pytest.mark.parametrize(
    ("variable", "shown"), [("xen:///", "xen:///"), (None, "libvirt's default URI")]
)
def test_the_default_uri_is_named_as_far_as_it_is_known(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, shown: str
) -> None:
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    if variable is not None:
        monkeypatch.setenv("LIBVIRT_DEFAULT_URI", variable)
    monkeypatch.setattr(libvirt_api.libvirt, "open", refuse)
    with pytest.raises(UsageProblem, match=f"cannot connect to {shown}"):
        connect(None)


@pytest.mark.parametrize(
    ("uri", "is_local"),
    [
        ("qemu:///system", True),
        ("qemu+unix:///system?socket=/x", True),
        ("qemu+ssh://user@host/system", False),
        ("qemu+tls://host:123/system", False),
    ],
)
def test_a_uri_with_a_host_is_another_host(host: Host, uri: str, is_local: bool) -> None:
    assert Hypervisor(host.connection, uri).is_local is is_local
