"""Markers are typed functions: bound to their signature, the nearest wins."""

from pathlib import Path
from typing import Any

import pytest

from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.golden import Golden, NamedFile
from pytest_kvmsnap.markers import MARKERS, Request, marker_lines, request_of, signature
from pytest_kvmsnap.pools import Pool
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
        "kvm_golden(image: str, *, memory: str | None = None, vcpus: int | None = None,"
        " template: str | None = None)",
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
        (["kvm_domain('a', 'b')"], Settings(), Request(Pool(("a", "b")))),
        (["kvm_domain('a', 'a')"], Settings(), Request("a")),
        (["kvm_domain('web-*')", "kvm_snapshot('s')"], OPTIONS, Request(Pool(("web-*",)), "s")),
        (["kvm_snapshot('s')"], Settings(domain=Pool(("a", "b"))), Request(Pool(("a", "b")), "s")),
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


@pytest.mark.parametrize(
    ("parameter", "machine"),
    [("p", "p"), ("of parameter", "of parameter"), ("web-*", Pool(("web-*",)))],
)
def test_a_parameter_beats_marker_and_option(
    test_of: ItemOf, parameter: str, machine: str | Pool
) -> None:
    request = test_of.request(marked("kvm_domain('a')"), OPTIONS, parameter)
    assert request == Request(machine, "snapshot of option")


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
        ("kvm_domain(None)", "a name must be text, not None"),
        ("kvm_domain('')", "a name must be text, not ''"),
        ("kvm_domain(['a'])", "a name must be text, not ['a']"),
        ("kvm_domain('a', 7)", "a name must be text, not 7"),
        ("kvm_domain('a', '')", "a name must be text, not ''"),
        ("kvm_domain(name='a')", "got an unexpected keyword argument 'name'"),
        ("kvm_snapshot()", "missing a required argument: 'name'"),
        ("kvm_snapshot('a', 'b')", "too many positional arguments"),
        ("kvm_snapshot(0)", "a name must be text, not 0"),
        ("kvm_snapshot('\\t')", r"a name must be text, not '\t'"),
        ("kvm_snapshot('a', force=True)", "got an unexpected keyword argument 'force'"),
        ("kvm_golden()", "missing a required argument: 'image'"),
        ("kvm_golden('')", "a name must be text, not ''"),
        ("kvm_golden('a', 'b')", "too many positional arguments"),
        ("kvm_golden('a', memory=2)", 'must be a size with its unit, such as "2 GiB", not 2'),
        ("kvm_golden('a', memory='2')", "memory: "),
        ("kvm_golden('a', vcpus='2')", "vcpus must be a number of processors, not '2'"),
        ("kvm_golden('a', vcpus=0)", "vcpus must be a number of processors, not 0"),
        ("kvm_golden('a', vcpus=True)", "vcpus must be a number of processors, not True"),
        ("kvm_golden('a', template=7)", "a name must be text, not 7"),
    ],
)
def test_wrong_arguments_are_told_with_the_signature(
    test_of: ItemOf, marker: str, why: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        test_of.request(marked(marker), OPTIONS)
    assert caught.value.what == f"wrong arguments: @pytest.mark.{marker}"
    assert why in caught.value.why
    assert caught.value.where.endswith("::test_it")
    name = marker.partition("(")[0]
    assert caught.value.cure.startswith(f"the marker is {name}(")


def test_wrong_arguments_are_told_with_the_node_that_has_them(test_of: ItemOf) -> None:
    source = f"pytestmark = pytest.mark.kvm_snapshot()\n{marked()}"
    with pytest.raises(ConfigError) as caught:
        test_of.request(source, OPTIONS)
    assert caught.value.where.endswith(".py")


# golden images


@pytest.fixture
def image(pytester: pytest.Pytester) -> Path:
    """An image beside the test's file."""
    path = pytester.path / "a.qcow2"
    path.touch()
    return path


def golden(request: Request) -> Golden:
    assert isinstance(request.machine, Golden)
    assert request.snapshot is None
    return request.machine


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("'a.qcow2'", {}),
        ("pathlib.Path('a.qcow2').absolute()", {}),
        ("'a.qcow2', memory='2 GiB', vcpus=3", {"memory": 2**31, "vcpus": 3}),
        ("'a.qcow2', template='t.xml'", {"template": "t.xml"}),
    ],
)
def test_a_golden_image_comes_with_what_the_marker_says(
    test_of: ItemOf, image: Path, arguments: str, expected: dict[str, Any]
) -> None:
    template = image.with_name("t.xml")
    template.touch()
    if "template" in expected:
        expected = {"template": template}
    request = test_of.request(f"import pathlib\n{marked(f'kvm_golden({arguments})')}")
    assert golden(request) == Golden(image, "qcow2", **expected)


@pytest.mark.parametrize(("name", "place"), [("a.qcow2", "beside"), ("b.qcow2", "first")])
def test_an_image_is_looked_for_beside_the_file_that_names_it_and_then_in_the_image_path(
    test_of: ItemOf,
    image: Path,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    place: str,
) -> None:
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    for folder in (first, second):
        for each in ("a.qcow2", "b.qcow2"):
            (folder / each).touch()
    settings = Settings(image_path=(first, second))
    found = golden(test_of.request(marked(f"kvm_golden('{name}')"), settings))
    expected = image.parent if place == "beside" else first
    assert found.image == expected / name
    assert found.folders == (expected, expected, first, second)


def test_an_image_that_is_nowhere_is_told_with_all_places(test_of: ItemOf, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no golden image 'no\.qcow2'") as caught:
        test_of.request(marked("kvm_golden('no.qcow2')"), Settings(image_path=(tmp_path,)))
    assert caught.value.where.endswith("::test_it")
    assert str(tmp_path / "no.qcow2") in caught.value.why
    assert len(caught.value.why.splitlines()) == 3
    assert "--kvmsnap-image-path" in caught.value.cure


def test_a_template_that_is_nowhere_is_told(test_of: ItemOf, image: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no template 'no\.xml'"):
        test_of.request(marked(f"kvm_golden('{image.name}', template='no.xml')"))


@pytest.mark.parametrize(
    ("name", "content", "format_"),
    [
        ("a.qcow2", b"", "qcow2"),
        ("a.QCOW2", b"", "qcow2"),
        ("a.raw", b"", "raw"),
        ("a.raw", b"QFI\xfb", "raw"),
        ("a.img", b"\0", "raw"),
        ("grün ☃.raw", b"", "raw"),
    ],
)
def test_the_name_of_an_image_tells_its_format(
    test_of: ItemOf, pytester: pytest.Pytester, name: str, content: bytes, format_: str
) -> None:
    (pytester.path / name).write_bytes(content)
    assert golden(test_of.request(marked(f"kvm_golden({name!r})"))).format == format_


@pytest.mark.parametrize(
    ("name", "content"), [("a", b""), ("a.vmdk", b""), ("a.img", b"QFI\xfb\0\0\0\3")]
)
def test_a_name_that_does_not_tell_the_format_is_refused(
    test_of: ItemOf, pytester: pytest.Pytester, name: str, content: bytes
) -> None:
    (pytester.path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="does not tell its format"):
        test_of.request(marked(f"kvm_golden({name!r})"))


def test_a_link_to_an_image_has_its_own_name_and_the_place_of_the_image(
    test_of: ItemOf, image: Path, tmp_path: Path
) -> None:
    content = tmp_path / "sha256-abc"
    content.touch()
    image.unlink()
    image.symlink_to(content)
    request = golden(test_of.request(marked(f"kvm_golden('{image.name}')")))
    assert (request.image, request.format) == (content, "qcow2")


OTHERS = ["kvm_domain('d')", "kvm_snapshot('s')"]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("order", [1, -1])
def test_a_golden_image_and_another_choice_on_one_node_contradict_each_other(
    test_of: ItemOf, image: Path, other: str, order: int
) -> None:
    with pytest.raises(ConfigError, match="and kvm_golden contradict each other") as caught:
        test_of.request(marked(*[f"kvm_golden('{image.name}')", other][::order]), OPTIONS)
    assert caught.value.where.endswith("::test_it")


NESTED = """
pytestmark = pytest.mark.{module}

@pytest.mark.{on_class}
class TestIt:
    @pytest.mark.{test}
    def test_it(self): pass
"""
GOLDEN, FAR, NEAR, SNAPSHOT = (
    "kvm_golden('a.qcow2')",
    "kvm_domain('f')",
    "kvm_domain('n')",
    OTHERS[1],
)


@pytest.mark.parametrize(
    ("module", "on_class", "test", "expected"),
    [
        (FAR, SNAPSHOT, GOLDEN, "golden"),
        (GOLDEN, NEAR, "kvm", Request("n")),
        (GOLDEN, NEAR, SNAPSHOT, Request("n", "s")),
        (FAR, GOLDEN, SNAPSHOT, Request("f", "s")),
        (SNAPSHOT, GOLDEN, "kvm", "golden"),
        (GOLDEN, FAR, NEAR, Request("n")),
    ],
)
def test_the_nearer_choice_replaces_the_farther_one(
    test_of: ItemOf, image: Path, module: str, on_class: str, test: str, expected: object
) -> None:
    source = NESTED.format(module=module, on_class=on_class, test=test)
    request = test_of.request(source)
    assert request == (Request(Golden(image, "qcow2")) if expected == "golden" else expected)


def test_a_snapshot_without_a_domain_is_told_why(test_of: ItemOf, image: Path) -> None:
    assert image.exists()
    source = NESTED.format(module="kvm", on_class=GOLDEN, test=SNAPSHOT)
    with pytest.raises(ConfigError, match="no machine is named") as caught:
        test_of.request(source)
    assert "kvm_snapshot('s') is a snapshot of a domain, not of a golden image" in caught.value.why


@pytest.mark.parametrize(
    ("markers", "parameter", "expected"),
    [
        ([], NONE, "golden with template"),
        (["kvm_domain('a')"], NONE, Request("a")),
        (["kvm_golden('a.qcow2')"], NONE, "golden"),
        ([], "of parameter", Request("of parameter")),
        (["kvm_snapshot('s')"], NONE, None),
    ],
)
def test_a_golden_image_of_the_options_is_for_tests_without_a_marker(
    test_of: ItemOf, image: Path, markers: list[str], parameter: object, expected: object
) -> None:
    template = image.with_name("t.xml")
    template.touch()
    settings = Settings(
        golden=NamedFile("a.qcow2", image.parent),
        template=NamedFile("t.xml", image.parent),
        origins={"golden": "--kvmsnap-golden"},
    )
    if expected is None:
        with pytest.raises(ConfigError, match="no machine is named"):
            test_of.request(marked(*markers), settings, parameter)
        return
    if expected == "golden":
        expected = Request(Golden(image, "qcow2"))
    elif expected == "golden with template":
        expected = Request(Golden(image, "qcow2", template=template))
    assert test_of.request(marked(*markers), settings, parameter) == expected


def test_a_marker_for_a_golden_image_beats_the_options(test_of: ItemOf, image: Path) -> None:
    assert golden(test_of.request(marked(f"kvm_golden('{image.name}')"), OPTIONS)).image == image


def test_a_parameter_beats_a_golden_image(test_of: ItemOf, image: Path) -> None:
    assert test_of.request(marked(f"kvm_golden('{image.name}')"), None, "p") == Request("p")
