"""The benchmark of products with packed weights: right before it is timed."""

import pytest
import torch

from benchmarks import linear


def test_every_product_stands_for_one_matrix():
    found, exact = linear.products(64, 96)
    assert set(found) == {"float32", "bfloat16", "4 bits", "8 bits", "torch int4"}
    x = torch.randn(40, 96)
    for name, product in found.items():
        linear.check(name, product(x), x, exact)
        with pytest.raises(AssertionError, match=f"{name} is off by"):
            linear.check(name, product(x).roll(1, 1), x, exact)


def test_each_is_timed():
    best = linear.measured(64, 96, 3, 1)
    assert len(best) == 5 and all(0 < seconds < 10 for seconds in best.values())
