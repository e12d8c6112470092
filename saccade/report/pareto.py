"""Memory against speed: which configurations no other beats, and what they do to the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from saccade.report.comparison import Report
from saccade.report.labels import Box, around, free
from saccade.report.numbers import as_bytes, significant
from saccade.report.svg import FONT, Axis, Scale, document, frame, mark, shortened, text, width_of

WIDTH, PLOT = 400.0, 352.0
TOP, BOTTOM, LEFT, RIGHT = 54.0, 306.0, 46.0, 388.0
LINE = 1.35 * FONT
LONGEST = 26  # letters of a name


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration.

    Attributes:
        name: what a person calls it.
        bytes: its memory; tokens_per_second: its speed.
        kl: nats from the exact model's predictions, None where it was not measured.
    """

    name: str
    bytes: int
    tokens_per_second: float
    kl: float | None


@dataclass(frozen=True, slots=True)
class Quality:
    """A class of quality: KL below `below`, its words, its mark and the ink of it."""

    below: float
    said: str
    shape: str
    ink: int


QUALITIES = (
    Quality(0.01, "KL < 0.01", "circle", 2),
    Quality(0.1, "< 0.1", "diamond", 0),
    Quality(1.0, "< 1", "triangle", 1),
    Quality(float("inf"), "broken", "cross", 7),
)
UNKNOWN = Quality(float("inf"), "not measured", "square", 6)


def quality(point: Point) -> Quality:
    """The class of a point; its mark and ink say it in the picture."""
    if point.kl is None:
        return UNKNOWN
    return next(each for each in QUALITIES if point.kl < each.below)


def best(points: Sequence[Point]) -> list[Point]:
    """The points that none beats in memory and speed at the same or a better class of quality.

    A broken model is never among them.
    """
    rank = {id(each): at for at, each in enumerate((*QUALITIES, UNKNOWN))}

    def beats(one: Point, other: Point) -> bool:
        a = (one.bytes, -one.tokens_per_second, rank[id(quality(one))])
        b = (other.bytes, -other.tokens_per_second, rank[id(quality(other))])
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    broken = QUALITIES[-1]
    useful = [point for point in points if quality(point) is not broken]
    return [point for point in useful if not any(beats(other, point) for other in useful)]


def pareto_svg(points: Sequence[Point]) -> str:
    """Points over memory (less is better) and tokens/s (more is better), "" where there are none.

    The best points stand in bold; names that have no room beside their point are listed below.
    """
    drawn = [point for point in points if point.bytes > 0 and point.tokens_per_second > 0]
    if not drawn:
        return ""
    x = Scale.over([p.bytes for p in drawn], LEFT + 8, RIGHT, log=True)
    y = Scale.over([p.tokens_per_second for p in drawn], BOTTOM, TOP + 6, log=True)
    axes = (
        Axis(scale=x, title="memory, less is better", show=as_bytes, binary=True),
        Axis(scale=y, title="tokens/s, more is better", show=significant),
    )
    places = _Places(drawn, x, y)
    parts = [*_legend(drawn), *frame(*axes, 36), *places.marks(), *places.labels()]
    below = places.list_below()
    height = PLOT + LINE * (len(below) + 0.4)
    return document(WIDTH, height, _said(drawn), [*parts, *below])


def _said(points: Sequence[Point]) -> str:
    listed = "; ".join(
        f"{p.name}: {as_bytes(p.bytes)}, {significant(p.tokens_per_second)} tokens/s"
        for p in points
    )
    return f"Memory against speed. {listed}"


def _legend(points: Sequence[Point]) -> list[str]:
    """The classes of quality that occur, in a row above the plot."""
    used, parts, x = {quality(point) for point in points}, [], 10.0
    for each in (*QUALITIES, UNKNOWN):
        if each in used:
            parts.append(mark(each.shape, x, 14, f"i{each.ink}"))
            parts.append(text(x + 9, 14, each.said, "soft"))
            x += 24 + width_of(each.said)
    return parts


@dataclass(slots=True)
class _Places:
    """Where every name stands: beside its point where there is room, else a number there."""

    points: list[Point]
    x: Scale
    y: Scale
    named: dict[int, Box] = field(default_factory=dict)
    numbered: dict[int, Box | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at = [(self.x(p.bytes), self.y(p.tokens_per_second)) for p in self.points]
        taken = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in at]
        inside = Box(LEFT, TOP - 8, RIGHT + 8, BOTTOM - 1)
        for index in self._order():
            width = width_of(self._name(index)) * 1.12
            found = free(around(*at[index], width, FONT, 8), taken, inside)
            if found is not None:
                self.named[index] = found
                taken.append(found)
        for number, index in enumerate(sorted(set(range(len(at))) - set(self.named)), 1):
            places = [
                place
                for gap in (7, 14, 22)
                for place in around(*at[index], width_of(str(number)) + 2, FONT, gap)
            ]
            self.numbered[index] = found = free(places, taken, inside)
            taken += [found] if found is not None else []

    def _order(self) -> list[int]:
        """The best points choose their places first."""
        front = {id(point) for point in best(self.points)}
        return sorted(range(len(self.points)), key=lambda at: id(self.points[at]) not in front)

    def _name(self, index: int) -> str:
        return shortened(self.points[index].name, LONGEST)

    def _classes(self, index: int) -> str:
        return "strong" if self.points[index] in best(self.points) else "soft"

    def marks(self) -> list[str]:
        """A mark for each point."""
        return [
            mark(
                quality(point).shape, self.x(point.bytes), self.y(point.tokens_per_second),
                f"i{quality(point).ink}", point.name,
            )
            for point in self.points
        ]  # fmt: skip

    def labels(self) -> list[str]:
        """Names and numbers beside the points."""
        numbers = {index: str(at) for at, index in enumerate(self.numbered, 1)}
        boxes = {**self.named, **self.numbered}
        return [
            self._label(index, box, numbers.get(index) or self._name(index))
            for index, box in boxes.items()
            if box is not None
        ]

    def _label(self, index: int, box: Box, said: str) -> str:
        """Text in its box, at the side where the point is."""
        point, height = self.x(self.points[index].bytes), (box.top + box.bottom) / 2
        sides = {"start": box.left, "end": box.right, "middle": (box.left + box.right) / 2}
        anchor = "start" if box.left >= point else "end" if box.right <= point else "middle"
        return text(sides[anchor], height, said, self._classes(index), anchor=anchor)

    def list_below(self) -> list[str]:
        """The names behind the numbers, with what they need and give."""
        lines = []
        for number, index in enumerate(self.numbered, 1):
            point = self.points[index]
            y = PLOT + LINE * (number - 0.2)
            said = f"{as_bytes(point.bytes)}, {significant(point.tokens_per_second)} tokens/s"
            lines.append(
                text(10, y, str(number), "soft")
                + text(28, y, shortened(point.name, 32), self._classes(index))
                + text(WIDTH - 8, y, said, "soft", anchor="end")
            )
        return lines


def points_of(report: Report) -> list[Point]:
    """The rows of a comparison that have memory and speed."""
    return [
        Point(row.name, row.peak_bytes, row.decode_tps, row.kl)
        for row in report.rows
        if row.peak_bytes and row.decode_tps
    ]
