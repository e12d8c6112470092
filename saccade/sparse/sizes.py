"""What the numbers of patterns have to be."""

from __future__ import annotations

from saccade.core.check import LARGEST_POSITION, integer


def check_sizes(pattern: object, **least: int) -> None:
    """Raise TypeError or ValueError unless each named field is a whole number of at least that."""
    name = type(pattern).__name__
    for field, smallest in least.items():
        integer(f"{name}.{field}", getattr(pattern, field), smallest, LARGEST_POSITION)


def check_share(name: str, x: object) -> None:
    """Raise ValueError unless `x` is a share of the attention, in (0, 1]."""
    if isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x <= 1:
        raise ValueError(f"{name} is a share of the attention, in (0, 1], got {x!r}.")
