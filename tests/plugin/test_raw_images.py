"""Raw images become qcow2 before the first test, and nothing half done is ever left."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from qemuimg import CONVERTING, fake_qemu_img, is_same
from testdriver import disk, node_file

from pytest_kvmsnap.machine import images
from pytest_kvmsnap.machine.libvirt_api import Hypervisor

if TYPE_CHECKING:
    from testdriver import Host, Suite

pytestmark = pytest.mark.usefixtures("qemu_img")

ONE_TEST = "def test_machine(vm): pass"


class Image:
    """A raw image of some MiB with holes, and what is made of it."""

    def __init__(self, folder: Path, name: str = "box") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.raw = folder / f"{name}.raw"
        self.qcow2 = folder / f"{name}.qcow2"
        with self.raw.open("wb") as file:
            file.write(b"start")
            file.truncate(3 * 2**20)
        self.content = self.raw.read_bytes()

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def assert_converted(self) -> None:
        assert self.raw.read_bytes() == self.content
        assert is_same(self.raw, self.qcow2)
        assert images.info(self.qcow2, "qcow2", in_use=False).virtual_size == 3 * 2**20

    def assert_as_found(self) -> None:
        assert self.names == [self.raw.name]
        assert self.raw.read_bytes() == self.content


@pytest.fixture
def image(suite: "Suite") -> Image:
    return Image(suite.pytester.path / "disk images")


def test_it_is_converted_before_the_first_test(suite: "Suite", host: "Host", image: Image) -> None:
    host.define("box", disk(image.raw, "raw"))
    before = host.look()
    suite.write(
        f"""
        def test_machine(vm):
            assert "{image.qcow2}" in vm.domain.XMLDesc(0)
            assert "type='raw'" not in vm.domain.XMLDesc(0)
            disk, = vm.disks()
            assert (disk.target, str(disk.path), disk.format) == ("vda", "{image.qcow2}", "qcow2")
            assert disk.virtual_size == 3 * 2**20 > disk.disk_size
            assert disk.snapshots == ()
        """
    )
    result = suite.run()
    result.assert_outcomes(passed=1)
    told = [line for line in result.outlines if line.startswith("kvmsnap: converted")]
    assert len(told) == 1
    assert told[0].startswith(f"kvmsnap: converted {image.raw} to box.qcow2 (")
    assert told[0].endswith("switched box to it; the raw file stays")
    assert result.stdout.str().count("back to raw: virsh -c test:///default edit box, with") == 1
    image.assert_converted()
    assert image.names == ["box.qcow2", "box.raw"]
    assert host.look().definition == before.definition.replace(
        str(image.raw), str(image.qcow2)
    ).replace("type='raw'", "type='qcow2'")
    assert suite.left_over() == []


def test_a_second_run_has_nothing_to_do(suite: "Suite", host: "Host", image: Image) -> None:
    host.define("box", disk(image.raw, "raw"))
    suite.write(ONE_TEST)
    suite.run().assert_outcomes(passed=1)
    made = image.qcow2.stat()
    result = suite.run()
    result.assert_outcomes(passed=1)
    assert "converted" not in result.stdout.str()
    assert image.qcow2.stat() == made


def test_mode_and_owner_of_the_raw_file_are_kept(
    suite: "Suite", host: "Host", image: Image
) -> None:
    image.raw.chmod(0o640)
    host.define("box", disk(image.raw, "raw"))
    suite.write(ONE_TEST)
    suite.run().assert_outcomes(passed=1)
    raw, made = image.raw.stat(), image.qcow2.stat()
    assert (made.st_mode, made.st_uid, made.st_gid) == (raw.st_mode, raw.st_uid, raw.st_gid)


def test_all_writable_raw_disks_and_no_others(suite: "Suite", host: "Host", image: Image) -> None:
    data = Image(image.folder, "data & <more> ü")
    seed, iso = Image(image.folder, "seed"), Image(image.folder, "cd")
    quoted = str(data.raw).replace("&", "&amp;").replace("<", "&lt;")
    host.define(
        "box",
        disk(image.raw, "raw"),
        disk(quoted, "raw", target="vdb"),
        disk(seed.raw, "raw", target="vdc", more="<readonly/>"),
        disk(iso.raw, "raw", target="sda", device="cdrom"),
        disk(None, "raw", target="sdb", device="cdrom"),
        disk(f"{image.folder}/ready.qcow2", target="vdd"),
    )
    suite.write(ONE_TEST)
    suite.run().assert_outcomes(passed=1)
    image.assert_converted()
    data.assert_converted()
    assert not seed.qcow2.exists()
    assert not iso.qcow2.exists()


def test_all_machines_are_converted_in_one_go_and_each_is_switched_once(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, other = Image(image.folder, "data"), Image(image.folder.with_name("elsewhere"), "other")
    host.define("box", disk(image.raw, "raw"), disk(data.raw, "raw", target="vdb"))
    host.define("other", disk(other.raw, "raw"))
    log: list[str] = []
    convert_all, define = images.convert_all, Hypervisor.define

    def recording_convert_all(jobs: list[tuple[Path, Path]], *args: Any) -> None:
        convert_all(jobs, *args)
        log.append(f"converted {len(jobs)}")

    def recording_define(self: Hypervisor, xml: str) -> None:
        define(self, xml)
        log.append("defined")

    monkeypatch.setattr(images, "convert_all", recording_convert_all)
    monkeypatch.setattr(Hypervisor, "define", recording_define)
    write_two(suite)
    result = suite.run()
    result.assert_outcomes(passed=2)
    assert log[:3] == ["converted 3", "defined", "defined"]
    assert log.count("converted 3") == len([line for line in log if "converted" in line])
    for each in (image, data, other):
        each.assert_converted()
    told = [line.split(" ")[1] for line in result.outlines if line.startswith("kvmsnap:")]
    assert told == ["converted", "converted", "back", "converted", "back", suite.uri]
    assert suite.left_over() == []


def write_two(suite: "Suite") -> None:
    suite.write(
        """
        import pytest

        @pytest.mark.parametrize("vm", ["box", "other"], indirect=True)
        def test_machine(vm): pass
        """
    )


def test_there_is_one_display_of_the_progress(
    suite: "Suite", host: "Host", image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Image(image.folder, "other")
    host.define("box", disk(image.raw, "raw"))
    host.define("other", disk(other.raw, "raw"))
    write_two(suite)
    suite.pytester.makeconftest(
        """
        def pytest_sessionstart(session):  # as on a terminal
            terminal = session.config.pluginmanager.get_plugin("terminalreporter")
            terminal.isatty = type(terminal.isatty)(True)  # not everywhere a bool
        """
    )
    suite.run("--color=no").assert_outcomes(passed=2)
    out = capsys.readouterr().out
    shown = re.findall(r"\rkvmsnap: converting raw images +(\d+) %", out)
    assert out.count("converting") == len(shown)
    assert out.count("\n", out.index("converting"), out.rindex("converting")) == 0
    assert [int(percent) for percent in shown] == sorted(int(percent) for percent in shown)
    assert shown[-1] == "100"


def test_a_machine_that_no_selected_test_uses_is_left_alone(
    suite: "Suite", host: "Host", image: Image
) -> None:
    host.define("box", disk(image.raw, "raw"))
    host.define("other", state="running")
    suite.write(
        """
        import pytest

        def test_machine(vm): pass

        @pytest.mark.kvm_domain("other")
        def test_other(vm): pass

        @pytest.mark.skip(reason="statically")
        def test_skipped(vm): pass
        """
    )
    suite.run("-k", "other or skipped").assert_outcomes(passed=1, skipped=1, deselected=1)
    image.assert_as_found()


@pytest.mark.parametrize(
    "option", ["--collect-only", "--fixtures", "--fixtures-per-test", "--setup-plan"]
)
def test_a_run_that_only_shows_something_converts_nothing(
    suite: "Suite", host: "Host", image: Image, option: str
) -> None:
    host.define("box", disk(image.raw, "raw"))
    before = host.look()
    suite.write(ONE_TEST)
    assert suite.run(option).ret == 0
    assert host.look() == before
    image.assert_as_found()


def test_a_collection_error_converts_nothing(suite: "Suite", host: "Host", image: Image) -> None:
    host.define("box", disk(image.raw, "raw"))
    suite.pytester.makepyfile(test_one=ONE_TEST, test_two="import nowhere_to_be_found")
    suite.run().assert_outcomes(errors=1)
    image.assert_as_found()


def test_a_problem_of_another_machine_converts_nothing(
    suite: "Suite", host: "Host", image: Image
) -> None:
    host.define("box", disk(image.raw, "raw"))
    before = host.look()
    suite.write(
        """
        import pytest

        @pytest.mark.parametrize("vm", ["box", "nowhere"], indirect=True)
        def test_machine(vm): pass
        """
    )
    assert suite.run().ret == pytest.ExitCode.USAGE_ERROR
    assert host.look() == before
    image.assert_as_found()


def test_a_machine_that_is_asked_for_at_run_time_is_converted_then(
    suite: "Suite", host: "Host", image: Image
) -> None:
    host.define("box", disk(image.raw, "raw"))
    suite.write("def test_machine(request): request.getfixturevalue('vm')")
    suite.run().assert_outcomes(passed=1)
    image.assert_converted()


# what goes wrong on the way


def run_and_fail(suite: "Suite", status: int, *texts: str) -> None:
    suite.write(ONE_TEST)
    result = suite.run()
    out = result.stdout.str() + result.stderr.str()
    assert result.ret == status, out
    for text in texts:
        assert out.count(text) == 1, out
    assert "Traceback" not in out


def test_a_definition_that_cannot_be_switched(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since the test driver takes every definition."""
    from pytest_kvmsnap.errors import MachineError

    def refuse(self: Hypervisor, xml: str) -> None:
        raise MachineError("cannot define the domain", where="test:///default", why="mocked")

    host.define("box", disk(image.raw, "raw"))
    before = host.look()
    suite.write(ONE_TEST)
    with monkeypatch.context() as patched:  # undo() would take back pytester's chdir too
        patched.setattr(Hypervisor, "define", refuse)
        assert suite.run().ret != 0
    assert host.look() == before
    image.assert_as_found()
    suite.run().assert_outcomes(passed=1)
    image.assert_converted()


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C through, which a shell's background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_while_converting(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake qemu-img presses it, and would go on for ever."""
    host.define("box", disk(image.raw, "raw"))
    before = host.look()
    bin_folder = suite.pytester.path / "bin"
    script = f"if {CONVERTING}; then echo $$ >{bin_folder}/pid; kill -INT $PPID; exec sleep 600; fi"
    fake_qemu_img(monkeypatch, bin_folder, f'{script}; exec $real "$@"')
    suite.write(ONE_TEST)
    assert suite.run().ret == pytest.ExitCode.INTERRUPTED
    assert host.look() == before
    image.assert_as_found()
    assert suite.left_over() == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((bin_folder / "pid").read_text()), 0)


def fail_for(
    suite: "Suite", monkeypatch: pytest.MonkeyPatch, image: Image, script: str = "exit 1"
) -> None:
    """Put in a fake qemu-img that does something else with one image than to convert it."""
    this = f'case "$*" in *{image.raw.name}*) {CONVERTING} && {{ {script}; }} ;; esac'
    fake_qemu_img(monkeypatch, suite.pytester.path / "bin", f'{this}; exec $real "$@"')


def test_a_full_disk_while_converting(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake qemu-img, since filling a disk needs one of our own (the real tier does)."""
    fail_for(suite, monkeypatch, image, "echo No space left on device >&2; exit 1")
    host.define("box", disk(image.raw, "raw"))
    before = host.look()
    run_and_fail(
        suite,
        pytest.ExitCode.USAGE_ERROR,
        "cannot convert the raw disk vda of box to qcow2",
        "why:   No space left on device",
        "the raw image is untouched",
    )
    assert host.look() == before
    image.assert_as_found()
    assert suite.left_over() == []


def test_a_machine_whose_conversion_fails_keeps_all_from_being_switched(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Image(image.folder.with_name("elsewhere"), "bad")
    host.define("box", disk(image.raw, "raw"))
    host.define("other", disk(bad.raw, "raw"))
    before = host.looks()
    write_two(suite)
    with monkeypatch.context() as patched:
        fail_for(suite, patched, bad)
        result = suite.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*cannot convert the raw disk vda of other to qcow2"])
    assert "kvmsnap: converted" not in result.stdout.str()
    assert host.looks() == before
    image.assert_as_found()
    bad.assert_as_found()
    assert suite.left_over() == []
    suite.run().assert_outcomes(passed=2)


def test_a_machine_that_cannot_be_switched_leaves_those_before_it_switched_as_a_whole(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake qemu-img makes the target of the second disk of the second machine."""
    good, bad = Image(image.folder, "good"), Image(image.folder, "bad")
    host.define("box", disk(image.raw, "raw"))
    host.define("other", disk(good.raw, "raw"), disk(bad.raw, "raw", target="vdb"))
    before = host.looks()
    fail_for(suite, monkeypatch, bad, f"echo precious >'{bad.qcow2}'")
    write_two(suite)
    result = suite.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = [line for line in result.outlines if line.startswith("kvmsnap: converted")]
    assert len(told) == 1
    assert f"{image.raw} to box.qcow2" in told[0]
    image.assert_converted()
    assert str(image.qcow2) in host.look("box").definition
    assert host.look("other") == before["other"]
    assert bad.qcow2.read_text() == "precious\n"
    assert image.names == ["bad.qcow2", "bad.raw", "box.qcow2", "box.raw", "good.raw"]
    assert suite.left_over() == []


def test_an_image_that_is_written_to_while_converting(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_for(suite, monkeypatch, image, f"touch '{image.raw}'")
    host.define("box", disk(image.raw, "raw"))
    run_and_fail(
        suite,
        pytest.ExitCode.USAGE_ERROR,
        "the raw image changed meanwhile: something wrote to it",
    )
    image.assert_as_found()


def test_a_machine_that_is_started_while_converting(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock: QEMU's lock keeps it from running while its image is read, not right after."""
    convert_all = images.convert_all

    def and_start(*args: Any) -> None:
        convert_all(*args)
        host.domain().create()

    host.define("box", disk(image.raw, "raw"))
    before = host.look()
    monkeypatch.setattr(images, "convert_all", and_start)
    run_and_fail(
        suite,
        pytest.ExitCode.USAGE_ERROR,
        "the disks of box cannot be switched to qcow2",
        "somebody started the machine",
    )
    assert host.look() == before._replace(state="running")
    image.assert_as_found()


def test_no_qemu_img(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(suite.pytester.mkdir("empty")))
    host.define("box", disk(image.raw, "raw"))
    run_and_fail(
        suite, pytest.ExitCode.USAGE_ERROR, "cannot run qemu-img", "install it: qemu-utils"
    )
    image.assert_as_found()


def test_a_folder_that_takes_no_more_files(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is too long with our ending."""
    image = Image(image.folder, "x" * 240)
    host.define("box", disk(image.raw, "raw"))
    run_and_fail(
        suite,
        pytest.ExitCode.USAGE_ERROR,
        "cannot convert the raw disk vda of box to qcow2",
        "File name too long",
    )


def test_not_enough_space(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since a raw image that does not fit is larger than a test should make."""
    monkeypatch.setattr(images, "space_needed", lambda _: 2**62)
    host.define("box", disk(image.raw, "raw"))
    run_and_fail(
        suite,
        pytest.ExitCode.USAGE_ERROR,
        "not enough space to convert the images of box",
        f"where: {image.folder}",
        "make room there",
    )
    image.assert_as_found()


@pytest.mark.parametrize(
    ("live", "size", "needs"),
    [("no", 6, "12.0 MiB"), ("yes", 2, "12.2 MiB with a snapshot of each machine")],
)
def test_space_is_looked_at_over_all_machines_of_a_file_system(
    suite: "Suite",
    host: "Host",
    image: Image,
    monkeypatch: pytest.MonkeyPatch,
    live: str,
    size: int,
    needs: str,
) -> None:
    """A mock of sizes: each machine alone would fit.

    A snapshot with the 8 MiB of memory takes half of that and a 64th at least.
    """
    monkeypatch.setattr(images, "space_needed", lambda _: size * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=11 * 2**20))
    other = Image(image.folder.with_name("elsewhere"), "other")
    host.define("box", disk(image.raw, "raw"))
    host.define("other", disk(other.raw, "raw"))
    before = host.looks()
    write_two(suite)
    option = f"--kvmsnap-live={live}"
    result = suite.run(option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [
            "*not enough space to convert the images of box and other",
            f"  where: {image.folder}, {other.folder}",
            f"  why:   needs up to {needs}, has 11.0 MiB",
        ]
    )
    assert "of box and other" in suite.run("--kvmsnap-plan", option).stdout.str()
    assert host.looks() == before
    suite.write(ONE_TEST)
    suite.run(option).assert_outcomes(passed=1)


def test_two_machines_whose_images_would_get_one_name(
    suite: "Suite", host: "Host", image: Image
) -> None:
    link = suite.pytester.path / "link"
    link.symlink_to(image.folder)
    (image.folder / "box.img").write_bytes(image.content)
    host.define("box", disk(image.raw, "raw"))
    host.define("other", disk(link / "box.img", "raw"))
    write_two(suite)
    result = suite.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    out = result.stderr.str()
    assert f"another raw disk would become {image.qcow2} too" in out
    assert f"another raw disk would become {link / 'box.qcow2'} too" in out
    assert image.names == ["box.img", "box.raw"]


# what is not converted


REFUSED = {
    "encrypted": (
        disk("{raw}", "raw", target="vdb", more="<encryption format='luks'/>"),
        "its definition says that it is encrypted",
    ),
    "backing file": (
        disk(
            "{raw}",
            "raw",
            target="vdb",
            more="<backingStore type='file'><format type='raw'/><source file='/x'/></backingStore>",
        ),
        "its definition names a backing file, which a raw image cannot have",
    ),
    "slice": (
        disk("{raw}", "raw", target="vdb").replace(
            "/><target",
            "><slices><slice type='storage' offset='0' size='512'/></slices></source><target",
        ),
        "its definition says that only a slice of the file is the disk",
    ),
    "shareable": (
        disk("{raw}", "raw", target="vdb", more="<shareable/>"),
        "it is shareable, and libvirt shares raw images only",
    ),
    "volume": (
        "<disk type='volume' device='disk'><driver name='qemu' type='raw'/>"
        "<source pool='p' volume='v'/><target dev='vdb'/></disk>",
        "it is no file of this host, but a volume of a pool or on the network",
    ),
    "network": (
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/>"
        "<source protocol='nbd' name='x'><host name='h'/></source><target dev='vdb'/></disk>",
        "it is no file of this host, but a volume of a pool or on the network",
    ),
}


@pytest.mark.parametrize("convert", ["auto", "check"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_disk_that_is_more_or_less_than_its_file_keeps_all_of_the_machine_raw(
    suite: "Suite", host: "Host", image: Image, kind: str, convert: str
) -> None:
    second = Image(image.folder, "second")
    element, words = REFUSED[kind]
    host.define("box", disk(image.raw, "raw"), element.format(raw=second.raw))
    before = host.look()
    suite.write(ONE_TEST)
    result = suite.run(f"--kvmsnap-convert={convert}")
    out = result.stderr.str()
    assert result.ret == pytest.ExitCode.USAGE_ERROR, out
    assert out.count("the raw disk vdb of box cannot be converted to qcow2") == 1
    assert out.count(words) == 1
    assert "raw disk vda" not in out
    assert host.look() == before
    assert image.names == ["box.raw", "second.raw"]


def test_check_lists_what_would_be_converted_and_the_space_that_takes(
    suite: "Suite", host: "Host", image: Image
) -> None:
    with image.raw.open("r+b") as file:
        file.write(os.urandom(2 * 2**20))
    data, other = Image(image.folder, "data ü"), Image(image.folder, "other")
    host.define("box", disk(image.raw, "raw"), disk(data.raw, "raw", target="vdb"))
    host.define("other", disk(other.raw, "raw"))
    before = host.looks()
    write_two(suite)
    result = suite.run("--kvmsnap-convert=check")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.assert_outcomes()
    result.stderr.fnmatch_lines(
        [
            "*2 problems must be solved before the first test can run*",
            "*box has raw disks, and internal snapshots need qcow2",
            f"*vda: {image.raw} (would become {image.qcow2}, and take up to 2.3 MiB)",
            f"*vdb: {data.raw} (would become {data.qcow2}, and take up to 0.4 MiB)",
            "*and kvmsnap's option convert is 'check'",
            "*let them be converted with --kvmsnap-convert=auto (the raw files stay)",
            "*other has raw disks, and internal snapshots need qcow2",
            f"*vda: {other.raw} (would become {other.qcow2}, and take up to 0.4 MiB)",
        ]
    )
    assert host.looks() == before
    assert image.names == ["box.raw", "data ü.raw", "other.raw"]
    assert suite.left_over() == []


def test_never_fails_where_one_is_met(suite: "Suite", host: "Host", image: Image) -> None:
    host.define("box", disk(image.raw, "raw"))
    host.define("other")
    suite.write(
        """
        import pytest

        def test_late(request):
            request.getfixturevalue("vm")

        @pytest.mark.kvm_domain("other")
        def test_other(vm): pass
        """
    )
    result = suite.run("--kvmsnap-convert=never")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*box has raw disks, and internal snapshots need qcow2*"])
    image.assert_as_found()


# killed on the way: the state of the test driver dies with its process, so it comes from a file


def run_and_kill(suite: "Suite", *images: Image) -> str:
    """Run on a machine with these disks until the run is killed; return its URI."""
    file = suite.pytester.path / "node.xml"
    disks = [disk(each.raw, "raw", target=f"vd{n}") for n, each in zip("ab", images, strict=True)]
    file.write_text(node_file(*disks, state="shut off"))
    assert suite.run_apart(f"--kvmsnap-uri=test://{file}").ret == -signal.SIGKILL
    return f"--kvmsnap-uri=test://{file}"


def assert_the_next_run_cleans(suite: "Suite", uri: str, *images: Image) -> None:
    result = suite.run_apart(uri, "--kvmsnap-clean")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["kvmsnap: put box back as found*"])
    assert images[0].names == sorted(each.raw.name for each in images)
    assert suite.left_over() == []


def test_a_kill_while_converting_leaves_no_half_file_after_the_next_run(
    suite: "Suite", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake qemu-img kills the run that started it when the second disk is converted."""
    second = Image(image.folder, "second")
    suite.write(ONE_TEST)
    with monkeypatch.context() as patched:
        fail_for(suite, patched, second, "kill -9 $PPID; exit 1")
        uri = run_and_kill(suite, image, second)
    assert (image.raw.read_bytes(), second.raw.read_bytes()) == (image.content,) * 2
    assert len(image.names) == 4
    assert not image.qcow2.exists()
    assert_the_next_run_cleans(suite, uri, image, second)


@pytest.mark.parametrize("step", ["images.flush", "Hypervisor.define"])
def test_a_kill_when_the_images_have_their_names_is_cleaned_too(
    suite: "Suite", image: Image, step: str
) -> None:
    """The first time that a folder is flushed one of two images has its name."""
    second = Image(image.folder, "second")
    suite.write(
        ONE_TEST,
        conftest=f"""
        import os, signal
        from pytest_kvmsnap.machine import images
        from pytest_kvmsnap.machine.libvirt_api import Hypervisor

        real = {step}

        def kill(*args):
            if isinstance(args[0], Hypervisor) or args[0].is_dir():
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        {step} = kill
        """,
    )
    uri = run_and_kill(suite, image, second)
    assert image.qcow2.exists()
    assert second.qcow2.exists() is (step == "Hypervisor.define")
    suite.pytester.makeconftest("")
    assert_the_next_run_cleans(suite, uri, image, second)
