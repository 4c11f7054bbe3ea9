"""Whether a test uses a machine of ours: by the definitions in its closure, not by names."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.fixtures import FixtureDef

_OURS = "pytest_kvmsnap.fixtures"


def uses_our_machine(item: pytest.Item) -> bool:
    """Tell whether one of our fixtures is in the closure of a test.

    Other suites have a fixture or a parameter `vm` too; theirs is not ours, unless it wraps ours.
    What a test asks for by `getfixturevalue` cannot be seen here.
    """
    info = getattr(item, "_fixtureinfo", None)  # doctest items and other collectors have none
    if info is None:
        return False
    definitions = info.name2fixturedefs
    return any(_is_ours_used(name, definitions[name]) for name in definitions)


def _is_ours_used(name: str, chain: "tuple[FixtureDef[object], ...]") -> bool:
    """Follow the overrides of a fixture from the nearest on, as far as each asks for the next."""
    for definition in reversed(chain):
        if definition.func.__module__ == _OURS:
            return True
        if name not in definition.argnames:
            return False
    return False
