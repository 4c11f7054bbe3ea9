"""Images by the real qemu-img, and what is looked at before a machine is used.

The domains are the test driver's, told to be QEMU's where the code looks at images of those only.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import libvirt
import pytest
from qemuimg import fake_qemu_img, is_same
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


def qcow2(qemu_img: str, path: Path, *more: str | bytes) -> Path:
    subprocess.run([qemu_img, "create", "-qf", "qcow2", *more, path, "3M"], check=True)
    return path


# qemu-img


ODD_NAMES = ["plain", "two words", "json:{}", "nbd:host", "file:x", "a,b=c", "ü☃", "-f", "a:b"]


def target(path: Path) -> Path:
    path.touch(mode=0o600)
    return path


def nothing(_: float) -> None:
    pass


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_image_of_any_name_is_measured_and_converted(
    qemu_img: str, tmp_path: Path, name: str
) -> None:
    assert qemu_img
    raw, made = tmp_path / f"{name}.raw", target(tmp_path / f"{name}.qcow2")
    raw.write_bytes(os.urandom(MIB).ljust(3 * MIB, b"\0"))
    heard: list[float] = []
    images.convert_all([(raw, made)], heard.append)
    images.check_raw_is_free(raw)
    told = images.info(made, "qcow2", in_use=False)
    assert (told.virtual_size, told.snapshots, told.backing_file) == (3 * MIB, (), None)
    assert made.stat().st_size <= images.space_needed(raw)
    assert made.stat().st_size < 2 * MIB
    assert made.stat().st_mode & 0o777 == 0o600
    assert is_same(raw, made)
    assert heard[-1] == 100
    assert heard == sorted(heard)


def test_a_raw_image_that_pretends_to_be_another_is_copied_and_not_followed(
    qemu_img: str, tmp_path: Path
) -> None:
    """A guest can write a qcow2 header into its raw disk, and point it at a file of the host."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret".ljust(3 * MIB, b"\0"))
    raw = qcow2(qemu_img, tmp_path / "box.raw", "-b", str(secret), "-F", "raw")
    size = raw.stat().st_size
    made = target(tmp_path / "box.qcow2")
    images.convert_all([(raw, made)], nothing)
    told = images.info(made, "qcow2", in_use=False)
    assert told.backing_file is None
    assert told.virtual_size == -(-size // 512) * 512
    assert images.info(raw, "raw", in_use=False).backing_file is None
    assert b"secret" not in made.read_bytes().replace(str(secret).encode(), b"")


def test_snapshots_and_backing_files_are_told(qemu_img: str, tmp_path: Path) -> None:
    base = qcow2(qemu_img, tmp_path / "base.qcow2")
    top = qcow2(qemu_img, tmp_path / "top.qcow2", "-b", str(base), "-F", "qcow2")
    for name in ("one", "zwei ü"):
        subprocess.run([qemu_img, "snapshot", "-c", name, top], check=True)
    told = images.info(top, "qcow2", in_use=True)
    assert told.snapshots == ("one", "zwei ü")
    assert (told.backing_file, told.backing_format) == (str(base), "qcow2")
    assert (told.data_file, told.encrypted) == (None, False)


def test_data_files_and_encryption_are_told_without_opening_them(
    qemu_img: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    split = qcow2(qemu_img, tmp_path / "split.qcow2", "-o", f"data_file={data}")
    data.unlink()
    assert images.info(split, "qcow2", in_use=False).data_file == str(data)
    assert images.info(locked(qemu_img, tmp_path), "qcow2", in_use=False).encrypted


def locked(qemu_img: str, folder: Path) -> Path:
    options = "encrypt.format=aes,encrypt.key-secret=key"  # luks takes 3 s
    key = ("--object", "secret,id=key,data=key")
    return qcow2(qemu_img, folder / "locked.qcow2", *key, "-o", options)


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


def test_a_name_that_is_no_text_is_no_trouble(qemu_img: str, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.qcow2"))
    path.write_bytes(b"no qcow2")
    with pytest.raises(ImageError, match="qemu-img info failed"):
        images.info(path, "qcow2", in_use=False)
    path.unlink()
    assert images.info(qcow2(qemu_img, path), "qcow2", in_use=False).virtual_size == 3 * MIB


def test_without_qemu_img_its_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (
        lambda: images.space_needed(tmp_path),
        lambda: images.convert_all([(tmp_path, tmp_path)], nothing),
        lambda: images.chain_problem(tmp_path, "raw", [tmp_path], in_use=False),
    ):
        with pytest.raises(ImageError, match="cannot run qemu-img") as caught:
            call()
        assert "qemu-utils on Debian" in caught.value.cure


# several images at once; qemu-img is a stand-in where it must do something at the right moment


def raws(folder: Path, *mebibytes: int) -> list[tuple[Path, Path]]:
    """Make raw images with so much data each, and files for their copies."""
    jobs = []
    for number, size in enumerate(mebibytes):
        raw = folder / f"{number}.raw"
        raw.write_bytes(os.urandom(size * MIB))
        jobs.append((raw, target(folder / f"{number}.qcow2")))
    return jobs


def set_cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))


def wait_for(condition: str) -> str:
    """Return shell code that waits, 20 s at most."""
    return f"for n in $(seq 2000); do {condition} && break; sleep 0.01; done"


def test_as_many_are_converted_at_a_time_as_there_are_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    set_cores(monkeypatch, 2)
    two = wait_for(f"[ $(grep -c + {log}) -ge 2 ]")
    fake_qemu_img(
        monkeypatch, tmp_path / "bin", f"echo + >>{log}; {two}; sleep 0.2; echo - >>{log}"
    )
    images.convert_all(raws(tmp_path, 1, 1, 1, 1, 1), nothing)
    running = list(itertools.accumulate(int(f"{line}1") for line in log.read_text().split()))
    assert len(running) == 10
    assert max(running) == 2


def test_the_progress_is_one_and_weighted_by_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 1 MiB waits until one of 3 MiB was heard of."""
    go_on = tmp_path / "go-on"
    stay = f"case $* in *0.raw*) {wait_for(f'[ -e {go_on} ]')} ;; esac"
    done = "echo '    (50.00/100%)'; echo '    (100.00/100%)'"
    fake_qemu_img(monkeypatch, tmp_path / "bin", f"{stay}; {done}")
    set_cores(monkeypatch, 2)
    jobs = raws(tmp_path, 1, 3)
    small, large = (raw.stat().st_blocks for raw, _ in jobs)
    heard: list[float] = []

    def hear(percent: float) -> None:
        heard.append(percent)
        if percent == 100 * large / (small + large):
            go_on.touch()

    images.convert_all(jobs, hear)
    assert go_on.exists()
    assert heard[-1] == 100
    assert heard == sorted(heard)


def assert_ended(pids: list[str]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_the_first_failure_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    both = wait_for(f"[ $(grep -c . {pids}) -ge 2 ]")
    fail = f"case $* in *0.raw*) {both}; echo cause >&2; exit 1 ;; esac"
    fake_qemu_img(monkeypatch, tmp_path / "bin", f"echo $$ >>{pids}; {fail}; exec sleep 600")
    set_cores(monkeypatch, 2)
    jobs = raws(tmp_path, 1, 1, 1)
    with pytest.raises(ImageError, match="qemu-img convert failed") as caught:
        images.convert_all(jobs, nothing)
    assert (caught.value.where, caught.value.why) == (str(jobs[0][0]), "cause\n")
    begun = pids.read_text().split()
    assert len(begun) >= 2
    assert_ended(begun)


@pytest.mark.parametrize("cores", [1, 2])
def test_ctrl_c_ends_all_and_begins_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    pids = tmp_path / "pids"
    script = f"echo $$ >>{pids}; echo '    (1.00/100%)'; exec sleep 600"
    fake_qemu_img(monkeypatch, tmp_path / "bin", script)
    set_cores(monkeypatch, cores)

    def interrupt(percent: float) -> None:
        if percent == cores / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        images.convert_all(raws(tmp_path, 1, 1), interrupt)
    begun = pids.read_text().split()
    assert len(begun) == cores
    assert_ended(begun)


CHANGES = {
    "written to": "echo x | dd of=$raw conv=notrunc",
    "longer": "echo x >>$raw",
    "written to, with its time put back": "cp -p $raw $raw.b; echo x >>$raw; cp -p $raw.b $raw",
    "replaced": "cp -p $raw $raw.b; mv $raw.b $raw",
    "gone": "rm $raw",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_raw_image_that_changes_meanwhile_is_told(
    qemu_img: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """It is the first of two, and changes after its own copy is complete."""
    assert qemu_img
    jobs = raws(tmp_path, 1, 1)
    set_cores(monkeypatch, 1)
    late = f"case $* in *1.raw*) raw={jobs[0][0]}; {CHANGES[change]} ;; esac"
    fake_qemu_img(monkeypatch, tmp_path / "bin", f'{late}; exec $real "$@"')
    with pytest.raises(ImageError) as caught:
        images.convert_all(jobs, nothing)
    assert caught.value.where == str(jobs[0][0])
    assert ("No such file" if change == "gone" else "changed meanwhile") in caught.value.why


def test_a_copy_that_does_not_get_to_the_disk_is_told(
    qemu_img: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since a disk that fails so late cannot be had."""
    assert qemu_img

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    (job,) = raws(tmp_path, 1)
    with pytest.raises(ImageError) as caught:
        images.convert_all([job], nothing)
    assert (caught.value.where, "Input/output" in caught.value.why) == (str(job[0]), True)


def test_a_qemu_img_that_a_killed_run_left_is_ended_and_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        subprocess.Popen([*command, f"file:{tmp_path}/ours"]) as ours,
        subprocess.Popen([*command, f"file:{tmp_path}/ours.too"]) as other,
    ):
        images.end_writers(tmp_path / "ours")
        assert ours.wait() == -signal.SIGKILL
        assert other.poll() is None
        other.kill()


# images that strangers may have made


@pytest.fixture
def safe(tmp_path: Path) -> Path:
    folder = tmp_path / "images ü"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", ["absolute", "relative"])
def test_a_chain_within_the_folders_is_no_problem(
    qemu_img: str, tmp_path: Path, safe: Path, name: str
) -> None:
    second = tmp_path / "more"
    second.mkdir()
    base = safe / "base.raw"
    base.write_bytes(bytes(3 * MIB))
    middle = qcow2(qemu_img, second / "middle.qcow2", "-b", str(base), "-F", "raw")
    named = "../more/middle.qcow2" if name == "relative" else str(middle)
    top = qcow2(qemu_img, safe / "top.qcow2", "-b", named, "-F", "qcow2")
    assert images.chain_problem(top, "qcow2", [safe, second], in_use=False) is None
    assert images.chain_problem(base, "raw", [safe], in_use=False) is None
    (tmp_path / "link").symlink_to(safe)
    (second / "top").symlink_to(top)
    assert (
        images.chain_problem(tmp_path / "link" / "top.qcow2", "qcow2", [safe, second], in_use=False)
        is None
    )
    problem = images.chain_problem(top, "qcow2", [safe], in_use=False)
    assert problem == f"{safe / named} is outside of the image folders ({safe})"


def test_a_relative_backing_file_is_looked_for_beside_the_link_as_qemu_does(
    qemu_img: str, tmp_path: Path, safe: Path
) -> None:
    """What lies beside the image itself is not what QEMU opens."""
    qcow2(qemu_img, safe / "base.qcow2")
    top = qcow2(qemu_img, safe / "top.qcow2", "-b", "base.qcow2", "-F", "qcow2")
    link = tmp_path / "top.qcow2"
    link.symlink_to(top)
    assert images.chain_problem(top, "qcow2", [safe], in_use=False) is None
    problem = images.chain_problem(link, "qcow2", [safe], in_use=False)
    assert problem == f"{tmp_path / 'base.qcow2'} is outside of the image folders ({safe})"


HOSTILE: dict[str, tuple[list[str | bytes], str]] = {
    "elsewhere": (["-b", "/etc/hostname", "-F", "raw"], "/etc/hostname is outside of the image"),
    "upwards": (["-b", "../x", "-F", "raw"], "/../x is outside of the image folders"),
    "by a link": (["-b", "link", "-F", "raw"], "/link is outside of the image folders"),
    "json": (["-b", 'json:{"driver": "null-co"}', "-F", "raw"], "is no plain file: json:{"),
    "nbd": (["-b", "nbd://host/x", "-F", "raw"], "is no plain file: nbd://host/x"),
    "file by protocol": (["-b", "file:/x", "-F", "raw"], "is no plain file: file:/x"),
    "odd format": (["-b", "base.qcow2", "-F", "vmdk"], "is in the format vmdk; only qcow2 and raw"),
    "lost": (["-b", "lost.qcow2", "-F", "qcow2"], "lost.qcow2 cannot be read as qcow2: "),
    "itself": (["-b", "top.qcow2", "-F", "qcow2"], "top.qcow2 is based on itself"),
    "round": (["-b", "round.qcow2", "-F", "qcow2"], "is based on itself: its backing files go"),
    "no text": (["-b", b"\xff\xfe", "-F", "qcow2"], "cannot be read as qcow2"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_chain_that_leads_elsewhere_is_refused(qemu_img: str, safe: Path, kind: str) -> None:
    arguments, words = HOSTILE[kind]
    (safe / "link").symlink_to("/etc/hostname")
    qcow2(qemu_img, safe / "base.qcow2")
    qcow2(qemu_img, safe / "round.qcow2", "-u", "-b", "top.qcow2", "-F", "qcow2")
    top = qcow2(qemu_img, safe / "top.qcow2", "-u", *arguments)
    problem = images.chain_problem(top, "qcow2", [safe], in_use=False)
    assert words in (problem or "")


def test_a_backing_file_without_a_format_is_refused(qemu_img: str, safe: Path) -> None:
    """qemu-img makes none any more, so the header's entry for the format is overwritten."""
    qcow2(qemu_img, safe / "base.qcow2")
    top = qcow2(qemu_img, safe / "top.qcow2", "-b", "base.qcow2", "-F", "qcow2")
    header = top.read_bytes()
    assert header.count(b"\xe2\x79\x2a\xca") == 1
    top.write_bytes(header.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78"))
    problem = images.chain_problem(top, "qcow2", [safe], in_use=False)
    assert problem == (
        f"{top} does not name the format of its backing file base.qcow2, and formats are not"
        " guessed"
    )


@pytest.mark.parametrize("is_below", [False, True])
@pytest.mark.parametrize("kind", ["data file", "encryption"])
def test_data_files_and_encryption_are_refused_anywhere_in_a_chain(
    qemu_img: str, safe: Path, kind: str, is_below: bool
) -> None:
    if kind == "encryption":
        image, words = locked(qemu_img, safe), "locked.qcow2 is encrypted"
    else:
        data = safe / "data"
        image = qcow2(qemu_img, safe / "split.qcow2", "-o", f"data_file={data}")
        words = f"split.qcow2 keeps its data in another file: {data}"
    if is_below:
        below = ("-u", "-b", image.name, "-F", "qcow2")
        image = qcow2(qemu_img, safe / "top.qcow2", *below)
    assert words in (images.chain_problem(image, "qcow2", [safe], in_use=False) or "")


def test_what_a_chain_leads_to_is_not_opened_before_it_is_known_to_be_safe(
    qemu_img: str, safe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = qcow2(qemu_img, safe / "top.qcow2", "-u", "-b", "/etc/hostname", "-F", "raw")
    looked_at: list[Path] = []
    info = images.info

    def recording(path: Path, image_format: str, *, in_use: bool) -> images.ImageInfo:
        looked_at.append(path)
        return info(path, image_format, in_use=in_use)

    monkeypatch.setattr(images, "info", recording)
    assert images.chain_problem(top, "qcow2", [safe], in_use=False) is not None
    assert looked_at == [top]


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


def test_guest_that_is_off_before_libvirt_is_done_asking_it(
    host: Host, hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, of what a guest did on a busy computer."""
    domain = box(host, hypervisor, state="running")

    def shutdown(self: libvirt.virDomain) -> None:
        self.destroy()
        raise libvirt.libvirtError("domain is not running")

    monkeypatch.setattr(libvirt.virDomain, "shutdown", shutdown)
    domain.shutdown(5)
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
