"""How the lab speaks to people."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Voice:
    """Lines, and how far something is: what it is, and per cent, shown on terminals alone."""

    line: Callable[[str], None]
    show: Callable[[str, float], None]

    def progress(self, percent: float) -> None:
        """Tell how far all conversions are."""
        self.show("converting raw images", percent)
