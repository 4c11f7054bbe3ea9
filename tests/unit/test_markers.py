"""Markers are typed functions: bound to their signature, the nearest wins."""

import pytest

from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.markers import MARKERS, Request, marker_lines, request_of, signature
from pytest_kvmsnap.settings import Settings

NONE = object()


@pytest.fixture
def test_of(pytester: pytest.Pytester) -> "ItemOf":
    return ItemOf(pytester)


class ItemOf:
    """Collect a test from its source."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self._pytester = pytester

    def __call__(self, source: str) -> pytest.Item:
        return self._pytester.getitem(f"import pytest\n{source}", "test_it")

    def request(
        self, source: str, settings: Settings | None = None, parameter: object = NONE
    ) -> Request:
        if parameter is not NONE:
            mark = f"@pytest.mark.parametrize('vm', [{parameter!r}], ids=[''], indirect=True)"
            source = f"{mark}\n{source}".replace("test_it()", "test_it(vm)")
        item, *_ = self._pytester.getitems(f"import pytest\n{source}")
        return request_of(item, "function", settings or Settings())


def marked(*markers: str) -> str:
    return "\n".join([*(f"@pytest.mark.{marker}" for marker in markers), "def test_it(): pass"])


def test_signatures_are_shown_as_people_write_them() -> None:
    assert [signature(marker) for marker in MARKERS] == [
        "kvm_domain(*names: str)",
        "kvm_snapshot(name: str)",
    ]


def test_there_is_a_line_for_each_marker_and_one_for_kvm() -> None:
    lines = list(marker_lines())
    assert len(lines) == len(MARKERS) + 1
    for line, marker in zip(lines, MARKERS, strict=False):
        assert line == f"{signature(marker)}: {marker.__doc__}"
    assert lines[-1].startswith("kvm: ")


OPTIONS = Settings(domain="of option", snapshot="snapshot of option")


@pytest.mark.parametrize(
    ("markers", "settings", "request_"),
    [
        (["kvm_domain('a')"], Settings(), Request("a")),
        (["kvm_domain('a')", "kvm_snapshot('s')"], Settings(), Request("a", "s")),
        (["kvm_domain('a')", "kvm_snapshot(name='s')"], Settings(), Request("a", "s")),
        ([], OPTIONS, Request("of option", "snapshot of option")),
        (["kvm_domain('a')"], OPTIONS, Request("a", "snapshot of option")),
        (["kvm_snapshot('s')"], OPTIONS, Request("of option", "s")),
        (["kvm_domain('a')", "kvm_domain('b')"], Settings(), Request("b")),
        (["kvm_domain('0')"], OPTIONS, Request("0", "snapshot of option")),
    ],
)
def test_a_marker_beats_the_option(
    test_of: ItemOf, markers: list[str], settings: Settings, request_: Request
) -> None:
    """Of two on one test the one that is written nearer to it counts, as pytest has it."""
    assert test_of.request(marked(*markers), settings) == request_


def test_the_nearest_marker_wins_and_farther_ones_are_not_looked_at(test_of: ItemOf) -> None:
    source = """
pytestmark = pytest.mark.kvm_domain()

@pytest.mark.kvm_domain("near")
def test_it(): pass
"""
    assert test_of.request(source) == Request("near")


@pytest.mark.parametrize("parameter", ["p", "of parameter"])
def test_a_parameter_beats_marker_and_option(test_of: ItemOf, parameter: str) -> None:
    request = test_of.request(marked("kvm_domain('a')"), OPTIONS, parameter)
    assert request == Request(parameter, "snapshot of option")


@pytest.mark.parametrize("parameter", [7, "", "  ", ["a"], 0, False])
def test_a_wrong_parameter_is_told(test_of: ItemOf, parameter: object) -> None:
    with pytest.raises(ConfigError) as caught:
        test_of.request(marked(), OPTIONS, parameter)
    assert caught.value.why == f"got {parameter!r}"
    assert caught.value.where.endswith("::test_it[]")
    assert "indirect=True" in caught.value.cure


def test_no_domain_is_told_with_the_ways_to_name_one(test_of: ItemOf) -> None:
    with pytest.raises(ConfigError, match="no machine is named") as caught:
        test_of.request(marked())
    for way in ("kvm_domain", "--kvmsnap-domain", "kvmsnap_domain"):
        assert way in caught.value.cure


@pytest.mark.parametrize(
    ("marker", "why"),
    [
        ("kvm_domain()", "no domain is named"),
        ("kvm_domain('a', 'b')", "several domains (a pool) are not supported yet"),
        ("kvm_domain(None)", "a name must be text, not None"),
        ("kvm_domain('')", "a name must be text, not ''"),
        ("kvm_domain(['a'])", "a name must be text, not ['a']"),
        ("kvm_domain(name='a')", "got an unexpected keyword argument 'name'"),
        ("kvm_snapshot()", "missing a required argument: 'name'"),
        ("kvm_snapshot('a', 'b')", "too many positional arguments"),
        ("kvm_snapshot(0)", "a name must be text, not 0"),
        ("kvm_snapshot('\\t')", r"a name must be text, not '\t'"),
        ("kvm_snapshot('a', force=True)", "got an unexpected keyword argument 'force'"),
    ],
)
def test_wrong_arguments_are_told_with_the_signature(
    test_of: ItemOf, marker: str, why: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        test_of.request(marked(marker), OPTIONS)
    assert caught.value.what == f"wrong arguments: @pytest.mark.{marker}"
    assert caught.value.why == why
    assert caught.value.where.endswith("::test_it")
    name = marker.partition("(")[0]
    assert caught.value.cure.startswith(f"the marker is {name}(")


def test_wrong_arguments_are_told_with_the_node_that_has_them(test_of: ItemOf) -> None:
    source = f"pytestmark = pytest.mark.kvm_snapshot()\n{marked()}"
    with pytest.raises(ConfigError) as caught:
        test_of.request(source, OPTIONS)
    assert caught.value.where.endswith(".py")
