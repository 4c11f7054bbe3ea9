"""What `vm.run` hands to the agent: an argument list in which no text is parsed by a shell."""

import os
import subprocess
from pathlib import Path

import pytest

from pytest_kvmsnap.vm import _argv

ODD = [
    "plain",
    "two words",
    "it's",
    'a "quote"',
    "$HOME",
    "`date`",
    "-n",
    "--",
    "a;b",
    "*",
    "new\nline",
    "ü",
    "\\",
    "",
]


def executed(argv: list[str], cwd: Path | None = None) -> str:
    """Run an argument list on this computer, as the agent would in the guest."""
    return subprocess.run(argv, capture_output=True, text=True, check=True, cwd=cwd).stdout


def test_a_string_goes_to_the_shell_and_a_list_does_not() -> None:
    assert _argv("echo $1", None, None) == ["/bin/sh", "-c", "echo $1"]
    assert _argv(["echo", "$1"], None, None) == ["echo", "$1"]
    assert _argv(("echo", "$1"), {}, None) == ["echo", "$1"]


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="the command is empty"):
        _argv([], None, None)


@pytest.mark.parametrize("value", ODD)
def test_arguments_arrive_as_they_are(value: str) -> None:
    assert executed(_argv(["printf", "%s|%s", value, "x"], None, "/")) == f"{value}|x"


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("cwd", [None, "/"])
def test_variables_arrive_as_they_are(value: str, cwd: str | None) -> None:
    env = {"KVMSNAP_A": value, "KVMSNAP_B": "=b=", "LC_ALL": "C"}
    argv = _argv('printf "%s|%s" "$KVMSNAP_A" "$KVMSNAP_B"', env, cwd)
    assert executed(argv) == f"{value}|=b="


def test_variables_are_added_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMSNAP_OLD", "old")
    argv = _argv('printf "%s %s" "$KVMSNAP_OLD" "$KVMSNAP_NEW"', {"KVMSNAP_NEW": "new"}, None)
    assert executed(argv) == "old new"


@pytest.mark.parametrize("name", [name for name in ODD if name])
@pytest.mark.parametrize("env", [None, {"KVMSNAP_A": "a"}])
def test_the_folder_is_gone_to_by_its_very_name(
    tmp_path: Path, name: str, env: dict[str, str] | None
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    assert executed(_argv(["pwd"], env, str(folder))) == f"{folder}\n"


def test_a_relative_folder_that_looks_like_an_option(tmp_path: Path) -> None:
    (tmp_path / "-P").mkdir()
    assert executed(_argv(["pwd"], None, "-P"), cwd=tmp_path) == f"{tmp_path}/-P\n"


def test_a_folder_that_is_not_there_fails_and_nothing_is_run(tmp_path: Path) -> None:
    argv = _argv(["touch", str(tmp_path / "ran")], None, str(tmp_path / "nowhere"))
    assert subprocess.run(argv, capture_output=True, check=False).returncode != 0
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - a list of names is what is meant
