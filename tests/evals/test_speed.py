"""Speeds from several rounds, and their errors."""

import math

import pytest

from saccade.evals.speed import Rounds, fill_speeds
from saccade.report.comparison import Row


def filled(*rounds, n_context=100):
    rows = [(Row(name=str(i), group="g"), each) for i, each in enumerate(rounds)]
    fill_speeds(rows, n_context)
    return [row for row, _ in rows]


def test_a_speed_is_tokens_over_the_mean_time():
    (row,) = filled(Rounds([1.0, 3.0], [1.5, 3.5], [0.1, 0.3]))
    assert row.prefill_tps == pytest.approx(50)
    assert row.ttft_seconds == pytest.approx(2.5)
    assert row.decode_tps == pytest.approx(5)


def test_one_round_has_no_error():
    (row,) = filled(Rounds([2.0], [2.1], [0.1]))
    assert row.prefill_tps == pytest.approx(50)
    assert row.prefill_tps_se is None and row.decode_tps_se is None


def test_a_row_measured_once_has_the_error_of_the_others():
    once, twice = filled(Rounds([2.0], [2.0], [0.1]), Rounds([1.0, 1.2], [1, 1], [0.1, 0.1]))
    noise = abs(math.log(1.2)) / math.sqrt(2)  # standard deviation of two numbers
    assert once.prefill_tps_se == pytest.approx(50 * noise)
    assert twice.prefill_tps_se == pytest.approx(twice.prefill_tps * noise / math.sqrt(2))


def test_a_row_worse_than_the_others_keeps_its_own_error():
    calm, wild = filled(Rounds([1.0, 1.0], [1, 1], []), Rounds([1.0, 2.0], [1, 1], []), n_context=1)
    own = math.log(2) / math.sqrt(2)
    assert wild.prefill_tps_se == pytest.approx(wild.prefill_tps * own / math.sqrt(2))
    assert 0 < calm.prefill_tps_se < wild.prefill_tps_se / wild.prefill_tps


def test_decoding_takes_the_median_of_a_round():
    rounds = Rounds()
    rounds.add(1.0, 1.1, [0.1, 0.1, 9.0])  # one token met a busy moment
    assert rounds.decode == [0.1]
    rounds.add(1.0, 1.1, [])
    assert rounds.decode == [0.1] and len(rounds.prefill) == 2
