"""Options: what each takes, where a value came from, and what is said of a wrong one."""

from pathlib import Path

import pytest

from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.golden import NamedFile
from pytest_kvmsnap.pools import Pool
from pytest_kvmsnap.settings import (
    OPTIONS,
    Folders,
    Option,
    Settings,
    check_complete,
    hook_values,
    resolve,
)

# option, what is given, what it comes to
RIGHT: list[tuple[str, object, object]] = [
    ("uri", "qemu:///system", "qemu:///system"),
    ("uri", " qemu:///system ", "qemu:///system"),
    ("domain", "centos", "centos"),
    ("domain", "two words ü", "two words ü"),
    ("domain", ["centos"], "centos"),
    ("domain", "web-*", Pool(("web-*",))),
    ("domain", ["web-1", "web-2"], Pool(("web-1", "web-2"))),
    ("snapshot", "installed", "installed"),
    ("snapshot", "0", "0"),
    ("golden", "a.qcow2", NamedFile("a.qcow2", Path())),
    ("golden", Path("/a.raw"), NamedFile("/a.raw", Path())),
    ("template", " a.xml ", NamedFile("a.xml", Path())),
    ("image_path", "/", (Path("/"),)),
    ("image_path", "/usr:/", (Path("/usr"), Path("/"))),
    ("image_path", "\n/usr\n/\n", (Path("/usr"), Path("/"))),
    ("image_path", ["/usr", Path("/")], (Path("/usr"), Path("/"))),
    ("image_path", "~", (Path.home(),)),
    ("convert", "auto", "auto"),
    ("convert", "check", "check"),
    ("convert", " never ", "never"),
    ("live", "yes", True),
    ("live", "True", True),
    ("live", True, True),
    ("live", "no", False),
    ("live", " FALSE", False),
    ("live", False, False),
    ("verify", "canary", "canary"),
    ("verify", "state", "state"),
    ("ready", "agent", "agent"),
    ("ready", "none", "none"),
    ("ready", " ssh ", "ssh"),
    ("ready", "console:login: $", "console:login: $"),
    ("keep", "on-failure", "on-failure"),
    ("keep_max", "1", 1),
    ("output", "results", Path("results")),
    ("durations", "0", 0),
    ("report", "/r.json", Path("/r.json")),
    ("ssh_user", "tester", "tester"),
    ("ssh_key", "/etc/passwd", Path("/etc/passwd")),
    ("ssh_port", 2222, 2222),
    ("ready_timeout", "0.5", 0.5),
    ("ready_timeout", 7, 7.0),
    ("revert_timeout", "1e3", 1000.0),
    ("lock_timeout", 2.5, 2.5),
    ("lock_dir", "/var/locks", Path("/var/locks")),
    ("lock_dir", Path("/var/locks"), Path("/var/locks")),
    ("lock_dir", "~/locks", Path.home() / "locks"),
    ("max_concurrent", "4", 4),
    ("max_concurrent", 1, 1),
    ("growth_limit", "512 MiB", 512 * 2**20),
]

# option, what is given, what is said
WRONG: list[tuple[str, object, str]] = [
    ("uri", "", "'': must not be empty"),
    ("uri", " \t", "must not be empty"),
    ("domain", "", "must not be empty"),
    ("snapshot", "", "must not be empty"),
    ("golden", "", "must not be empty"),
    ("template", " ", "must not be empty"),
    ("image_path", " : ", "must not be empty"),
    ("image_path", "/usr:/nowhere", "there is no folder /nowhere"),
    ("golden", ["a", "b"], "must be text, a number or a path"),
    ("convert", "", "'': must be one of: auto, check, never"),
    ("convert", "Auto", "'Auto': must be one of: auto, check, never"),
    ("live", "", "must be yes or no"),
    ("live", 0, "'0': must be yes or no"),
    ("live", "1", "must be yes or no"),
    ("verify", "none", "must be one of: canary, state"),
    ("ready", "telnet", "must be agent, ssh, none, or console:"),
    ("ready", "console:(", "no regular expression"),
    ("ready", "console:", "matches a console that says nothing"),
    ("keep", "yes", "must be one of: never, on-failure, always"),
    ("keep_max", "0", "must be a whole number above 0"),
    ("durations", "-1", "must be a whole number"),
    ("ssh_key", "/no/key", "there is no file"),
    ("ssh_port", "70000", "must be a port"),
    ("ready_timeout", "", "must be a number of seconds"),
    ("ready_timeout", 0, "'0': must be a number of seconds above 0"),
    ("ready_timeout", "0", "must be a number of seconds above 0"),
    ("ready_timeout", True, "'yes': must be a number of seconds"),
    ("revert_timeout", "-3", "must be a number of seconds above 0"),
    ("revert_timeout", "5 min", "must be a number of seconds"),
    ("revert_timeout", "nan", "must be a number of seconds above 0"),
    ("lock_timeout", "inf", "must be a number of seconds above 0"),
    ("lock_dir", "", "must not be empty"),
    ("lock_dir", "locks", "must be an absolute path"),
    ("lock_dir", "./locks", "must be an absolute path"),
    ("max_concurrent", "", "must be a whole number above 0"),
    ("max_concurrent", 0, "'0': must be a whole number above 0"),
    ("max_concurrent", "-1", "must be a whole number above 0"),
    ("max_concurrent", "2.5", "must be a whole number above 0"),
    ("max_concurrent", True, "'yes': must be a whole number above 0"),
    ("growth_limit", 10, "'10': must be a size above 0 with its unit, such as 512 MiB or 10 GiB"),
    ("uri", object(), "must be text, a number or a path"),
    ("uri", {"uri": 1}, "must be text, a number or a path"),
]

SOURCES = ["command line", "hook", "ini"]


def option_of(key: str) -> Option:
    return next(option for option in OPTIONS if option.key == key)


def settled(source: str, key: str, value: object) -> Settings:
    given = {name: {key: value} if name == source else {} for name in SOURCES}
    return resolve(given["command line"], given["hook"], given["ini"])


def origin_of(source: str, option: Option) -> str:
    return {
        "command line": option.flag,
        "hook": f"'{option.name}' from the hook pytest_kvmsnap_lab",
        "ini": f"{option.ini} in ini",
    }[source]


def test_an_option_has_three_spellings() -> None:
    option = option_of("ready_timeout")
    assert (option.name, option.flag, option.ini) == (
        "ready-timeout",
        "--kvmsnap-ready-timeout",
        "kvmsnap_ready_timeout",
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("key", "given", "value"), RIGHT)
def test_a_value_is_parsed_and_its_origin_kept(
    key: str, given: object, value: object, source: str
) -> None:
    settings = settled(source, key, given)
    assert getattr(settings, key) == value
    assert type(getattr(settings, key)) is type(value)
    assert settings.origins == {key: origin_of(source, option_of(key))}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("key", "given", "why"), WRONG)
def test_a_wrong_value_is_told_with_its_origin(
    key: str, given: object, why: str, source: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        settled(source, key, given)
    assert caught.value.what == f"wrong value for {origin_of(source, option_of(key))}"
    assert why in caught.value.why


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: str(option.name))
def test_the_cure_for_a_wrong_value_is_the_options_own_help(option: Option) -> None:
    with pytest.raises(ConfigError) as caught:
        settled("ini", option.key, " ")
    assert caught.value.cure == f"{option.flag}: {option.help} (default: {option.default_text})"


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: str(option.name))
def test_a_default_is_what_the_table_says(option: Option) -> None:
    settings = resolve({}, {}, {})
    assert getattr(settings, option.key) == option.default
    assert settings.origins == {}
    assert settings == Settings()


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: str(option.name))
def test_none_stands_for_not_given(option: Option) -> None:
    nothing = {option.key: None}
    assert resolve(nothing, nothing, nothing) == Settings()


@pytest.mark.parametrize(
    ("line", "hook", "ini", "value"),
    [
        ("1", "2", "3", 1.0),
        (None, "2", "3", 2.0),
        (None, None, "3", 3.0),
        ("1", None, "3", 1.0),
        (None, None, None, 120.0),
    ],
)
def test_command_line_over_hook_over_ini_over_default(
    line: str | None, hook: str | None, ini: str | None, value: float
) -> None:
    key = "ready_timeout"
    assert resolve({key: line}, {key: hook}, {key: ini}).ready_timeout == value


@pytest.mark.parametrize(
    ("key", "falsy"),
    [("ready_timeout", 0), ("live", 0), ("uri", ""), ("domain", ""), ("convert", "")],
)
def test_a_falsy_value_is_a_value_and_not_replaced_by_what_is_below(
    key: str, falsy: object
) -> None:
    good = {"ready_timeout": "5", "live": "yes", "uri": "x", "domain": "x", "convert": "auto"}
    with pytest.raises(ConfigError):
        resolve({}, {key: falsy}, {key: good[key]})


def test_live_false_from_the_hook_beats_ini() -> None:
    assert resolve({}, {"live": False}, {"live": "yes"}).live is False


def test_files_are_relative_to_what_names_them(tmp_path: Path) -> None:
    folders = Folders(*(tmp_path / name for name in ("shell", "hook", "ini")))
    for folder in folders:
        (folder / "images").mkdir(parents=True)
    settings = resolve({"golden": "g"}, {"template": "t"}, {"image-path": None}, folders)
    assert settings.golden == NamedFile("g", tmp_path / "shell")
    assert settings.template == NamedFile("t", tmp_path / "hook")
    for number, folder in enumerate(folders):
        line, hook, ini = ({"image_path": "images"} if n == number else {} for n in range(3))
        assert resolve(line, hook, ini, folders).image_path == (folder / "images",)


GOLDEN = {"golden": "g.qcow2"}


@pytest.mark.parametrize("other", [{"domain": "d"}, {"snapshot": "s"}])
def test_a_golden_image_and_a_domain_at_one_place_contradict_each_other(
    other: dict[str, object],
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({}, {}, GOLDEN | other)
    (key,) = other
    assert (
        caught.value.what == f"kvmsnap_golden in ini and kvmsnap_{key} in ini contradict each other"
    )


def test_of_a_golden_image_and_a_domain_the_stronger_one_counts() -> None:
    stronger = resolve(GOLDEN, {"domain": "d"}, {"snapshot": "s"})
    assert (stronger.domain, stronger.snapshot) == (None, None)
    assert stronger.golden is not None
    assert stronger.origins.keys() == {"golden"}
    weaker = resolve({}, {"domain": "d"}, GOLDEN | {"template": "t"})
    assert (weaker.domain, weaker.golden, weaker.template) == ("d", None, None)
    check_complete(weaker)


def test_a_template_without_an_image_is_told_once_all_were_asked() -> None:
    lonely = resolve({}, {}, {"template": "t"})
    with pytest.raises(ConfigError, match="kvmsnap_template in ini has no golden image"):
        check_complete(lonely)
    check_complete(resolve({}, GOLDEN, {"template": "t"}))


def test_a_value_that_is_beaten_is_not_looked_at() -> None:
    assert resolve({"live": "no"}, {}, {"live": "nonsense"}).live is False


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Settings().uri = "other"  # type: ignore[misc]


# the hook's result


def test_no_result_is_no_values() -> None:
    assert hook_values(None) == {}


@pytest.mark.parametrize("name", ["ready-timeout", "ready_timeout"])
def test_a_name_is_spelt_with_either_sign(name: str) -> None:
    assert hook_values({name: 5}) == {"ready_timeout": 5}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("domian", "did you mean 'domain'? options: uri, domain, "),
        ("ready-timout", "did you mean 'ready-timeout'? "),
        ("xyzzy", "options: uri, domain, "),
        (7, "options: uri, domain, "),
    ],
)
def test_an_unknown_name_is_told_with_the_close_one(name: object, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hook_values({name: "value"})
    assert caught.value.why == f"{name!r} is no option"
    assert caught.value.cure.startswith(hint)


@pytest.mark.parametrize("returned", ["uri", ["uri"], 7, True, object])
def test_what_is_no_mapping_is_told(returned: object) -> None:
    with pytest.raises(ConfigError, match="the hook pytest_kvmsnap_lab") as caught:
        hook_values(returned)
    assert caught.value.why == f"it returned {type(returned).__name__}, not a mapping"
