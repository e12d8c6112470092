"""Lengths of a text in tokens, as people write them: `4096`, `4k`, `128k`, `1M`."""

from __future__ import annotations

import re

MOST = 10**12
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*([km]?)", re.IGNORECASE)
_POWERS = {"": 1, "k": 1024, "m": 1024**2}
_LONGEST = 40


def length(text: str) -> int:
    """Tokens; `k` is 1024 of them and `M` 1024 times that.

    Raises:
        ValueError: anything else, a part of a token, or more than there can be.
    """
    found = _LENGTH.fullmatch(text.strip()) if len(text) < _LONGEST else None
    value = float(found[1]) * _POWERS[found[2].lower()] if found else 0.0
    if not 1 <= value <= MOST or value != int(value):
        shown = repr(text if len(text) < _LONGEST else f"{text[:_LONGEST]}...")
        raise ValueError(f"expected a number of tokens such as 4096 or 4k, got {shown}.")
    return int(value)
