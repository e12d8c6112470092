"""The order in which candidates are called; no test measures real time."""

from __future__ import annotations

import gc

import pytest

from saccade.bench import timing
from saccade.bench.timing import interleave, summary


class Clock:
    """Time that passes only where a call spends it."""

    def __init__(self):
        self.now = 0.0
        self.log = ""

    def __call__(self):
        return self.now

    def call(self, name, seconds):
        def spend():
            self.now += seconds
            self.log += name

        return spend


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0)


def test_candidates_take_turns():
    clock = Clock()
    first, second = interleave([clock.call("a", 1.0), clock.call("b", 1.0)], budget=4, clock=clock)
    assert clock.log == "ab" + "abababab"  # warm-up, then alternately
    assert first.seconds == second.seconds == 1.0
    assert first.samples == 4 and first.spread == 0


def test_a_slow_one_leaves_when_its_budget_is_spent():
    clock = Clock()
    times = interleave([clock.call("a", 0.5), clock.call("b", 2.0)], budget=4, clock=clock)
    assert clock.log == "ab" + "ababab" + "aaaaa"
    assert [taken.samples for taken in times] == [8, 3]  # at least three, over budget or not


def test_a_very_slow_one_is_measured_once():
    clock = Clock()
    (taken,) = interleave([clock.call("a", 20.0)], budget=1, clock=clock)
    assert clock.log == "aa" and taken.samples == 1 and taken.seconds == 20


def test_short_calls_are_repeated_inside_a_sample_after_one_that_settles():
    clock = Clock()
    (taken,) = interleave([clock.call("a", 0.25e-3)], budget=0.006, clock=clock)
    assert taken.samples == 3 and taken.seconds == pytest.approx(0.25e-3)
    assert len(clock.log) == 1 + 3 * (1 + 8)


def test_a_number_of_samples_is_enough():
    clock = Clock()
    (taken,) = interleave([clock.call("a", 0.01)], budget=1e9, clock=clock)
    assert taken.samples == timing.MOST


def test_nobody_and_garbage_collection():
    assert interleave([], budget=1) == []
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave([lambda: 1 // 0], budget=1)
    assert gc.isenabled()


def test_summary():
    taken = summary([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (taken.seconds, taken.low, taken.high, taken.best) == (3, 2, 4, 1)
    assert taken.spread == pytest.approx(2 / 3)
