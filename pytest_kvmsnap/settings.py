"""The options: one table; command line, lab hook and ini become frozen `Settings`."""

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pytest_kvmsnap.errors import ConfigError
from pytest_kvmsnap.golden import NamedFile
from pytest_kvmsnap.pools import Pool, domain_or_pool
from pytest_kvmsnap.sizes import parse_size

HOOK = "pytest_kvmsnap_lab"
CONSOLE = "console:"
"""What `ready` begins with where a text on the console tells, the regular expression follows."""
_GROWTH_LIMIT = 10 * 2**30


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value.strip()


def _path(value: str) -> Path:
    path = Path(_text(value)).expanduser()
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _file(value: str, folder: Path) -> NamedFile:
    return NamedFile(_text(value), folder)


def _folders(value: str, folder: Path) -> tuple[Path, ...]:
    parts = [part.strip() for part in re.split(rf"[{os.pathsep}\n]", value)]
    folders = tuple(folder / Path(part).expanduser() for part in parts if part)
    if not folders:
        raise ValueError("must not be empty")
    for each in folders:
        if not each.is_dir():
            raise ValueError(f"there is no folder {each}")
    return folders


def _domains(value: str) -> str | Pool:
    names = [line.strip() for line in value.splitlines() if line.strip()]
    if not names:
        raise ValueError("must not be empty")
    return domain_or_pool(names)


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        raise ValueError("must be a number of seconds") from None
    if not 0 < seconds < float("inf"):
        raise ValueError("must be a number of seconds above 0")
    return seconds


def _count(value: str) -> int:
    if not value.strip().isdecimal() or int(value) < 1:
        raise ValueError("must be a whole number above 0")
    return int(value)


def _yes_no(value: str) -> bool:
    try:
        return {"yes": True, "true": True, "no": False, "false": False}[value.strip().lower()]
    except KeyError:
        raise ValueError("must be yes or no") from None


def _count_or_none(value: str) -> int:
    if not value.strip().isdecimal():
        raise ValueError("must be a whole number")
    return int(value)


def _port(value: str) -> int:
    if not value.strip().isdecimal() or not 0 < int(value) < 2**16:
        raise ValueError("must be a port, 1 to 65535")
    return int(value)


def _place(value: str, folder: Path) -> Path:
    return folder / Path(_text(value)).expanduser()


def _key_file(value: str, folder: Path) -> Path:
    path = _place(value, folder)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def _ready(value: str) -> str:
    wanted = value.strip()
    if wanted.startswith(CONSOLE):
        try:
            pattern = re.compile(wanted.removeprefix(CONSOLE))
        except re.error as error:
            raise ValueError(f"what follows {CONSOLE} is no regular expression: {error}") from None
        if pattern.match(""):
            raise ValueError(f"what follows {CONSOLE} matches a console that says nothing")
    elif wanted not in ("agent", "ssh", "none"):
        raise ValueError(f"must be agent, ssh, none, or {CONSOLE} and a regular expression")
    return wanted


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value.strip() not in choices:
            raise ValueError(f"must be one of: {', '.join(choices)}")
        return value.strip()

    return parse


@dataclass(frozen=True)
class Option:
    """One option: `--kvmsnap-NAME`, ini `kvmsnap_NAME`, or NAME in the mapping of the lab hook.

    `parse` of one that names files gets the folder too that they are relative to.
    """

    name: str
    parse: Callable[..., object]
    default: object
    default_text: str
    help: str
    metavar: str
    names_files: bool = False
    may_repeat: bool = False

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
        _domains,
        None,
        "none",
        "machine for tests without the marker kvm_domain; several, or a pattern such as 'web-*',"
        " are a pool, of which the first free one serves",
        "NAME",
        may_repeat=True,
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
        "golden",
        _file,
        None,
        "none",
        "image for tests without a marker: they get a throwaway machine on a thin copy of it",
        "IMAGE",
        names_files=True,
    ),
    Option(
        "template",
        _file,
        None,
        "a built-in machine",
        "domain XML for the golden image's machine; its first disk is replaced",
        "FILE",
        names_files=True,
    ),
    Option(
        "image-path",
        _folders,
        (),
        "the folder of the file that names the image",
        "folders to search for golden images and templates too",
        "DIRS",
        names_files=True,
        may_repeat=True,
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
        "revert",
        _one_of("force", "fast"),
        "force",
        "force",
        "force: libvirt's revert, with force; fast: inside the running QEMU where that is provably"
        " the same, else force",
        "{force,fast}",
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
        _ready,
        None,
        "agent where the domain has the channel, else none",
        "what a ready machine answers: agent, ssh, or none; or console:REGEX, what it says on its"
        " serial console once it has booted",
        "MEANS",
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
    Option(
        "max-concurrent",
        _count,
        None,
        "the number of cores there",
        "reverts and boots at once on a host, across processes",
        "NUMBER",
    ),
    Option(
        "growth-limit",
        parse_size,
        _GROWTH_LIMIT,
        "10 GiB",
        "warn when the image of a machine grew by more during the run",
        "SIZE",
    ),
    Option(
        "keep",
        _one_of("never", "on-failure", "always"),
        "never",
        "never",
        "keep the state that a test left, as a snapshot of the machine",
        "{never,on-failure,always}",
    ),
    Option(
        "keep-max",
        _count,
        3,
        "3",
        "how many kept states a machine has at most; the oldest goes first",
        "NUMBER",
    ),
    Option(
        "output",
        _place,
        None,
        "kvmsnap-results",
        "folder for what failed tests leave: screen, console, logs",
        "DIR",
        names_files=True,
    ),
    Option(
        "durations",
        _count_or_none,
        0,
        "0",
        "list so many of the slowest preparations of machines at the end",
        "NUMBER",
    ),
    Option(
        "report",
        _place,
        None,
        "none",
        "write what machines the run used, and what that cost, to this file as JSON",
        "FILE",
        names_files=True,
    ),
    Option(
        "ssh-user",
        _text,
        "root",
        "root",
        "user in the guest for ready=ssh and vm.ssh",
        "USER",
    ),
    Option(
        "ssh-key",
        _key_file,
        None,
        "those of ssh itself",
        "private key for ready=ssh and vm.ssh",
        "FILE",
        names_files=True,
    ),
    Option(
        "ssh-port",
        _port,
        22,
        "22",
        "port in the guest for ready=ssh and vm.ssh",
        "PORT",
    ),
)
_BY_KEY = {option.key: option for option in OPTIONS}


@dataclass(frozen=True)
class Settings:
    """What the options came to, and where each value came from (`origins`, by field name)."""

    uri: str | None = None
    domain: str | Pool | None = None
    snapshot: str | None = None
    golden: NamedFile | None = None
    template: NamedFile | None = None
    image_path: tuple[Path, ...] = ()
    convert: Literal["auto", "check", "never"] = "auto"
    revert: Literal["force", "fast"] = "force"
    live: bool = True
    verify: Literal["canary", "state"] = "canary"
    ready: str | None = None
    ready_timeout: float = 120.0
    revert_timeout: float = 300.0
    lock_timeout: float = 600.0
    lock_dir: Path | None = None
    max_concurrent: int | None = None
    growth_limit: int = _GROWTH_LIMIT
    keep: Literal["never", "on-failure", "always"] = "never"
    keep_max: int = 3
    output: Path | None = None
    durations: int = 0
    report: Path | None = None
    ssh_user: str = "root"
    ssh_key: Path | None = None
    ssh_port: int = 22
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)


class Folders(NamedTuple):
    """What relative paths are relative to, by where they are given."""

    command_line: Path = Path()
    hook: Path = Path()
    ini: Path = Path()


def resolve(
    command_line: Mapping[str, object],
    hook: Mapping[str, object],
    ini: Mapping[str, object],
    folders: Folders | None = None,
) -> Settings:
    """Return the settings: command line over hook over ini over default.

    The mappings go by option key; None means not given.

    Raises:
        ConfigError: a value is wrong; the message names where it was given.
    """
    folders = folders or Folders()
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    levels: dict[str, int] = {}
    for option in OPTIONS:
        sources = (
            (option.flag, command_line.get(option.key), folders.command_line),
            (f"{option.name!r} from the hook {HOOK}", hook.get(option.key), folders.hook),
            (f"{option.ini} in ini", ini.get(option.key), folders.ini),
        )
        for level, (origin, given, folder) in enumerate(sources):
            if given is not None:
                values[option.key] = _parsed(option, origin, given, folder)
                origins[option.key] = origin
                levels[option.key] = level
                break
    for key in _replaced(origins, levels):
        del values[key], origins[key]
    return Settings(**values, origins=origins)


def check_complete(settings: Settings) -> None:
    """Refuse what makes no sense alone, once all sources were asked.

    Raises:
        ConfigError: a template is given without its golden image.
    """
    if settings.template is not None and settings.golden is None:
        raise ConfigError(
            f"{settings.origins['template']} has no golden image to go with",
            cure="give --kvmsnap-golden too, or name the template in the marker:"
            " kvm_golden(image, template=…)",
        )


def _replaced(origins: Mapping[str, str], levels: Mapping[str, int]) -> set[str]:
    """Return which of the options that choose a machine are replaced by a stronger other one.

    Raises:
        ConfigError: a golden image and a domain, or a snapshot of one, are given side by side.
    """
    others = [key for key in ("domain", "snapshot") if key in levels]
    if "golden" not in levels or not others:
        return set()
    golden = levels["golden"]
    for key in others:
        if levels[key] == golden:
            raise ConfigError(
                f"{origins['golden']} and {origins[key]} contradict each other",
                why="a golden image gives a throwaway machine, which is no domain of yours and has"
                " no snapshots of yours",
                cure="give one of the two; markers can name the other for single tests",
            )
    if min(levels[key] for key in others) < golden:
        return {"golden", "template"} & levels.keys()
    return set(others)


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


def _parsed(option: Option, origin: str, given: object, folder: Path) -> object:
    if isinstance(given, list | tuple):  # repeated on the command line, or by the hook
        given = "\n".join(map(str, given)) if option.may_repeat else given
    if isinstance(given, bool):
        given = "yes" if given else "no"
    if not isinstance(given, str | int | float | os.PathLike):
        raise ConfigError(
            f"wrong value for {origin}", why=f"{given!r}: must be text, a number or a path"
        )
    try:
        return option.parse(str(given), folder) if option.names_files else option.parse(str(given))
    except ValueError as error:
        raise ConfigError(
            f"wrong value for {origin}",
            why=f"{str(given)!r}: {error}",
            cure=f"{option.flag}: {option.help} (default: {option.default_text})",
        ) from None
