"""What the numbers of patterns have to be."""

from __future__ import annotations

from saccade.core.check import LARGEST_POSITION, integer


def check_sizes(pattern: object, **least: int) -> None:
    """Raise TypeError or ValueError unless each named field is a whole number of at least that."""
    name = type(pattern).__name__
    for field, smallest in least.items():
        integer(f"{name}.{field}", getattr(pattern, field), smallest, LARGEST_POSITION)
