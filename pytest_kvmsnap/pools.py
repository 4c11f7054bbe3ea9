"""Pools: domains of which any will do, named one by one or by patterns."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

# What libvirt's names may begin with is up to its users; ours begin so, and belong to one run.
_OURS = "kvmsnap-"


@dataclass(frozen=True)
class Pool:
    """Domains that are equal to those who ask. `names` may have wildcards (`*`, `?`, `[…]`)."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.names)

    def has(self, domain: str) -> bool:
        """Tell whether a domain of that name belongs to it."""
        return any(domain in matching(name, [domain]) for name in self.names)


def domain_or_pool(names: Iterable[str]) -> str | Pool:
    """Return what these names stand for: one domain, or a pool."""
    unique = tuple(dict.fromkeys(names))
    if len(unique) == 1 and not is_pattern(unique[0]):
        return unique[0]
    return Pool(unique)


def is_pattern(name: str) -> bool:
    """Tell whether a name may stand for several domains."""
    return any(character in name for character in "*?[")


def matching(name: str, domains: Collection[str]) -> list[str]:
    """Return which domains a name or pattern stands for; the throwaway ones of runs are none."""
    if name in domains:
        return [name]
    if not is_pattern(name):
        return []
    return [d for d in domains if fnmatchcase(d, name) and not d.startswith(_OURS)]
