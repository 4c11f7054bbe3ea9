"""pytest's hooks: they decide, others act. This module is loaded in every pytest run."""

import contextlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.main import wrap_session
from _pytest.skipping import evaluate_skip_marks, evaluate_xfail_marks

from pytest_kvmsnap import (
    failures,
    hooks,
    markers,
    plan,
    reporting,
    results,
    run,
    states,
    xdist,
)
from pytest_kvmsnap.errors import KvmsnapError
from pytest_kvmsnap.settings import OPTIONS
from pytest_kvmsnap.usage import uses_our_machine

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter  # public from pytest 8.4 on

pytest_plugins = ("pytest_kvmsnap.fixtures",)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvmsnap", "clean virtual machines (pytest-kvmsnap)")
    for option in OPTIONS:
        text = f"{option.help} (default: {option.default_text})"
        group.addoption(
            option.flag,
            dest=f"kvmsnap_{option.key}",
            action="append" if option.may_repeat else "store",
            default=None,
            metavar=option.metavar,
            help=text.replace("%", "%%"),
        )
        parser.addini(option.ini, f"{option.flag} in ini: {option.help}", default=None)
    group.addoption(
        "--kvmsnap-clean",
        action="store_true",
        help="undo what dead runs left on machines of this host, print it, run no test",
    )
    group.addoption(
        "--kvmsnap-force",
        action="store_true",
        help="with --kvmsnap-clean: also undo what a run of another host or container left",
    )
    group.addoption(
        "--kvmsnap-plan",
        action="store_true",
        help="print for each test its machine, state and image, then what would be converted and"
        " what stands in the way; start and change nothing, run no test",
    )
    group.addoption(
        "--kvmsnap-plan-format",
        choices=("table", "json"),
        default="table",
        help="for people or for programs (default: table)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("kvmsnap_plan"):
        xdist.stay_in_one_process(config)
        if config.getoption("kvmsnap_plan_format") == "json":
            config.option.verbose = -2  # nothing but the plan
            config.option.no_header = config.option.no_summary = True
    for line in markers.marker_lines():
        config.addinivalue_line("markers", line)
    with _usage_errors():
        run.settings_without_hook(config)
    if config.getoption("kvmsnap_force") and not config.getoption("kvmsnap_clean"):
        raise pytest.UsageError("--kvmsnap-force goes with --kvmsnap-clean only")


def pytest_itemcollected(item: pytest.Item) -> None:
    if uses_our_machine(item):
        item.add_marker("kvm")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | pytest.ExitCode | None:
    if not config.getoption("kvmsnap_clean"):
        return None
    xdist.stay_in_one_process(config)
    return wrap_session(config, _clean)


def _clean(config: pytest.Config, session: pytest.Session) -> int:  # noqa: ARG001 - pytest's call
    with _usage_errors():
        return run.clean(config)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    if session.config.getoption("kvmsnap_plan") and not _will_run_nothing(session):
        with _usage_errors():
            plan.show(session.config, _tests_with_machines(session))
        session.items.clear()
        return (yield)
    if not xdist.is_worker(session.config):
        with _usage_errors():
            _check_machines(session)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist, check before it reports its tests: later is too late."""
    if xdist.is_worker(session.config):
        try:
            _check_machines(session)
        except KvmsnapError as error:
            xdist.hand_over(session, str(error))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In the controller of pytest-xdist, listen to what its workers will tell."""
    results.listen(node.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """In the controller of pytest-xdist, take what a worker handed over."""
    xdist.take_over(node)


def _check_machines(session: pytest.Session) -> None:
    if _will_run_nothing(session):
        return
    items = _tests_with_machines(session)
    if items:
        reporting.check(session.config)
        requests = run.check_machines(session.config, items)
        reporting.begin(session.config, requests)
        states.states_of(session.config)


def _tests_with_machines(session: pytest.Session) -> list[pytest.Item]:
    return [item for item in session.items if uses_our_machine(item) and _will_run(item)]


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Let pytest print our message and exit with 4."""
    try:
        yield
    except KvmsnapError as error:
        raise pytest.UsageError(str(error)) from None


def _will_run_nothing(session: pytest.Session) -> bool:
    option = session.config.option
    is_broken = bool(session.testsfailed) and not option.continue_on_collection_errors
    return is_broken or option.collectonly or option.setupplan


def _will_run(item: pytest.Item) -> bool:
    """Tell whether no marker skips the test, or expects its failure without running it."""
    try:
        if evaluate_skip_marks(item):
            return False
        expected = evaluate_xfail_marks(item)
    except pytest.fail.Exception:  # a wrong marker of pytest's, which pytest reports itself
        return False
    return expected is None or expected.run or item.config.option.runxfail


# Outermost, so that what was expected to fail has not failed.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when != "teardown":
        try:
            failures.look(item, report)
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001
            # Whatever it is, the test's own failure counts. pytest-timeout may end it here, too.
            report.sections.append(("kvmsnap", f"what the test left is lost: {error!r}"))
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave the machines as they were found, after the last fixture is torn down."""
    config = session.config
    is_closed = run.close(config)
    is_told = reporting.finish(config)
    is_well = is_closed and is_told and not plan.is_blocked(config) and not xdist.has_failed(config)
    if not is_well and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if xdist.handed_over(config):
        session.exitstatus = pytest.ExitCode.USAGE_ERROR


def pytest_terminal_summary(terminalreporter: "TerminalReporter") -> None:
    config = terminalreporter.config
    for problem in xdist.handed_over(config):
        terminalreporter.write_line(f"ERROR: {problem}", red=True)
    words = [*reporting.closing_lines(config), *run.closing_words(config)]
    if words:
        terminalreporter.write_sep("=", "pytest-kvmsnap")
    for text in words:
        terminalreporter.write_line(text)
