"""Where the names of points and lines stand, so that none covers another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a picture."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether they overlap."""
        return not (
            self.right <= other.left
            or other.right <= self.left
            or self.bottom <= other.top
            or other.bottom <= self.top
        )

    def lies_in(self, other: Box) -> bool:
        """Whether no part of it is outside."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


def around(x: float, y: float, width: float, height: float, gap: float) -> list[Box]:
    """Places for a label beside a point, the best first: right, left, above, below, corners."""
    far, tall, half = gap + width, gap + height, height / 2
    corners = [
        Box(x + gap, y - half, x + far, y + half),
        Box(x - far, y - half, x - gap, y + half),
        Box(x - width / 2, y - tall, x + width / 2, y - gap),
        Box(x - width / 2, y + gap, x + width / 2, y + tall),
    ]
    for up, down in ((-tall, -gap), (gap, tall)):
        corners += [Box(x + 2, y + up, x + 2 + width, y + down)]
        corners += [Box(x - 2 - width, y + up, x - 2, y + down)]
    return corners


def free(places: Iterable[Box], taken: Sequence[Box], inside: Box) -> Box | None:
    """The first place that lies inside and meets nothing that is taken."""
    fits = (p for p in places if p.lies_in(inside) and not any(p.meets(t) for t in taken))
    return next(fits, None)


def spread(heights: list[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Ascending heights moved as little as needed to be `gap` apart and inside low .. high."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else max(height, low))
    ceiling = high
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed
