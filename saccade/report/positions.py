"""Perplexity by position as a small table: which positions it shows, which curves are good."""

from __future__ import annotations

import math
from dataclasses import dataclass

from saccade.report.comparison import Curve, Report
from saccade.report.line_chart import Chart, Series, line_chart
from saccade.report.numbers import MISSING, as_position, significant
from saccade.report.table import Cell, Heading, Line, Table

BROKEN = 1.5  # times the best curve at a position: the model has broken down there


@dataclass(frozen=True, slots=True)
class PositionTable:
    """Chosen positions and, for each curve, its perplexity there (None: not measured).

    Attributes:
        starts: first token of each block; block: tokens in a block.
        past_training: for each start, whether it lies beyond the trained length.
        lines: (curve name, values).
    """

    starts: list[int]
    block: int
    past_training: list[bool]
    lines: list[tuple[str, list[float | None]]]

    def headings(self) -> list[str]:
        """The positions as text, those past the trained length marked with an asterisk."""
        marked = zip(self.starts, self.past_training, strict=True)
        return [as_position(start) + ("*" if past else "") for start, past in marked]

    def table(self) -> Table:
        """The values, those past the trained length judged."""
        lines = [
            Line(name, [Cell(as_perplexity(v), "", self.verdict(i, v)) for i, v in enumerate(row)])
            for name, row in self.lines
        ]
        return Table([Heading(text) for text in self.headings()], lines, "from token", True)

    def verdict(self, column: int, value: float | None) -> bool | None:
        """True for the best past the trained length, False where it is broken, else None."""
        known = [x for _, values in self.lines if (x := values[column]) is not None]
        if value is None or len(known) < 2 or not self.past_training[column]:
            return None
        if value <= min(known):
            return True
        return False if value > BROKEN * min(known) else None


def trained_length(report: Report) -> int | None:
    """Tokens the model was trained for, where the record says it."""
    length = report.model.get("trained_length")
    return length if isinstance(length, int) and length > 0 else None


def position_table(report: Report, *, most: int = 9) -> PositionTable | None:
    """The table of at most `most` positions, or None where no curve was measured."""
    curves = [curve for curve in report.curves if curve.positions]
    if not curves:
        return None
    trained = trained_length(report)
    starts = _choose(sorted({p for curve in curves for p in curve.positions}), trained, most)
    lines = [(curve.name, [_at(curve, start) for start in starts]) for curve in curves]
    past = [trained is not None and start >= trained for start in starts]
    return PositionTable(starts, curves[0].block, past, lines)


def curve_points(curve: Curve) -> list[tuple[float, float]]:
    """(middle of a block, its perplexity), those that are not finite left out."""
    pairs: list[tuple[int, float | None]] = list(
        zip(curve.positions, curve.perplexity, strict=False)
    )
    return [
        (start + curve.block / 2, value)
        for start, value in pairs
        if value is not None and math.isfinite(value) and value > 0
    ]


def positions_chart(report: Report) -> str:
    """The curves as SVG text, "" where none was measured."""
    trained = trained_length(report)
    chart = Chart(
        label="Perplexity by position in the text, one line for each way of scaling positions; "
        "the table below has the numbers",
        x="position in the text, tokens",
        y="Perplexity, less is better",
        show_x=lambda value: as_position(round(value)),
        show_y=significant,
        log_x=False,
        boundary=None if trained is None else (trained, "trained length"),
        series=[Series(c.name, curve_points(c), ink) for ink, c in enumerate(report.curves)],
    )
    return line_chart(chart)


def as_perplexity(value: float | None) -> str:
    """A perplexity without its error, as short as a table of many needs."""
    return MISSING if value is None else significant(value)


def _at(curve: Curve, start: int) -> float | None:
    values: dict[int, float | None] = dict(zip(curve.positions, curve.perplexity, strict=False))
    value = values.get(start)
    return value if value is not None and math.isfinite(value) else None


def _choose(starts: list[int], trained: int | None, most: int) -> list[int]:
    """At most `most` starts: the ends, the neighbours of the trained length, the rest evenly.

    What happens past the trained length is what the table is for, so it gets two thirds.
    """
    if len(starts) <= most:
        return starts
    inside = [p for p in starts if trained is None or p < trained]
    outside = [p for p in starts if trained is not None and p >= trained]
    room = min(len(outside), max(most * 2 // 3, most - len(inside)))
    return _evenly(inside, most - room) + _evenly(outside, room)


def _evenly(items: list[int], count: int) -> list[int]:
    """`count` of the items, evenly spread, first and last among them."""
    if count >= len(items) or count < 1:
        return items[: max(count, 0)] if count < 1 else items
    if count == 1:
        return items[-1:]
    step = (len(items) - 1) / (count - 1)
    return [items[round(i * step)] for i in range(count)]
