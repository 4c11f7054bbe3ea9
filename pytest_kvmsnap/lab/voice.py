"""How the lab speaks to people."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Voice:
    """Lines, and the progress of all conversions in per cent."""

    line: Callable[[str], None]
    progress: Callable[[float], None]
