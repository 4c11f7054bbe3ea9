"""What a run would meet, as a look beforehand tells it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pytest_kvmsnap.errors import UsageProblem
from pytest_kvmsnap.golden import Golden
from pytest_kvmsnap.pools import Pool


class PlannedConversion(NamedTuple):
    """A raw image that would be converted. `qcow2` is None where the result goes into the cache.

    `size` are the bytes that it takes at most.
    """

    machine: str
    raw: Path
    qcow2: Path | None
    size: int


@dataclass
class Outlook:
    """The images of each machine, what would be converted, and what stands in the way.

    `notes` are what could not be looked at, and why.
    """

    images: dict[str | Pool | Golden, list[Path]] = field(default_factory=dict)
    conversions: list[PlannedConversion] = field(default_factory=list)
    problems: list[UsageProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
