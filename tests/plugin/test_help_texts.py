"""What --help, --markers and --fixtures tell."""

from typing import TYPE_CHECKING

import pytest

from pytest_kvmsnap import markers
from pytest_kvmsnap.settings import OPTIONS, Option

if TYPE_CHECKING:
    from testdriver import Suite


def squeezed(text: str) -> str:
    """Return a text without its line breaks, which depend on the terminal."""
    return " ".join(text.split())


@pytest.mark.parametrize("option", OPTIONS, ids=[option.name for option in OPTIONS])
def test_help_has_each_option_with_its_meaning_and_default(
    suite: "Suite", monkeypatch: pytest.MonkeyPatch, option: Option
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = squeezed(suite.pytester.runpytest_inprocess("--help").stdout.str())
    assert f"{option.flag}={option.metavar} {option.help}" in text
    assert f"(default: {option.default_text})" in text
    assert f"{option.ini} " in text
    assert f"{option.flag} in ini: {option.help}" in text


def test_help_has_the_command(suite: "Suite", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = squeezed(suite.pytester.runpytest_inprocess("--help").stdout.str())
    assert "--kvmsnap-clean undo what dead runs left on machines of this host" in text


def test_the_markers_are_listed_with_their_signatures(suite: "Suite") -> None:
    text = suite.pytester.runpytest_inprocess("--markers").stdout.str()
    for line in (*markers.marker_lines(), "kvm_domain(*names: str): ", "kvm_snapshot(name: str): "):
        assert f"@pytest.mark.{line}" in text
    assert "@pytest.mark.kvm: " in text


def test_the_fixture_is_listed_with_its_meaning(suite: "Suite") -> None:
    text = suite.pytester.runpytest_inprocess("--fixtures").stdout.str()
    assert "A virtual machine: running, ready and clean" in text
