"""Options: what each takes, where a value came from, and what is said of a wrong one."""

from pathlib import Path

import pytest

from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.settings import OPTIONS, Option, Settings, hook_values, resolve

# option, what is given, what it comes to
RIGHT: list[tuple[str, object, object]] = [
    ("uri", "qemu:///system", "qemu:///system"),
    ("uri", " qemu:///system ", "qemu:///system"),
    ("domain", "centos", "centos"),
    ("domain", "two words ü", "two words ü"),
    ("domain", ["centos"], "centos"),
    ("snapshot", "installed", "installed"),
    ("snapshot", "0", "0"),
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
    ("ready_timeout", "0.5", 0.5),
    ("ready_timeout", 7, 7.0),
    ("revert_timeout", "1e3", 1000.0),
    ("lock_timeout", 2.5, 2.5),
    ("lock_dir", "/var/locks", Path("/var/locks")),
    ("lock_dir", Path("/var/locks"), Path("/var/locks")),
    ("lock_dir", "~/locks", Path.home() / "locks"),
]

# option, what is given, what is said
WRONG: list[tuple[str, object, str]] = [
    ("uri", "", "'': must not be empty"),
    ("uri", " \t", "must not be empty"),
    ("domain", "", "must not be empty"),
    ("domain", "web*", "must be one domain's name"),
    ("domain", "web?", "must be one domain's name"),
    ("domain", "web[12]", "must be one domain's name"),
    ("domain", "web1\nweb2", "must be one domain's name"),
    ("domain", ["a", "b"], "'a', 'b': several (a pool) are not supported yet"),
    ("snapshot", "", "must not be empty"),
    ("convert", "", "'': must be one of: auto, check, never"),
    ("convert", "Auto", "'Auto': must be one of: auto, check, never"),
    ("live", "", "must be yes or no"),
    ("live", 0, "'0': must be yes or no"),
    ("live", "1", "must be yes or no"),
    ("verify", "none", "must be one of: canary, state"),
    ("ready", "ssh", "must be one of: agent, none"),
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
