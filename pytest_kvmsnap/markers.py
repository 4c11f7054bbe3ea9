"""The markers as typed functions, and the `Request` that markers and options come to."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.settings import Settings
from pytest_kvmsnap.usage import closure_of, is_ours


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

FIXTURES = {
    "function": "vm",
    "class": "class_vm",
    "module": "module_vm",
    "session": "session_vm",
}
_SEEN = {"class": "its class and above", "module": "its module and above", "session": "no test"}


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


def request_of(item: pytest.Item, scope: str, settings: Settings) -> Request:
    """Return what a machine fixture of a scope gets in a test, by markers and options.

    A wider fixture sees the markers of its own node and those above it only. The nearer marker wins
    and any marker beats the options. The value of an indirect parametrization, a domain's name,
    beats both; it holds for the narrower fixtures of the test too.

    Raises:
        ConfigError: wrong arguments, or no domain is named anywhere.
    """
    node = _node_of(item, scope)
    parameter = _parameter(item, scope)
    domain = _nearest(node, kvm_domain) or settings.domain
    if parameter is not None:
        if not isinstance(parameter, str) or not parameter.strip():
            raise ConfigError(
                "a parameter of vm must be a domain's name",
                where=item.nodeid,
                why=f"got {parameter!r}",
                cure='parametrize("vm", ["centos7", "debian12"], indirect=True)',
            )
        domain = parameter
    if domain is None:
        raise ConfigError(
            "no machine is named for a test that asks for one",
            where=item.nodeid,
            why=f"{FIXTURES[scope]} sees the markers of {_SEEN[scope]} only"
            if scope != "function" and _nearest(item, kvm_domain)
            else "",
            cure='mark it with @pytest.mark.kvm_domain("NAME"), or give --kvmsnap-domain NAME'
            " (ini: kvmsnap_domain)",
        )
    return Request(domain, _nearest(node, kvm_snapshot) or settings.snapshot)


def _node_of(item: pytest.Item, scope: str) -> pytest.Item | pytest.Collector:
    """Return whose markers a fixture of a scope sees."""
    node: pytest.Item | pytest.Collector | None = item
    if scope == "session":
        node = item.session
    elif scope == "module":
        node = item.getparent(pytest.Module)
    elif scope == "class":
        node = item.getparent(pytest.Class)
    return item if node is None else node  # class_vm outside of a class lasts for one test


def _parameter(item: pytest.Item, scope: str) -> object:
    """Return the parameter of our fixture of a scope, or of the next wider one that has any."""
    parameters: dict[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    scopes = list(FIXTURES)
    wider = [FIXTURES[each] for each in scopes[scopes.index(scope) :]]
    named = [name for name in wider if name in parameters]
    if not named:  # so mostly, and a walk through the closure is saved
        return None
    ours = {definition.argname for definition in closure_of(item) if is_ours(definition)}
    return next((parameters[name] for name in named if name in ours), None)


def _nearest(node: pytest.Item | pytest.Collector, marker: Callable[..., None]) -> str | None:
    for holder, first in node.iter_markers_with_node(marker.__name__):
        mark = _of_derived_class(holder, first)
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


def _of_derived_class(node: object, mark: pytest.Mark) -> pytest.Mark:
    """Return the mark of a class in place of that of its base class, which pytest gives first."""
    marked: list[pytest.Mark] = []
    for cls in node.obj.__mro__ if isinstance(node, pytest.Class) else ():
        own = vars(cls).get("pytestmark", [])
        decorators: list[Any] = own if isinstance(own, list) else [own]
        marks = [getattr(each, "mark", each) for each in decorators]
        marked += [each for each in marks if each.name == mark.name]
    return marked[0] if mark in marked else mark
