"""What all tiers share: pytester, libvirt's test driver, and the switch for CI."""

import shutil

import pytest

pytest_plugins = ("pytester", "testdriver", "localguest")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-real",
        action="store_true",
        help="fail, rather than skip, where QEMU or a tool of it is missing",
    )


@pytest.fixture
def qemu_img(pytestconfig: pytest.Config) -> str:
    """The path of qemu-img."""
    found = shutil.which("qemu-img")
    if found is None:
        complain = pytest.fail if pytestconfig.getoption("--require-real") else pytest.skip
        complain("qemu-img is not installed (qemu-utils on Debian and Ubuntu)")
    return found
