"""One domain from outside: its state, its snapshots, and the calls that change them."""

import contextlib
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pytest_kvmsnap.errors import KvmsnapError, MachineError, RevertError, SnapshotError
from pytest_kvmsnap.machine import domainxml
from pytest_kvmsnap.machine.calls import Call
from pytest_kvmsnap.machine.console import Console
from pytest_kvmsnap.machine.domainxml import Snapshot
from pytest_kvmsnap.machine.libvirt_api import Hypervisor, libvirt, libvirt_qemu

if TYPE_CHECKING:
    from pytest_kvmsnap.machine.agentport import AgentPort

STATES = {
    libvirt.VIR_DOMAIN_NOSTATE: "no state",
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "idle",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "in shutdown",
    libvirt.VIR_DOMAIN_SHUTOFF: "shut off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "pmsuspended",
}

_NAMELESS = "name in virGetDomainSnapshot must not be NULL"
"""What libvirt says when it is to list a snapshot that is only just being taken."""
_LISTING = 30.0
"""Seconds that somebody may take for that."""

UNMIGRATABLE = (
    "remove the device that it names; a folder that is shared by 9p, unmount in the guest; or have"
    " the machine off, and give --kvmsnap-live=no"
)


class _NotDoneError(MachineError):
    """libvirt says that it did not end the machine."""


class Fingerprint(NamedTuple):
    """What changes when somebody touched the machine from outside; cheap to take."""

    state: str
    id: int
    current: str | None
    definition: str


class Outside(NamedTuple):
    """What libvirt knows of a machine, in words and XML; `id` changes with each start."""

    state: str
    id: int
    live: str
    inactive: str
    persistent: bool
    autostart: bool
    current: str | None
    managed_save: bool
    snapshots: frozenset[str]


class Client(Protocol):
    """Who is connected to the system in a machine, such as by SSH."""

    def hang_up(self) -> None:
        """Close what is open; it may be opened again at any time. Never fails."""


class Domain:
    """A domain of a hypervisor, found by its UUID, so that a rename does not lose it.

    `agent_port` is the way to its agent while libvirt does not see that, after a fast revert.
    `clients` are told to hang up before the system in it ends, jumps in time, or is snapshotted.
    """

    def __init__(self, hypervisor: Hypervisor, uuid: str, name: str) -> None:
        self.hypervisor = hypervisor
        self.uuid = uuid
        self.name = name
        self.where = f"{name} at {hypervisor.uri}"
        self.agent_port: AgentPort | None = None
        self.console = Console(self)
        self.clients: list[Client] = []

    def telling(
        self, what: str, kind: type[KvmsnapError] = MachineError
    ) -> contextlib.AbstractContextManager[None]:
        """Turn libvirt's errors into ours, as `Hypervisor.telling` does."""
        return self.hypervisor.telling(what, self.where, kind)

    def _tolerating(self, what: str) -> contextlib.AbstractContextManager[None]:
        return self.hypervisor.tolerating(what, self.where)

    @property
    def raw(self) -> libvirt.virDomain:
        """libvirt's own object, looked up afresh.

        Raises:
            MachineError: the domain is gone, or the host is.
        """
        domain = self.hypervisor.lookup(self.uuid)
        if domain is None:
            raise MachineError(
                "the domain is gone",
                where=self.where,
                why=f"no domain has the UUID {self.uuid} any more: somebody undefined it",
            )
        return domain

    def is_defined(self) -> bool:
        """Tell whether it is there, with a persistent definition."""
        with self.telling("cannot look for the definition"):
            raw = self.hypervisor.lookup(self.uuid)
            return raw is not None and bool(raw.isPersistent())

    def state(self) -> str:
        """Return the state in virsh's words."""
        with self.telling("cannot read the state"):
            return _state_of(self.raw)

    def is_active(self) -> bool:
        with self.telling("cannot read the state"):
            return bool(self.raw.isActive())

    def xml(self, *, inactive: bool = False, secrets: bool = True) -> str:
        """Return the live XML, or the persistent definition."""
        flags = libvirt.VIR_DOMAIN_XML_SECURE if secrets else 0
        if inactive:
            flags |= libvirt.VIR_DOMAIN_XML_INACTIVE
        with self.telling("cannot read the definition"):
            return self.raw.XMLDesc(flags)

    def disks(self, *, inactive: bool = False) -> list[domainxml.DiskSource]:
        default = "raw" if self.hypervisor.kind == "QEMU" else None
        return domainxml.disks(self.xml(inactive=inactive), default)

    def fingerprint(self) -> Fingerprint:
        with self.telling("cannot read the state"):
            raw = self.raw
            definition = raw.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
            return Fingerprint(
                state=_state_of(raw),
                id=raw.ID(),
                current=_current_name(raw),
                definition=hashlib.sha256(definition.encode()).hexdigest(),
            )

    def outside(self) -> Outside:
        """Return all that libvirt knows of the machine, in as few calls as that takes."""
        flags = libvirt.VIR_DOMAIN_XML_SECURE
        with self.telling("cannot look at the machine"):
            raw = self.raw
            return Outside(
                state=_state_of(raw),
                id=raw.ID(),
                live=raw.XMLDesc(flags),
                inactive=raw.XMLDesc(flags | libvirt.VIR_DOMAIN_XML_INACTIVE),
                persistent=bool(raw.isPersistent()),
                autostart=bool(raw.autostart()),
                current=_current_name(raw),
                managed_save=bool(raw.hasManagedSaveImage()),
                snapshots=frozenset(each.getName() for each in raw.listAllSnapshots()),
            )

    # power

    def start(self) -> None:
        self.disconnect()
        self.console.boots()
        with self.telling("cannot start the machine"):
            self.raw.create()
        self.console.listen()

    def resume(self) -> None:
        with self.telling("cannot resume the machine"):
            self.raw.resume()

    def destroy(self) -> None:
        """Pull the plug; a machine that is off already stays so.

        libvirt may report an error although the machine is off right after (seen after it
        reconnected to a QEMU whose client had been killed), so the state decides.
        """
        try:
            with self.telling("cannot destroy the machine", _NotDoneError):
                self.raw.destroy()
        except _NotDoneError:
            end = time.monotonic() + 10
            while self.is_active():
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def shutdown(self, timeout: float) -> None:
        """Ask the guest to shut down and wait until it is off.

        Raises:
            MachineError: it was not off within `timeout` seconds.
        """
        self.await_agent()
        try:
            with self.telling("cannot shut the machine down", _NotDoneError):
                self.raw.shutdown()
        except _NotDoneError:  # libvirt says so too when the guest is quicker than its call
            if self.is_active():
                raise
        self._wait_until(lambda: not self.is_active(), "it did not shut down", timeout)

    def reboot(self, timeout: float, *, by_agent: bool) -> None:
        """Ask the guest to reboot, and wait until it did.

        Left to choose, libvirt presses the power button as well when the agent is gone before it
        answered, and the guest reboots twice (seen on 9.0, on a busy computer).
        """
        self.await_agent()
        self.disconnect()  # they would notice only in a while
        flags = libvirt.VIR_DOMAIN_REBOOT_GUEST_AGENT if by_agent else 0
        booted = threading.Event()

        def note(*_: object) -> None:
            self.console.boots()
            booted.set()

        what = "cannot reboot the machine"
        with self.telling(what):
            raw = self.raw
            connection: libvirt.virConnect = raw.connect()  # type: ignore[no-untyped-call]
            watch = connection.domainEventRegisterAny(
                raw, libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, note, None
            )
            try:
                raw.reboot(flags)
                self._wait_until(
                    lambda: booted.is_set() or not connection.isAlive(),
                    "it did not reboot",
                    timeout,
                )
            finally:
                with contextlib.suppress(libvirt.libvirtError):  # it went with the connection
                    connection.domainEventDeregisterAny(watch)
        if not booted.is_set():
            raise self.hypervisor.lost(what, self.where, "libvirt did not tell that it rebooted")

    def _wait_until(self, done: Callable[[], bool], failure: str, timeout: float) -> None:
        end = time.monotonic() + timeout
        while not done():
            if time.monotonic() > end:
                raise MachineError(failure, where=self.where, why=f"waited {timeout:g} s")
            time.sleep(0.05)

    # persistence

    def autostart(self) -> bool:
        with self.telling("cannot read the autostart flag"):
            return bool(self.raw.autostart())

    def set_autostart(self, wanted: bool) -> None:
        if self.autostart() != wanted:
            with self.telling("cannot set the autostart flag"):
                self.raw.setAutostart(wanted)

    def has_managed_save(self) -> bool:
        with self.telling("cannot look for a managed save"):
            return bool(self.raw.hasManagedSaveImage())

    def remove_managed_save(self) -> None:
        with self.telling("cannot remove the managed save"):
            self.raw.managedSaveRemove()

    def restore_name(self) -> None:
        """Undo a rename, which a revert does not; libvirt renames only machines that are off."""
        with self.telling("cannot give the machine its name back"):
            if self.raw.name() != self.name:
                self.destroy()
                self.raw.rename(self.name)

    # snapshots

    def snapshots(self) -> list[Snapshot]:
        """Return the snapshots, parents before children."""
        with self.telling("cannot list the snapshots"):
            return [domainxml.snapshot(s.getXMLDesc()) for s in self._listed_snapshots()]

    def snapshot_names(self) -> list[str]:
        """Return the names of the snapshots, parents before children."""
        with self.telling("cannot list the snapshots"):
            return [s.getName() for s in self._listed_snapshots()]

    def snapshot_xmls(self) -> dict[str, str]:
        """Return the XML of all snapshots by name, parents before children."""
        with self.telling("cannot list the snapshots"):
            secure = libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE
            return {s.getName(): s.getXMLDesc(secure) for s in self._listed_snapshots()}

    def _listed_snapshots(self) -> list[libvirt.virDomainSnapshot]:
        """List them; libvirt cannot while somebody is just taking one (seen on 9.0)."""
        end = time.monotonic() + _LISTING
        while True:
            try:
                return self.raw.listAllSnapshots(libvirt.VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL)
            except libvirt.libvirtError as error:
                if _NAMELESS not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.1)

    def current(self) -> str | None:
        with self.telling("cannot read the current snapshot"):
            return _current_name(self.raw)

    def take_snapshot(self, name: str, description: str) -> Snapshot:
        """Take an internal snapshot, with the memory when the machine runs (it pauses for it)."""
        self.disconnect()  # or the snapshot would hold the guest's end of what has none here
        targets = [disk.target for disk in self.disks() if disk.is_snapshotted]
        request = domainxml.snapshot_request(name, description, targets)
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        try:
            with self.telling(f"cannot take the snapshot {name!r}", SnapshotError):
                taken = self.raw.snapshotCreateXML(request, flags)
                return domainxml.snapshot(taken.getXMLDesc())
        except SnapshotError as error:
            if "migrat" in error.why:  # QEMU takes a snapshot as a migration into the image
                error.cure = UNMIGRATABLE
            raise

    def delete_snapshot(self, name: str) -> None:
        with self.telling(f"cannot delete the snapshot {name!r}", SnapshotError):
            self.raw.snapshotLookupByName(name).delete(0)

    def forget_snapshot(self, name: str) -> None:
        """Delete only what libvirt knows of a snapshot; what the images hold stays."""
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY
        with self.telling(f"cannot forget the snapshot {name!r}", SnapshotError):
            self.raw.snapshotLookupByName(name).delete(flags)

    def redefine_snapshot(self, xml: str, *, current: bool) -> None:
        """Give libvirt back the metadata of a snapshot whose data is in the image."""
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        if current:
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
        with self.telling("cannot redefine a snapshot", SnapshotError):
            self.raw.snapshotCreateXML(xml, flags)

    def revert(self, name: str, timeout: float) -> None:
        """Revert to a snapshot with force; the machine is then in the snapshot's power state.

        Raises:
            RevertError: it failed, or took too long.
        """
        what = f"cannot revert to the snapshot {name!r}"

        def force() -> None:
            with self.telling(what, RevertError):
                raw = self.raw
                snapshot = raw.snapshotLookupByName(name)
                raw.revertToSnapshot(snapshot, libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE)

        self.within(timeout, force, what)

    def within(self, timeout: float, revert: Callable[[], None], what: str) -> None:
        """Revert within `timeout` seconds.

        The calls for it have neither progress nor abort, so they run in a thread of their own;
        beyond the time the machine is destroyed, which ends them.

        Raises:
            RevertError: it took too long.
        """
        self.hang_up()
        call = Call(revert)
        if not call.ended_within(timeout):
            self.destroy()
            call.ended_within(30)
            raise RevertError(
                what,
                where=self.where,
                why=f"it took more than {timeout:g} s; the machine was destroyed",
                cure="give it more time with --kvmsnap-revert-timeout",
            )
        call.raise_error()

    # jobs

    def has_job(self) -> bool:
        """Tell whether a running machine is just being saved, dumped, moved, or snapshotted.

        Such a job shows in the one or the other of two calls (seen on 9.0), and the second waits
        for some: for 30 s at most, and then that is the answer.
        """
        jobs = (libvirt.VIR_DOMAIN_JOB_BOUNDED, libvirt.VIR_DOMAIN_JOB_UNBOUNDED)
        with self._tolerating("cannot look for a job"):  # a driver without jobs, or it is off now
            raw = self.raw
            control: Any = raw.controlInfo()  # the binding's annotation is wrong, twice
            if control[0] == libvirt.VIR_DOMAIN_CONTROL_JOB:
                return True
            try:
                job: Any = raw.jobInfo()
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_OPERATION_TIMEOUT:
                    raise
                return True
            return job[0] in jobs
        return False

    def block_jobs(self, disks: list[domainxml.DiskSource]) -> list[str]:
        """Return which disks of a running machine are just being copied, by their targets."""
        found = []
        for disk in disks:
            with self._tolerating("cannot look for block jobs"):  # a driver without them has none
                if self.raw.blockJobInfo(disk.target):
                    found.append(disk.target)
        return found

    def end_block_jobs(self) -> None:
        """Abort the block jobs of a running machine: they make a revert fail (libvirt error 55)."""
        for target in self.block_jobs(self.disks()) if self.is_active() else ():
            with self._tolerating("cannot end a block job"):  # it ended meanwhile
                self.raw.blockJobAbort(target)

    def migration_blockers(self) -> list[str]:
        """Ask the QEMU of a running machine what keeps it from being snapshotted; its own words.

        libvirt logs the taint "custom-monitor" for it. It asks the same itself, but only when the
        snapshot is to be taken.
        """
        reasons: list[str] = self.monitor("query-migrate").get("blocked-reasons", [])
        return reasons

    def monitor(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Give QEMU's monitor one command and return its answer.

        Raises:
            MachineError: QEMU refused, or libvirt did not pass it on.
        """
        (answer,) = self.monitored([(command, arguments)])
        return answer

    def monitored(self, commands: Sequence[tuple[str, dict[str, Any] | None]]) -> list[Any]:
        """Give QEMU's monitor several commands, one after another; like `monitor`."""
        with self.telling("cannot use QEMU's monitor"):
            raw = self.raw
        return [self._monitored(raw, *command) for command in commands]

    def _monitored(
        self, raw: libvirt.virDomain, command: str, arguments: dict[str, Any] | None
    ) -> Any:
        request = {"execute": command} | ({"arguments": arguments} if arguments else {})
        what = f"QEMU did not do {command}"
        with self.telling(what):
            told = json.loads(libvirt_qemu.qemuMonitorCommand(raw, json.dumps(request), 0))
        if "error" in told:
            raise MachineError(what, where=self.where, why=told["error"]["desc"])
        return told["return"]

    def hang_up(self) -> None:
        """Have all connections to the machine closed that are ours."""
        self.disconnect()
        self.console.hang_up()
        if self.agent_port is not None:
            self.agent_port.close()
            self.agent_port = None

    def disconnect(self) -> None:
        """Have those hang up who are connected to the system in it."""
        for client in self.clients:
            client.hang_up()

    def await_agent(self) -> None:
        """Wait until libvirt sees the agent, should it have lost sight of it by a fast revert."""
        if self.agent_port is not None:
            self.agent_port.wait()

    def sees_agent(self) -> bool:
        """Tell whether libvirt takes the guest's agent for connected."""
        return domainxml.sees_agent(self.xml())

    def addresses(self) -> Iterator[list[str]]:
        """Yield the addresses that the agent, libvirt's leases and the host's ARP table know."""
        self.await_agent()
        for source in (
            libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT,
            libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE,
            libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_ARP,
        ):
            with self._tolerating("cannot ask for the addresses"):
                interfaces: dict[str, Any] = self.raw.interfaceAddresses(source)  # type: ignore[assignment]
                told = [each["addrs"] or () for each in interfaces.values()]
                yield [address["addr"] for addresses in told for address in addresses]

    def screenshot(self) -> tuple[bytes, str]:
        """Return a picture of the first screen, and its kind: `png`, with QEMU before 7.1 `ppm`.

        Raises:
            MachineError: the machine is off or has no screen.
        """
        with self.telling("cannot take a picture of the screen"):
            raw = self.raw
            connection: libvirt.virConnect = raw.connect()  # type: ignore[no-untyped-call]
            stream = connection.newStream()
            kind: str = raw.screenshot(stream, 0)
            picture = io.BytesIO()
            stream.recvAll(lambda _stream, chunk, _: picture.write(chunk), None)
            stream.finish()
        return picture.getvalue(), "png" if kind == "image/png" else "ppm"

    def memory_in_use(self) -> int:
        """Return an upper bound of what a live snapshot writes for the memory, in bytes."""
        with self._tolerating("cannot ask how much memory is in use"):
            statistics: dict[str, int] = self.raw.memoryStats()  # type: ignore[assignment]
            resident = statistics.get("rss")
            if resident:
                return resident * 1024
        return domainxml.memory_bytes(self.xml())


def _state_of(raw: libvirt.virDomain) -> str:
    state: int = raw.state()[0]  # type: ignore[assignment] # the binding's annotation is wrong
    return STATES.get(state, "no state")


def _current_name(raw: libvirt.virDomain) -> str | None:
    if not raw.hasCurrentSnapshot():
        return None
    name: str = raw.snapshotCurrent().getName()
    return name
