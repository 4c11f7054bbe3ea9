"""SSH into a guest, by the system's own client, over one connection that is kept open.

That client is what keeps for years, and people's scp, rsync and ansible go over the same
connection. The connection is a process of ours, `ssh -M`, and all else are its guests by a control
socket. A revert cuts it, so it is closed before and opened again by whoever needs it next.

The machine's host keys are believed as they come, once for each connection: a test, and each jump
in time, may change them. They are kept beside the socket, never in the user's own known_hosts.
"""

import shlex
import subprocess
import threading
import time
from collections.abc import Sequence

from pytest_kvmsnap.errors import MachineError, NoAddressError, SshDeniedError, SshError
from pytest_kvmsnap.guest.address import Address, Endpoint
from pytest_kvmsnap.guest.completed import as_input, completed
from pytest_kvmsnap.guest.ssh_process import CONNECT, SshProcess, greeting, last_words
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.settings import Settings

_LOST = 255  # the status of ssh itself
_BREAK = 0.3  # seconds for it to notice that the connection broke
_PULSE = 3  # seconds for a guest to run `true` by a connection that is open


class Ssh:
    """SSH to one machine: `run` for commands, `command` and `options` for programs of yours.

    `vm.ssh.command` is the argument list that runs ssh up to the destination, and opens the
    connection if need be: `subprocess.run([*vm.ssh.command, "uptime"])`. `vm.ssh.options` are
    those that ssh, scp and sftp all take. Both hold until the next revert.

    Attributes:
        user: as whom commands run.
    """

    def __init__(self, domain: Domain, address: Address, settings: Settings) -> None:
        self._domain = domain
        self._address = address
        self.user = settings.ssh_user
        self._key = settings.ssh_key
        self._port = settings.ssh_port
        self._is_direct: bool | None = None
        self._master: SshProcess | None = None
        self._lock = threading.RLock()
        domain.clients.append(self)

    def __repr__(self) -> str:
        return f"<Ssh to {self._domain.where}>"

    # for users

    def run(
        self,
        command: str | Sequence[str],
        *,
        check: bool = False,
        input: str | bytes | None = None,
        text: bool = True,
        timeout: float = 60,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in the guest, as `--kvmsnap-ssh-user`.

        A string goes to the user's shell, a list is executed as it is. With `text=False` input
        and output are bytes. The status of a command that a signal ended is 255.

        Raises:
            subprocess.CalledProcessError: `check` is given and the status is not 0.
            subprocess.TimeoutExpired: it took more than `timeout` seconds. The connection is
                closed then, and with it the command's input and output, which ends it where it
                reads or writes. SSH has no way to kill others; `timeout` in the guest has.
            SshError: there is no connection, or it broke.
        """
        __tracebackhide__ = True
        shown = command if isinstance(command, str) else list(command)
        if not shown:
            raise ValueError("the command is empty")
        remote = shown if isinstance(shown, str) else shlex.join(shown)
        stdin = as_input(input)
        end = time.monotonic() + timeout
        master = self._connected(timeout)
        try:
            done = subprocess.run(
                [*master.command, "--", remote],
                input=b"" if stdin is None else stdin,
                capture_output=True,
                timeout=max(0.0, end - time.monotonic()),
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            self.hang_up()
            raise subprocess.TimeoutExpired(shown, timeout, late.output, late.stderr) from None
        if done.returncode == _LOST and master.breaks_within(_BREAK):
            said = last_words(done.stderr.decode(errors="replace"))
            self.hang_up()
            raise self._error("the connection by ssh broke", said)
        return completed(shown, done.returncode, done.stdout, done.stderr, check=check, text=text)

    @property
    def command(self) -> list[str]:
        """The arguments that run ssh, up to the destination; what it is to run follows.

        Raises:
            SshError: there is no connection.
        """
        return list(self._connected(CONNECT * 2).command)

    @property
    def options(self) -> list[str]:
        """The options for ssh, scp and sftp, all but the destination (`USER@ADDRESS`).

        Raises:
            SshError: there is no connection.
        """
        return list(self._connected(CONNECT * 2).options)

    @property
    def destination(self) -> str:
        """`USER@ADDRESS`, for scp and the like.

        Raises:
            SshError: there is no connection.
        """
        return self._connected(CONNECT * 2).command[-1]

    # for the plugin

    def connect(self) -> None:
        """Open the connection if there is none.

        Raises:
            SshError: that failed.
        """
        self._connected(CONNECT * 2)

    def silence(self) -> MachineError | None:
        """Return why nobody can log in right now, None when somebody can."""
        try:
            if self._master is None:
                endpoint = self._address.endpoint(self._port)
                said = greeting(endpoint) if self._reaches_directly(endpoint) else ""
                if said:
                    return SshError("ssh", why=said)
            done = self.run("true", timeout=CONNECT if self._master is None else _PULSE)
        except (SshError, NoAddressError) as error:
            return error
        except subprocess.TimeoutExpired:  # the machine was started anew, or is busy
            return SshError("ssh", why="the guest lets us in, but runs nothing in time")
        if done.returncode:
            why = done.stderr.strip() or f"`true` ended with the status {done.returncode}"
            return SshError("ssh", why=why)
        return None

    def hang_up(self) -> None:
        """Close the connection, and forget the host keys. Never fails."""
        with self._lock:
            master, self._master = self._master, None
        if master is not None:
            master.close()

    def _reaches_directly(self, endpoint: Endpoint) -> bool:
        """Tell whether no jump host of the user's is between us and the guest."""
        if self._is_direct is None:
            command = ["ssh", "-G", endpoint.address]
            try:
                told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            except FileNotFoundError:
                return False  # told when it is to be used
            proxies = [line for line in told.splitlines() if line.startswith("proxy")]
            self._is_direct = all(line.endswith((" none", " no")) for line in proxies)
        return self._is_direct

    def _connected(self, timeout: float) -> SshProcess:
        """Return the connection, opened if there is none.

        Raises:
            SshError: that failed, or took more than `timeout` seconds.
        """
        with self._lock:
            return self._opened(timeout)

    def _opened(self, timeout: float) -> SshProcess:
        if self._master is not None and not self._master.is_connected():
            self.hang_up()
        if self._master is None:
            endpoint = self._address.endpoint(self._port)
            try:
                master = SshProcess(self._domain.uuid, self.user, endpoint, self._key)
            except FileNotFoundError:
                raise self._error(
                    "there is no ssh on this computer", "", "install the package openssh-client"
                ) from None
            said: str | None = None
            try:
                said = master.failure(min(timeout, CONNECT * 2))
            finally:  # a Ctrl-C too
                if said != "":
                    master.close()
            if said:
                raise self._error(f"cannot log in by ssh as {master.command[-1]}", said)
            self._master = master
        return self._master

    def _error(self, what: str, why: str, cure: str = "") -> SshError:
        is_denied = "Permission denied" in why or "Too many authentication failures" in why
        if is_denied:
            cure = (
                "is the public key in the guest's ~/.ssh/authorized_keys? User and key are"
                " --kvmsnap-ssh-user and --kvmsnap-ssh-key; nobody is asked for a password"
            )
        kind = SshDeniedError if is_denied else SshError
        return kind(what, where=self._domain.where, why=why, cure=cure or _CURE)


_CURE = (
    "does sshd run in the guest, at --kvmsnap-ssh-port, and is the address reachable from here? On"
    " another host it may not be; a ProxyJump in ~/.ssh/config is used"
)
