"""Real machines: an embedded libvirt in a folder of its own."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import Machine, Maker, Suite

import guest as guests
from lab import Lab, open_lab, reap_orphans

TOOLS = ("qemu-system-x86_64", "qemu-img", "virsh")


@pytest.fixture(scope="session")
def linux(pytestconfig: pytest.Config) -> guests.Guest:
    """The example's guest, built once for the user."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        complain = pytest.fail if pytestconfig.getoption("--require-real") else pytest.skip
        complain(f"no real machines without {', '.join(missing)}: run scripts/setup")
    guests.kvm_works()  # asked once, and now: pytester moves HOME, where the guest's cache is
    return guests.build()


@pytest.fixture(scope="session")
def lab(linux: guests.Guest) -> Iterator[Lab]:
    """A root for `qemu:///embed`, which nothing may have left a process in at the end."""
    folder = Path(tempfile.mkdtemp(prefix="kvm-", dir=_short_temporary_folder()))
    with reap_orphans(), open_lab(folder) as opened:
        yield opened
        left = [path.name for path in (folder / "run" / "qemu").glob("*.xml")]
        assert left == [], "machines were left running"


def _short_temporary_folder() -> str:
    """Return a folder whose sockets' paths stay short enough; pytest's own do not."""
    return tempfile.gettempdir() if len(tempfile.gettempdir()) < 30 else "/tmp"


@pytest.fixture
def suite(pytester: pytest.Pytester, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Suite:
    return Suite(pytester, lab, monkeypatch)


@pytest.fixture
def make_machine(lab: Lab, linux: guests.Guest) -> Iterator[Maker]:
    maker = Maker(lab, linux)
    yield maker
    for machine in maker.made:
        with contextlib.suppress(AssertionError):
            machine.destroy()
            machine.virsh("undefine", "--snapshots-metadata", "--managed-save")


@pytest.fixture
def machine(make_machine: Maker) -> Machine:
    """A machine that is off, on a qcow2 image."""
    return make_machine()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB, made with sudo where need be."""
    sudo = [] if os.getuid() == 0 else ["sudo", "-n"]
    folder = tmp_path / "small"
    folder.mkdir()
    options = f"size=48m,mode=0777,uid={os.getuid()}"
    mount = [*sudo, "mount", "-t", "tmpfs", "-o", options, "small", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot make a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run([*sudo, "umount", "-l", str(folder)], check=True)
