"""Raw images become qcow2 before the first test, and nothing half done is ever left."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
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
        assert images.is_same(self.raw, self.qcow2)
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
    assert "kvmsnap:" not in result.stdout.str()
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


def test_ctrl_c_while_converting(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock, since no conversion is long enough to press Ctrl-C in."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    host.define("box", disk(image.raw, "raw"))
    before = host.look()
    monkeypatch.setattr(images, "is_same", interrupted)
    suite.write(ONE_TEST)
    assert suite.run().ret == pytest.ExitCode.INTERRUPTED
    assert host.look() == before
    image.assert_as_found()


FAKE = {
    "no space left": "#!/bin/sh\n"
    "[ $1 = convert ] && echo 'No space left on device' >&2 && exit 1\n",
    "differs": "#!/bin/sh\n[ $1 = compare ] && exit 1\n",
}


def fake_qemu_img(
    suite: "Suite", monkeypatch: pytest.MonkeyPatch, qemu_img: str, script: str
) -> None:
    """Put a qemu-img before the real one on the path that does what `script` says first."""
    folder = suite.pytester.mkdir("bin")
    fake = folder / "qemu-img"
    fake.write_text(f'{script}exec "{qemu_img}" "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_full_disk_while_converting(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch, qemu_img: str
) -> None:
    """A fake qemu-img, since filling a disk needs one of our own (the real tier does)."""
    fake_qemu_img(suite, monkeypatch, qemu_img, FAKE["no space left"])
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


def test_an_image_that_is_written_to_while_converting(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch, qemu_img: str
) -> None:
    """A fake qemu-img, for a comparison that fails at the right moment."""
    fake_qemu_img(suite, monkeypatch, qemu_img, FAKE["differs"])
    host.define("box", disk(image.raw, "raw"))
    run_and_fail(suite, pytest.ExitCode.USAGE_ERROR, "the copy differs: something wrote meanwhile")
    image.assert_as_found()


def test_a_conversion_that_failed_leaves_nothing_to_be_undone(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch, qemu_img: str
) -> None:
    fake_qemu_img(suite, monkeypatch, qemu_img, FAKE["differs"])
    host.define("box", disk(image.raw, "raw"))
    run_and_fail(suite, pytest.ExitCode.USAGE_ERROR, "the copy differs")
    assert suite.left_over() == []


def test_no_qemu_img(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(suite.pytester.mkdir("empty")))
    host.define("box", disk(image.raw, "raw"))
    run_and_fail(
        suite, pytest.ExitCode.USAGE_ERROR, "cannot run qemu-img", "install it: qemu-utils"
    )
    image.assert_as_found()


def test_a_target_that_appears_meanwhile_is_not_overwritten(
    suite: "Suite", host: "Host", image: Image, monkeypatch: pytest.MonkeyPatch, qemu_img: str
) -> None:
    """A fake qemu-img makes the target while we compare."""
    script = f"#!/bin/sh\n[ $1 = compare ] && echo precious > '{image.qcow2}'\n"
    fake_qemu_img(suite, monkeypatch, qemu_img, script)
    host.define("box", disk(image.raw, "raw"))
    before = host.look()
    run_and_fail(suite, pytest.ExitCode.USAGE_ERROR, "cannot give the converted image its name")
    assert host.look() == before
    assert image.names == ["box.qcow2", "box.raw"]
    assert image.qcow2.read_text() == "precious\n"


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


# killed on the way: the state of the test driver dies with its process, so it comes from a file


@pytest.mark.parametrize("command", ["convert", "compare"])
def test_a_kill_while_converting_leaves_no_half_file_after_the_next_run(
    suite: "Suite",
    image: Image,
    monkeypatch: pytest.MonkeyPatch,
    qemu_img: str,
    command: str,
) -> None:
    """A fake qemu-img kills the run that started it, and half a file stays."""
    file = suite.pytester.path / "node.xml"
    file.write_text(node_file(disk(image.raw, "raw"), state="shut off"))
    script = f"#!/bin/sh\nif [ $1 = {command} ]; then kill -9 $PPID; exit 1; fi\n"
    with monkeypatch.context() as patched:
        fake_qemu_img(suite, patched, qemu_img, script)
        suite.write(ONE_TEST)
        assert suite.run_apart(f"--kvmsnap-uri=test://{file}").ret == -signal.SIGKILL
    assert image.raw.read_bytes() == image.content
    assert not image.qcow2.exists()
    assert len(image.names) == 2
    result = suite.run_apart(f"--kvmsnap-uri=test://{file}", "--kvmsnap-clean")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["kvmsnap: put box back as found*"])
    image.assert_as_found()
    assert suite.left_over() == []
