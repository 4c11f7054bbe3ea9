"""The markers as typed functions, and the `Request` that markers and options come to."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.settings import Settings


def kvm_domain(*names: str) -> None:
    """Run on this libvirt domain."""
    if len(names) != 1:
        raise TypeError(
            "several domains (a pool) are not supported yet" if names else "no domain is named"
        )
    _check_names(*names)


def kvm_snapshot(name: str) -> None:
    """Start from this existing snapshot of the domain, and go back to it afterwards."""
    _check_names(name)


MARKERS: tuple[Callable[..., None], ...] = (kvm_domain, kvm_snapshot)


def _check_names(*names: object) -> None:
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise TypeError(f"a name must be text, not {name!r}")


@dataclass(frozen=True)
class Request:
    """Which machine a test wants, and in which state: None stands for the machine's baseline."""

    domain: str
    snapshot: str | None = None


def marker_lines() -> Iterator[str]:
    """Yield the lines for `--markers`, made from the signatures."""
    for marker in MARKERS:
        yield f"{signature(marker)}: {marker.__doc__}"
    yield "kvm: Carried by every test that uses a machine of pytest-kvmsnap; not to be set by hand."


def signature(marker: Callable[..., None]) -> str:
    """Return a marker as people write it: `kvm_snapshot(name: str)`."""
    call = inspect.signature(marker).replace(return_annotation=inspect.Signature.empty)
    return f"{marker.__name__}{call}"


def request_of(node: pytest.Item, settings: Settings, parameter: object = None) -> Request:
    """Return what the markers above a test and the options ask for.

    The nearer marker wins and any marker beats the options. `parameter` is the value of an
    indirect parametrization of `vm`: a domain's name, which beats both.

    Raises:
        ConfigError: wrong arguments, or no domain is named anywhere.
    """
    domain = _nearest(node, kvm_domain) or settings.domain
    if parameter is not None:
        if not isinstance(parameter, str) or not parameter.strip():
            raise ConfigError(
                "a parameter of vm must be a domain's name",
                where=node.nodeid,
                why=f"got {parameter!r}",
                cure='parametrize("vm", ["centos7", "debian12"], indirect=True)',
            )
        domain = parameter
    if domain is None:
        raise ConfigError(
            "no machine is named for a test that asks for one",
            where=node.nodeid,
            cure='mark it with @pytest.mark.kvm_domain("NAME"), or give --kvmsnap-domain NAME'
            " (ini: kvmsnap_domain)",
        )
    return Request(domain, _nearest(node, kvm_snapshot) or settings.snapshot)


def _nearest(node: pytest.Item, marker: Callable[..., None]) -> str | None:
    for holder, mark in node.iter_markers_with_node(marker.__name__):
        try:
            bound = inspect.signature(marker).bind(*mark.args, **mark.kwargs)
            marker(*bound.args, **bound.kwargs)
        except TypeError as error:
            given = [repr(a) for a in mark.args] + [f"{k}={v!r}" for k, v in mark.kwargs.items()]
            raise ConfigError(
                f"wrong arguments: @pytest.mark.{marker.__name__}({', '.join(given)})",
                where=holder.nodeid,
                why=str(error),
                cure=f"the marker is {signature(marker)}: {marker.__doc__}",
            ) from None
        value = bound.args[0]
        assert isinstance(value, str)  # noqa: S101 - checked by the marker just called
        return value
    return None
