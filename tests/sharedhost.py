"""Domains of libvirt's test driver that several processes share: the driver lives in a daemon.

    def test_two_runs(shared: SharedSuite) -> None:
        shared.host.define(state="running")
        shared.write("def test_one(vm): pass")
        first, second = shared.run_together([], ["-k", "one"])

Each domain is there for all who connect to `shared.uri`, for as long as the test lasts.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import libvirt
import pytest
from daemon import Daemon
from testdriver import Host, Suite

LONGEST_RUN = 240
"""Seconds after which a run is taken for stuck; one takes a few."""


_numbers = itertools.count(1)


class SharedSuite(Suite):
    """A test suite whose runs, in processes of their own, meet the domains of one daemon."""

    def __init__(self, pytester: pytest.Pytester, libvirtd: Daemon) -> None:
        self.libvirtd = libvirtd
        self.uri = libvirtd.uri("test")
        super().__init__(pytester, Host(libvirt.open(self.uri)))

    def start_run(self, *args: str, domain: str | None = "box") -> "Run":
        """Start a run of the suite that goes on beside the test."""
        return Run(self.pytester, [*self.options(domain), *args])

    def run_together(
        self, *runs: Sequence[str], domain: str | None = "box"
    ) -> list[pytest.RunResult]:
        """Run the suite several times at once, each with arguments of its own."""
        started = [self.start_run(*args, domain=domain) for args in runs]
        return [run.result() for run in started]

    def restart_libvirtd(self, end: Callable[[Daemon], None] = Daemon.stop) -> None:
        """Restart the daemon, by `Daemon.kill` if it is to crash: its domains are gone then."""
        self.close()
        self.libvirtd.restart(end)
        self.host.connection = libvirt.open(self.uri)
        self.host.clear()

    def close(self) -> None:
        with contextlib.suppress(libvirt.libvirtError):
            self.host.connection.close()


class Run:
    """A run of pytest in the background; `before` is a command that is to run it."""

    def __init__(
        self, pytester: pytest.Pytester, args: Sequence[str], before: Sequence[str] = ()
    ) -> None:
        self._started = time.monotonic()
        # else pytest would take the folder of the test around it for one of an earlier run
        temporary = pytester.path / f"temporary-{next(_numbers)}"
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "pytest", f"--basetemp={temporary}", *args],
            cwd=pytester.path,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},  # two runs may write the same file
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> pytest.RunResult:
        """Wait for its end and return what it said, which the test's report has too."""
        try:
            out, err = self.process.communicate(timeout=LONGEST_RUN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            err += f"\nkilled after {LONGEST_RUN} s"
        sys.stdout.write(out)
        sys.stderr.write(err)
        took = time.monotonic() - self._started
        return pytest.RunResult(self.process.returncode, out.split("\n"), err.split("\n"), took)


@pytest.fixture
def shared(
    pytester: pytest.Pytester, libvirtd: Daemon, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SharedSuite]:
    """A suite on domains that all processes see; none is there at first, and none is left."""
    monkeypatch.setenv("XDG_STATE_HOME", str(pytester.path.parent / "state"))
    for name in ("LIBVIRT_DEFAULT_URI", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    suite = SharedSuite(pytester, libvirtd)
    suite.host.clear()
    yield suite
    suite.host.clear()
    suite.close()
