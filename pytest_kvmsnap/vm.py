"""`VM`: the machine as a test holds it."""

import contextlib
import itertools
import os
import secrets
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_kvmsnap.errors import AgentError, ConfigError
from pytest_kvmsnap.guest import files
from pytest_kvmsnap.guest.agent import CHUNK, Agent
from pytest_kvmsnap.guest.completed import as_input, completed
from pytest_kvmsnap.guest.console import Console
from pytest_kvmsnap.guest.guest import Guest
from pytest_kvmsnap.guest.output import run_whole
from pytest_kvmsnap.guest.ssh import Ssh
from pytest_kvmsnap.machine import images
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.domainxml import Snapshot
from pytest_kvmsnap.machine.images import Disk
from pytest_kvmsnap.machine.libvirt_api import libvirt

if TYPE_CHECKING:
    from pytest_kvmsnap.guest.testinfra import Host

_NUMBERS = itertools.count(1)  # of snapshots without a name, over all objects of this process


class VM:
    """A machine that is running, ready and clean, and is made so again after the test.

    Attributes:
        name: the domain's name.
        uuid: the domain's UUID.
        uri: the libvirt URI of its host.
    """

    def __init__(
        self,
        guest: Guest,
        *,
        revert_timeout: float,
        description: str,
        on_use: Callable[[], None] = lambda: None,
        on_snapshot: Callable[[str], None] = lambda _: None,
        show: Callable[[str, float], None] = lambda *_: None,
    ) -> None:
        domain = guest.domain
        self.name = domain.name
        self.uuid = domain.uuid
        self.uri = domain.hypervisor.uri
        self._used_guest = guest
        self._revert_timeout = revert_timeout
        self._description = description
        self._on_use = on_use
        self._on_snapshot = on_snapshot
        self._console: Console | None = None
        self._show = show
        self._host: Host | None = None

    def __repr__(self) -> str:
        return f"<VM {self.name!r} at {self.uri}>"

    @property
    def _guest(self) -> Guest:
        self._on_use()
        return self._used_guest

    @property
    def _domain(self) -> Domain:
        return self._guest.domain

    @property
    def _agent(self) -> Agent:
        return self._guest.agent

    # power

    @property
    def domain(self) -> libvirt.virDomain:
        """The domain as libvirt-python has it, for all that is not here."""
        return self._domain.raw

    @property
    def state(self) -> str:
        """The state in virsh's words, such as "running", "paused" or "shut off"."""
        return self._domain.state()

    def start(self) -> None:
        """Start the machine; `wait_ready` waits until it can be used."""
        self._domain.start()

    def shutdown(self, timeout: float = 60) -> None:
        """Ask the guest to shut down and wait, `timeout` seconds at most, until it is off."""
        self._domain.shutdown(timeout)

    def destroy(self) -> None:
        """Pull the plug."""
        self._domain.destroy()

    def reboot(self, timeout: float = 60) -> None:
        """Ask the guest to reboot and wait, `timeout` seconds at most, until it does.

        `wait_ready` waits until it is up again.
        """
        self._domain.reboot(timeout, by_agent=self._guest.has_agent)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the machine is ready, `--kvmsnap-ready-timeout` seconds unless told otherwise.

        Raises:
            NotReadyError: it is not; the message has the last lines of its console.
        """
        self._guest.wait_ready(timeout)

    # screen and console

    def screenshot(self, path: str | os.PathLike[str]) -> Path:
        """Write a picture of the screen to a file, and return its path.

        It is a PNG. QEMU before 7.1 makes PPM only, and the file's name ends so then.

        Raises:
            MachineError: the machine is off, or has no screen.
        """
        picture, kind = self._domain.screenshot()
        file = Path(path) if kind == "png" else Path(path).with_suffix(f".{kind}")
        file.write_bytes(picture)
        return file

    @property
    def console(self) -> Console:
        """The serial console, to talk to a guest without agent or network."""
        domain = self._domain
        if self._console is None:
            self._console = Console(domain)
        return self._console

    def console_log(self) -> str:
        """Return all that the serial console said since the test began.

        Raises:
            ConsoleError: nobody could listen to it.
        """
        console = self._domain.console
        said = console.said()
        if said is None:
            raise console.unheard("nothing is known of the console")
        return said

    # snapshots and disks

    def snapshot(self, name: str | None = None) -> Snapshot:
        """Take a snapshot, with the memory when the machine runs; gone after the test."""
        chosen = name or f"kvmsnap-test-{os.getpid()}-{next(_NUMBERS)}"
        if chosen.startswith(".") or "/" in chosen:
            # the test driver accepts such names, QEMU does not
            raise ConfigError(
                f"wrong name for a snapshot: {chosen!r}",
                where=self._domain.where,
                why="libvirt's QEMU driver refuses names with / or with a dot at the start",
            )
        domain = self._domain
        self._on_snapshot(chosen)
        return domain.take_snapshot(chosen, self._description)

    def snapshots(self) -> list[Snapshot]:
        """Return all snapshots of the machine."""
        return self._domain.snapshots()

    @property
    def current_snapshot(self) -> Snapshot | None:
        """The snapshot that the machine was last reverted to or last taken of, if any."""
        current = self._domain.current()
        return next((s for s in self._domain.snapshots() if s.name == current), None)

    def revert(self, snapshot: str | Snapshot) -> None:
        """Revert to a snapshot, with force; a machine that runs then is ready, its clock set."""
        self._domain.end_block_jobs()
        self._domain.revert(_name(snapshot), self._revert_timeout)
        self._host = None  # it keeps what it found out about the system
        self._domain.console.listen()
        if self.state == "running":
            self.wait_ready()
            self._guest.set_clock()

    def delete_snapshot(self, snapshot: str | Snapshot) -> None:
        """Delete a snapshot."""
        self._domain.delete_snapshot(_name(snapshot))

    def disks(self) -> list[Disk]:
        """Return the writable disks and what is in their images; on this host only."""
        found = []
        for disk in self._domain.disks():
            if disk.is_snapshotted and disk.path is not None and disk.format is not None:
                told = images.info(disk.path, disk.format, in_use=self._domain.is_active())
                found.append(
                    Disk(
                        disk.target,
                        disk.path,
                        disk.format,
                        told.virtual_size,
                        told.disk_size,
                        told.snapshots,
                    )
                )
        return found

    # the guest

    def run(
        self,
        command: str | Sequence[str],
        *,
        check: bool = False,
        input: str | bytes | None = None,
        text: bool = True,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in the guest, as root, by the guest agent.

        A string goes to the guest's shell, a list is executed as it is. `env` is added to the
        agent's environment. With `text=False` input and output are bytes.

        Output may be of any length with `text=False`, else 7.5 MiB of both streams together.

        Raises:
            subprocess.CalledProcessError: `check` is given and the status is not 0.
            subprocess.TimeoutExpired: it took more than `timeout` seconds; it was killed, with all
                that descends from it.
            AgentError: the agent could not start it, or does not tell any more how it ended: it
                ended the agent, the guest or the machine.
        """
        __tracebackhide__ = True
        shown = command if isinstance(command, str) else list(command)
        stdin = as_input(input)
        argv = _argv(command, env, cwd)
        if stdin is not None and len(stdin) > CHUNK:  # too long for one message to the agent
            path = f"/tmp/.kvmsnap-input-{secrets.token_hex(8)}"  # noqa: S108 - in the guest
            self.write_bytes(path, stdin)
            argv = [
                "/bin/sh",
                "-c",
                'exec < "$1" && rm -f "$1" && shift && exec "$@"',
                "sh",
                path,
                *argv,
            ]
            stdin = None
        try:
            run = self._agent.run if text else partial(run_whole, self._agent)
            done = run(argv, stdin=stdin, timeout=timeout, shown=_shown(command))
        except subprocess.TimeoutExpired:
            raise subprocess.TimeoutExpired(shown, timeout) from None
        return completed(shown, done.status, done.stdout, done.stderr, check=check, text=text)

    @property
    def ssh(self) -> Ssh:
        """SSH into the guest: commands, and options for scp and the like."""
        return self._guest.ssh

    def ip_address(self) -> str:
        """Return the guest's network address, as the agent, DHCP or ARP know it.

        Raises:
            MachineError: nobody knows one.
        """
        return self._guest.ip_address()

    @property
    def host(self) -> "Host":
        """testinfra's `Host` of the guest, over the guest agent: neither network nor keys.

        It keeps what it finds out about the system, as testinfra does: after `revert` there is a
        new one. `vm.host.run` takes a `timeout` as `run` does.

        Raises:
            ConfigError: pytest-testinfra is not installed.
        """
        from pytest_kvmsnap.guest.testinfra import host_of

        if self._host is None:
            self._host = host_of(self.name, lambda: self._agent)
        return self._host

    def read_bytes(self, path: str) -> bytes:
        """Return the content of a file in the guest."""
        __tracebackhide__ = True
        return b"".join(self._agent.read(path))

    def read_text(self, path: str) -> str:
        """Return the content of a UTF-8 file in the guest."""
        __tracebackhide__ = True
        return self.read_bytes(path).decode()

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a file in the guest, replacing what was there."""
        __tracebackhide__ = True
        self._agent.write(path, iter([data]))

    def write_text(self, path: str, data: str) -> None:
        """Write a UTF-8 file in the guest, replacing what was there."""
        __tracebackhide__ = True
        self.write_bytes(path, data.encode())

    def put(self, local: str | os.PathLike[str], remote: str) -> None:
        """Copy a file of any size into the guest, with its mode."""
        __tracebackhide__ = True
        with self._copying(f"{local} to {remote} in the guest"):
            files.put(self._agent, Path(local), remote, self._show)

    def get(self, remote: str, local: str | os.PathLike[str]) -> None:
        """Copy a file of any size out of the guest, with its mode.

        `local` is replaced once all of it is there, and left alone if that fails.
        """
        __tracebackhide__ = True
        with self._copying(f"{remote} in the guest to {local}"):
            files.get(self._agent, remote, Path(local), self._show)

    @contextlib.contextmanager
    def _copying(self, what: str) -> Iterator[None]:
        __tracebackhide__ = True
        try:
            yield
        except AgentError as error:
            error.what = f"cannot copy {what}: {error.what}"
            raise


def _name(snapshot: str | Snapshot) -> str:
    return snapshot if isinstance(snapshot, str) else snapshot.name


def _shown(command: str | Sequence[str]) -> str:
    return command if isinstance(command, str) else shlex.join(command)


def _argv(
    command: str | Sequence[str], env: Mapping[str, str] | None, cwd: str | None
) -> list[str]:
    """Return the argument list for the agent, which knows no working directory.

    The agent's own `env` replaces the whole environment, so the variables go by env(1). Neither a
    value nor the folder passes through a shell's parser.
    """
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    if not argv:
        raise ValueError("the command is empty")
    if env:
        argv = ["env", *(f"{key}={value}" for key, value in env.items()), *argv]
    if cwd is not None:
        argv = ["/bin/sh", "-c", 'cd -- "$1" && shift && exec "$@"', "sh", cwd, *argv]
    return argv
