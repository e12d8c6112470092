"""Better and worse: only beyond the interval and five per cent."""

from __future__ import annotations

import math

import pytest

from saccade.report import verdict
from saccade.report.comparison import Row


def _row(**values):
    return Row(name="x", group="y", **values)


@pytest.mark.parametrize(
    ("ratio", "error", "better"),
    [
        (0.9, 0.0, True),
        (1.1, 0.0, False),
        (1.04, 0.0, None),  # within 5 %
        (1 / 1.04, 0.0, None),
        (0.5, None, None),  # noise of unknown size
        (0.9, 0.06, None),  # |log 0.9| = 0.105 is less than two errors
        (0.9, 0.05, True),
        (None, 0.0, None),
    ],
)
def test_a_ratio_is_judged_beyond_two_errors_and_five_per_cent(ratio, error, better):
    assert verdict.of_ratio(ratio, error, lower_is_better=True) is better
    flipped = None if better is None else not better
    assert verdict.of_ratio(ratio, error, lower_is_better=False) is flipped


def test_errors_of_independent_means_add_in_quadrature():
    fast, slow = _row(decode_tps=20.0, decode_tps_se=0.6), _row(decode_tps=10.0, decode_tps_se=0.4)
    assert verdict.sampled("decode_tps")(fast, slow) == pytest.approx(0.05)
    slow.decode_tps_se = None
    assert verdict.sampled("decode_tps")(fast, slow) is None


def test_times_to_the_first_token_are_as_certain_as_those_of_prefill():
    row, reference = (
        _row(ttft_seconds=4.0, prefill_tps=100.0, prefill_tps_se=error) for error in (3.0, 4.0)
    )
    assert verdict.waited(row, reference) == pytest.approx(0.05)
    row.ttft_seconds_se, reference.ttft_seconds_se = 0.0, 0.4
    assert verdict.waited(row, reference) == pytest.approx(0.1)


def test_perplexity_is_judged_by_its_pairs():
    reference = _row(perplexity=10.0, perplexity_se=1.7)
    row = _row(perplexity=11.0, perplexity_se=1.8, perplexity_ratio_se=0.011)
    assert verdict.paired_perplexity(row, reference) == pytest.approx(0.01)
    row.perplexity_ratio_se = None
    assert verdict.paired_perplexity(row, reference) == pytest.approx(math.hypot(0.17, 1.8 / 11))


def _simulated(p, n, draws=4000):
    """How often a share of n equal trials is called different from another of the same p."""
    import numpy as np

    found = np.random.default_rng(0).binomial(n, p, (draws, 2)) / n
    return np.mean([
        verdict.of_shares(_row(needle=a, needle_trials=n), _row(needle=b, needle_trials=n),
                          "needle", "needle_trials") is not None
        for a, b in found
    ])  # fmt: skip


@pytest.mark.parametrize(("p", "n"), [(0.5, 24), (0.9, 24), (1.0, 2)])
def test_equal_shares_are_seldom_called_different(p, n):
    assert _simulated(p, n) < 0.08


def test_shares_that_differ_are_told_apart_with_enough_trials():
    def judged(found, of, trials):
        row, reference = (_row(needle=share, needle_trials=trials) for share in (found, of))
        return verdict.of_shares(row, reference, "needle", "needle_trials")

    assert judged(0.25, 1.0, 24) is False and judged(1.0, 0.25, 24) is True
    assert judged(0.0, 1.0, 2) is None and judged(0.5, 1.0, 0) is None


@pytest.mark.parametrize(
    ("row", "broken"),
    [
        ({"perplexity": 16.0, "perplexity_ratio_se": 0.01}, True),
        ({"perplexity": 16.0, "perplexity_ratio_se": 0.2}, False),  # the interval reaches 1.5
        ({"perplexity": 12.0, "perplexity_ratio_se": 0.01}, False),
        ({"kl": 1.2}, True),
        ({"kl": 0.9}, False),
        ({}, False),
    ],
)
def test_a_row_is_broken_by_perplexity_beyond_its_interval_or_by_kl(row, broken):
    assert verdict.is_broken(_row(**row), _row(perplexity=10.0)) is broken
