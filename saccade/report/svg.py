"""Pictures as SVG text: scales, marks, axes.  Nothing is fetched and no package is needed.

Colours are CSS classes with values for light and dark pages, so that a picture inside a page and
one opened by itself both follow the reader's colour scheme.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

FONT = 11.0  # units of the picture, which are pixels where it is shown at its own size
GLYPH = 0.56  # mean width of a letter in heights of the font

# Inks for light and dark paper; each has a contrast of at least 4.5 with it, so names can wear it.
_INKS = ("1d4ed8", "b45309", "0f766e", "9d174d", "6d28d9", "4d7c0f", "475569", "b91c1c")
_DARK = ("93b4ff", "f5b265", "5fd3c3", "f59ac0", "c4a8ff", "a9d86e", "a8b3c4", "ff9a8f")
NUM_INKS = len(_INKS)


def _style() -> str:
    def rules(paper: str, ink: str, soft: str, line: str, inks: Sequence[str]) -> str:
        own = "".join(
            f".saccade-chart .i{n}{{fill:#{c}}}.saccade-chart .l{n}{{stroke:#{c}}}"
            for n, c in enumerate(inks)
        )
        return (
            f".saccade-chart .paper{{fill:{paper}}}.saccade-chart text{{fill:{ink}}}"
            f".saccade-chart .soft{{fill:{soft}}}.saccade-chart .rule{{stroke:{line}}}"
            f".saccade-chart .ink{{stroke:{soft}}}.saccade-chart .shade{{fill:{line}}}{own}"
        )

    light = rules("#ffffff", "#1f2430", "#596170", "#dfe3e8", _INKS)
    dark = rules("#14171d", "#e6e8ec", "#a3abb8", "#2e3440", _DARK)
    common = (
        f".saccade-chart text{{font:{FONT:g}px system-ui,sans-serif}}"
        ".saccade-chart .strong{font-weight:650}.saccade-chart .series{fill:none;stroke-width:1.7}"
    )
    return f"<style>{common}{light}@media (prefers-color-scheme:dark){{{dark}}}</style>"


def document(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """A whole picture; `label` is what a screen reader says instead of it."""
    said = escape(label)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="saccade-chart" role="img" '
        f'viewBox="0 0 {width:g} {height:g}" aria-label="{said}">{_style()}'
        f'<rect class="paper" width="100%" height="100%"/>{"".join(parts)}</svg>'
    )


def text(x: float, y: float, said: str, classes: str = "", *, anchor: str = "start") -> str:
    """Text whose middle is at height `y`."""
    return (
        f'<text x="{x:.1f}" y="{y + 0.35 * FONT:.1f}" text-anchor="{anchor}" class="{classes}">'
        f"{escape(said)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, classes: str, *, dashes: str = "") -> str:
    """A straight line."""
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{classes}"{dashed}/>'
    )


def polyline(points: Sequence[tuple[float, float]], classes: str) -> str:
    """A line through points."""
    through = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{through}" class="{classes}"/>'


# Outlines around (0, 0) for marks that differ in shape as well as in colour.
SHAPES = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "diamond": "M0,-5L5,0L0,5L-5,0z",
    "triangle": "M0,-5L5,4L-5,4z",
    "cross": "M-4,-2.5L-2.5,-4L0,-1.5L2.5,-4L4,-2.5L1.5,0L4,2.5L2.5,4L0,1.5L-2.5,4L-4,2.5L-1.5,0z",
    "square": "M-3.5,-3.5h7v7h-7z",
}


def mark(shape: str, x: float, y: float, classes: str, said: str = "") -> str:
    """A mark of one of SHAPES; `said` is shown where a mouse rests on it."""
    title = f"<title>{escape(said)}</title>" if said else ""
    return (
        f'<path d="{SHAPES[shape]}" transform="translate({x:.1f} {y:.1f})" class="{classes}">'
        f"{title}</path>"
    )


def width_of(said: str) -> float:
    """About how wide a text is."""
    return GLYPH * FONT * len(said)


def shortened(said: str, most: int) -> str:
    """At most that many letters."""
    return said if len(said) <= most else said[: most - 1] + "…"


@dataclass(frozen=True, slots=True)
class Scale:
    """Values low..high on pixels start..end, evenly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float], start: float, end: float, *, log: bool, margin: float = 0.06
    ) -> Scale:
        """A scale with all values inside and a margin, as a share of the length, at both ends."""
        found = list(values)
        low, high = min(found), max(found)
        if not log:
            low, high = min(0.0, low), high or 1.0
            return cls(low, high + margin * (high - low), start, end)
        spread = max(math.log(high / low), 0.4)
        middle = math.sqrt(low * high)
        half = math.exp(spread * (0.5 + margin))
        return cls(middle / half, middle * half, start, end, log=True)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 5, *, binary: bool = False) -> list[float]:
        """Round values inside the scale, at most `most`: 1, 2, 5 or powers of two."""
        for step in _steps(self, binary):
            found = [value for value in step if self.low <= value <= self.high]
            if 0 < len(found) <= most:
                return found
        return []


def _steps(scale: Scale, binary: bool) -> Iterable[list[float]]:
    """Finer sets of ticks first, coarser ones later."""
    if not scale.log and binary:
        unit = 2.0 ** (math.floor(math.log2(scale.high - scale.low)) - 3)
        for size in (1, 2, 4, 8, 16):
            yield [unit * size * i for i in range(int(scale.high / (unit * size)) + 1)]
        return
    if not scale.log:
        unit = 10.0 ** (math.floor(math.log10(scale.high - scale.low)) - 1)
        for size in (1, 2, 5, 10, 20, 50, 100):
            count = int((scale.high - scale.low) / (unit * size)) + 2
            yield [unit * size * i for i in range(count)]
        return
    if binary:
        first, last = math.floor(math.log2(scale.low)), math.ceil(math.log2(scale.high))
        for every in (1, 2, 3, 4, 6, 8, 12):
            yield [2.0**power for power in range(last, first - 1, -every)][::-1]
        return
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    for heads in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        yield [head * 10.0**power for power in range(first, last + 1) for head in heads]
    for every in (2, 3, 4, 6):
        yield [10.0**power for power in range(first, last + 1, every)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis: its scale, title, how its ticks are written, and where they are.

    Attributes:
        binary: ticks at powers of two; at: ticks at these values instead.
    """

    scale: Scale
    title: str
    show: Callable[[float], str]
    binary: bool = False
    at: Sequence[float] = ()

    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, text): at the given values, else at round ones."""
        values = self.at or self.scale.ticks(binary=self.binary)
        return [(self.scale(value), _TRAILING.sub("", self.show(value))) for value in values]


_TRAILING = re.compile(r"\.0+(?!\d)")  # 64.0 MiB is 64 MiB on an axis


def frame(x: Axis, y: Axis, title_at: float) -> list[str]:
    """Grid, ticks and titles of a plot; the y title lies above it, so that all text is level."""
    left, right = x.scale.start, x.scale.end
    bottom = y.scale.start
    parts: list[str] = []
    for at, said in y.ticks():
        parts.append(line(left, at, right, at, "rule"))
        parts.append(text(left - 6, at, said, "soft", anchor="end"))
    parts.append(line(left, bottom, right, bottom, "ink"))
    for at, said in x.ticks():
        parts.append(line(at, bottom, at, bottom + 4, "ink"))
        parts.append(text(at, bottom + 13, said, "soft", anchor="middle"))
    parts.append(text((left + right) / 2, bottom + 29, x.title, "soft", anchor="middle"))
    parts.append(text(4, title_at, y.title, "soft"))
    return parts
