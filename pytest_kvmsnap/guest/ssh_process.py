"""One connection by SSH: the process that holds it, for the others that go over it."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from pytest_kvmsnap.guest.address import Endpoint

# A socket's path has 107 bytes at most, and ssh makes it under a name that is 17 longer.
_LONGEST_PLACE = 60
CONNECT = 10
"""Seconds to get through to the guest, and as many again to log in."""
_ALIVE = 5  # seconds without a word after which the guest is asked for one; the third is the last
_END = 2  # seconds for our own ssh process to end
_LOOK = 0.005  # seconds between looks whether it is connected

# What people have in ~/.ssh/config for all hosts may stay, as a jump host and keys must, but for
# what keeps a command from being run as it is. The command line comes first.
_FIXED = {
    "BatchMode": "yes",
    "ConnectTimeout": f"{CONNECT}",
    "ServerAliveInterval": f"{_ALIVE}",
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
    "StrictHostKeyChecking": "accept-new",
    "GlobalKnownHostsFile": "none",
    "CheckHostIP": "no",
    "UpdateHostKeys": "no",
    "RequestTTY": "no",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ControlMaster": "no",
    "ControlPersist": "no",
}


class SshProcess:
    """The process that holds the connection, and a private folder for its socket and host keys."""

    def __init__(self, uuid: str, user: str, endpoint: Endpoint, key: Path | None) -> None:
        self._folder = private_folder()
        self._socket = self._folder / "s"
        self._log = self._folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        options = _FIXED | {
            "User": user,
            "Port": f"{endpoint.port}",
            "HostKeyAlias": uuid,
            "UserKnownHostsFile": f'"{self._folder / "hosts"}"',
            "ControlPath": f'"{_escaped(self._socket)}"',
        }
        if key is not None:
            options |= {"IdentityFile": f'"{_escaped(key)}"', "IdentitiesOnly": "yes"}
        self.options = [
            word for name, value in options.items() for word in ("-o", f"{name}={value}")
        ]
        destination = f"{user}@{endpoint.address}"
        self.command = ["ssh", *self.options, destination]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*_dies_with_us(), "ssh", "-MNT", *self.options, destination],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a Ctrl-C is not for it
                )
        except BaseException:
            self.close()
            raise

    def failure(self, timeout: float) -> str:
        """Wait until it is connected; return what it says otherwise, or nothing ("")."""
        end = time.monotonic() + timeout
        # the socket is there once it has logged in
        while not self._socket.exists():
            if not self._lives():
                said = self._log.read_text(encoding="utf-8", errors="replace")
                return last_words(said) or "ssh ended without a word"
            if time.monotonic() > end:
                return f"it took more than {timeout:g} s"
            time.sleep(_LOOK)
        return ""

    def is_connected(self) -> bool:
        """Tell whether it still is, as far as it knows itself."""
        return self._lives() and self._socket.exists()

    def breaks_within(self, seconds: float) -> bool:
        """Wait whether it ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                self._process.wait(seconds)
        return not self._lives()

    def _lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End it, and remove what it left. Never fails, and never waits for the guest."""
        if self._process is not None:
            self._process.terminate()
            if not self.breaks_within(_END):
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _dies_with_us() -> list[str]:
    """Return what has a command end when we are killed, where there is such a tool.

    It would end with the thread that started it, too, so others than the main one do without.
    """
    is_main = threading.current_thread() is threading.main_thread()
    setpriv = shutil.which("setpriv") if is_main else None
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def private_folder() -> Path:
    place = tempfile.gettempdir()
    if len(place) > _LONGEST_PLACE:
        place = "/tmp"  # noqa: S108 - only its length matters: mkdtemp makes it private
    return Path(tempfile.mkdtemp(prefix="kvmsnap-ssh-", dir=place))


def _escaped(path: Path) -> str:
    return f"{path}".replace("%", "%%")


def greeting(endpoint: Endpoint) -> str:
    """Look whether an SSH server is there, as cheaply as can be; return what else it is, or ""."""
    place = f"{endpoint.address} port {endpoint.port}"
    try:
        with socket.create_connection(endpoint, timeout=1) as connection:
            said = connection.recv(4)
    except TimeoutError:
        return f"{place} did not answer within 1 s"
    except OSError as error:
        return f"{place}: {error.strerror}"
    return "" if said == b"SSH-" else f"{place} answers, but not as an SSH server"


def last_words(said: str) -> str:
    return "\n".join([line.strip() for line in said.splitlines() if line.strip()][-3:])
