"""What the hooks and fixtures share of one pytest run: its settings and its lab."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kvmsnap import settings, xdist
from pytest_kvmsnap.errors import ConfigError, KvmsnapError, UsageProblem, merged
from pytest_kvmsnap.markers import Request, check_pools, request_of
from pytest_kvmsnap.settings import OPTIONS, Settings
from pytest_kvmsnap.usage import closure_of, is_ours

if TYPE_CHECKING:
    from pytest_kvmsnap.lab.lab import Lab
    from pytest_kvmsnap.lab.voice import Voice

_SETTINGS = pytest.StashKey[Settings]()
_LAB = pytest.StashKey["Lab"]()
_CLOSING = pytest.StashKey[list[str]]()


def settings_without_hook(config: pytest.Config) -> Settings:
    """Return what command line and ini come to, so that a wrong value is told at once."""
    return settings.resolve(_command_line(config), {}, _ini(config), _folders(config))


def settings_of(config: pytest.Config) -> Settings:
    """Return the settings of this run; the first call asks the lab hook."""
    if _SETTINGS not in config.stash:
        returned: object = config.hook.pytest_kvmsnap_lab(config=config)
        hook = settings.hook_values(returned)
        resolved = settings.resolve(_command_line(config), hook, _ini(config), _folders(config))
        settings.check_complete(resolved)
        config.stash[_SETTINGS] = resolved
    return config.stash[_SETTINGS]


def _folders(config: pytest.Config) -> settings.Folders:
    return settings.Folders(
        command_line=config.invocation_params.dir,
        hook=config.rootpath,
        ini=config.inipath.parent if config.inipath is not None else config.rootpath,
    )


def _command_line(config: pytest.Config) -> dict[str, object]:
    return {option.key: config.getoption(f"kvmsnap_{option.key}") for option in OPTIONS}


def _ini(config: pytest.Config) -> dict[str, object]:
    return {option.key: config.getini(option.ini) for option in OPTIONS}


def lab_of(config: pytest.Config) -> "Lab":
    """Return the lab of this run; the first call imports libvirt."""
    if _LAB not in config.stash:
        run_settings = settings_of(config)
        config.stash[_LAB] = lab = _lab_class()(run_settings, voice(config))
        config.add_cleanup(partial(_close_late, lab))
    return config.stash[_LAB]


def _close_late(lab: "Lab") -> None:
    """Leave the machines as they were found, where a second Ctrl-C kept the session from it."""
    _say(lab.close())


def _say(failures: Sequence[KvmsnapError]) -> None:
    for failure in failures:
        sys.stderr.write(f"{failure}\n")


def _lab_class() -> "type[Lab]":
    try:
        from pytest_kvmsnap.lab.lab import Lab
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("libvirt", "libvirtmod", "libvirt_qemu"):
            raise
        raise ConfigError(
            "libvirt's Python binding cannot be imported",
            why=str(error),
            cure="install libvirt (libvirt0 on Debian and Ubuntu, libvirt-libs on Fedora), then"
            " pip install --force-reinstall libvirt-python",
        ) from None
    return Lab


def _uncaptured(config: pytest.Config) -> contextlib.AbstractContextManager[None]:
    capture: Any = config.pluginmanager.get_plugin("capturemanager")
    return capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()


def write(config: pytest.Config, text: str) -> None:
    """Write what was asked for to the standard output, with a terminal or without."""
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    with _uncaptured(config):
        if terminal is None:
            sys.stdout.write(f"{text}\n")
        else:
            terminal.ensure_newline()
            terminal.write_line(text)


def voice(config: pytest.Config) -> "Voice":
    """Return how the lab speaks: through pytest's terminal, past its capture.

    A worker of pytest-xdist has a terminal that nobody sees, but its standard error is shown.
    """
    from pytest_kvmsnap.lab.voice import Voice

    is_worker = xdist.is_worker(config)
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter") if not is_worker else None

    def line(text: str) -> None:
        if is_worker:
            with _uncaptured(config):
                sys.stderr.write(f"kvmsnap: {text}\n")
                sys.stderr.flush()
        elif terminal is not None:
            with _uncaptured(config):
                terminal.ensure_newline()
                terminal.write_line(f"kvmsnap: {text}")

    def show(what: str, percent: float) -> None:
        if terminal is not None and terminal.isatty:
            with _uncaptured(config):
                terminal.rewrite(f"kvmsnap: {what} {percent:3.0f} %", erase=True)
                sys.stdout.flush()

    return Voice(line, show)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """End the test with the message of an error of ours, which says it all."""
    try:
        yield
    except KvmsnapError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


def check_machines(config: pytest.Config, items: Sequence[pytest.Item]) -> list[Request]:
    """Check the machines that these tests will use, and convert their raw images.

    Returns what the tests ask for.

    Raises:
        UsageProblem: something stands in the way.
    """
    xdist.refuse_shared_root(config, settings_of(config))
    wanted = _wanted_by(items, settings_of(config))
    lab = lab_of(config)
    if xdist.workers(config) > 1:
        held = [request.machine for scope, request in wanted if scope == "session"]
        lab.check_workers(held, xdist.workers(config))
    requests = list(dict.fromkeys(request for _, request in wanted))
    lab.check(requests)
    return requests


def _wanted_by(items: Sequence[pytest.Item], run_settings: Settings) -> list[tuple[str, Request]]:
    """Return what our fixtures will ask for in these tests, with their scopes."""
    problems: dict[str, UsageProblem] = {}
    wanted: list[tuple[str, Request]] = []
    for item in items:
        of_item: list[Request] = []
        for scope in [definition.scope for definition in closure_of(item) if is_ours(definition)]:
            try:
                of_item.append(request_of(item, scope, run_settings))
                check_pools(of_item, item.nodeid)
                wanted.append((scope, of_item[-1]))
            except ConfigError as problem:
                problems.setdefault(str(problem), problem)
    if problems:
        raise merged(list(problems.values()))
    return wanted


def close(config: pytest.Config) -> bool:
    """Leave the machines as they were found; tell whether that went well."""
    lab = config.stash.get(_LAB, None)
    if lab is None:
        return True
    failures = lab.close()
    words = [*lab.grown, *_unproven_words(lab.unproven)]
    words += [line for kept in lab.kept for line in kept.lines()]
    config.stash[_CLOSING] = [*words, *map(str, failures)]
    if xdist.is_worker(config):
        xdist.hand_over_words(config, config.stash[_CLOSING], failed=bool(failures))
    elif not config.pluginmanager.has_plugin("terminalreporter") or config.getoption("no_summary"):
        _say(failures)
    return not failures


def _unproven_words(unproven: dict[str, list[str]]) -> list[str]:
    return [
        f"{machine}: after {len(tests)} tests the guest could not take or look for the marks of the"
        " proof (it was off, or broken by the test), so that the revert is proven by power state"
        f" and current snapshot alone: {', '.join(tests[:5])}{' …' if len(tests) > 5 else ''}"
        for machine, tests in unproven.items()
    ]


def closing_words(config: pytest.Config) -> list[str]:
    """Return what must be said at the end of the run; mostly nothing."""
    return [*config.stash.get(_CLOSING, []), *xdist.words_of_workers(config)]


def clean(config: pytest.Config) -> int:
    """Undo what dead runs left; return the exit status."""
    lab = lab_of(config)
    try:
        return 1 if lab.clean(force=config.getoption("kvmsnap_force")) else 0
    finally:
        lab.close()
