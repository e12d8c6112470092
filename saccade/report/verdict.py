"""When a row is called better or worse than the reference: only beyond its interval and 5 %.

Bytes are counted, so they are exact; times and losses are samples, and one without a known error
is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

NOTEWORTHY = 0.05  # a ratio within 5 % of 1 is not called better or worse
ERRORS = 2.0  # standard errors of the log ratio: about 95 % of a normal distribution
BROKEN_PERPLEXITY = 1.5  # times the reference's perplexity, its interval included
BROKEN_KL = 1.0  # nats from the reference's predictions

Error = Callable[[Any, Any], float | None]
"""(row, reference) to the standard error of the log of their ratio; None: not known."""


def finite(row: Any, key: str) -> float | None:
    """The number in a field, None where there is none, or none that is finite."""
    value = getattr(row, key, None)
    return value if value is not None and math.isfinite(value) else None


def ratio(row: Any, reference: Any, key: str) -> float | None:
    """Value over the reference's, None where one of them is missing or the latter is zero."""
    if reference is None:
        return None
    value, base = finite(row, key), finite(reference, key)
    return value / base if value is not None and base else None


def exact(row: Any, reference: Any) -> float | None:
    """The error of a ratio of counts."""
    return 0.0


def sampled(key: str) -> Error:
    """The error of a ratio of two means that were measured independently."""

    def error(row: Any, reference: Any) -> float | None:
        shares = [_relative(row, key), _relative(reference, key)]
        known = [share for share in shares if share is not None]
        return math.hypot(*known) if len(known) == len(shares) else None

    return error


def waited(row: Any, reference: Any) -> float | None:
    """Of times to the first token: their own, else that of prefill, which is all but one step."""
    own = sampled("ttft_seconds")(row, reference)
    return sampled("prefill_tps")(row, reference) if own is None else own


def paired_perplexity(row: Any, reference: Any) -> float | None:
    """From the differences token by token where they were kept, else from both perplexities."""
    error, found = finite(row, "perplexity_ratio_se"), ratio(row, reference, "perplexity")
    if error is not None and found:
        return error / found
    return sampled("perplexity")(row, reference)


def _relative(row: Any, key: str) -> float | None:
    value, error = finite(row, key), finite(row, f"{key}_se")
    return error / value if value and error is not None else None


def of_ratio(found: float | None, error: float | None, *, lower_is_better: bool) -> bool | None:
    """True for better, False for worse, None for neither or not known."""
    if found is None or error is None:
        return None
    size = abs(math.log(found)) if found > 0 else math.inf
    if size <= math.log1p(NOTEWORTHY) or size <= ERRORS * error:
        return None
    return (found < 1) == lower_is_better


def of_shares(row: Any, reference: Any, key: str, trials_key: str) -> bool | None:
    """Shares of successes: their difference over its Agresti-Caffo standard error.

    One success and one failure are added to each side, so that 0 of 2 is no certainty.
    """
    shares, variance = [], 0.0
    for each in (row, reference):
        share, trials = finite(each, key), getattr(each, trials_key, 0)
        if share is None or trials < 1:
            return None
        smoothed = (share * trials + 1) / (trials + 2)
        variance += smoothed * (1 - smoothed) / (trials + 2)
        shares.append(smoothed)
    difference = shares[0] - shares[1]
    return None if abs(difference) <= ERRORS * math.sqrt(variance) else difference > 0


def is_broken(row: Any, reference: Any) -> bool:
    """Whether a row's text is of no use: what it saves is then no gain."""
    if (kl := finite(row, "kl")) is not None and kl > BROKEN_KL:
        return True
    found = ratio(row, reference, "perplexity")
    if not found or found <= 0:
        return False
    error = paired_perplexity(row, reference) or 0.0
    return math.log(found) - ERRORS * error > math.log(BROKEN_PERPLEXITY)
