"""Whether KVM works: what libvirt says, what this user can prove, and what follows from both.

The emulators are scripts here, which end as QEMU does; a real one is in tests/real.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import libvirt
import pytest

from pytest_kvmsnap.machine import accelerator
from pytest_kvmsnap.machine.libvirt_api import Hypervisor

BOOTED = 0x2A << 1 | 1  # QEMU's isa-debug-exit: (value << 1) | 1
Make = Callable[..., Hypervisor]


class Host:
    """A hypervisor that offers an emulator for KVM, or has no KVM."""

    def __init__(self, emulator: Path | None, *, is_local: bool = True) -> None:
        self.is_local = is_local
        self.asked: list[tuple[Any, ...]] = []
        self._emulator = emulator

    @property
    def connection(self) -> "Host":
        return self

    def tolerating(self, _: str) -> "contextlib.AbstractContextManager[None]":
        return contextlib.suppress(libvirt.libvirtError)

    def getDomainCapabilities(self, *arguments: Any) -> str:
        self.asked.append(arguments)
        if self._emulator is None:
            raise libvirt.libvirtError("KVM is not supported by '/usr/bin/qemu' on this host")
        return f"<domainCapabilities><path>{self._emulator}</path></domainCapabilities>"


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Makes an emulator of two lines of shell, for KVM and without it, beside a /dev/kvm."""
    monkeypatch.setattr(accelerator, "KVM", tmp_path / "kvm")
    (tmp_path / "kvm").touch()
    path = tmp_path / "qemu"

    def make(with_kvm: str, without: str) -> Path:
        log = tmp_path / "log"
        path.write_text(f"#!/bin/sh\necho $2 >> {log}\n[ $2 = kvm ] && {with_kvm}\n{without}\n")
        path.chmod(0o755)
        return path

    return make


def runs(tmp_path: Path) -> list[str]:
    """Return the accelerators that the emulator was run with."""
    log = tmp_path / "log"
    return log.read_text().split() if log.exists() else []


def domain_type(host: Host) -> str:
    return accelerator.domain_type(cast(Hypervisor, host))


def test_host_without_kvm(tmp_path: Path, emulator: Callable[[str, str], Path]) -> None:
    emulator(f"exit {BOOTED}", f"exit {BOOTED}")
    assert domain_type(Host(None)) == "qemu"
    assert runs(tmp_path) == []


def test_kvm_that_works(tmp_path: Path, emulator: Callable[[str, str], Path]) -> None:
    host = Host(emulator(f"exit {BOOTED}", "exit 1"))
    assert domain_type(host) == "kvm"
    assert domain_type(host) == "kvm"
    assert runs(tmp_path) == ["kvm"]  # once
    assert host.asked == [(None, "x86_64", None, "kvm")]


@pytest.mark.parametrize("failure", ["exit 1", "exit 0", "kill -ABRT $$"])
def test_kvm_that_does_not_work(
    tmp_path: Path, emulator: Callable[[str, str], Path], failure: str
) -> None:
    assert domain_type(Host(emulator(failure, f"exit {BOOTED}"))) == "qemu"
    assert runs(tmp_path) == ["kvm", "tcg"]


def test_kvm_that_only_emulates_is_killed(
    tmp_path: Path, emulator: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "DEADLINE", 0.5)
    pid = tmp_path / "pid"
    host = Host(emulator(f"echo $$ > {pid} && exec sleep 600", f"exit {BOOTED}"))
    assert domain_type(host) == "qemu"
    assert runs(tmp_path) == ["kvm"]
    assert not Path("/proc", pid.read_text().strip()).exists()


def test_emulator_that_this_user_cannot_run_proves_nothing(
    tmp_path: Path, emulator: Callable[[str, str], Path]
) -> None:
    assert domain_type(Host(emulator("exit 1", "exit 1"))) == "kvm"
    assert runs(tmp_path) == ["kvm", "tcg"]
    assert domain_type(Host(tmp_path / "none")) == "kvm"


def test_where_nothing_can_be_proven_libvirt_is_believed(
    tmp_path: Path, emulator: Callable[[str, str], Path]
) -> None:
    path = emulator("exit 1", f"exit {BOOTED}")
    assert domain_type(Host(path, is_local=False)) == "kvm"
    accelerator.KVM.unlink()
    assert domain_type(Host(path)) == "kvm"
    assert runs(tmp_path) == []


def test_driver_without_domain_capabilities() -> None:
    connection = libvirt.open("test:///default")
    assert domain_type(Host(None)) == "qemu"
    assert accelerator.domain_type(Hypervisor(connection, "test:///default")) == "qemu"
    connection.close()
