"""Sizes as people write and read them."""

import pytest

from pytest_kvmsnap.sizes import mib, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512 MiB", 512 * 2**20),
        ("10 GiB", 10 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("2G", 2 * 2**30),
        (" 2g ", 2 * 2**30),
        ("64 kib", 2**16),
        ("1K", 2**10),
        ("0.5TiB", 2**39),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "10", "GiB", "0 GiB", "0.0001 KiB", "-1 GiB", "10 GB", "1,5 GiB", "1e3 MiB", "1 GiB 2"],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be a size above 0 with its unit, such as 512 MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 MiB"), (3 * 2**19, "1.5 MiB"), (2**30, "1.0 GiB"), (2**42, "4,096.0 GiB")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert mib(size) == text
