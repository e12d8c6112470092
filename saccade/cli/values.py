"""Text of an option to its value: each parser raises ValueError with what it expected and got."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from saccade.units import Bytes

ON_OFF = {"on": True, "off": False}


MOST = 10**12
"""More tokens, rows or bytes than anything here can have."""


def whole_number(least: int, most: int = MOST) -> Callable[[str], int]:
    """Parser of a whole number from `least` to `most`."""
    allowed = f"of at least {least}" if most == MOST else f"from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value > MOST >= most:
            raise ValueError(f"expected a whole number {allowed} and at most {most:,}.")
        if not least <= value <= most:
            raise ValueError(f"expected a whole number {allowed}, got {_shown(text)}.")
        return value

    return parse


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"expected a number, got {_shown(text)}.")
    return value


def utf8_text(value: str) -> str:
    """Any text that is Unicode: names and prompts that are not UTF-8 are refused.

    A shell passes other bytes on as halves of characters, which no tokenizer and no file has.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected UTF-8 text, got other bytes (at {error.start}).") from None
    return value


def file_name(value: str) -> str:
    """A name that a file can have, with `~` for the folder of a user that there is."""
    if not value or "\0" in value:
        raise ValueError(f"expected the name of a file, got {_shown(value)}.")
    try:
        Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"there is no user {Path(value).parts[0]} here.") from None
    return utf8_text(value)


def _shown(value: str) -> str:
    """A value for a message: quoted, and not longer than a line."""
    return repr(value if len(value) <= _LONGEST else f"{value[:_LONGEST]}...")


_LONGEST = 60


def one_of(*choices: str) -> Callable[[str], str]:
    """Parser of one of some words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {_shown(text)}.")
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
            raise ValueError(f"expected at least one, such as A or A,B, got {_shown(text)}.")
        return found

    return parse_all


def budget(text: str) -> int | float | Bytes:
    """Bytes where it ends in B, a share where it has a point or a per cent sign, else tokens."""
    try:
        if text[-1:] in ("B", "b"):
            return Bytes(text)
        share = text.endswith("%") or "." in text
        value = float(text.removesuffix("%")) if share else int(text)
        value = value / 100 if text.endswith("%") else value
        if 0 < value <= (1 if share else MOST):
            return value
    except ValueError:
        pass
    raise ValueError(
        f"expected tokens (512), a share of at most all (0.25 or 25%) or bytes (512MiB), got "
        f"{_shown(text)}."
    )
