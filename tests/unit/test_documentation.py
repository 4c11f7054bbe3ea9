"""README and CHANGELOG, held against the code, in both directions where it has two."""

import ast
import dataclasses
import functools
import importlib.metadata
import inspect
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pytest_kvmsnap
from pytest_kvmsnap import VM, Disk, Snapshot, fixtures, hooks, markers, plugin, results, settings
from pytest_kvmsnap.guest import canary
from pytest_kvmsnap.lab import locks
from pytest_kvmsnap.settings import OPTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
STATES = (ROOT / "docs" / "states.md").read_text()
REPORTS = (ROOT / "docs" / "reports.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = Path(pytest_kvmsnap.__file__).parent


def section(title: str) -> str:
    _, heading, rest = README.partition(f"\n## {title}\n")
    assert heading, f"the README has no section {title!r}"
    return rest.partition("\n## ")[0]


def tables(title: str) -> list[list[list[str]]]:
    """Return the tables of a section without their heads, as rows of cells."""
    found = re.findall(r"(?:^\|.*\n?)+", section(title), re.MULTILINE)
    return [
        [
            [cell.strip().replace("\\|", "|") for cell in line.strip("|").split(" | ")]
            for line in lines.splitlines()[2:]
            if not line.startswith("| **")  # the heading of a group
        ]
        for lines in found
    ]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def blocks(language: str, text: str = README) -> list[str]:
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [block for of, block in fenced if of == language]


@functools.cache
def trees() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))]


def said(node: ast.AST) -> str | None:
    """Return a literal string of the code as people read it, with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) or "…" for part in node.values)
    return None


# --- options ----------------------------------------------------------------------------------


class Parser:
    """Notes what the plugin adds to pytest's parser."""

    def __init__(self) -> None:
        self.flags: set[str] = set()
        self.ini: set[str] = set()

    def getgroup(self, *_: str) -> "Parser":
        return self

    def addoption(self, flag: str, **_: object) -> None:
        self.flags.add(flag)

    def addini(self, name: str, *_: str, **__: object) -> None:
        self.ini.add(name)


@pytest.fixture
def added() -> Parser:
    parser: Any = Parser()
    plugin.pytest_addoption(parser)
    return parser  # type: ignore[no-any-return]


def test_options() -> None:
    assert tables("Options") == [
        [
            [f"`{option.flag}`", f"`{option.ini}`", option.default_text, option.help]
            for option in OPTIONS
        ]
    ]


def test_the_options_are_all_that_there_are(added: Parser) -> None:
    clean = re.findall(r"^`(--[a-z-]+)` \(command line only\)", section("Options"), re.MULTILINE)
    assert added.flags == {option.flag for option in OPTIONS} | set(clean)
    assert added.ini == {option.ini for option in OPTIONS}


@pytest.mark.parametrize("text", [README, STATES, CHANGELOG], ids=["README", "states", "CHANGELOG"])
def test_no_option_is_named_that_there_is_not(added: Parser, text: str) -> None:
    flags = set(re.findall(r"--kvmsnap-[a-z]+(?:-[a-z]+)*", text))
    assert flags - added.flags == set()
    assert set(re.findall(r"\bkvmsnap_[a-z_]+", text)) - added.ini == set()


def test_properties_of_tests_are_those_that_are_told(added: Parser) -> None:
    assert set(re.findall(r"\bkvmsnap_[a-z_]+", REPORTS)) == results.NAMES
    assert set(re.findall(r"--kvmsnap-[a-z]+(?:-[a-z]+)*", REPORTS)) - added.flags == set()


def test_option_values_that_are_named_are_allowed() -> None:
    values = re.findall(r"--kvmsnap-([a-z-]+)=([a-z][a-z-]*)", README)
    assert values
    for name, value in values:
        key = name.replace("-", "_")
        settings.resolve({key: value}, {}, {})


def test_folders_of_the_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/qa")
    assert locks.private_folder() == Path("/home/qa/.local/state/pytest-kvmsnap")
    assert "`pytest-kvmsnap` in\n`$XDG_STATE_HOME` (`~/.local/state`)" in section("Options")
    shared, _ = locks.folders()
    assert f"`{shared}` for URIs that end in `/system`" in section("Options")


# --- markers, fixtures, hook ------------------------------------------------------------------


def test_markers() -> None:
    signatures = [markers.signature(marker) for marker in markers.MARKERS]
    lines = list(markers.marker_lines())
    names = [*signatures, "kvm"]
    meanings = [line.removeprefix(f"{name}: ") for name, line in zip(names, lines, strict=True)]
    rows = [[f"`{name}`", meaning] for name, meaning in zip(names, meanings, strict=True)]
    assert tables("Markers") == [rows]


def test_no_marker_is_named_that_there_is_not() -> None:
    known = {marker.__name__ for marker in markers.MARKERS}
    assert set(re.findall(r"\bkvm_\w+", README + CHANGELOG)) <= known


def test_fixtures() -> None:
    scopes = {}
    for node in ast.walk(ast.parse(inspect.getsource(fixtures))):
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            call = decorator if isinstance(decorator, ast.Call) else None
            if ast.unparse(call.func if call else decorator) == "pytest.fixture":
                given = {k.arg: ast.literal_eval(k.value) for k in call.keywords} if call else {}
                assert isinstance(node, ast.FunctionDef)
                scopes[given.get("name", node.name)] = given.get("scope", "function")
    (rows,) = tables("Fixtures")
    assert {code(row[0])[0]: row[1] for row in rows} == scopes


def test_hooks() -> None:
    specified = {name for name in vars(hooks) if name.startswith("pytest_")}
    assert set(re.findall(r"\bpytest_kvmsnap_\w+", README + CHANGELOG)) == specified


def test_the_example_of_the_hook_returns_options() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", section("Hooks"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    returned = names["pytest_kvmsnap_lab"](config=None)
    resolved = settings.resolve({}, settings.hook_values(returned), {})
    assert len(resolved.origins) == len(returned)


# --- VM and the public names ------------------------------------------------------------------


def members() -> set[str]:
    stub: Any = SimpleNamespace(name="", uuid="", hypervisor=SimpleNamespace(uri=""))
    vm = VM(SimpleNamespace(domain=stub), revert_timeout=1, description="")  # type: ignore[arg-type]
    return {name for name in (*vars(VM), *vars(vm)) if not name.startswith("_")}


def test_members_of_vm() -> None:
    told = [name.partition("(")[0] for row in tables("VM")[0] for name in code(row[0])]
    assert sorted(told) == sorted(members())


def signatures_of_vm() -> list[str]:
    return [call for row in tables("VM")[0] for call in code(row[0])]


@pytest.mark.parametrize("call", signatures_of_vm())
def test_signatures_of_vm(call: str) -> None:
    name = call.partition("(")[0]
    member = vars(VM).get(name)
    if not inspect.isfunction(member):
        assert call == name
        return
    signature = inspect.signature(member)
    bare = [p.replace(annotation=p.empty) for p in list(signature.parameters.values())[1:]]
    parameters = signature.replace(parameters=bare, return_annotation=signature.empty)
    assert call == f"{name}{parameters}"


def test_no_member_of_vm_is_used_that_there_is_not() -> None:
    assert set(re.findall(r"\bvm\.(\w+)", README + CHANGELOG)) <= members()


def test_public_names() -> None:
    told = [code(row[0])[0] for row in tables("VM")[1]]
    assert sorted(told) == sorted(pytest_kvmsnap.__all__)
    for name in told:
        assert getattr(pytest_kvmsnap, name).__name__ == name


@pytest.mark.parametrize("row", tables("VM")[1], ids=lambda row: code(row[0])[0])
def test_meaning_of_public_names(row: list[str]) -> None:
    public = getattr(pytest_kvmsnap, code(row[0])[0])
    if public in (Disk, Snapshot):
        assert code(row[1]) == [field.name for field in dataclasses.fields(public)]
    elif base := re.match(r"an? `(\w+)`:", row[1]):
        assert [parent.__name__ for parent in public.__bases__] == [base[1]]
    elif public is not VM:
        assert public.__bases__ == (Exception,)
        assert code(row[1]) == list(vars(public("")))


# --- the canary and the agent -----------------------------------------------------------------


def test_paths_of_the_canary() -> None:
    told = set(re.findall(r"[/\w.-]+\.canary\b", README))
    assert told == {canary.MEMORY, canary.DISK}


def test_commands_of_the_agent() -> None:
    literals = [said(node) or "" for _, tree in trees() for node in ast.walk(tree)]
    used = {text for text in literals if re.fullmatch(r"guest(-[a-z]+)+", text)}
    told = re.search(r"used:(.*?)by us, and by libvirt(.*?)\.", section("Install it"), re.DOTALL)
    assert told is not None
    assert set(code(told[1])) == used
    assert set(code(told[2])) == {"guest-sync", "guest-shutdown"}


# --- what is refused --------------------------------------------------------------------------


def refusals() -> list[str]:
    return [row[0] for table in tables("What it refuses, and why") for row in table]


@pytest.mark.parametrize("refusal", refusals())
def test_refusal_is_what_the_code_says(refusal: str) -> None:
    assert refusal in {said(node) for _, tree in trees() for node in ast.walk(tree)}


def test_all_blockers_are_in_the_table() -> None:
    calls = [
        (getattr(node.func, "id", ""), path.name, node.args)
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]
    whys = [
        *(
            said(args[-2])
            for name, of, args in calls
            if (name, of) == ("_blocked", "conversion.py")
        ),
        *(said(args[0]) for name, _, args in calls if name == "Blocker"),
    ]
    assert len(whys) > 40
    assert [why for why in whys if why is not None and why not in refusals()] == []


# --- what people type -------------------------------------------------------------------------


def test_two_commands_are_those_of_ci() -> None:
    given = [block.strip() for block in blocks("") if "scripts/setup" in block]
    assert given == [
        "scripts/setup && .venv/bin/pytest example_suite",
        "scripts/setup && .venv/bin/tox",
    ]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    steps = [re.sub(r"( --)? --require-real$", "", line.strip()) for line in lines]
    for command in given:
        for step in command.split(" && "):
            assert step in steps


def test_packages_are_those_of_setup() -> None:
    setup = (ROOT / "scripts" / "setup").read_text()
    lines = re.findall(r"(?:apt-get|dnf) install ([\w -]+)`", section("Install it"))
    assert len(lines) == 2
    for package in " ".join(lines).split():
        # Debian's unversioned package stands for the one of the Python that setup found
        name = {"python3-dev": "python$python_minor-dev"}.get(package, package)
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", setup), package


def test_versions_are_those_of_the_project() -> None:
    needs = dict(row[:2] for table in tables("Install it") for row in table)
    floors = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.M))
    assert needs["Python"] == f"{PROJECT['requires-python'].removeprefix('>=')} or newer"
    assert needs["pytest"] == f"{floors['pytest']} or newer"
    assert needs["libvirt"].startswith(f"{floors['libvirt-python']} to ")


@pytest.mark.parametrize("block", [*blocks("python"), *blocks("python", STATES)])
def test_python_compiles(block: str) -> None:
    ast.parse(block)


def test_smallest_test_runs(pytester: pytest.Pytester) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", section("The smallest test"), re.DOTALL)
    (command,) = [line for line in section("The smallest test").splitlines() if "pytest --" in line]
    locks = pytester.path / "locks"
    typed = command.replace("qemu:///system", "test:///default").replace(" centos", " test")
    arguments = [*typed.split()[1:], f"--kvmsnap-lock-dir={locks}", "-Werror"]
    assert "--kvmsnap-uri" in arguments
    assert "--kvmsnap-domain" in arguments
    pytester.makepyfile(block)
    result = pytester.runpytest_inprocess(*arguments)
    result.assert_outcomes(passed=1)
    assert list(locks.iterdir()) == []


# --- the changelog ----------------------------------------------------------------------------


def test_changelog_begins_with_this_version_or_what_comes() -> None:
    headings = re.findall(r"^## \[?([^\]\s]+)", CHANGELOG, re.MULTILINE)
    assert headings[0] in ("Unreleased", PROJECT["version"])
    if len(headings) > 1 and headings[0] == "Unreleased":
        assert headings[1] == PROJECT["version"]


def test_installed_version_is_that_of_the_project() -> None:
    assert importlib.metadata.version(PROJECT["name"]) == PROJECT["version"]
