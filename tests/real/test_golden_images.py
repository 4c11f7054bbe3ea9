"""Throwaway machines on golden images, on real QEMU."""

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bench import NO_TRACE, Suite, assert_told_before_the_first_test, fill
from qemuimg import CONVERTING, fake_qemu_img

import guest as guests

Template = Callable[..., Path]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_qcow2(raw: Path, path: Path) -> Path:
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    return path


def known_kvm() -> str:
    """Return a conftest that knows the answer, which takes seconds; test_kvm_or_not asks it."""
    return f"""
from pytest_kvmsnap.machine import accelerator
accelerator.boots = lambda emulator, accelerator: accelerator == "tcg" or {guests.kvm_works()}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose name is not easy."""
    made = tmp_path / "images of ü"
    made.mkdir()
    return made


@pytest.fixture
def image(linux: guests.Guest, folder: Path) -> Path:
    """A qcow2 image of the guest's root, for machines that bring its kernel."""
    return as_qcow2(linux.root, folder / "golden ☃.qcow2")


@pytest.fixture
def template(linux: guests.Guest, folder: Path) -> Template:
    """Makes a template with the guest's kernel; `more` are further devices."""

    def make(more: str = "") -> Path:
        xml = guests.domain_xml(linux, "theirs", Path("/no/where.raw"), kind="qemu")
        path = folder / "machine.xml"
        path.write_text(xml.replace("</devices>", f"{more}</devices>"))
        return path

    return make


# --- the built-in machine ---------------------------------------------------------------------


@pytest.mark.long
def test_several_tests_on_one_raw_image_are_one_conversion_and_one_boot(
    linux: guests.Guest, suite: Suite, folder: Path
) -> None:
    raw = folder / "debian ü.raw"
    guests.copy_disk(linux, raw)
    before = digest(raw)
    suite.write(
        f"""
import xml.etree.ElementTree as ET
pytestmark = pytest.mark.kvm_golden({str(raw)!r}, memory="192 MiB")

@pytest.mark.parametrize("turn", range(3))
def test_starts_clean(vm, turn):
    assert vm.read_text("/opt/abc") == "123\\n"
    vm.write_text("/opt/abc", "456")
    assert vm.name.startswith("kvmsnap-debian---")
    definition = ET.fromstring(vm.domain.XMLDesc())
    assert definition.findtext("memory") == str(192 * 1024)
    assert definition.find("devices/graphics") is None
    assert definition.find("devices/interface") is None
    assert definition.find("genid").text
    (disk,) = vm.disks()
    assert (disk.format, disk.path.name) == ("qcow2", "disk0.qcow2")
    log = definition.find("devices/serial/log").get("file")
    assert "Linux version" in open(log, errors="replace").read()
""",
        known_kvm(),
    )
    result = suite.run()
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines([f"kvmsnap: converted the golden image {raw} to qcow2 *"])
    assert suite.calls_on_clones() == [
        "1 take_snapshot found",
        "1 start",
        "1 take_snapshot base",
        *["1 revert base"] * 3,
        "1 destroy",
    ]
    assert digest(raw) == before
    (converted,) = suite.converted()
    assert suite.left_over() == []

    again = suite.run("-k", "2")
    again.assert_outcomes(passed=1, deselected=2)
    again.stdout.no_fnmatch_line("*converted the golden image*")
    assert suite.converted() == [converted]

    os.utime(raw, (1, 1))  # the same content, but another file by its time
    plan = suite.run("--kvmsnap-plan")
    plan.stdout.fnmatch_lines(["conversions:", f"*{raw} -> the cache (up to *"])


def test_an_image_that_never_comes_up_is_tried_twice_and_then_fails_at_once(
    suite: Suite, folder: Path
) -> None:
    empty = folder / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", empty, "16M"], check=True)
    suite.write(
        f"""
pytestmark = pytest.mark.kvm_golden({str(empty)!r}, memory="64 MiB")
@pytest.mark.parametrize("turn", range(4))
def test_waits(vm, turn): pass
""",
        known_kvm(),
    )
    result = suite.run("--kvmsnap-ready-timeout=1")
    result.assert_outcomes(errors=4)
    said = result.stdout.str()
    assert said.count("\nthe machine did not get ready") == 2
    assert said.count("2 machines on it did not come up") == 2
    assert suite.calls_on_clones("start") == ["1 start", "2 start"]
    assert suite.left_over() == []


# --- templates --------------------------------------------------------------------------------


def test_a_template_gives_its_machine_and_nothing_of_its_own_is_touched(
    suite: Suite, image: Path, template: Template, folder: Path
) -> None:
    second = folder / "second.raw"
    second.write_bytes(bytes(2**20))
    xml = template(
        f"<disk type='file'><driver name='qemu' type='raw'/><source file='{second}'/>"
        "<target dev='vdb' bus='virtio'/></disk>"
        "<interface type='user'><mac address='52:54:00:00:00:01'/></interface>"
        "<graphics type='vnc' port='5999' listen='0.0.0.0'/>"
    )
    before = [digest(path) for path in (image, second)]
    suite.write(
        """
import xml.etree.ElementTree as ET
def test_machine(vm):
    definition = ET.fromstring(vm.domain.XMLDesc())
    assert definition.findtext("vcpu") == "1"
    assert [e.get("address") for e in definition.iter("listen")] == ["127.0.0.1"]
    assert definition.find("devices/graphics").get("port") != "5999"
    assert definition.find("devices/interface/mac").get("address") != "52:54:00:00:00:01"
    assert [disk.format for disk in vm.disks()] == ["qcow2", "qcow2"]
    vm.run("echo dirty > /opt/abc; echo dirty > /dev/vdb; sync", check=True)

def test_both_disks_are_clean(vm):
    assert vm.read_text("/opt/abc") == "123\\n"
    assert vm.run("head -c 5 /dev/vdb").stdout.strip("\\0") == ""
"""
    )
    ini = suite.write_ini(
        f"kvmsnap_golden = {image.name}",
        f"kvmsnap_template = {xml.name}",
        f"kvmsnap_image_path = {folder}",
        "kvmsnap_revert = fast",
    )
    suite.run("-c", str(ini)).assert_outcomes(passed=2)
    assert suite.calls_on_clones("load", "revert") == ["1 load base"] * 2
    assert [digest(path) for path in (image, second)] == before
    assert suite.left_over() == []


@pytest.mark.long
def test_wide_fixtures_and_live_no_work_on_a_golden_image(
    suite: Suite, image: Path, template: Template
) -> None:
    suite.write(
        f"""
pytestmark = pytest.mark.kvm_golden({str(image)!r}, template={str(template())!r})

@pytest.fixture(scope="module")
def prepared(module_vm):
    module_vm.write_text("/opt/prepared", "yes")

def test_with(prepared, vm):
    assert vm.read_text("/opt/prepared") == "yes"

def test_without(vm):
    assert vm.run("test -e /opt/prepared").returncode
"""
    )
    suite.run().assert_outcomes(passed=2)
    assert suite.calls_on_clones("start") == ["1 start"]
    suite.run("--kvmsnap-live=no").assert_outcomes(passed=2)
    assert suite.left_over() == []


# --- what fails -------------------------------------------------------------------------------


@pytest.mark.long
def test_a_machine_that_fails_is_thrown_away_and_made_anew(
    suite: Suite, image: Path, template: Template
) -> None:
    suite.write(
        f"""
pytestmark = pytest.mark.kvm_golden({str(image)!r}, template={str(template())!r})
NAMES = []

@pytest.fixture(scope="module")
def prepared(module_vm):
    NAMES.append(module_vm.name)
    module_vm.write_text("/opt/prepared", "yes")

def test_breaks_it(prepared, vm):
    vm.delete_snapshot(vm.current_snapshot)

def test_is_prepared_anew(prepared, vm):
    assert vm.name == NAMES[1] != NAMES[0]
    assert vm.read_text("/opt/prepared") == "yes"
"""
    )
    result = suite.run()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*cannot revert to the snapshot 'kvmsnap-prepared-*"])
    result.stdout.no_fnmatch_line("*is in quarantine*")
    assert suite.calls_on_clones("start") == ["1 start", "2 start"]
    assert suite.left_over() == []


@pytest.mark.long
def test_an_image_that_vanishes_is_one_clear_failure_a_test(
    suite: Suite, image: Path, template: Template
) -> None:
    suite.write(
        f"""
import pathlib
@pytest.mark.kvm_golden({str(image)!r}, template={str(template())!r})
def test_removes_it(vm):
    pathlib.Path({str(image)!r}).unlink()

@pytest.mark.kvm_golden({str(image)!r}, template={str(template())!r})
def test_too_late(vm): pass
"""
    )
    result = suite.run()
    result.assert_outcomes(passed=1, errors=2)
    said = result.stdout.str()
    assert "cannot revert to the snapshot" in said
    assert f"there is no golden image {str(image)!r}" in said
    assert "Traceback" not in said
    assert suite.left_over() == []


def test_an_image_that_somebody_writes_to_is_refused(
    suite: Suite, image: Path, template: Template
) -> None:
    suite.write(
        f"""
@pytest.mark.kvm_golden({str(image)!r}, template={str(template())!r})
def test_never(vm): pass
"""
    )
    holder = ["qemu-io", "-f", "qcow2", str(image)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(8) == b"qemu-io>"
        result = suite.run()
        process.terminate()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = result.stdout.str() + result.stderr.str()
    assert f"no machine can be made on the golden image {image.name}" in said
    assert "another process is writing to it" in said
    assert "lsof" in said
    assert suite.left_over() == []


# --- kills ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("step", "by"), [("overlay", "next run"), ("boot", "clean"), ("test", "next run")]
)
def test_what_a_killed_run_made_is_removed(
    suite: Suite, image: Path, template: Template, pytester: pytest.Pytester, step: str, by: str
) -> None:
    sign = pytester.path / "sign"
    stop = f"pathlib.Path({str(sign)!r}).touch(); time.sleep(60)"
    patch = {
        "overlay": "real = images.create_overlay\n"
        f"def create_overlay(*args): real(*args); {stop}\n"
        "images.create_overlay = create_overlay\n",
        "boot": f"real = Domain.start\ndef start(self): real(self); {stop}\nDomain.start = start\n",
        "test": "",
    }[step]
    tests = f"""
import pathlib, time
@pytest.mark.kvm_golden({str(image)!r}, template={str(template())!r})
def test_it(vm):
    if {step == "test"!r} and not pathlib.Path({str(sign)!r}).exists():
        {stop}
"""
    imports = "import pathlib, time\nfrom pytest_kvmsnap.machine import images\n"
    imports += "from pytest_kvmsnap.machine.domain import Domain\n"
    suite.write(tests, conftest=imports + patch)
    suite.run_until(sign)
    assert suite.left_over() != []
    pytester.makeconftest("")
    if by == "clean":
        result = suite.run("--kvmsnap-clean")
    else:
        result = suite.run()
        result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["kvmsnap: removed the throwaway machine kvmsnap-golden---*"])
    assert result.ret == 0
    assert suite.left_over() == []


@pytest.mark.long
def test_a_conversion_that_was_killed_is_begun_anew(
    linux: guests.Guest,
    suite: Suite,
    folder: Path,
    template: Template,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the real qemu-img, but it takes its time. It goes on when the run is killed."""
    raw = folder / "golden.raw"
    guests.copy_root(linux, raw)
    suite.write(
        f"""
@pytest.mark.kvm_golden({str(raw)!r}, template={str(template())!r})
def test_it(vm): pass
"""
    )
    sign = pytester.path / "converting"
    with monkeypatch.context() as patched:
        slow = f'set -- convert -r 50k "$@"; (sleep 1; touch "{sign}") &'
        script = f'if {CONVERTING}; then shift; {slow} fi; exec $real "$@"'
        fake_qemu_img(patched, pytester.path / "bin", script)
        suite.run_until(sign)
    assert suite.converted() == []
    assert len(list(suite.store.glob("*/images/*.draft"))) == 1
    suite.run().assert_outcomes(passed=1)
    assert len(suite.converted()) == 1
    assert list(suite.store.glob("*/images/*.draft")) == []
    assert suite.left_over() == []


# --- a full disk ------------------------------------------------------------------------------


def test_full_disk_is_told_before_the_first_test(
    linux: guests.Guest, suite: Suite, small_disk: Path, template: Template, folder: Path
) -> None:
    raw = folder / "golden.raw"
    guests.copy_root(linux, raw)
    suite.keep_images_in(small_disk)
    fill(small_disk, leaving=2 * 2**20)
    suite.write(
        f"""
@pytest.mark.kvm_golden({str(raw)!r}, template={str(template())!r})
def test_it(vm): pass
"""
    )
    assert_told_before_the_first_test(
        suite.run(), "a snapshot of it while it runs takes about ", f"in {small_disk}"
    )
    assert_told_before_the_first_test(
        suite.run("--kvmsnap-live=no"),
        "not enough space to convert the golden image golden.raw",
        "TMPDIR",
    )
    assert suite.converted() == []
    assert suite.left_over() == []


@pytest.mark.long
def test_full_disk_while_snapshotting(
    suite: Suite, small_disk: Path, image: Path, template: Template
) -> None:
    """It fills up when the machine is there; the look at it beforehand is made blind."""
    suite.keep_images_in(small_disk)
    suite.write(
        f"""
pytestmark = pytest.mark.kvm_golden({str(image)!r}, template={str(template())!r})
@pytest.mark.parametrize("turn", range(3))
def test_it(vm, turn): pass
""",
        conftest=f"""
from pathlib import Path
from bench import fill
from pytest_kvmsnap.machine import clone, space
space.room_blockers = lambda *_: []
make = clone.make
def make_and_fill(*args):
    make(*args)
    fill(Path({str(small_disk)!r}), leaving=12 * 2**20)
clone.make = make_and_fill
""",
    )
    result = suite.run()
    result.assert_outcomes(errors=3)
    said = result.stdout.str()
    assert said.count("\nthere is no room for a snapshot of the running machine") == 2
    assert "2 machines on it did not come up" in said
    assert [trace for trace in NO_TRACE if trace in said] == []
    assert suite.left_over() == []


# --- several at once --------------------------------------------------------------------------


@pytest.mark.usefixtures("xdist")
@pytest.mark.long
def test_workers_share_an_image_and_one_of_them_converts_it(
    linux: guests.Guest, suite: Suite, folder: Path, template: Template, pytester: pytest.Pytester
) -> None:
    raw = folder / "golden.raw"
    guests.copy_root(linux, raw)
    calls = pytester.path / "qemu-img-calls"
    suite.write(
        f"""
pytestmark = pytest.mark.kvm_golden({str(raw)!r}, template={str(template())!r})
@pytest.mark.parametrize("turn", range(4))
def test_it(vm, turn):
    assert vm.read_text("/opt/abc") == "123\\n"
    vm.write_text("/opt/abc", "dirty")
    with open({str(pytester.path / "names")!r}, "a") as file:
        print(vm.name, file=file)
""",
        conftest=f"""
import pathlib, tempfile, pytest
from lab import open_lab
from pytest_kvmsnap.machine import images

real = images.convert_all
def convert_all(*args):
    with open({str(calls)!r}, "a") as file:
        print("convert", file=file)
    real(*args)
images.convert_all = convert_all

def pytest_kvmsnap_lab(config):
    folder = tempfile.mkdtemp(prefix="kvm-", dir="/tmp")  # an embedded libvirt serves one process
    lab = open_lab(pathlib.Path(folder))
    config.add_cleanup(lab.remove)
    return {{"uri": lab.uri}}
""",
    )
    result = suite.run_elsewhere("-n2")
    result.assert_outcomes(passed=4)
    assert calls.read_text().split() == ["convert"]
    names = (pytester.path / "names").read_text().split()
    assert len(names) == 4
    assert len(set(names)) == 2
    assert len(suite.converted()) == 1
    assert suite.left_over() == []
