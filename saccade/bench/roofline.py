"""The roofline of a record: what each case reaches, under what the machine allows.

A kernel that performs `x` operations for each byte it has to move cannot be faster than the FMA
rate, nor than x times the read bandwidth (Williams, Waterman and Patterson 2009).  Decoding is
under the slope, prefill under the flat part.  Drawn without pyplot: no global state, no display.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saccade.bench.record import Benchmark, Row
from saccade.report.numbers import significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, FAINT = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = {
    "fp32": "#2563a8", "bf16": "#0f8a6c", "fp16": "#b8860b", "int8": "#c2410c", "int4": "#7c4dbd",
}  # fmt: skip
MARKS = {"prefill": "o", "decode": "s", "window": "D", "backward": "^"}
WIDTH, HEIGHT, DPI = 9.6, 5.6, 160
ASIDE = 1.1  # fp16 and bf16 move the same bytes
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


@dataclass(frozen=True, slots=True)
class Point:
    """One timed row: operations a byte, and GF/s."""

    row: Row
    intensity: float
    rate: float


def points(record: Benchmark) -> list[Point]:
    """The rows that were timed."""
    return [
        Point(row, row.flops / row.nbytes, row.flop_rate / 1e9)
        for row in record.rows
        if row.flop_rate  # none for reading alone
    ]


def to_png(record: Benchmark) -> bytes:
    """The picture as PNG bytes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the record has no timed row.
    """
    import matplotlib
    from matplotlib.figure import Figure

    found = points(record)
    if not found:
        raise ValueError("the record has no timed row, so there is nothing to draw.")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
        axes = figure.add_axes((0.08, 0.11, 0.7, 0.74))
        limits = _limits(record, found)
        _frame(axes, *limits)
        _roof(axes, record, limits[0])
        _draw(axes, found)
        _legend(axes, found)
        left = 0.08
        figure.text(left, 0.945, "Attention on the CPU, under its roofline", size=13, weight="bold")
        figure.text(left, 0.9, _subtitle(record), size=8.5, color=SOFT)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": "saccade"},
                       pil_kwargs={"optimize": True})  # fmt: skip
    return out.getvalue()


def _subtitle(record: Benchmark) -> str:
    ceilings = record.ceilings
    threads = f"{ceilings.threads} thread{'s' if ceilings.threads != 1 else ''}"
    target = f", {ceilings.target}" if ceilings.target else ""
    stand_in = "" if ceilings.source == "extension" else "; ceilings by torch, a stand-in"
    return f"{record.environment.get('cpu')}, {threads}{target}{stand_in}"


def _limits(
    record: Benchmark, found: list[Point]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Axis limits that hold the knee of the roof and every point."""
    knee = record.ceilings.fma_peak / record.ceilings.read_bandwidth
    low = min(knee / 8, *(p.intensity for p in found)) / 2
    high = max(knee * 8, *(p.intensity for p in found)) * 2
    slowest = min(p.rate for p in found)
    fastest = max(record.ceilings.fma_peak / 1e9, *(p.rate for p in found))
    return (low, high), (slowest / 2.2, fastest * 1.8)


def _frame(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set(xscale="log", yscale="log", xlim=x, ylim=y)
    plain = FuncFormatter(lambda value, _: significant(value, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("operations for each byte that has to move (FLOP/byte)")
    axes.set_ylabel("GF/s")


def _roof(axes: Axes, record: Benchmark, x: tuple[float, float]) -> None:
    """The two ceilings, each with its name along it."""
    peak, bandwidth = record.ceilings.fma_peak / 1e9, record.ceilings.read_bandwidth / 1e9
    knee = peak / bandwidth
    bottom = axes.get_ylim()[0]
    start = max(x[0], bottom / bandwidth)
    axes.plot([start, knee, x[1]], [start * bandwidth, peak, peak], color=INK, lw=1.8)
    axes.fill_between([start, knee, x[1]], [start * bandwidth, peak, peak], bottom,
                      color=FAINT, alpha=0.35, lw=0)  # fmt: skip
    axes.text(x[1], peak * 1.07, f"FMA peak {significant(peak)} GF/s ", ha="right", va="bottom",
              size=8.5, color=INK)  # fmt: skip
    middle = math.sqrt(start * knee)
    axes.text(middle, middle * bandwidth * 1.09, f"reads {significant(bandwidth)} GB/s",
              rotation=_slope(axes), rotation_mode="anchor", ha="center", va="bottom", size=8.5,
              color=INK)  # fmt: skip


def _slope(axes: Axes) -> float:
    """Degrees at which a line of slope 1 in both logarithms stands on the page."""
    box = axes.get_position()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    across = box.width * WIDTH / math.log(right / left)
    up = box.height * HEIGHT / math.log(top / bottom)
    return math.degrees(math.atan2(up, across))


def _draw(axes: Axes, found: list[Point]) -> None:
    """Peers hollow and below, ours filled and on top; fp16 a little right of bf16, or it hid it."""
    for point in sorted(found, key=lambda p: p.row.ours):
        color, mark = COLORS[point.row.storage], MARKS[point.row.work]
        x = point.intensity * (ASIDE if point.row.storage == "fp16" else 1.0)
        if point.row.ours:
            axes.plot(x, point.rate, mark, ms=7.5, mfc=color, mec="white", mew=0.9,
                      zorder=4)  # fmt: skip
        else:
            cross = point.row.backend == "flex"
            axes.plot(x, point.rate, "x" if cross else mark, ms=6, mfc="white",
                      mec=color, mew=1.2, alpha=0.75, zorder=3)  # fmt: skip


def _legend(axes: Axes, found: list[Point]) -> None:
    """Right of the axes: shapes are kinds of work, colours storage types, hollow the peers."""
    from matplotlib.lines import Line2D

    def mark(shape: str, face: str, edge: str) -> Line2D:
        return Line2D([], [], ls="", marker=shape, ms=7, mfc=face, mec=edge, mew=1.2)

    entries = [(Line2D([], [], ls=""), "work")]
    works = {p.row.work for p in found}
    entries += [(mark(m, SOFT, SOFT), name) for name, m in MARKS.items() if name in works]
    entries += [(Line2D([], [], ls=""), ""), (Line2D([], [], ls=""), "storage")]
    types = {p.row.storage for p in found}
    entries += [(mark("o", c, c), name) for name, c in COLORS.items() if name in types]
    entries += [(Line2D([], [], ls=""), ""), (Line2D([], [], ls=""), "who")]
    entries += [(mark("o", SOFT, SOFT), "saccade")]
    peers = {p.row.backend for p in found if not p.row.ours}
    if "torch" in peers:
        entries += [(mark("o", "white", SOFT), "torch SDPA")]
    if "flex" in peers:
        entries += [(mark("x", SOFT, SOFT), "FlexAttention")]
    legend = axes.legend(
        [handle for handle, _ in entries], [name for _, name in entries], frameon=False,
        loc="upper left", bbox_to_anchor=(1.02, 1.02), handletextpad=0.4, labelspacing=0.45,
    )  # fmt: skip
    for text in legend.get_texts():
        if text.get_text() in ("work", "storage", "who"):
            text.set_fontweight("bold")
