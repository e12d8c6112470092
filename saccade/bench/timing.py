"""Timing on a busy machine: samples of candidates alternate, medians are compared.

Candidates run A B C A B C, never A A A B B B: another process that takes a core for a second slows
all of them, and ratios stay right where absolute times do not.  Alternating has a price: OpenMP
workers of one candidate keep spinning for milliseconds after its last loop and would take a core
from the next one.  So a pause and an untimed call come before each short sample.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

SHORTEST = 2e-3  # seconds a sample lasts at least; shorter calls are repeated inside it
LEAST, MOST = 3, 200  # samples of a candidate
SLOW = 10.0  # seconds from which one sample has to do
PAUSE = 5e-3  # seconds in which idle workers fall asleep
SETTLED = 0.1  # seconds from which a call does not notice how it was started


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median of `samples` samples, the quartiles, and the best one."""

    seconds: float
    low: float
    high: float
    best: float
    samples: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.seconds if self.seconds else 0.0


def interleave(
    calls: Sequence[Callable[[], object]],
    *,
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Sample the calls alternately until each has used `budget` seconds.

    A call that has used its budget leaves the rounds; each gets at least three samples, except
    calls of more than ten seconds, which get one.  Each call is warmed up first.
    """
    with _no_collection():
        estimates = [_sample(call, 1, clock) for call in calls]
        repeats = [max(1, math.ceil(SHORTEST / max(seconds, 1e-9))) for seconds in estimates]
        least = [1 if seconds > SLOW else LEAST for seconds in estimates]
        samples: list[list[float]] = [[] for _ in calls]
        running = list(range(len(calls)))
        while running:
            for at in running:
                if estimates[at] < SETTLED:
                    time.sleep(PAUSE)
                    calls[at]()
                samples[at].append(_sample(calls[at], repeats[at], clock))
            running = [
                at for at in running
                if len(samples[at]) < least[at]
                or (sum(samples[at]) * repeats[at] < budget and len(samples[at]) < MOST)
            ]  # fmt: skip
    return [summary(taken) for taken in samples]


def summary(samples: Sequence[float]) -> Timing:
    """Median and quartiles of the samples."""
    if len(samples) < 2:
        return Timing(samples[0], samples[0], samples[0], samples[0], 1)
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(middle, low, high, min(samples), len(samples))


def _sample(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of one call, averaged over `repeats` calls in a row."""
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of the samples."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
