"""Speeds of rows measured in turns, and how far they can be trusted.

A machine that does other things too is now fast and now slow, for seconds.  So every row is
measured in several rounds, and the error is taken from how much the rounds differ: over all rows,
since two or three rounds of one row say little, or of the row itself where that is worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from saccade.report.comparison import Row


@dataclass(slots=True)
class Rounds:
    """Seconds of one row, one number a round.

    Attributes:
        prefill: reading the context; first: until the first token was chosen.
        decode: of a token, the median of the round.
    """

    prefill: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, prefill: float, first: float, tokens: Sequence[float]) -> None:
        """One round more."""
        self.prefill.append(prefill)
        self.first.append(first)
        if tokens:
            self.decode.append(median(tokens))


def fill_speeds(rows: Iterable[tuple[Row, Rounds]], n_context: int) -> None:
    """Speeds and their standard errors from all rounds so far."""
    pairs = [(row, rounds) for row, rounds in rows if rounds.prefill]
    noise_prefill = _noise([rounds.prefill for _, rounds in pairs])
    noise_decode = _noise([rounds.decode for _, rounds in pairs])
    for row, rounds in pairs:
        row.ttft_seconds = fmean(rounds.first)
        row.prefill_tps, row.prefill_tps_se = _rate(n_context, rounds.prefill, noise_prefill)
        if rounds.decode:
            row.decode_tps, row.decode_tps_se = _rate(1, rounds.decode, noise_decode)


def _rate(amount: int, seconds: Sequence[float], noise: float | None) -> tuple[float, float | None]:
    """Amount a second, with its standard error where there is one."""
    rate = amount / fmean(seconds)
    if noise is None:
        return rate, None
    own = _noise([seconds]) or 0.0
    return rate, rate * max(own, noise) / math.sqrt(len(seconds))


def _noise(rows: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation of the logarithm of one time, pooled over rows; None: nothing repeated."""
    squares = freedom = 0.0
    for seconds in rows:
        logs = [math.log(x) for x in seconds]
        squares += sum((x - fmean(logs)) ** 2 for x in logs)
        freedom += max(0, len(logs) - 1)
    return math.sqrt(squares / freedom) if freedom else None
