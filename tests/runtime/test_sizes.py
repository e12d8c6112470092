"""Amounts of memory as people write them."""

import pytest

from saccade.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("1.5 kib", 1536),
        ("8GB", 8 * 10**9),
        ("7700000", 7700000),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "77", "8 giraffes", "-1", "G", "nan"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(text)
