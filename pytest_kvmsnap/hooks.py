"""The hooks that suites may implement."""

from collections.abc import Mapping

import pytest


@pytest.hookspec(firstresult=True)
def pytest_kvmsnap_lab(config: pytest.Config) -> Mapping[str, object] | None:
    """Return option names and values, for a suite whose conftest builds or finds its machines.

    Called once per process, before anything is connected, and only when a machine will be used or
    `--kvmsnap-clean` is given. The command line beats what is returned; that beats ini. A name is
    an option's, such as `uri` or `ready-timeout`.
    """
