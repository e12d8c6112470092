"""Checks of the values in a scaling rule, with errors that explain what is possible.

Values come from JSON, so each check takes any object; NaN, infinity, bools and texts all fail.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import cast


def require(ok: bool, place: str, expected: str, value: object, advice: str) -> None:
    """Raise a ValueError that says expected, got and what to do, unless `ok`."""
    if not ok:
        raise ValueError(f"{place} must be {expected}, got {value!r}. {advice}")


def check_stretch(place: str, value: object) -> None:
    """A factor by which a context grows: finite, at least 1."""
    advice = "Give served length / trained length, or use Unscaled() for no scaling."
    ok = 1 <= as_float(value) < math.inf
    require(ok, place, "a finite number of at least 1", value, advice)


def check_positive(place: str, value: object, advice: str) -> None:
    """A finite number above 0."""
    ok = 0 < as_float(value) < math.inf
    require(ok, place, "a finite number above 0", value, advice)


def check_magnitude(place: str, value: object) -> None:
    """What multiplies cos and sin: a finite number above 0, or None for the formula."""
    if value is not None:
        check_positive(place, value, "Use None to take it from the formula, 1.0 to switch it off.")


def check_mscale(place: str, value: object) -> None:
    """A weight in YaRN's magnitude: finite, at least 0, or None."""
    advice = "None and 0 both leave the magnitude to the plain formula."
    ok = value is None or 0 <= as_float(value) < math.inf
    require(ok, place, "a finite number of at least 0 or None", value, advice)


def check_length(place: str, value: object) -> None:
    """A length in tokens, at least 2."""
    advice = "Give the length the model was trained on, before any stretching."
    # One token has no waves to count and log(1) = 0 divides LongRoPE's magnitude.
    ok = isinstance(value, Integral) and as_float(value) >= 2
    require(ok, place, "an integer of at least 2 tokens", value, advice)


def check_divisors(place: str, values: object) -> None:
    """A tuple of numbers above 0, one per pair."""
    advice = "Wrap a list from a config file in tuple(...)."
    ok = isinstance(values, tuple) and len(values) > 0
    require(ok, place, "a tuple of rotary_dim / 2 divisors", values, advice)
    for index, value in enumerate(cast(tuple[object, ...], values)):
        check_positive(f"{place}[{index}]", value, "Each divides the frequency of one pair.")


def as_float(value: object) -> float:
    """The number as a float; NaN, which fails every bound, for what is not a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    return float(value)
