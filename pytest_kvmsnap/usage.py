"""Which machines a test uses: by the fixture definitions in its closure, not by names.

Other suites have a fixture or a parameter `vm` too; theirs is not ours, unless it wraps ours. What
a test asks for by `getfixturevalue` cannot be seen here.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

if TYPE_CHECKING:
    from _pytest.fixtures import FixtureDef

    Definition: TypeAlias = FixtureDef[Any]
    Closure: TypeAlias = Mapping[Definition, frozenset[Definition]]

_OURS = "pytest_kvmsnap.fixtures"


def is_ours(definition: "Definition") -> bool:
    return getattr(definition.func, "__module__", None) == _OURS


def uses_our_machine(item: pytest.Item) -> bool:
    """Tell whether one of our fixtures is in the closure of a test."""
    return any(closure_of(item).values())


def closure_of(item: pytest.Item) -> "Closure":
    """Return the fixtures of a test, in the order of their set-up, with ours that each asks for.

    What a fixture asks for through others counts too.
    """
    walk = _Walk(item)
    for name in getattr(item, "fixturenames", ()):  # doctests of pytest before 8 have none
        walk.visit(name, ())
    return walk.found


def closure_under(item: pytest.Item, definition: "Definition") -> "Closure":
    """Return a fixture of a test and those that it asks for; the rest like `closure_of`."""
    walk = _Walk(item)
    levels = walk.definitions(definition.argname)
    depth = len(levels) - levels.index(definition) if definition in levels else 1
    walk.visit(definition.argname, (definition.argname,) * (depth - 1))
    return walk.found


def nearest(item: pytest.Item, definition: "Definition") -> "Definition":
    """Return the fixture that a test gets by the name of this one: itself, or an override of it."""
    levels = _Walk(item).definitions(definition.argname)
    return levels[-1] if levels else definition


class _Walk:
    def __init__(self, item: pytest.Item) -> None:
        self.found: dict[Definition, frozenset[Definition]] = {}
        self._item = item
        info = getattr(item, "_fixtureinfo", None)  # other collectors' items have none
        self._by_name: dict[str, Sequence[Definition]] = info.name2fixturedefs if info else {}

    def definitions(self, name: str) -> "Sequence[Definition]":
        """Return the definitions of a name that the test can see, the nearest last.

        pytest 8.2 does not list what only an overridden fixture asks for, so it is asked.
        """
        if name in self._by_name:
            return self._by_name[name]
        manager: Any = self._item.session._fixturemanager
        return manager.getfixturedefs(name, self._item) or ()

    def visit(self, name: str, path: tuple[str, ...]) -> "frozenset[Definition]":
        """Note a fixture and all that it asks for; `path` are the fixtures that led to it.

        A fixture that asks for its own name gets the definition that it overrides.
        """
        levels = self.definitions(name)
        depth = 1 + path.count(name)
        if depth > len(levels):
            return frozenset()
        definition = levels[-depth]
        if definition not in self.found:
            ours = (
                frozenset({definition})
                if is_ours(definition)
                else frozenset().union(
                    *(self.visit(asked, (*path, name)) for asked in definition.argnames)
                )
            )
            self.found[definition] = ours
        return self.found[definition]
