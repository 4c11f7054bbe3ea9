"""The markers as typed functions, and the `Request` that markers and options come to."""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import pytest

from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.golden import Golden, NamedFile, format_of
from pytest_kvmsnap.pools import Pool, domain_or_pool
from pytest_kvmsnap.settings import Settings
from pytest_kvmsnap.sizes import parse_size
from pytest_kvmsnap.usage import closure_of, is_ours


def kvm_domain(*names: str) -> None:
    """Run on this libvirt domain; several, or a pattern, are a pool: the first free one serves."""
    if not names:
        raise TypeError("no domain is named")
    _check_names(*names)


def kvm_snapshot(name: str) -> None:
    """Start from this existing snapshot of the domain, and go back to it afterwards."""
    _check_names(name)


def kvm_golden(
    image: str,
    *,
    memory: str | None = None,
    vcpus: int | None = None,
    template: str | None = None,
) -> None:
    """Run on a throwaway machine on a thin copy of this image."""
    for file in (image, template):
        if file is not None and not isinstance(file, PurePath):
            _check_names(file)
    if memory is not None:
        _bytes(memory)
    if vcpus is not None:
        _check_count(vcpus)


MARKERS: tuple[Callable[..., None], ...] = (kvm_domain, kvm_snapshot, kvm_golden)

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


def _check_count(vcpus: object) -> None:
    if not isinstance(vcpus, int) or isinstance(vcpus, bool) or vcpus < 1:
        raise TypeError(f"vcpus must be a number of processors, not {vcpus!r}")


def _bytes(memory: object) -> int:
    if not isinstance(memory, str):
        raise TypeError(f'memory must be a size with its unit, such as "2 GiB", not {memory!r}')
    try:
        return parse_size(memory)
    except ValueError as error:
        raise TypeError(f"memory: {error}") from None


@dataclass(frozen=True)
class Request:
    """Which machine a test wants, and in which state: None stands for the machine's baseline.

    The machine is a domain, by its name, any of a pool, or a throwaway one on a golden image.
    """

    machine: str | Pool | Golden
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
    beats both; it holds for the narrower fixtures of the test too. A golden image and a domain (or
    a snapshot of one) replace each other.

    Raises:
        ConfigError: wrong arguments, markers that contradict each other, a file that is not there,
            or no machine is named anywhere.
    """
    node = _node_of(item, scope)
    parameter = _parameter(item, scope)
    if parameter is not None and (not isinstance(parameter, str) or not parameter.strip()):
        raise ConfigError(
            "a parameter of vm must be a domain's name",
            where=item.nodeid,
            why=f"got {parameter!r}",
            cure='parametrize("vm", ["centos7", "debian12"], indirect=True)',
        )
    domain, snapshot, golden = (_nearest(node, marker) for marker in MARKERS)
    if parameter is None and golden is not None and not _is_replaced(golden, domain, snapshot):
        return Request(_golden_of(golden, settings))
    named = settings.domain
    if parameter is not None:
        named = domain_or_pool([parameter])
    elif domain is not None:
        named = domain_or_pool(domain.values)
    if named is None and snapshot is None and settings.golden is not None:
        return Request(_golden_of_options(settings))
    if named is None:
        raise _unnamed(item, scope, snapshot)
    return Request(named, snapshot.values[0] if snapshot is not None else settings.snapshot)


def requests_of(
    item: pytest.Item, scopes: Collection[str], settings: Settings
) -> dict[Request, str]:
    """Return what our fixtures of these scopes come to: for each machine the narrowest one.

    Raises:
        ConfigError: as `request_of`.
    """
    narrowest: dict[str | Pool | Golden, tuple[Request, str]] = {}
    for scope in FIXTURES:
        if scope in scopes:
            request = request_of(item, scope, settings)
            narrowest.setdefault(request.machine, (request, scope))
    return dict(narrowest.values())


def check_pools(requests: Sequence[Request], where: str) -> None:
    """Refuse a pool beside a machine of it in one test: they may or may not be the same.

    Raises:
        ConfigError: that is so.
    """
    machines = {request.machine for request in requests}
    for pool in [machine for machine in machines if isinstance(machine, Pool)]:
        for other in machines - {pool}:
            names = other.names if isinstance(other, Pool) else [other]
            if any(isinstance(name, str) and pool.has(name) for name in names):
                raise ConfigError(
                    f"this test asks for the pool {pool}, and for {other} beside it",
                    where=where,
                    why="a machine of the one may be the machine of the other",
                    cure="name the same for all fixtures of a test, or other machines",
                )


def _is_replaced(golden: "_Marked", *others: "_Marked | None") -> bool:
    """Tell whether a marker that is nearer to the test asks for something else.

    Raises:
        ConfigError: one on the same node does.
    """
    for other in others:
        if other is not None and other.node is golden.node:
            raise ConfigError(
                f"{other.name} and kvm_golden contradict each other",
                where=golden.node.nodeid,
                why="a golden image gives a throwaway machine, which is no domain of yours and has"
                " no snapshots of yours",
                cure="use one of the two here; on a nearer class or test it replaces the other",
            )
    return any(other is not None and other.depth > golden.depth for other in others)


def _golden_of(marked: "_Marked", settings: Settings) -> Golden:
    path = marked.node.path
    given = marked.arguments
    template = given.get("template")
    return _golden(
        NamedFile(str(given["image"]), path if path.is_dir() else path.parent),
        NamedFile(str(template), path if path.is_dir() else path.parent) if template else None,
        settings,
        marked.node.nodeid,
        memory=_bytes(given["memory"]) if given.get("memory") is not None else None,
        vcpus=given.get("vcpus"),
    )


def _golden_of_options(settings: Settings) -> Golden:
    assert settings.golden is not None  # noqa: S101 - for mypy
    return _golden(settings.golden, settings.template, settings, settings.origins["golden"])


def _golden(
    image: NamedFile,
    template: NamedFile | None,
    settings: Settings,
    where: str,
    *,
    memory: int | None = None,
    vcpus: int | None = None,
) -> Golden:
    path = image.find("golden image", settings.image_path, where)
    found = template.find("template", settings.image_path, where) if template else None
    folders = (path.parent, path.resolve().parent, *settings.image_path)
    return Golden(path.resolve(), format_of(path, where), memory, vcpus, found, folders)


def _unnamed(item: pytest.Item, scope: str, snapshot: "_Marked | None") -> ConfigError:
    why = ""
    if snapshot is not None:
        name = snapshot.values[0]
        why = f"kvm_snapshot({name!r}) is a snapshot of a domain, not of a golden image"
    elif scope != "function" and (_nearest(item, kvm_domain) or _nearest(item, kvm_golden)):
        why = f"{FIXTURES[scope]} sees the markers of {_SEEN[scope]} only"
    return ConfigError(
        "no machine is named for a test that asks for one",
        where=item.nodeid,
        why=why,
        cure='mark it with @pytest.mark.kvm_domain("NAME"), or give --kvmsnap-domain NAME'
        " (ini: kvmsnap_domain); or with kvm_golden(IMAGE) for a throwaway machine",
    )


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


class _Marked(NamedTuple):
    """A marker with what was given to it; `depth` is how near to the test its node is."""

    name: str
    node: pytest.Item | pytest.Collector
    depth: int
    arguments: dict[str, Any]

    @property
    def values(self) -> tuple[str, ...]:
        """The names that it gives."""
        given = next(iter(self.arguments.values()))
        return given if isinstance(given, tuple) else (str(given),)


def _nearest(node: pytest.Item | pytest.Collector, marker: Callable[..., None]) -> _Marked | None:
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
        assert isinstance(holder, pytest.Item | pytest.Collector)  # noqa: S101 - for mypy
        depth = len(holder.listchain())
        return _Marked(marker.__name__, holder, depth, bound.arguments)
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
