"""Sizes as people write them."""

import re

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "10 GiB"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])(?:ib)?", text.strip().lower())
    if found is None:
        raise ValueError("must be a size with its unit, such as 512 MiB or 2 GiB")
    return int(float(found[1]) * 2 ** _UNITS[found[2]])


def mib(size: int) -> str:
    """Return a size for people."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"
