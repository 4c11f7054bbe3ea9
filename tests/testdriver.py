"""Domains of libvirt's test driver, which lives in this process, and runs of pytest on them.

The driver keeps its domains for as long as a connection is open. So `host` holds one: it outlives
the runs, and can be asked how they left the domains.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import libvirt
import pytest

# All that the runs inside of tests import is imported here already: pytester forgets modules that
# are new, and a second import of libvirt's extension is no good.
import pytest_kvmsnap.lab.lab
from pytest_kvmsnap.machine.domain import STATES, Domain
from pytest_kvmsnap.report import evidence, html, jsonfile, properties, summary

URI = "test:///default"


class Look(NamedTuple):
    """A domain as it is at one moment."""

    state: str
    snapshots: tuple[str, ...]
    current: str | None
    autostart: bool
    managed_save: bool
    definition: str


def disk(
    path: Path | str | None,
    image_format: str | None = "qcow2",
    *,
    target: str = "vda",
    device: str = "disk",
    more: str = "",
) -> str:
    """Return a disk for a definition; `more` are further elements."""
    source = f"<source file='{path}'/>" if path else ""
    driver = f"<driver name='qemu' type='{image_format}'/>" if image_format else ""
    return (
        f"<disk type='file' device='{device}'>{driver}{source}<target dev='{target}'/>{more}</disk>"
    )


def definition(name: str, *devices: str) -> str:
    """Return the XML of a domain."""
    return (
        f"<domain type='test'><name>{name}</name><memory unit='KiB'>8192</memory>"
        f"<os><type>hvm</type></os><devices>{''.join(devices)}</devices></domain>"
    )


def node_file(*devices: str, state: str = "running") -> str:
    """Return a host with one domain `box`, for a `test://FILE` that every process reads anew."""
    off = "<test:runstate xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>5</test:runstate>"
    same = "<uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>"  # in every process
    box = definition("box", *devices).replace("</name>", f"</name>{same}")
    return f"<node>{box.replace('<os>', f'{off}<os>') if state == 'shut off' else box}</node>"


class Host:
    """libvirt's test driver, with no domain but those that a test defines."""

    def __init__(self, connection: libvirt.virConnect) -> None:
        self.connection = connection

    def define(
        self, name: str = "box", *devices: str, state: str = "shut off"
    ) -> libvirt.virDomain:
        """Define a domain, with one qcow2 disk unless others are given, and bring it to a state."""
        xml = definition(name, *(devices or [disk(f"/images/{name}.qcow2")]))
        domain = self.connection.defineXML(xml)
        if state != "shut off":
            domain.create()
        if state == "paused":
            domain.suspend()
        return domain

    def domain(self, name: str = "box") -> libvirt.virDomain:
        return self.connection.lookupByName(name)

    def snapshot(self, name: str, *, of: str = "box", description: str = "") -> None:
        """Take a snapshot, as its owner would by virsh."""
        xml = f"<domainsnapshot><name>{name}</name><description>{description}</description>"
        self.domain(of).snapshotCreateXML(xml + "</domainsnapshot>", 0)

    def look(self, name: str = "box") -> Look:
        domain = self.domain(name)
        state: Any = domain.state()
        return Look(
            state=STATES[state[0]],
            snapshots=tuple(sorted(domain.snapshotListNames())),
            current=domain.snapshotCurrent().getName() if domain.hasCurrentSnapshot() else None,
            autostart=bool(domain.autostart()),
            managed_save=bool(domain.hasManagedSaveImage()),
            definition=domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE),
        )

    def looks(self) -> dict[str, Look]:
        return {domain.name(): self.look(domain.name()) for domain in self._domains()}

    def clear(self) -> None:
        for domain in self._domains():
            if domain.isActive():
                domain.destroy()
            if domain.isPersistent():
                domain.undefineFlags(
                    libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                    | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                )

    def _domains(self) -> list[libvirt.virDomain]:
        return self.connection.listAllDomains()


@pytest.fixture
def host() -> Iterator[Host]:
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    connection = libvirt.open(URI)
    host = Host(connection)
    host.clear()
    yield host
    host.clear()
    connection.close()


class Calls:
    """What was done to domains, in order, such as "take found" or "revert base"."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def add(self, verb: str, *names: str) -> None:
        shown = [re.sub(r"kvmsnap-([\w-]+)-\w+", r"\1", name) for name in names]
        self.log.append(" ".join([verb, *shown]))

    def count(self, verb: str) -> int:
        return sum(entry.split()[0] == verb for entry in self.log)

    @property
    def snapshots(self) -> list[str]:
        """What was done to snapshots, in order."""
        return [entry for entry in self.log if entry.split()[0] in ("take", "revert", "delete")]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls that change domains, recorded as they are made."""
    calls = Calls()

    def record(method: str, verb: str, *, named: bool) -> None:
        original: Callable[..., object] = getattr(Domain, method)

        def recording(self: Domain, *args: Any, **kwargs: Any) -> object:
            calls.add(verb, *args[:1] if named else ())
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Domain, method, recording)

    record("take_snapshot", "take", named=True)
    record("revert", "revert", named=True)
    record("delete_snapshot", "delete", named=True)
    for power in ("start", "resume", "destroy", "shutdown"):
        record(power, power, named=False)
    return calls


class Suite:
    """A test suite and the runs of it, on the domains of `host`."""

    uri = URI

    def __init__(self, pytester: pytest.Pytester, host: Host) -> None:
        self.pytester = pytester
        self.host = host
        self.locks = pytester.path.parent / f"{pytester.path.name}-locks"

    def options(self, domain: str | None = "box") -> list[str]:
        named = [f"--kvmsnap-domain={domain}"] if domain else []
        return [
            "-Werror",
            "-pno:randomly",
            f"--kvmsnap-uri={self.uri}",
            f"--kvmsnap-lock-dir={self.locks}",
            *named,
        ]

    def write(self, tests: str, conftest: str = "") -> None:
        self.pytester.makepyfile(tests)
        if conftest:
            self.pytester.makeconftest(conftest)

    def run(self, *args: str, domain: str | None = "box") -> pytest.RunResult:
        """Run the suite in this process, where it meets the domains of `host`."""
        options = self.options(domain)
        return self.pytester.runpytest_inprocess(*options, *args, no_reraise_ctrlc=True)

    def run_apart(self, *args: str, domain: str | None = "box") -> pytest.RunResult:
        """Run the suite in a process of its own, whose test driver has its domain `test` only."""
        return self.pytester.runpytest_subprocess(*self.options(domain), *args)

    def left_over(self) -> list[str]:
        """Return the names of the locks and journals that are there."""
        return sorted(path.name for path in self.locks.glob("*")) if self.locks.exists() else []


@pytest.fixture
def suite(pytester: pytest.Pytester, host: Host, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setenv("XDG_STATE_HOME", str(pytester.path.parent / "state"))
    for name in ("LIBVIRT_DEFAULT_URI", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    return Suite(pytester, host)


def fail_when(
    monkeypatch: pytest.MonkeyPatch, method: str, error: Exception, when: Callable[..., bool]
) -> None:
    """Let a method of Domain fail where `when` says so of its arguments."""
    original = getattr(Domain, method)

    def failing(self: Domain, *args: Any, **kwargs: Any) -> object:
        if when(*args):
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Domain, method, failing)


assert [pytest_kvmsnap.lab.lab, evidence, html, jsonfile, properties, summary]  # see above
