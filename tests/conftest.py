"""What all tiers share: pytester, libvirt's test driver, and the switch for CI."""

import gc
import shutil

import pytest

pytest_plugins = ("pytester", "testdriver", "localguest", "daemon", "sharedhost")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-real",
        action="store_true",
        help="fail, rather than skip, where QEMU or a tool of it is missing",
    )


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is there to stay: each run inside of a test calls it often.

    pytest collects ten times at the end of a run, for resources that were not closed.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def only_our_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs inside of tests load no plugin but ours: all that are installed take each a second."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_kvmsnap.plugin")
    # they are no workers of the run that they are in
    monkeypatch.delenv("PYTEST_XDIST_TESTRUNUID", raising=False)


@pytest.fixture
def all_plugins(only_our_plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs inside of this test load what is installed, as users' do."""
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    monkeypatch.delenv("PYTEST_PLUGINS")


@pytest.fixture
def xdist(only_our_plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs inside of this test may have workers."""
    _load_too("xdist.plugin", monkeypatch)


@pytest.fixture
def random_order(only_our_plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs inside of this test may be in random order."""
    _load_too("random_order.plugin", monkeypatch)


@pytest.fixture
def rerunfailures(only_our_plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs inside of this test may repeat what failed."""
    _load_too("pytest_rerunfailures", monkeypatch)


def _load_too(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(plugin, reason=f"{plugin} is not installed")
    monkeypatch.setenv("PYTEST_PLUGINS", plugin, prepend=",")


@pytest.fixture
def qemu_img(pytestconfig: pytest.Config) -> str:
    """The path of qemu-img."""
    found = shutil.which("qemu-img")
    if found is None:
        complain = pytest.fail if pytestconfig.getoption("--require-real") else pytest.skip
        complain("qemu-img is not installed (qemu-utils on Debian and Ubuntu)")
    return found
