"""A revert inside the running QEMU, where it is provably the same as libvirt's.

libvirt's own revert ends QEMU and starts another. QMP's `snapshot-load` (QEMU 6.0 and newer,
https://qemu.readthedocs.io/en/latest/interop/qemu-qmp-ref.html) brings back what QEMU knows of the
guest: memory, devices, disks. It brings back nothing of what libvirt knows, nor a device that came
or went since. So it is used only while nothing of that differs from how the machine looked when it
came to the snapshot by libvirt. The use of the monitor is not supported by libvirt, which logs the
taint "custom-monitor" (https://libvirt.org/drvqemu.html#pass-through-of-arbitrary-qemu-commands).
"""

import contextlib
import secrets
import time
import xml.etree.ElementTree as ET
from typing import Any, NamedTuple

from pytest_kvmsnap.errors import MachineError, RevertError
from pytest_kvmsnap.machine.domain import Domain, Outside
from pytest_kvmsnap.machine.libvirt_api import libvirt, libvirt_qemu

_DEVICES = ("/machine/peripheral", "/machine/peripheral-anon")
"""Where QEMU lists its devices, those that were added behind libvirt's back among them."""
_POLL = (0.001, 0.02)
"""Seconds between looks at the job: at first, at most. QEMU mostly answers when it is done."""
_SETTLING = 2.0
"""Seconds for libvirt to hear from QEMU that the guest runs again."""


class Look(NamedTuple):
    """All that a revert inside QEMU would leave as it is, so that it must not have changed.

    `times_opened` tells one connection of ours from another: over a restart of libvirt its numbers
    of processes may begin anew. `tags` are, by the node of each writable drive, the snapshot that
    it would be brought back to.
    """

    outside: Outside
    times_opened: int
    devices: frozenset[str]
    drives: list[dict[str, Any]]
    tags: dict[str, Any]
    jobs: list[str]
    reboots: int


_CHANGES = {
    "state": "its state is another",
    "id": "it is another QEMU process",
    "live": "its live definition changed (a device, its memory, a link, …)",
    "inactive": "it was redefined",
    "persistent": "it was undefined",
    "autostart": "its autostart flag changed",
    "current": "another snapshot is the current one",
    "managed_save": "it has a managed save",
    "snapshots": "snapshots came or went",
    "times_opened": "libvirt was away",
    "devices": "QEMU has other devices",
    "drives": "its drives changed",
    "tags": "its images hold another snapshot of that name",
    "jobs": "QEMU is busy with a job",
    "reboots": "the guest rebooted",
}
"""What is told of each part of a look, and of the outside in it."""


class Watch:
    """Counts the reboots of a guest, which leave no trace in what can be asked for.

    By QEMU's own event: of libvirt's, a program can have one registration for each machine, which
    a test may want for itself.
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._registered: tuple[libvirt.virConnect, int] | None = None
        self.count = 0

    def start(self) -> None:
        """Begin to count, on the connection that is open now."""
        with self._domain.telling("cannot watch for reboots"):
            raw = self._domain.raw
            connection: libvirt.virConnect = raw.connect()  # type: ignore[no-untyped-call]
            if self._registered is not None and self._registered[0] is connection:
                return
            number = libvirt_qemu.qemuMonitorEventRegister(
                connection, raw, "RESET", self._note, None
            )
            self._registered = connection, number

    def stop(self) -> None:
        registered, self._registered = self._registered, None
        if registered is not None:
            connection, number = registered
            with contextlib.suppress(libvirt.libvirtError):  # it went with the connection
                libvirt_qemu.qemuMonitorEventDeregister(connection, number)

    def _note(self, *_: object) -> None:
        self.count += 1


def look(domain: Domain, snapshot: str, watch: Watch) -> Look:
    """Return how a running machine looks now, in view of a revert to a snapshot.

    Raises:
        MachineError: it does not run, or libvirt or QEMU does not let us look.
    """
    outside = domain.outside()
    if outside.state != "running":
        raise MachineError("cannot look into QEMU", where=domain.where, why=_CHANGES["state"])
    drives, jobs, *devices = domain.monitored(
        [
            ("query-block", None),
            ("query-jobs", None),
            *[("qom-list", {"path": path}) for path in _DEVICES],
        ]
    )
    return Look(
        outside=outside,
        times_opened=domain.hypervisor.times_opened,
        devices=frozenset(
            f"{path}/{entry['name']} {entry['type']}"
            for path, entries in zip(_DEVICES, devices, strict=True)
            for entry in entries
        ),
        drives=[_steady(drive) for drive in drives],
        tags=_tags(drives, snapshot),
        jobs=[job["id"] for job in jobs],
        reboots=watch.count,  # last, since QEMU tells of them a little later
    )


def changes(before: Look, now: Look) -> list[str]:
    """Return in words what differs between two looks."""
    old, new = _parts(before), _parts(now)
    differing = [name for name in _CHANGES if old[name] != new[name]]
    if "live" in differing and _steady_xml(old["live"]) == _steady_xml(new["live"]):
        differing.remove("live")
    return [_CHANGES[name] for name in differing]


def _parts(look: Look) -> dict[str, Any]:
    """Return all parts of a look by name, those of the outside among them."""
    return look.outside._asdict() | look._asdict()


def unfit(at: Look) -> str | None:
    """Return why a machine that looks so cannot be reverted inside its QEMU, None when it can."""
    if at.jobs:
        return _CHANGES["jobs"]
    if not at.tags or None in at.tags.values():
        return "not every writable drive holds the snapshot"
    if len(_with_memory(at)) != 1:
        return "the snapshot holds no memory"
    return None


def load(domain: Domain, snapshot: str, at: Look, timeout: float) -> None:
    """Bring a running machine back to a snapshot, within its QEMU.

    The guest runs then, and libvirt may not see its agent for a second (see `agentport`).

    Raises:
        RevertError: it failed, or took more than `timeout` seconds. The guest must not be resumed:
            it may be half of the one and half of the other.
    """
    what = f"cannot revert to the snapshot {snapshot!r} inside QEMU"
    job = f"kvmsnap-{secrets.token_hex(4)}"
    arguments = {
        "job-id": job,
        "tag": snapshot,
        "vmstate": _with_memory(at)[0],
        "devices": list(at.tags),
    }

    def work() -> None:
        domain.monitor("snapshot-load", arguments)
        error = _ended(domain, job)
        _, now = domain.monitored([("job-dismiss", {"id": job}), ("query-status", None)])
        status = now["status"]
        if error or status != "running":
            raise RevertError(what, where=domain.where, why=error or f"QEMU says: {status}")

    domain.within(timeout, work, what)
    end = time.monotonic() + _SETTLING
    while domain.state() != "running":
        if time.monotonic() > end:
            raise RevertError(what, where=domain.where, why="libvirt did not hear that it runs")
        time.sleep(_POLL[1])


def _ended(domain: Domain, job: str) -> str | None:
    """Wait for the job; return its error."""
    pause, longest = _POLL
    while True:
        told = {each["id"]: each for each in domain.monitor("query-jobs")}
        if job not in told:
            return "QEMU forgot the job"
        if told[job]["status"] == "concluded":
            error: str | None = told[job].get("error")
            return error
        time.sleep(pause)
        pause = min(pause * 2, longest)


def _steady_xml(live: str) -> str:
    """Return live XML without what libvirt sees of the guest's ends of channels."""
    root = ET.fromstring(live)
    for target in root.iterfind("./devices/channel/target"):
        target.attrib.pop("state", None)
    return ET.tostring(root, encoding="unicode")


def _steady(drive: dict[str, Any]) -> dict[str, Any]:
    """Return of a drive what does not change by its use: its medium, its limits, its tray."""
    plain = {**drive, **drive.get("inserted", {})}
    return {
        key: value
        for key, value in plain.items()
        if key != "io-status" and isinstance(value, str | int | bool)
    }


def _tags(drives: list[dict[str, Any]], snapshot: str) -> dict[str, Any]:
    """Return the snapshot as each writable node holds it, None where one does not."""
    tags = {}
    for drive in drives:
        medium = drive.get("inserted")
        if medium and not medium["ro"]:
            held = medium["image"].get("snapshots", [])
            tag = next((each for each in held if each["name"] == snapshot), None)
            tags[medium["node-name"]] = tag
    return tags


def _with_memory(at: Look) -> list[str]:
    return [node for node, tag in at.tags.items() if tag and tag["vm-state-size"]]
