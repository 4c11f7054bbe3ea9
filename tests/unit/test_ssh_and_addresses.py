"""What a real guest does not show of SSH: computers without it, and ends in the middle.

`ssh` is a stand-in here: its "guest" is this computer.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_kvmsnap.errors import (
    MachineError,
    NoAddressError,
    NotReadyError,
    SshDeniedError,
    SshError,
)
from pytest_kvmsnap.guest import ready, ssh_process
from pytest_kvmsnap.guest.address import Address, Endpoint, best, in_arp_table
from pytest_kvmsnap.guest.ssh import Ssh
from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.blockers import definition_blockers
from pytest_kvmsnap.machine.console import Console
from pytest_kvmsnap.machine.preflight import ssh_blockers
from pytest_kvmsnap.settings import Settings

# addresses


@pytest.mark.parametrize(
    ("told", "address"),
    [
        ([], None),
        (["127.0.0.1", "::1", "fe80::1%eth0", "169.254.3.4", "0.0.0.0"], None),
        (["fe80::1", "2001:db8::5", "192.168.122.7", "10.0.0.1"], "192.168.122.7"),
        (["::1", "2001:db8::5"], "2001:db8::5"),
    ],
)
def test_best_address(told: list[str], address: str | None) -> None:
    assert best(told) == address


ARP = """\
IP address       HW type     Flags       HW address            Mask     Device
10.1.2.3         0x1         0x0         00:00:00:00:00:00     *        virbr0
10.1.2.4         0x1         0x2         52:54:00:AA:bb:cc     *        virbr0
10.1.2.5         0x1         0x2         52:54:00:00:00:01     *        virbr0
"""


def test_address_in_the_arp_table() -> None:
    card = "<mac address='52:54:00:aa:BB:cc'/>"
    xml = f"<domain><devices><interface type='network'>{card}</interface></devices></domain>"
    assert in_arp_table(ARP, domainxml.macs(xml)) == ["10.1.2.4"]
    assert in_arp_table("", {"52:54:00:aa:bb:cc"}) == []


class Guest:
    """A domain, as far as addresses and SSH need one; `told` is what each source says."""

    uuid = "6f7c2f5e"
    where = "box at test:///default"
    hypervisor = SimpleNamespace(is_local=False)

    def __init__(self, *told: list[str], devices: str = "") -> None:
        self.told = told
        self.clients: list[Any] = []
        domain: Any = self
        self.console = Console(domain)
        self._xml = f"<domain><devices>{devices}</devices></domain>"

    @property
    def raw(self) -> object:
        raise MachineError("there is no console")

    def addresses(self) -> Iterator[list[str]]:
        yield from self.told

    def state(self) -> str:
        return "running"

    def xml(self) -> str:
        return self._xml


def test_address_of_the_first_source_that_has_one_for_us() -> None:
    guest: Any = Guest(["127.0.0.1"], ["10.0.0.2"], ["10.0.0.3"])
    assert Address(guest).find() == "10.0.0.2"


def test_address_is_remembered_when_nobody_knows_it_after_a_revert() -> None:
    guest: Any = Guest([], ["10.0.0.2"])
    address = Address(guest)
    assert address.find() == "10.0.0.2"
    guest.told = ([], ["fe80::1"])
    assert address.find() == "10.0.0.2"
    guest.told = (["10.0.0.9"],)
    assert address.find() == "10.0.0.9"


def test_no_address() -> None:
    guest: Any = Guest([], ["127.0.0.1"])
    with pytest.raises(NoAddressError, match="nobody knows the machine's address") as caught:
        Address(guest).find()
    assert (caught.value.where, "DHCP" in caught.value.cure) == (guest.where, True)


@pytest.mark.parametrize(
    ("forward", "reached"),
    [
        ("<portForward proto='tcp'/>", ("127.0.0.1", 22)),
        ("<portForward proto='udp'/>", None),
        (
            "<portForward proto='tcp'><range start='2022' to='22'/></portForward>",
            ("127.0.0.1", 2022),
        ),
        (
            "<portForward proto='tcp' address='10.0.0.1'><range start='5' end='9' exclude='yes'/>"
            "<range start='2000' end='2010' to='20'/></portForward>",
            ("10.0.0.1", 2002),
        ),
        ("<portForward proto='tcp'><range start='20' end='21'/></portForward>", None),
        ("<portForward proto='tcp'><range start='22'/></portForward>", ("127.0.0.1", 22)),
    ],
)
def test_forwarded_port(forward: str, reached: tuple[str, int] | None) -> None:
    card = f"<interface type='user'><backend type='passt'/>{forward}</interface>"
    xml = f"<domain><devices>{card}</devices></domain>"
    assert domainxml.forwarded_port(xml, 22) == reached


def test_ssh_goes_by_a_forwarded_port_of_this_host() -> None:
    forward = "<portForward proto='tcp'><range start='2022' to='22'/></portForward>"
    guest: Any = Guest(["10.0.2.15"], devices=f"<interface type='user'>{forward}</interface>")
    assert Address(guest).endpoint(22) == ("10.0.2.15", 22)
    guest.hypervisor = SimpleNamespace(is_local=True)
    assert Address(guest).endpoint(22) == ("127.0.0.1", 2022)


# what stands in the way


@pytest.mark.parametrize(
    ("devices", "blocked"),
    [("", True), ("<interface type='network'/>", False), ("<hostdev type='pci'/>", False)],
)
def test_machine_without_a_network_card(devices: str, blocked: bool) -> None:
    disk = "<disk type='file'><driver type='qcow2'/><source file='/x'/><target dev='vda'/></disk>"
    xml = f"<domain><devices>{disk}{devices}</devices></domain>"
    options: Any = {"edit": "edit it", "libvirt_version": 9_000_000, "live": False, "off": True}
    found = definition_blockers(xml, ready="ssh", **options)
    assert ["it has no network card" in each.why for each in found] == [True] * blocked
    assert definition_blockers(xml, ready="agent", **options) != found


def test_computer_without_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ssh_blockers() == [] if shutil.which("ssh") else True
    monkeypatch.setenv("PATH", "/nowhere")
    [blocker] = ssh_blockers()
    assert "openssh-client" in blocker.cure
    guest: Any = Guest(["127.0.0.2", "10.0.0.2"])
    client = Ssh(guest, Address(guest), Settings())
    with pytest.raises(SshError, match="there is no ssh on this computer") as caught:
        client.run("true")
    assert "openssh-client" in caught.value.cure


# the connection

STAND_IN = """\
#!/bin/sh
echo "$@" >> "$STAND_IN_LOG"
for word; do case $word in ControlPath=*) socket=$(echo "$word" | cut -d '"' -f 2) ;; esac; done
if [ "$1" = -MNT ]; then
    [ -z "$STAND_IN_SAYS" ] || { echo "$STAND_IN_SAYS" >&2; exit 255; }
    : > "$socket"
    [ -z "$STAND_IN_IS_STUCK" ] || trap '' TERM
    while :; do sleep 0.01; done
fi
while [ "$1" != -- ]; do shift; done
exec sh -c "$2"
"""


class Computer:
    """This one, with a stand-in for ssh; its temporary files are in a folder of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._log = folder / "log"
        program = folder / "ssh"
        program.write_text(STAND_IN)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("STAND_IN_LOG", str(self._log))
        monkeypatch.setattr(ssh_process, "_LONGEST_PLACE", 1000)
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        self.folder = folder
        self.guest: Any = Guest(["10.0.0.2"])

    def client(self, **settings: Any) -> Ssh:
        return Ssh(self.guest, Address(self.guest), Settings(**settings))

    def calls(self) -> list[str]:
        return self._log.read_text().splitlines()

    def left(self) -> list[str]:
        return [path.name for path in self.folder.glob("kvmsnap-ssh-*")]


@pytest.fixture
def computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Computer:
    return Computer(tmp_path, monkeypatch)


def test_one_connection_serves_until_the_jump(computer: Computer) -> None:
    client = computer.client()
    for _ in range(2):
        assert client.run("echo $((1 + 1))").stdout == "2\n"
    assert client.run(["echo", "$HOME  x"]).stdout == "$HOME  x\n"
    assert [call.startswith("-MNT ") for call in computer.calls()] == [True, False, False, False]
    [place] = computer.left()
    assert (computer.folder / place).stat().st_mode & 0o777 == 0o700
    [client_of_the_domain] = computer.guest.clients
    client_of_the_domain.hang_up()
    client_of_the_domain.hang_up()
    assert computer.left() == []
    assert client.run("true").returncode == 0
    assert computer.left() not in ([], [place])
    client.hang_up()


def test_options(computer: Computer, tmp_path: Path) -> None:
    client = computer.client(ssh_user="qa", ssh_port=2222, ssh_key=tmp_path / "my key")
    line = " ".join(client.options)
    for option in (
        "User=qa",
        "Port=2222",
        f'IdentityFile="{tmp_path}/my key"',
        "IdentitiesOnly=yes",
        "BatchMode=yes",
        "HostKeyAlias=6f7c2f5e",
    ):
        assert f"-o {option}" in line
    assert client.command == ["ssh", *client.options, "qa@10.0.0.2"]
    assert client.destination == "qa@10.0.0.2"
    client.hang_up()


@pytest.mark.parametrize(
    ("says", "kind"),
    [("x: Permission denied (publickey).", SshDeniedError), ("Connection refused", SshError)],
)
def test_nobody_lets_us_in(
    computer: Computer, monkeypatch: pytest.MonkeyPatch, says: str, kind: type[SshError]
) -> None:
    monkeypatch.setenv("STAND_IN_SAYS", says)
    with pytest.raises(SshError, match=r"cannot log in by ssh as root@10\.0\.0\.2") as caught:
        computer.client().run("true")
    assert (type(caught.value), caught.value.why) == (kind, says)
    assert computer.left() == []


def test_ctrl_c_while_it_connects_leaves_nothing(
    computer: Computer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    client = computer.client()
    monkeypatch.setattr(ssh_process.SshProcess, "failure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.connect()
    assert computer.left() == []


def test_connection_that_ignores_us_is_killed(
    computer: Computer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_IS_STUCK", "1")
    monkeypatch.setattr(ssh_process, "_END", 0.05)
    client = computer.client()
    client.connect()
    client.hang_up()
    assert computer.left() == []


def test_status_of_ssh_itself_is_told_from_that_of_a_command(computer: Computer) -> None:
    client = computer.client()
    assert client.run("exit 255").returncode == 255
    process = client._master._process  # type: ignore[union-attr]
    with pytest.raises(SshError, match="the connection by ssh broke") as caught:
        client.run(f"kill -9 {process.pid}; echo closed by remote host >&2; exit 255")  # type: ignore[union-attr]
    assert caught.value.why == "closed by remote host"
    assert computer.left() == []
    assert client.run("echo again").stdout == "again\n"
    client.hang_up()


def test_command_that_takes_too_long_ends_the_connection(computer: Computer) -> None:
    client = computer.client()
    client.connect()
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        client.run(["sleep", "60"], timeout=0.1)
    assert (caught.value.cmd, caught.value.timeout) == (["sleep", "60"], 0.1)
    assert computer.left() == []


def test_folder_for_sockets_is_short_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folder = ssh_process.private_folder()
    folder.rmdir()
    assert len(str(folder / "s")) + 17 < 104


# readiness


class Server:
    """Greets each who connects with some bytes, or (None) says nothing."""

    def __init__(self, greeting: bytes | None) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint(*self._socket.getsockname())
        self._greeting = greeting
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._connections.append(connection)
            if self._greeting is not None:
                with contextlib.suppress(OSError):  # who has heard enough hangs up
                    connection.sendall(self._greeting)
                    connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self._connections:
            connection.close()


@pytest.mark.parametrize(
    ("greeting", "said"),
    [
        (b"SSH-2.0-x\r\n", ""),
        (b"", "answers, but not as an SSH server"),
        (b"220 mail\r\n", "answers, but not as an SSH server"),
        (None, "did not answer within 1 s"),
    ],
)
def test_greeting(greeting: bytes | None, said: str) -> None:
    server = Server(greeting)
    try:
        place = f"127.0.0.1 port {server.endpoint.port}"
        assert ssh_process.greeting(server.endpoint) in ("", f"{place} {said}")
        assert bool(ssh_process.greeting(server.endpoint)) == bool(said)
    finally:
        server.close()
    assert ssh_process.greeting(server.endpoint) == f"{place}: Connection refused"


class Clock:
    """A second passes between two looks at it."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now

    def sleep(self, seconds: float) -> None: ...


def waited(monkeypatch: pytest.MonkeyPatch, *silences: SshError | None) -> NotReadyError | None:
    """Wait 10 s for a machine whose ssh says these, the last one again and again."""
    monkeypatch.setattr(ready, "time", Clock())
    told = iter(silences)
    client: Any = SimpleNamespace(silence=lambda: next(told, silences[-1]))
    domain: Any = Guest(devices="")
    domain.is_active = lambda: True
    try:
        ready.wait_ready(domain, ready.SshSign(domain, client), 10)
    except NotReadyError as error:
        return error
    return None


def test_ssh_that_comes_up_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    refused, denied = SshError("", why="refused"), SshDeniedError("", why="denied")
    assert waited(monkeypatch, refused, refused, denied, denied, refused, denied, None) is None


def test_ssh_that_never_comes_up_is_told_with_what_it_said_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = waited(monkeypatch, SshError("", why="no route"), SshError("", why="refused"))
    assert error is not None
    words = "waited 10 s for ssh to let us in, which said last: refused (state: running)"
    assert error.why.startswith(words)
    assert "--kvmsnap-ssh-port" in error.cure


def test_ssh_that_does_not_let_us_in_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    error = waited(monkeypatch, SshDeniedError("", why="denied", cure="another key"))
    assert error is not None
    assert (error.why, error.cure) == ("ssh does not let us in: denied", "another key")
