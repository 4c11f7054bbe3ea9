"""Sizes as people write and read them."""

import re

_POWERS = {"k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "512 MiB", "1.5 GiB" or "2G".

    As for qemu-img, all units are powers of 1024; "GB" means one thing here and another there.

    Raises:
        ValueError: it is no such size, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])(?:ib)?", text.strip().lower())
    size = int(float(found[1]) * 2 ** _POWERS[found[2]]) if found else 0
    if size <= 0:
        raise ValueError("must be a size above 0 with its unit, such as 512 MiB or 10 GiB")
    return size


def mib(size: int) -> str:
    """Return a size for people."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"
