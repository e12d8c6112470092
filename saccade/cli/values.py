"""Text of an option to its value: each parser raises ValueError with what it expected and got."""

from __future__ import annotations

import math
from collections.abc import Callable

ON_OFF = {"on": True, "off": False}


def whole_number(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Parser of a whole number from `least` to `most`."""
    allowed = f"of at least {least}" if most == math.inf else f"from {least} to {most:g}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise ValueError(f"expected a whole number {allowed}, got {text!r}.")
        return value

    return parse


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"expected a number, got {text!r}.")
    return value


def one_of(*choices: str) -> Callable[[str], str]:
    """Parser of one of some words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {text!r}.")
        return text

    return parse


def switch(text: str) -> bool:
    """`on` or `off`."""
    return ON_OFF[one_of(*ON_OFF)(text)]


def list_of(parse: Callable[[str], object]) -> Callable[[str], list[object]]:
    """Parser of values between commas."""

    def parse_all(text: str) -> list[object]:
        found = [parse(part.strip()) for part in text.split(",") if part.strip()]
        if not found:
            raise ValueError(f"expected at least one, such as A or A,B, got {text!r}.")
        return found

    return parse_all


def budget(text: str) -> int | float:
    """A share where it has a point or a per cent sign, else a number of tokens."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(f"expected tokens (512) or a share (0.25 or 25%), got {text!r}.") from None
