"""Where no machine is used, nothing is imported, connected, written or printed."""

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from testdriver import Suite

# Printed at the very end of a run, by the run's own process.
SPY = """
    import sys

    def pytest_unconfigure(config):
        names = [n for n in sys.modules if n.startswith(("libvirt", "filelock"))]
        names += [n for n in sys.modules if n.startswith("pytest_kvmsnap.") and n.count(".") > 1]
        with open("imported", "w") as file:
            file.write(" ".join(names))
"""

PLAIN = """
    def test_plain():
        pass
"""
WITH_MACHINE = """
    def test_machine(vm):
        pass
"""
BROKEN = """
    import nowhere_to_be_found
"""
SKIPPED = """
    import pytest
    import sys

    @pytest.mark.skip(reason="told so")
    def test_skip(vm): pass

    @pytest.mark.skipif(sys.version_info > (3,), reason="Python 3")
    def test_skipif(vm): pass

    @pytest.mark.skipif("sys.version_info > (3,)", reason="Python 3")
    def test_skipif_text(vm): pass

    @pytest.mark.xfail(run=False, reason="kills the host")
    def test_xfail(vm): pass
"""


def quiet_run(suite: "Suite", *args: str) -> pytest.RunResult:
    """Run with an unreachable host and no machine named; check that nobody noticed."""
    suite.pytester.makeconftest(SPY)
    result = suite.pytester.runpytest_subprocess(
        "-Werror",
        "-pno:randomly",
        "--kvmsnap-uri=qemu+unix:///system?socket=/nonexistent",
        f"--kvmsnap-lock-dir={suite.locks}",
        *args,
    )
    assert (suite.pytester.path / "imported").read_text() == ""
    assert not suite.locks.exists()
    assert not (suite.pytester.path.parent / "state").exists()
    assert "kvmsnap:" not in result.stdout.str() + result.stderr.str()
    assert "cannot connect" not in result.stdout.str() + result.stderr.str()
    return result


def test_a_run_that_requests_no_machine(suite: "Suite") -> None:
    suite.write(PLAIN)
    result = quiet_run(suite)
    result.assert_outcomes(passed=1)
    # the list of plugins in the header is pytest's
    assert not [line for line in result.outlines if "kvmsnap" in line and "plugins:" not in line]


@pytest.mark.parametrize(
    "option",
    ["--collect-only", "--fixtures", "--fixtures-per-test", "--setup-plan", "--help", "--markers"],
)
def test_a_run_that_only_shows_something(suite: "Suite", option: str) -> None:
    suite.write(WITH_MACHINE)
    assert quiet_run(suite, option).ret == 0


def test_a_collection_error(suite: "Suite") -> None:
    suite.pytester.makepyfile(test_one=WITH_MACHINE, test_two=BROKEN)
    quiet_run(suite).assert_outcomes(errors=1)


def test_static_skips(suite: "Suite") -> None:
    suite.write(SKIPPED)
    quiet_run(suite).assert_outcomes(skipped=3, xfailed=1)


@pytest.mark.parametrize("args", [["-k", "nothing"], ["-m", "not kvm"]])
def test_deselected_tests(suite: "Suite", args: list[str]) -> None:
    suite.write(WITH_MACHINE)
    assert quiet_run(suite, *args).ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_wrong_skip_marker_is_reported_by_pytest(suite: "Suite") -> None:
    suite.write(
        """
        import pytest

        @pytest.mark.skipif("no such name", reason="wrong")
        def test_machine(vm): pass
        """
    )
    quiet_run(suite).assert_outcomes(errors=1)


@pytest.mark.usefixtures("all_plugins")
def test_pytest_kvmsnap_can_be_switched_off(suite: "Suite") -> None:
    suite.write(PLAIN)
    result = suite.pytester.runpytest_subprocess("-Werror", "-pno:asyncio", "-pno:kvmsnap")
    result.assert_outcomes(passed=1)


def test_importing_the_package_imports_no_libvirt() -> None:
    script = "import sys, pytest_kvmsnap; sys.exit('libvirt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_test_with_a_machine_does_import_libvirt(suite: "Suite") -> None:
    """The counterpart: the spy above does see an import."""
    suite.write(WITH_MACHINE)
    suite.pytester.makeconftest(SPY)
    suite.run_apart()
    assert "libvirt" in (suite.pytester.path / "imported").read_text().split()


@pytest.mark.parametrize("option", ["--runxfail", "--continue-on-collection-errors"])
def test_an_option_that_makes_tests_run_after_all(suite: "Suite", option: str) -> None:
    """The domain is not there: with the option it is asked for, without it is not."""
    suite.pytester.makepyfile(
        test_one="""
        import pytest

        @pytest.mark.xfail(run=False)
        def test_machine(vm): pass
        """
        if option == "--runxfail"
        else WITH_MACHINE,
        **({} if option == "--runxfail" else {"test_two": BROKEN}),
    )
    result = suite.run_apart(option, domain="nowhere")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "there is no domain 'nowhere'" in result.stderr.str()
    assert suite.run_apart(domain="nowhere").ret != pytest.ExitCode.USAGE_ERROR
