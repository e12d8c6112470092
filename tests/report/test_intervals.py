"""Intervals against published values and against the equations that define them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from saccade.report.intervals import paired_difference, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Newcombe (1998, Statistics in Medicine 17, pages 857 to 872), Table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
     (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_wilson_as_published(right, count, low, high):
    assert wilson(right / count, count) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("mean", [0.1, 0.37, 0.5, 0.98])
def test_wilson_solves_its_equation(mean):
    """The bounds are where the mean is z standard errors away, with the bound's own error."""
    for bound in wilson(mean, 17):
        assert abs(mean - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / 17))


def test_wilson_at_the_ends():
    assert wilson(1.0, 8)[1] == pytest.approx(1.0) and wilson(0.0, 8)[0] == pytest.approx(0.0)
    assert wilson(1.0, 8)[0] == pytest.approx(8 / (8 + Z**2))
    with pytest.raises(ValueError, match="at least one score, got 0"):
        wilson(0.5, 0)


def test_paired_difference():
    rng = np.random.default_rng(0)
    for _ in range(20):
        theirs = (rng.random(24) < 0.8).astype(float)
        ours = np.where(rng.random(24) < 0.3, 0.0, theirs)
        change, low, high = paired_difference(ours.tolist(), theirs.tolist())
        p, q = ours.mean(), theirs.mean()
        (p1, p2), (q1, q2) = wilson(p, 24), wilson(q, 24)
        r = np.corrcoef(ours, theirs)[0, 1] if ours.std() * theirs.std() else 0.0
        assert change == pytest.approx(p - q)
        assert low == pytest.approx(
            p - q - math.sqrt((p - p1) ** 2 - 2 * r * (p - p1) * (q2 - q) + (q2 - q) ** 2)
        )
        assert high == pytest.approx(
            p - q + math.sqrt((p2 - p) ** 2 - 2 * r * (p2 - p) * (q - q1) + (q - q1) ** 2)
        )


def test_paired_differences_of_nothing_and_of_everything():
    change, low, high = paired_difference([1.0] * 8, [1.0] * 8)
    assert change == 0 and low == -high == pytest.approx(8 / (8 + Z**2) - 1)
    assert paired_difference([0.0] * 8, [1.0] * 8)[2] < -0.5
    with pytest.raises(ValueError, match="as many scores of each, got 1 and 2"):
        paired_difference([1.0], [1.0, 0.0])
