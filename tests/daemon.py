"""A libvirt daemon of the tests' own, which several processes share and which may be killed.

All that it writes stays in one folder: root's daemon sees that folder in place of the host's own
folders for libvirt (a mount namespace), an ordinary user's is told by XDG_… variables.
"""

import contextlib
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

# Ordinary users of Debian do not have the daemon's folder.
SEARCHED = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
# Whoever may use the socket of root has all of the rights of root.
LIBVIRTD_CONF = """\
unix_sock_dir = "{folder}"
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:file:{folder}/libvirtd.log"
"""
# No rights are needed that a container lacks, and no daemon for the logs.
QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
remember_owner = 0
dynamic_ownership = 0
namespaces = []
cgroup_controllers = []
"""
QEMU_CONF_ROOT = 'user = "root"\ngroup = "root"\n'
MASKED = {"/run": "run", "/etc/libvirt": "etc", "/var/lib/libvirt": "lib"} | {
    f"/var/{kind}/libvirt": kind for kind in ("cache", "log")
}


class NoDaemonError(Exception):
    """A daemon cannot run here; says why."""


class Daemon:
    """A libvirtd in `folder`, whose path is short. Clients connect to `uri()`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "libvirt-sock"
        self.is_system = os.geteuid() == 0
        self._process: subprocess.Popen[bytes] | None = None
        for name in MASKED.values():
            (folder / name).mkdir()
        (folder / "run" / "lock").mkdir()  # of consoles and channels that clients open
        self._configure()

    def uri(self, driver: str = "qemu", socket: Path | None = None, transport: str = "unix") -> str:
        """Return how clients get to one of its drivers, by the socket or another way to it."""
        scheme = f"{driver}+{transport}" if transport else driver
        path = "default" if driver == "test" else "system" if self.is_system else "session"
        return f"{scheme}:///{path}?socket={socket or self.socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the daemon is not running"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            NoDaemonError: it cannot run here.
        """
        with (self.folder / "said").open("wb") as said:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,  # a Ctrl-C is for the tests
            )
        end = time.monotonic() + 60
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise NoDaemonError(self._last_words())
            time.sleep(0.01)

    def stop(self) -> None:
        """End it as a restart of the service does: its machines run on."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash does: its machines run on."""
        self._end(signal.SIGKILL)

    def restart(self, end: Callable[["Daemon"], None] | None = None) -> None:
        """Stop it, or end it in another way, and start it again."""
        (end or Daemon.stop)(self)
        self.start()

    def remove(self) -> None:
        """End it, and the machines that still run on it, and delete the folder."""
        if self._process is not None:
            self.kill()
        for pid_file in self._pid_files():
            _end_machine(pid_file)
        shutil.rmtree(self.folder)

    def running(self) -> list[str]:
        """Return the names of the machines whose QEMU is there, asked of nobody but the host."""
        return sorted(file.stem for file in self._pid_files() if _machine_of(file) is not None)

    def _pid_files(self) -> list[Path]:
        folder = self.folder / "run" / "libvirt" / "qemu"
        return [*folder.glob("*.pid"), *folder.glob("run/*.pid")]

    def _configure(self) -> None:
        (self.folder / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(folder=self.folder))
        place = self.folder / "etc" / ("" if self.is_system else "libvirt")
        place.mkdir(exist_ok=True)
        more = QEMU_CONF_ROOT if self.is_system else ""
        (place / "qemu.conf").write_text(QEMU_CONF + more)

    def _command(self) -> list[str]:
        found = shutil.which("libvirtd", path=SEARCHED)
        if found is None:
            raise NoDaemonError("libvirtd is not installed")
        command = [found, "--config", f"{self.folder}/libvirtd.conf"]
        if not self.is_system:
            return [*command, "--pid-file", f"{self.folder}/libvirtd.pid"]
        if not Path("/etc/libvirt").is_dir():
            raise NoDaemonError("there is no /etc/libvirt, which libvirt's packages bring along")
        return _in_place_of(self.folder, command)

    def _environment(self) -> dict[str, str]:
        ours = {
            name: value for name, value in os.environ.items() if not name.startswith("LIBVIRT_")
        }
        if not self.is_system:
            places = {"CONFIG_HOME": "etc", "CACHE_HOME": "cache", "DATA_HOME": "lib"}
            for name, folder in (places | {"RUNTIME_DIR": "run", "STATE_HOME": "log"}).items():
                ours[f"XDG_{name}"] = str(self.folder / folder)
        return ours | {"PATH": SEARCHED}

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.socket))
            return True
        return False

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None, "the daemon is not running"
        self._process.send_signal(how)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._process = None

    def _last_words(self) -> str:
        words = (self.folder / "said").read_text(errors="replace")
        with contextlib.suppress(FileNotFoundError):
            words += (self.folder / "libvirtd.log").read_text(errors="replace")
        return "libvirtd does not run here: " + (words.strip()[-2000:] or "it says nothing")


def _in_place_of(folder: Path, command: Sequence[str]) -> list[str]:
    """Return a command that sees the parts of a folder where the host has its libvirt's own.

    A folder that the host lacks is made up below the next one that it has: nothing is made there.
    """
    mounts = []
    for place, name in MASKED.items():
        there = Path(place)
        inside = folder / name
        while not there.is_dir():
            there = there.parent
        if str(there) != place:
            inside = folder / f"{name}-above"
            (inside / Path(place).relative_to(there)).mkdir(parents=True, exist_ok=True)
        mounts.append(f"mount -n --bind {shlex.quote(str(inside))} {shlex.quote(str(there))}")
    script = " && ".join([*mounts, 'exec "$@"'])
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command]


def _machine_of(pid_file: Path) -> int | None:
    """Return the process of a machine, unless its number is meanwhile that of another one."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        pid = int(pid_file.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if f"guest={pid_file.stem},".encode() in command:
            return pid
    return None


def _end_machine(pid_file: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        pid = _machine_of(pid_file)
        if pid is not None:
            process = os.pidfd_open(pid)
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], 10)
            os.close(process)


def short_temporary_folder() -> str:
    """Return a folder whose sockets' paths stay short enough; pytest's own do not."""
    return tempfile.gettempdir() if len(tempfile.gettempdir()) < 30 else "/tmp"


@contextlib.contextmanager
def running_daemon() -> Iterator[Daemon]:
    """Have a daemon in a new folder, of which nothing is left afterwards.

    Raises:
        NoDaemonError: it cannot run here.
    """
    daemon = Daemon(Path(tempfile.mkdtemp(prefix="kvm-", dir=short_temporary_folder())))
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


@pytest.fixture(scope="session")
def libvirtd(pytestconfig: pytest.Config) -> Iterator[Daemon]:
    """A libvirt daemon of the tests' own; one for all tests of this process, with no domain."""
    with contextlib.ExitStack() as stack:
        try:
            daemon = stack.enter_context(running_daemon())
        except NoDaemonError as error:
            complain = pytest.fail if pytestconfig.getoption("--require-real") else pytest.skip
            complain(f"{error}: run scripts/setup")
        yield daemon
