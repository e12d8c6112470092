"""Confidence intervals of scores between 0 and 1, of 95 %, that hold for few samples too.

A score that is a share (three of four numbers found) varies less than one that is right or wrong
with the same mean, so these intervals are then wider than need be, never narrower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import Final

Z: Final = NormalDist().inv_cdf(0.975)


def wilson(mean: float, count: int) -> tuple[float, float]:
    """Bounds of a proportion (Wilson, 1927, doi.org/10.1080/01621459.1927.10502953).

    Args:
        mean: of `count` scores.

    Raises:
        ValueError: no scores.
    """
    if count < 1:
        raise ValueError(f"an interval needs at least one score, got {count}.")
    spread = Z * math.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2))
    middle, scale = mean + Z**2 / (2 * count), 1 + Z**2 / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `ours - theirs` on the same samples, and its bounds.

    Newcombe's score method for paired proportions (Statistics in Medicine 17, 1998, pages 2635 to
    2650, method 8): from the Wilson bounds of both means and the correlation of the scores.

    Raises:
        ValueError: no scores, or not as many of each.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"expected as many scores of each, got {len(ours)} and {len(theirs)}.")
    p, q = fmean(ours), fmean(theirs)
    (p_low, p_high), (q_low, q_high) = wilson(p, len(ours)), wilson(q, len(theirs))
    r = _correlation(ours, theirs)
    below = _distance(p - p_low, q_high - q, r)
    above = _distance(p_high - p, q - q_low, r)
    return p - q, max(-1.0, p - q - below), min(1.0, p - q + above)


def _distance(a: float, b: float, correlation: float) -> float:
    return math.sqrt(max(0.0, a**2 - 2 * correlation * a * b + b**2))


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; 0 where one of them never varies."""
    mean_x, mean_y = fmean(x), fmean(y)
    varies_x = sum((a - mean_x) ** 2 for a in x)
    varies_y = sum((b - mean_y) ** 2 for b in y)
    if varies_x * varies_y == 0:
        return 0.0
    both = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return both / math.sqrt(varies_x * varies_y)
