"""Golden images as tests and options name them; what cannot be, before the first test."""

from pathlib import Path

import pytest
from testdriver import Calls, Host, Suite

IMAGE = "a.qcow2"
NO_QEMU = "throwaway machines need QEMU on this host"


@pytest.fixture
def image(pytester: pytest.Pytester) -> Path:
    path = pytester.path / IMAGE
    path.touch()
    return path


def assert_told_once(result: pytest.RunResult, *parts: str) -> None:
    said = result.stdout.str() + result.stderr.str()
    assert result.ret == pytest.ExitCode.USAGE_ERROR, said
    for part in parts:
        assert said.count(part) == 1
    assert "Traceback" not in said
    assert "INTERNALERROR" not in said
    assert " passed" not in said


MARKED = f"""
import pytest
@pytest.mark.kvm_golden("{IMAGE}")
@pytest.mark.parametrize("turn", range(3))
def test_it(vm, turn): pass
"""


@pytest.mark.usefixtures("xdist")
@pytest.mark.parametrize("more", [(), ("-n2",)])
def test_a_driver_without_images_is_refused(
    suite: Suite, image: Path, more: tuple[str, ...]
) -> None:
    suite.write(MARKED)
    result = suite.run_apart(*more, domain=None)
    assert_told_once(result, NO_QEMU, str(image), "--kvmsnap-uri")
    assert suite.left_over() == []


def test_problems_of_images_and_of_machines_are_told_together(
    suite: Suite, image: Path, host: Host, calls: Calls
) -> None:
    assert image.exists()
    assert host.looks() == {}
    suite.write(MARKED + '@pytest.mark.kvm_domain("unknown")\ndef test_other(vm): pass\n')
    result = suite.run()
    assert_told_once(result, "2 problems", NO_QEMU, "there is no domain 'unknown'")
    assert calls.log == []


def test_a_plain_test_beside_one_on_an_image_is_not_in_its_way(
    suite: Suite, image: Path, host: Host
) -> None:
    assert image.exists()
    host.define(state="running")
    suite.write(MARKED + "def test_plain(vm): assert vm.name == 'box'\n")
    suite.run("-k", "test_plain").assert_outcomes(passed=1, deselected=3)


@pytest.mark.parametrize("place", ["command line", "ini", "hook"])
def test_an_image_of_the_options_is_found_beside_what_names_it(
    suite: Suite, image: Path, pytester: pytest.Pytester, place: str
) -> None:
    suite.write("def test_it(vm): pass\n")
    options = []
    if place == "command line":
        options = [f"--kvmsnap-golden={IMAGE}"]
    elif place == "ini":
        pytester.makeini(f"[pytest]\nkvmsnap_golden = {IMAGE}\n")
    else:
        hook = f"def pytest_kvmsnap_lab(config): return {{'golden': '{IMAGE}'}}"
        pytester.makeconftest(hook)
    assert_told_once(suite.run(*options, domain=None), NO_QEMU, str(image))


def test_a_golden_image_and_a_domain_given_side_by_side(suite: Suite, image: Path) -> None:
    assert image.exists()
    suite.write("def test_it(vm): pass\n")
    result = suite.run(f"--kvmsnap-golden={IMAGE}")
    assert_told_once(result, "--kvmsnap-golden and --kvmsnap-domain contradict each other")


def test_a_template_alone_is_told(suite: Suite) -> None:
    suite.write("def test_it(vm): pass\n")
    result = suite.run("--kvmsnap-template=t.xml")
    assert_told_once(result, "--kvmsnap-template has no golden image to go with")


def test_an_image_asked_for_late_is_told_by_its_test(suite: Suite, image: Path) -> None:
    assert image.exists()
    suite.write(
        MARKED.replace("(vm, turn): pass", "(request, turn): request.getfixturevalue('vm')")
    )
    result = suite.run(domain=None)
    result.assert_outcomes(failed=3)
    assert result.stdout.str().count(NO_QEMU) == 3
    assert suite.left_over() == []
