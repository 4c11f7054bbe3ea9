"""Real machines: an embedded libvirt in a folder of its own."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from bench import Machine, Maker, Suite
from daemon import Daemon, short_temporary_folder
from daemonlab import DaemonLab, DaemonSuite, SharedMachine

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
    folder = Path(tempfile.mkdtemp(prefix="kvm-", dir=short_temporary_folder()))
    with reap_orphans(), open_lab(folder) as opened:
        yield opened
        left = [path.name for path in (folder / "run" / "qemu").glob("*.xml")]
        assert left == [], "machines were left running"


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


@pytest.fixture(scope="session")
def daemon_lab(linux: guests.Guest, libvirtd: Daemon) -> Iterator[DaemonLab]:
    """Machines that several processes share, which nothing may have left running at the end."""
    with reap_orphans():
        yield DaemonLab(libvirtd, linux)
        assert libvirtd.running() == [], "machines were left running"


@pytest.fixture
def daemon_suite(
    pytester: pytest.Pytester, daemon_lab: DaemonLab, monkeypatch: pytest.MonkeyPatch
) -> DaemonSuite:
    """A suite whose runs share the machines of the daemon."""
    return DaemonSuite(pytester, daemon_lab, monkeypatch)


@pytest.fixture
def make_shared(daemon_lab: DaemonLab) -> Iterator[Callable[[str], SharedMachine]]:
    """Make machines, by their names, that all processes see; they are off."""
    made: list[SharedMachine] = []

    def make(name: str) -> SharedMachine:
        made.append(daemon_lab.make(name))
        return made[-1]

    yield make
    for machine in made:
        daemon_lab.discard(machine)


class Wire(NamedTuple):
    """A network between this computer and a guest, and a key that the guest lets in.

    `ip` is the command of that name with the rights that it needs.
    """

    network: guests.Network
    key: Path
    ip: list[str]


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    """A tap device, made with sudo where need be."""
    ip = ["ip"] if os.getuid() == 0 else ["sudo", "-n", "ip"]
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    public = key.with_suffix(".pub").read_text().split()[1]
    number = os.getpid() % 2**14  # of this worker
    tap, net = f"kvmsnap{number:x}", f"10.{128 + number // 256}.{number % 256}"
    make = [*ip, "tuntap", "add", "dev", tap, "mode", "tap", "user", str(os.getuid())]
    done = subprocess.run(make, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot make a network: {done.stderr.strip()}")
    try:
        subprocess.run([*ip, "address", "add", f"{net}.1/24", "dev", tap], check=True)
        subprocess.run([*ip, "link", "set", tap, "up"], check=True)
        yield Wire(guests.Network(tap, f"{net}.2/24", public), key, ip)
    finally:
        subprocess.run([*ip, "link", "delete", tap], check=True)


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
