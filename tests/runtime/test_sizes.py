"""Amounts of memory as people write them."""

import pytest

from saccade.units import Bytes, parse_bytes


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


@pytest.mark.parametrize(
    ("size", "count", "said"),
    [("2 GiB", 2 << 30, "2GiB"), ("1.5GiB", 3 << 29, "1536MiB"), (1000, 1000, "1000B")],
)
def test_a_budget_says_itself_exactly(size, count, said):
    budget = Bytes(size)
    assert budget.count == count and str(budget) == said
    assert eval(repr(budget)) == budget == Bytes(count)


@pytest.mark.parametrize("size", [0, -5, True, 1.5, None, "-2GiB", "2 XB", ""])
def test_no_budgets(size):
    with pytest.raises(ValueError, match=r"expected .*size such as .*, got "):
        Bytes(size)
