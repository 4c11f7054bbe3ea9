"""Pools: names and patterns that stand for several domains, of which any will do."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap.errors import ConfigError, DomainNotFoundError
from pytest_kvmsnap.golden import Golden
from pytest_kvmsnap.lab.lab import Lab
from pytest_kvmsnap.lab.site import Site
from pytest_kvmsnap.lab.voice import Voice
from pytest_kvmsnap.markers import Request, check_pools
from pytest_kvmsnap.pools import Pool, domain_or_pool, is_pattern, matching
from pytest_kvmsnap.settings import Settings, resolve

if TYPE_CHECKING:
    from testdriver import Host

WEB = Pool(("web-*",))
SILENT = Voice(lambda _line: None, lambda *_: None)

# what names stand for


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["web-1"], "web-1"),
        (["two words ü"], "two words ü"),
        (["web-1", "web-1"], "web-1"),
        (["web-1", "web-2"], Pool(("web-1", "web-2"))),
        (["web-2", "web-1"], Pool(("web-2", "web-1"))),
        (["web-1", "web-2", "web-1"], Pool(("web-1", "web-2"))),
        (["web-*"], WEB),
        (["web-?"], Pool(("web-?",))),
        (["web-[12]"], Pool(("web-[12]",))),
        (["web-1", "web-*"], Pool(("web-1", "web-*"))),
    ],
)
def test_one_name_is_a_domain_and_everything_else_a_pool(
    names: list[str], wanted: str | Pool
) -> None:
    assert domain_or_pool(names) == wanted


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("*", True), ("a?", True), ("[a]", True), ("a", False), ("a]", False), ("a.b-c_%", False)],
)
def test_wildcards_make_a_pattern(name: str, is_one: bool) -> None:
    assert is_pattern(name) == is_one


DOMAINS = ["db", "kvmsnap-web-0a1b-1", "web", "web-1", "web-2", "web-10", "Web-3", "web-[1]"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("web-1", ["web-1"]),
        ("nowhere", []),
        ("web-?", ["web-1", "web-2"]),
        ("web-[2-9]", ["web-2"]),
        ("web-*", ["web-1", "web-2", "web-10", "web-[1]"]),
        ("web-[1]", ["web-[1]"]),  # there is a domain of that very name
        ("x*", []),
        ("*", [name for name in DOMAINS if not name.startswith("kvmsnap-")]),
        ("kvmsnap-*", []),
        ("kvmsnap-web-0a1b-1", ["kvmsnap-web-0a1b-1"]),
    ],
)
def test_a_pattern_matches_as_in_a_shell_and_leaves_out_our_throwaway_machines(
    name: str, found: list[str]
) -> None:
    assert matching(name, DOMAINS) == found


@pytest.mark.parametrize(
    ("pool", "domain", "has"),
    [
        (WEB, "web-1", True),
        (WEB, "web", False),
        (WEB, "kvmsnap-web-1", False),
        (Pool(("*",)), "kvmsnap-web-1", False),
        (Pool(("a", "b")), "b", True),
        (Pool(("a", "b")), "c", False),
        (Pool(("a", "web-*")), "web-2", True),
        (Pool(("a", "web-*")), "a", True),
    ],
)
def test_a_pool_tells_whether_it_has_a_domain(pool: Pool, domain: str, has: bool) -> None:
    assert pool.has(domain) == has


def test_a_pool_reads_as_its_names_and_may_be_a_key() -> None:
    assert str(Pool(("a", "web-*"))) == "a, web-*"
    assert {Pool(("a", "b")): 1}[Pool(("a", "b"))] == 1
    assert Pool(("a", "b")) != Pool(("b", "a"))


# options


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("web-*", WEB),
        (" web-* ", WEB),
        ("\nweb-1\n\n  web-2\n", Pool(("web-1", "web-2"))),  # lines of ini
        ("\nweb-1\n", "web-1"),
        (["web-1", "web-2"], Pool(("web-1", "web-2"))),  # repeated
        (("web-1", "db*"), Pool(("web-1", "db*"))),
        (["web-1", "web-1"], "web-1"),
        ("web 1, web 2", "web 1, web 2"),
    ],
)
def test_the_option_takes_several_names_and_patterns(given: object, wanted: str | Pool) -> None:
    for number in range(3):
        line, hook, ini = ({"domain": given} if n == number else {} for n in range(3))
        assert resolve(line, hook, ini).domain == wanted


def test_a_pool_beats_the_golden_image_of_a_weaker_place() -> None:
    settings = resolve({"domain": ["a", "b"]}, {}, {"golden": "g.qcow2"})
    assert (settings.domain, settings.golden) == (Pool(("a", "b")), None)


# several machines in one test


@pytest.mark.parametrize(
    "machines",
    [
        ["a"],
        [WEB],
        [WEB, WEB],
        ["a", "b"],
        [WEB, "db"],
        [Pool(("a", "b")), Pool(("c", "d"))],
        [WEB, Golden(Path("/web-1.qcow2"), "qcow2")],
        [WEB, "kvmsnap-web-1"],
    ],
)
def test_machines_that_differ_for_sure_may_be_in_one_test(
    machines: list[str | Pool | Golden],
) -> None:
    check_pools([Request(machine) for machine in machines], "test_it")


@pytest.mark.parametrize(
    ("pool", "other"),
    [
        (WEB, "web-1"),
        (Pool(("a", "b")), "b"),
        (Pool(("a", "b")), Pool(("b", "c"))),
        (Pool(("a", "b")), Pool(("b", "a"))),
        (WEB, Pool(("db", "web-2"))),
        (WEB, Pool(("web-1*",))),
    ],
)
def test_a_pool_beside_what_may_be_the_same_machine_is_refused(
    pool: Pool, other: str | Pool
) -> None:
    for machines in ([pool, other], [other, pool]):
        with pytest.raises(ConfigError, match="asks for the pool") as caught:
            check_pools([Request(machine) for machine in machines], "test_x.py::test_it")
        assert caught.value.where == "test_x.py::test_it"
        assert str(pool) in caught.value.what
        assert str(other) in caught.value.what


# at a hypervisor


@pytest.fixture
def site(host: "Host", tmp_path: Path) -> Iterator[Site]:
    for name in ("web-2", "web-10", "web-1", "db", "kvmsnap-web-1"):
        host.define(name)
    site = Site(Settings(uri="test:///default", lock_dir=tmp_path), SILENT)
    yield site
    site.close()


@pytest.mark.parametrize(
    ("names", "members"),
    [
        (("web-*",), ["web-1", "web-10", "web-2"]),
        (("web-2", "web-1"), ["web-2", "web-1"]),
        (("web-2", "web-*", "db"), ["web-2", "web-1", "web-10", "db"]),
        (("*",), ["db", "web-1", "web-10", "web-2"]),
        (("kvmsnap-web-1", "web-1"), ["kvmsnap-web-1", "web-1"]),
    ],
)
def test_the_members_come_once_and_in_the_order_in_which_they_are_named(
    site: Site, names: tuple[str, ...], members: list[str]
) -> None:
    assert [domain.name for domain in site.members(Pool(names))] == members


def test_the_members_stay_the_same_for_a_run(site: Site, host: "Host") -> None:
    before = site.members(WEB)
    host.define("web-3")
    assert site.members(WEB) == before


@pytest.mark.parametrize(
    ("names", "what", "cure"),
    [
        (("web-1", "wep-2"), "there is no domain 'wep-2'", "did you mean 'web-2'"),
        (
            ("x*",),
            "there is no domain that matches 'x*'",
            "domains there: db, kvmsnap-web-1, web-1",
        ),
        (("web-*", "x*"), "there is no domain that matches 'x*'", "domains there: db"),
        (("kvmsnap-*",), "there is no domain that matches 'kvmsnap-*'", "domains there: db"),
    ],
)
def test_a_name_or_pattern_that_stands_for_nothing_is_told(
    site: Site, names: tuple[str, ...], what: str, cure: str
) -> None:
    with pytest.raises(DomainNotFoundError) as caught:
        site.members(Pool(names))
    assert caught.value.what == what
    assert caught.value.where == "test:///default"
    assert caught.value.cure.startswith(cure)


# for the whole run


@pytest.mark.parametrize(
    ("machine", "workers", "some"),
    [("db", 2, "one machine"), (WEB, 4, "3 machines"), (Pool(("db", "db*")), 2, "one machine")],
)
def test_machines_of_the_whole_run_are_refused_where_there_are_fewer_than_workers(
    site: Site, machine: str | Pool, workers: int, some: str
) -> None:
    lab = Lab(site.settings, SILENT)
    with pytest.raises(ConfigError) as caught:
        lab.check_workers([machine], workers)
    lab.close()
    message = f"{workers} workers of pytest-xdist would wait for {some} until the run ends"
    assert caught.value.what == message
    assert caught.value.where == f"{machine} at test:///default"
    assert f"name {workers} machines (a pool)" in caught.value.cure


@pytest.mark.parametrize(
    ("machine", "workers"),
    [(WEB, 3), (WEB, 2), (Golden(Path("/g.qcow2"), "qcow2"), 9), ("unknown", 2), ("un*", 2)],
)
def test_machines_of_the_whole_run_may_be_as_many_as_workers(
    site: Site, machine: str | Pool | Golden, workers: int
) -> None:
    """What is not there at all is told by the look at all machines."""
    lab = Lab(site.settings, SILENT)
    lab.check_workers([machine], workers)
    lab.close()
