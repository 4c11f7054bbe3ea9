"""The README's tables and examples, held against the code."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import pytest_kvmsnap
from pytest_kvmsnap import VM, fixtures, markers
from pytest_kvmsnap.guest import canary
from pytest_kvmsnap.machine import preflight
from pytest_kvmsnap.settings import OPTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(title: str) -> list[list[str]]:
    """Return the rows of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_options() -> None:
    assert table("Options") == [
        [f"`{option.flag}`", f"`{option.ini}`", option.default_text, option.help]
        for option in OPTIONS
    ]


def test_markers() -> None:
    lines = [line.split(": ", 1) for line in markers.marker_lines()]
    rows = [[f"`{name}`", meaning] for name, meaning in (_unsplit(line) for line in lines)]
    assert table("Markers") == rows


def _unsplit(line: list[str]) -> tuple[str, str]:
    """Undo the split inside of a signature: `kvm_snapshot(name: str): Start …`."""
    whole = ": ".join(line)
    name = whole[: whole.index("): ") + 1] if "(" in whole.split(": ")[0] else whole.split(": ")[0]
    return name, whole[len(name) + 2 :]


def test_fixtures() -> None:
    defined = {
        name
        for name, value in vars(fixtures).items()
        if type(value).__name__ == "FixtureFunctionDefinition"
        or hasattr(value, "_pytestfixturefunction")
    }
    assert {code(row[0])[0] for row in table("Fixtures")} == defined


def test_members_of_vm() -> None:
    told = {name.partition("(")[0] for row in table("VM") for name in code(row[0])}
    attributes = {"name", "uuid", "uri"}
    public = {name for name in vars(VM) if not name.startswith("_")}
    assert told == public | attributes


@pytest.mark.parametrize("call", [c for row in table("VM") for c in code(row[0]) if "(" in c])
def test_signatures_of_vm(call: str) -> None:
    name, _, rest = call.partition("(")
    told = [part.strip() for part in rest.rstrip(")").split(",") if part.strip()]
    parameters = list(inspect.signature(getattr(VM, name)).parameters.values())[1:]
    assert [part.partition("=")[0] for part in told if part != "*"] == [p.name for p in parameters]
    for part, parameter in zip([p for p in told if p != "*"], parameters, strict=True):
        default = part.partition("=")[2]
        assert default == ("" if parameter.default is parameter.empty else str(parameter.default))


def test_public_names() -> None:
    text = section("VM").partition("For annotations")[2]
    told = set(re.findall(r"\b[A-Z]\w+", " ".join(code(text)))) - {"BLACKLIST_RPC"}
    assert told == set(pytest_kvmsnap.__all__)
    for name in pytest_kvmsnap.__all__:
        assert getattr(pytest_kvmsnap, name).__name__ == name


def test_canary_paths() -> None:
    assert f"`{canary.MEMORY}`" in README
    assert f"`{canary.DISK}`" in README
    assert preflight.OURS.startswith("pytest-kvmsnap")


def test_two_commands_are_those_of_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ("scripts/setup", ".venv/bin/tox", ".venv/bin/pytest example_suite"):
        assert command in section("Try it")
        assert command in ci
    assert "--require-real" in ci


@pytest.mark.parametrize("block", python_blocks())
def test_python_compiles(block: str) -> None:
    ast.parse(block)


def test_smallest_test_runs(pytester: pytest.Pytester) -> None:
    block = re.search(r"## The smallest test\n```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    pytester.makepyfile(block[1])
    arguments = ["--kvmsnap-uri=test:///default", "--kvmsnap-domain=test"]
    result = pytester.runpytest(*arguments, f"--kvmsnap-lock-dir={pytester.path / 'locks'}")
    result.assert_outcomes(passed=1)


def test_changelog_has_a_place_for_what_comes() -> None:
    assert "\n## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text()
