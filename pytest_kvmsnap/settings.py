"""The options: one table; command line, lab hook and ini become frozen `Settings`."""

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pytest_kvmsnap.errors import ConfigError

HOOK = "pytest_kvmsnap_lab"


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value.strip()


def _path(value: str) -> Path:
    path = Path(_text(value)).expanduser()
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _one_domain(value: str) -> str:
    name = _text(value)
    if re.search(r"[*?\[\n]", name):
        raise ValueError("must be one domain's name: patterns and pools are not supported yet")
    return name


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        raise ValueError("must be a number of seconds") from None
    if not 0 < seconds < float("inf"):
        raise ValueError("must be a number of seconds above 0")
    return seconds


def _yes_no(value: str) -> bool:
    try:
        return {"yes": True, "true": True, "no": False, "false": False}[value.strip().lower()]
    except KeyError:
        raise ValueError("must be yes or no") from None


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.strip() not in choices:
            raise ValueError(f"must be one of: {', '.join(choices)}")
        return value.strip()

    return parse


@dataclass(frozen=True)
class Option:
    """One option: `--kvmsnap-NAME`, ini `kvmsnap_NAME`, or NAME in the mapping of the lab hook."""

    name: str
    parse: Callable[[str], object]
    default: object
    default_text: str
    help: str
    metavar: str

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def flag(self) -> str:
        return f"--kvmsnap-{self.name}"

    @property
    def ini(self) -> str:
        return f"kvmsnap_{self.key}"


OPTIONS = (
    Option(
        "uri",
        _text,
        None,
        "LIBVIRT_DEFAULT_URI, else libvirt's own",
        "libvirt URI of the host with the machines",
        "URI",
    ),
    Option(
        "domain",
        _one_domain,
        None,
        "none",
        "machine for tests without the marker kvm_domain",
        "NAME",
    ),
    Option(
        "snapshot",
        _text,
        None,
        "a fresh one",
        "start tests without the marker kvm_snapshot from this existing snapshot",
        "NAME",
    ),
    Option(
        "convert",
        _one_of("auto", "check", "never"),
        "auto",
        "auto",
        "raw images: auto converts them to qcow2 before the first test, check lists them and"
        " fails, never fails where one is met",
        "{auto,check,never}",
    ),
    Option(
        "live",
        _yes_no,
        True,
        "yes",
        "yes: snapshots hold the running machine; no: it is snapshotted while off and booted for"
        " each test",
        "{yes,no}",
    ),
    Option(
        "verify",
        _one_of("canary", "state"),
        "canary",
        "canary",
        "canary: prove each revert inside the guest too; state: by power state and current"
        " snapshot alone",
        "{canary,state}",
    ),
    Option(
        "ready",
        _one_of("agent", "none"),
        None,
        "agent where the domain has the channel, else none",
        "what a ready machine answers: agent or none",
        "{agent,none}",
    ),
    Option(
        "ready-timeout",
        _seconds,
        120.0,
        "120",
        "seconds that a machine may take to get ready",
        "SECONDS",
    ),
    Option(
        "revert-timeout",
        _seconds,
        300.0,
        "300",
        "seconds that a revert may take before the machine is destroyed and quarantined",
        "SECONDS",
    ),
    Option(
        "lock-timeout",
        _seconds,
        600.0,
        "600",
        "seconds to wait for a machine that another process holds",
        "SECONDS",
    ),
    Option(
        "lock-dir",
        _path,
        None,
        "shared by the users of the host for system URIs, else private to the user",
        "folder of the locks and journals",
        "DIR",
    ),
)
_BY_KEY = {option.key: option for option in OPTIONS}


@dataclass(frozen=True)
class Settings:
    """What the options came to, and where each value came from (`origins`, by field name)."""

    uri: str | None = None
    domain: str | None = None
    snapshot: str | None = None
    convert: Literal["auto", "check", "never"] = "auto"
    live: bool = True
    verify: Literal["canary", "state"] = "canary"
    ready: Literal["agent", "none"] | None = None
    ready_timeout: float = 120.0
    revert_timeout: float = 300.0
    lock_timeout: float = 600.0
    lock_dir: Path | None = None
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)


def resolve(
    command_line: Mapping[str, object], hook: Mapping[str, object], ini: Mapping[str, object]
) -> Settings:
    """Return the settings: command line over hook over ini over default.

    The mappings go by option key; None means not given.

    Raises:
        ConfigError: a value is wrong; the message names where it was given.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in OPTIONS:
        sources = (
            (option.flag, command_line.get(option.key)),
            (f"{option.name!r} from the hook {HOOK}", hook.get(option.key)),
            (f"{option.ini} in ini", ini.get(option.key)),
        )
        for origin, given in sources:
            if given is not None:
                values[option.key] = _parsed(option, origin, given)
                origins[option.key] = origin
                break
    return Settings(**values, origins=origins)


def hook_values(returned: object) -> dict[str, object]:
    """Return the mapping that the lab hook gave, by option key.

    Raises:
        ConfigError: it is no mapping, or has a key that is no option.
    """
    what = f"the hook {HOOK} returned something wrong"
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise ConfigError(
            what,
            why=f"it returned {type(returned).__name__}, not a mapping",
            cure='return a mapping of option names to values, such as {"uri": "qemu:///system"}',
        )
    values: dict[str, object] = {}
    for name, value in returned.items():
        key = str(name).replace("-", "_")
        if key not in _BY_KEY:
            close = difflib.get_close_matches(key, _BY_KEY, n=1)
            hint = f"did you mean {_BY_KEY[close[0]].name!r}? " if close else ""
            names = ", ".join(option.name for option in OPTIONS)
            raise ConfigError(what, why=f"{name!r} is no option", cure=f"{hint}options: {names}")
        values[key] = value
    return values


def _parsed(option: Option, origin: str, given: object) -> object:
    if isinstance(given, list):  # --kvmsnap-domain may be repeated
        if len(given) > 1:
            raise ConfigError(
                f"wrong value for {origin}",
                why=f"{', '.join(map(repr, given))}: several (a pool) are not supported yet",
                cure="name one domain, or mark tests with kvm_domain",
            )
        given = given[0]
    if isinstance(given, bool):
        given = "yes" if given else "no"
    if not isinstance(given, str | int | float | os.PathLike):
        raise ConfigError(
            f"wrong value for {origin}", why=f"{given!r}: must be text, a number or a path"
        )
    try:
        return option.parse(str(given))
    except ValueError as error:
        raise ConfigError(
            f"wrong value for {origin}",
            why=f"{str(given)!r}: {error}",
            cure=f"{option.flag}: {option.help} (default: {option.default_text})",
        ) from None
