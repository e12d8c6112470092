"""Lines over a shared axis, each named at its end instead of in a legend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from saccade.report.labels import spread
from saccade.report.svg import (
    FONT,
    NUM_INKS,
    SHAPES,
    Axis,
    Scale,
    document,
    frame,
    line,
    mark,
    polyline,
    shortened,
    text,
    width_of,
)

WIDTH, HEIGHT = 400.0, 250.0
TOP, BOTTOM, LEFT = 42.0, 42.0, 56.0  # room for the y title, the x axis and the y ticks
LONGEST = 22  # letters of a name


@dataclass(frozen=True, slots=True)
class Series:
    """A named line; `ink` keeps its colour and mark the same over several pictures."""

    name: str
    points: list[tuple[float, float]]
    ink: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What a picture of lines shows.

    Attributes:
        label: what a screen reader says; x, y: titles of the axes; show_x, show_y: their numbers.
        log, log_x: whether y and x are logarithmic.
        ticks_x: where x has its ticks; none: at powers of two.
        binary_y: whether y counts bytes, so that its ticks are powers of two.
        boundary: a value of x beyond which the paper is shaded, and what it means.
    """

    label: str
    x: str
    y: str
    show_x: Callable[[float], str]
    show_y: Callable[[float], str]
    log: bool = True
    log_x: bool = True
    ticks_x: Sequence[float] = ()
    binary_y: bool = False
    boundary: tuple[float, str] | None = None
    series: Sequence[Series] = field(default_factory=list)


def line_chart(chart: Chart) -> str:
    """The picture as SVG text, "" where no line has a point.

    Points that are not finite, or not above zero on a logarithmic axis, are left out.
    """
    shown = [Series(s.name, _drawable(s.points, chart), s.ink) for s in chart.series]
    shown = [series for series in shown if series.points]
    if not shown:
        return ""
    names = max(1.12 * width_of(shortened(series.name, LONGEST)) for series in shown)
    right = WIDTH - names - 14
    xs, ys = zip(*(point for series in shown for point in series.points), strict=True)
    x = Scale.over(xs, LEFT, right, log=chart.log_x, margin=0.03 if chart.log_x else 0.0)
    y = Scale.over(ys, HEIGHT - BOTTOM, TOP, log=chart.log)
    axes = (
        Axis(scale=x, title=chart.x, show=chart.show_x, binary=True, at=chart.ticks_x),
        Axis(scale=y, title=chart.y, show=chart.show_y, binary=chart.binary_y),
    )
    parts = [*_boundary(chart, x), *frame(*axes, 10)]
    for series in shown:
        parts += _line(series, x, y)
    return document(WIDTH, HEIGHT, chart.label, [*parts, *_names(shown, y, right)])


def _drawable(points: list[tuple[float, float]], chart: Chart) -> list[tuple[float, float]]:
    def fits(value: float, log: bool) -> bool:
        return math.isfinite(value) and (value > 0 or not log)

    return sorted(p for p in points if fits(p[0], chart.log_x) and fits(p[1], chart.log))


def _boundary(chart: Chart, x: Scale) -> list[str]:
    if chart.boundary is None or not x.low < chart.boundary[0] < x.high:
        return []
    at, said = x(chart.boundary[0]), chart.boundary[1]
    height = HEIGHT - BOTTOM - TOP
    shade = f'<rect class="shade" opacity="0.35" x="{at:.1f}" y="{TOP:g}"'
    shade += f' width="{x.end - at:.1f}" height="{height:g}"/>'
    half = width_of(said) / 2
    label = text(min(max(at, half + 4), x.end - half), TOP - 9, said, "soft", anchor="middle")
    return [shade, line(at, TOP, at, HEIGHT - BOTTOM, "ink", dashes="4 3"), label]


def _line(series: Series, x: Scale, y: Scale) -> list[str]:
    ink, shape = series.ink % NUM_INKS, list(SHAPES)[series.ink % len(SHAPES)]
    points = [(x(a), y(b)) for a, b in series.points]
    marks = [mark(shape, *point, f"i{ink}", series.name) for point in points]
    return [polyline(points, f"series l{ink}"), *marks]


def _names(shown: list[Series], y: Scale, right: float) -> list[str]:
    """Each name at the height where its line ends, pushed apart where they would collide."""
    order = sorted(shown, key=lambda series: y(series.points[-1][1]))
    ends = [y(series.points[-1][1]) for series in order]
    heights = spread(ends, 1.2 * FONT, TOP - 8, HEIGHT - 8)
    return [
        text(right + 9, at, shortened(s.name, LONGEST), f"strong i{s.ink % NUM_INKS}")
        for s, at in zip(order, heights, strict=True)
    ]
