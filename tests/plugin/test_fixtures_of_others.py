"""Suites that have wide fixtures of the names of ours go on working untouched."""

from typing import TYPE_CHECKING

import pytest
from notes import write

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite

WIDE = [("class", "class_vm"), ("module", "module_vm"), ("session", "session_vm")]
FOREIGN = {
    "fixture": """
import pytest

@pytest.fixture(scope="{scope}")
def {name}():
    return "theirs"

@pytest.fixture(scope="{scope}")
def prepared({name}):
    return {name}

class TestClass:
    def test_vm(self, prepared, {name}):
        assert prepared is {name} == "theirs"
""",
    "fixture for one test": """
import pytest

@pytest.fixture
def {name}():
    return "theirs"

def test_vm({name}):
    assert {name} == "theirs"
""",
    "parameter": """
import pytest

@pytest.mark.parametrize("{name}", ["theirs"], scope="{scope}")
def test_vm({name}):
    assert {name} == "theirs"
""",
}


@pytest.mark.parametrize(("scope", "name"), WIDE)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_wide_fixture_of_somebody_else_is_left_alone(
    suite: "Suite", kind: str, scope: str, name: str
) -> None:
    """No domain of the name is there, so that a machine of ours would be an error."""
    suite.write(FOREIGN[kind].format(scope=scope, name=name))
    suite.run(domain="nowhere").assert_outcomes(passed=1)
    suite.run("-m", "kvm", domain="nowhere").assert_outcomes(deselected=1)
    assert not suite.locks.exists()


@pytest.mark.parametrize(("scope", "name"), WIDE)
def test_ours_beside_a_wide_fixture_of_somebody_else(
    suite: "Suite", host: "Host", calls: "Calls", scope: str, name: str
) -> None:
    host.define(state="running")
    before = host.look()
    write(
        suite,
        f"""
@pytest.fixture(scope="{scope}")
def {name}():
    return []

@pytest.fixture(scope="{scope}")
def prepared({name}):
    {name}.append("prepared")

class TestClass:
    def test_one(self, prepared, {name}, vm):
        assert {name} == ["prepared"]
        write(vm, "dirt")

    def test_two(self, prepared, {name}, vm):
        assert {name} == ["prepared"]
        assert read(vm) == []
""",
    )
    suite.run().assert_outcomes(passed=2)
    assert not any("prepared" in entry for entry in calls.log)
    assert host.look() == before
