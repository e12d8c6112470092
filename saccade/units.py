"""Numbers as people read and write them; it imports nothing of the package."""

from __future__ import annotations

import math
import re
from dataclasses import InitVar, dataclass, field

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
    """`8GiB`, `8G` and `8g` are 8 * 2**30 bytes, `8GB` is 8 * 10**9, `2000000` is as many.

    Raises:
        ValueError: anything else, less than a byte, a small number without a unit, or over 2**63.
    """
    found = _SIZE.fullmatch(text.strip()) if len(text) < _LONGEST else None
    if found is None:
        raise ValueError(f"expected a size such as 8GiB or 512MiB, got {_shortened(text)}.")
    number, unit, binary = found.groups()
    power = " kmgt".index(unit.lower() or " ")
    decimal = not binary and text.strip().lower().endswith("b")
    size = int(float(number) * (1000 if decimal else 1024) ** power)
    if not 1 <= size < 2**63:
        raise ValueError(f"expected a size from one byte to 8 EiB, got {text!r}.")
    if text.strip().isdecimal() and size < 2**20:
        raise ValueError(f"expected a size with its unit, such as {number}GiB, got {text!r}.")
    return size


_LONGEST = 50


def _shortened(text: str) -> str:
    """A text for a message, in quotes."""
    return repr(text if len(text) < _LONGEST else f"{text[:_LONGEST]}...")


@dataclass(frozen=True, slots=True)
class Bytes:
    """An amount of memory; as `kv_budget`, what all caches may take behind a compression.

    Args:
        size: a number of bytes, or a text such as "512MiB" or "1.5 GiB" (`parse_bytes`).

    Attributes:
        count: bytes.

    Raises:
        ValueError: less than a byte, or no size.
    """

    size: InitVar[int | str]
    count: int = field(init=False)

    def __post_init__(self, size: int | str) -> None:
        if isinstance(size, str):
            size = parse_bytes(size)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:  # pyright: ignore
            raise ValueError(
                f"expected bytes, at least 1, or a size such as '512MiB', got {size!r:.40}."
            )
        object.__setattr__(self, "count", size)

    def __str__(self) -> str:
        """Exact, in the largest unit of which it is a whole number."""
        power = next(p for p in (3, 2, 1, 0) if self.count % 1024**p == 0)
        return f"{self.count // 1024**power}{_UNITS[power]}"

    def __repr__(self) -> str:
        return f"Bytes({str(self)!r})"
