"""Stored records as plain data, and how their numbers are written in sentences."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks/results"


@cache
def record(name: str) -> Any:
    """A stored record as plain data."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def span(values: Iterable[float]) -> str:
    """`75 to 86`: whole numbers."""
    whole = [round(value) for value in values]
    return f"{min(whole)} to {max(whole)}" if min(whole) != max(whole) else str(whole[0])


def times(values: list[float]) -> str:
    """`3.3 to 3.4 times`, or one number where both are the same."""
    least, most = min(values), max(values)
    both = f"{least:.1f} to {most:.1f}" if f"{least:.1f}" != f"{most:.1f}" else f"{most:.1f}"
    return f"{both} times"
