"""Numbers as people read and write them; it imports nothing of the package."""

from __future__ import annotations

import math
import re

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def significant(value: float, digits: int = 3) -> str:
    """`value` with that many significant digits, thousands grouped, never in e-notation."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def as_bytes(count: float) -> str:
    """Bytes in binary units: `212 MiB`, `1.25 GiB`."""
    power = 0
    while abs(count) >= 999.5 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{significant(count)} {_UNITS[power]}" if power else f"{count:.0f} B"


def parse_bytes(text: str) -> int:
    """`8GiB`, `8G` and `8g` are 8 * 2**30 bytes, `8GB` is 8 * 10**9, `512` is 512.

    Raises:
        ValueError: anything else, or nothing at all.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"expected a size such as 8GiB or 512MiB, got {text!r}.")
    number, unit, binary = found.groups()
    power = " kmgt".index(unit.lower() or " ")
    decimal = not binary and text.strip().lower().endswith("b")
    size = int(float(number) * (1000 if decimal else 1024) ** power)
    if size < 1:
        raise ValueError(f"expected a size of at least one byte, got {text!r}.")
    return size
