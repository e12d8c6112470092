"""Numbers as text: bytes, ratios, rates, values with their standard error."""

from __future__ import annotations

import math
from typing import Any

from saccade.units import as_bytes, significant

__all__ = [
    "MISSING", "as_bytes", "as_duration", "as_fact", "as_position", "as_ratio", "as_seconds",
    "as_share", "as_time", "fact_name", "significant", "with_error",
]  # fmt: skip

MISSING = "–"


def as_ratio(ratio: float) -> str:
    """A multiple of the baseline: `0.35x`, `1.02x`, `12.4x`, `0.004x`."""
    if ratio == 0:
        return "0x"
    if 0.1 <= abs(ratio) < 10:
        return f"{ratio:.2f}x"
    return f"{significant(ratio, 3 if abs(ratio) >= 10 else 1)}x"


def with_error(value: float, error: float | None, *, most_decimals: int = 4) -> str:
    """`12.31 ±0.24`: the error to one or two digits, the value to the same place."""
    if not math.isfinite(value):
        return str(value)
    if value and abs(value) < 0.5 * 10**-most_decimals:
        return f"<{10**-most_decimals:.{most_decimals}f}"
    if error is None or not math.isfinite(error) or error <= 0:
        short = f"{value:.{most_decimals}f}"
        return min(significant(value), short, key=len) if value else "0"
    exponent = math.floor(math.log10(error))
    two_digits = error < 3.55 * 10**exponent
    decimals = min(max(0, two_digits - exponent), most_decimals)
    if round(error, decimals) == 0:
        return f"{value:,.{decimals}f}"
    return f"{value:,.{decimals}f} ±{error:,.{decimals}f}"


def as_share(share: float) -> str:
    """A share of 1 in per cent, never rounded up to a perfect score."""
    percent = 100 * share
    if share < 1 and round(percent, 1) >= 100:
        return ">99.9 %"
    return f"{percent:.1f} %" if percent < 100 else "100 %"


def as_duration(seconds: float) -> str:
    """`48 s`, `2 min 31 s`, `1 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def as_time(seconds: float) -> str:
    """The time of a call: `42.0 µs`, `171 ms`, `12.3 s`."""
    if seconds < 1e-3:
        return f"{significant(seconds * 1e6)} µs"
    return f"{significant(seconds * 1e3)} ms" if seconds < 10 else f"{significant(seconds)} s"


def as_seconds(seconds: float) -> str:
    """How long somebody waits: `171 ms`, `9.27 s`, `151 s`."""
    return f"{significant(seconds * 1e3)} ms" if seconds < 1 else f"{significant(seconds)} s"


def as_position(position: int) -> str:
    """A token position: `8k` for whole multiples of 1024, else the number."""
    if position and position % 1024 == 0:
        return f"{position // 1024}k"
    return f"{position:,}"


def as_fact(name: str, value: Any) -> str:
    """A fact of a record; the ending of its name says its unit (`_bytes`, `_seconds`)."""
    if isinstance(value, dict):
        value = [f"{key} {as_fact(key, item)}" for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return ", ".join(as_fact("", item) for item in value)
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return MISSING if value is None or value == "" else str(value)
    if name.endswith("bytes"):
        return as_bytes(value)
    if name.endswith("seconds"):
        return as_duration(value)
    return f"{value:,}" if isinstance(value, int) else significant(value)


def fact_name(name: str) -> str:
    """The name of a fact as a person reads it: the unit ending goes, `_` becomes a space."""
    return name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
