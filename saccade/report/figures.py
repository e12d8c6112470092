"""One picture of a comparison: what every row costs and gives, and perplexity by position.

The rows are named once, on the left; every measure is a narrow panel beside them, so that names
never collide however many rows there are.  Drawn without pyplot: no global state, no display.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from saccade.report.columns import COLUMNS, Column, groups, label, why
from saccade.report.comparison import Report, Row
from saccade.report.labels import spread
from saccade.report.notes import summary
from saccade.report.numbers import as_position, as_ratio
from saccade.report.positions import curve_points, trained_length
from saccade.report.table import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, FAINT = "#1f2430", "#6b7280", "#e5e7eb"
BETTER, WORSE, SAME = "#0f8a6c", "#c2410c", "#9aa2af"
LINES = ("#c2410c", "#b8860b", "#7c4dbd", "#0f8a6c", "#2563a8", "#c2417f", "#5b6472")
LONGEST = 40  # letters of a name; what is longer is cut
CLIP = 2.0  # times the reference's perplexity: points beyond sit at the edge as arrows
ROOM = 100  # letters of a reason, which runs over all panels
PANELS = ("peak_bytes", "cache_bytes", "prefill_tps", "decode_tps", "perplexity")

ROW, HEADER, CURVES = 0.235, 1.12, 3.05  # inches
WIDTH, DPI = 11.0, 160

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def to_png(report: Report) -> bytes:
    """The picture as PNG bytes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lines = _lines(report)
    curves = [curve for curve in report.curves if curve.positions]
    top = HEADER + ROW * len(lines)
    height = top + (CURVES if curves else 0) + 0.15
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        _title(figure, report, height)
        if lines:
            _panels(figure, report, lines, height)
        if curves:
            bottom, tall = 0.5 / height, (CURVES - 1.15) / height
            axes = figure.add_axes((0.62 / WIDTH, bottom, (WIDTH - 2.3) / WIDTH, tall))
            _draw_curves(axes, report)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": "saccade"},
                       pil_kwargs={"optimize": True})  # fmt: skip
    return out.getvalue()


def _title(figure: Figure, report: Report, height: float) -> None:
    left = 0.16 / WIDTH
    figure.text(left, 1 - 0.2 / height, "What each technique costs and gives", size=12,
                weight="bold", va="center")  # fmt: skip
    for inches, text in ((0.42, summary(report)), (0.6, _key(report))):
        figure.text(left, 1 - inches / height, text, size=8, color=SOFT, va="center")


def _key(report: Report) -> str:
    """What the colours, the ratios and the dotted line mean."""
    name = (_compared(report) or Row(name="nothing", group="")).name
    if report.reference_row() is None:
        return f"ratios and dotted line: {name}   no colours: no reference was measured"
    return (
        f"ratios and dotted line: {name}   green: better, orange: worse, beyond 5 % and two "
        "standard errors   grey: neither"
    )


def _compared(report: Report) -> Row | None:
    """The row that ratios refer to: the reference, or the baseline of a run without one."""
    return report.reference_row() or report.baseline_row()


def _lines(report: Report) -> list[Row | str]:
    """Headings and rows from top to bottom."""
    return [line for name, rows in groups(report) for line in (name, *rows)]


def _panels(figure: Figure, report: Report, lines: list[Row | str], height: float) -> None:
    """The row names and one panel for each measure."""
    from matplotlib.lines import Line2D

    tall = ROW * len(lines)
    bottom = (height - HEADER - tall) / height
    for at, line in enumerate(lines):
        y = 1 - (HEADER + ROW * (at + 0.5)) / height
        if isinstance(line, str):
            figure.text(0.16 / WIDTH, y, line, weight="bold", va="center")
            rule = 1 - (HEADER + ROW * at) / height
            figure.add_artist(Line2D((0.16 / WIDTH, 1 - 0.15 / WIDTH), (rule, rule), color=FAINT,
                                     lw=0.8))  # fmt: skip
        else:
            bold = "bold" if line.name in (report.baseline, report.reference) else "normal"
            text = _short(label(line, report), LONGEST)
            figure.text(0.3 / WIDTH, y, text, va="center", weight=bold)
    names = _names_width(report)
    wide = (WIDTH - names - 0.15) / len(PANELS)
    columns = {column.key: column for column in COLUMNS}
    for index, key in enumerate(PANELS):
        left = (names + index * wide + 0.1) / WIDTH
        axes = figure.add_axes((left, bottom, (wide - 0.14) / WIDTH, tall / height))
        axes.patch.set_visible(False)  # a reason in the first panel runs over the others
        axes.set_zorder(len(PANELS) - index)
        _panel(axes, report, lines, columns[key])


def _names_width(report: Report) -> float:
    """Inches for the longest name, bold counted as wider."""
    longest = max((len(label(row, report)) for row in report.rows), default=0)
    return 0.44 + 0.0625 * max(24, min(longest, LONGEST))


def _panel(axes: Axes, report: Report, lines: list[Row | str], column: Column) -> None:
    """Bars for amounts, points for perplexity."""
    compared = _compared(report)
    rows = [(at, line) for at, line in enumerate(lines) if isinstance(line, Row)]
    known = [value for _, row in rows if (value := column.value(row)) is not None]
    reference = column.value(compared) if compared is not None else None
    scale = _log_scale if column.key == "perplexity" else _linear_scale
    share = scale(known or [1.0], reference)
    for at, row in rows:
        value, cell = column.value(row), column.cell(row, report)
        if value is None:
            _absent(axes, at, row, cell, first=column.key == PANELS[0])
            continue
        color = INK if row is compared else {True: BETTER, False: WORSE, None: SAME}[cell.better]
        x = share(value)
        if scale is _linear_scale:
            axes.barh(at, x, height=0.62, color=color, alpha=0.88, lw=0)
        else:
            _point(axes, at, x, color, clipped=share(value * 1.001) == x)
            x += 0.012
        _write(axes, x + 0.025, at, _mark(cell, column, column.ratio(row, compared)), color=INK)
    if reference is not None:
        axes.axvline(share(reference), color="#aab1bd", lw=0.8, ls=(0, (1.5, 2)), zorder=0)
    _frame_panel(axes, column, len(lines))


def _absent(axes: Axes, at: int, row: Row, cell: Cell, *, first: bool) -> None:
    """A dash, or once for a row without any number: its reason, over all panels."""
    empty = row.status != "ok" and all(column.value(row) is None for column in COLUMNS)
    if first and empty:
        _write(axes, 0.01, at, _short(why(row, ROOM), ROOM + 1), color=SOFT, italic=True)
    elif not empty:
        said = cell.text if row.status == "ok" else row.status
        _write(axes, 0.01, at, said, color=SOFT, italic=row.status != "ok")


def _linear_scale(values: list[float], _: float | None) -> Callable[[float], float]:
    """Value to 0 .. 1; room is left for the text behind the longest bar."""
    reach = 2.15 * max(*values, 1e-9)
    return lambda value: value / reach


def _log_scale(values: list[float], reference: float | None) -> Callable[[float], float]:
    """Value to 0 .. 1 on a log axis that ends at CLIP times the reference; text has its room."""
    low = min(values) / 1.04
    high = max(min(max(values), CLIP * reference) if reference else max(values), low * 1.1)
    span = math.log(high / low) / 0.5
    return lambda value: math.log(min(max(value, low), high) / low) / span


def _point(axes: Axes, at: int, x: float, color: str, *, clipped: bool) -> None:
    axes.plot([0, x], [at, at], color=FAINT, lw=1.2, zorder=1, solid_capstyle="butt")
    axes.plot([x], [at], ">" if clipped else "o", color=color, ms=5, zorder=2, mew=0)


def _write(axes: Axes, x: float, at: int, text: str, *, color: str, italic: bool = False) -> None:
    """Text in a panel, haloed so that no line runs through it."""
    from matplotlib.patheffects import withStroke

    axes.text(x, at, text, color=color, va="center", size=7.8,
              style="italic" if italic else "normal",
              path_effects=[withStroke(linewidth=2.4, foreground="white")])  # fmt: skip


def _mark(cell: Cell, column: Column, ratio: float | None) -> str:
    text = cell.text.split(" ±")[0] if column.key == "perplexity" else cell.text
    return f"{text}  {as_ratio(ratio)}" if ratio is not None and cell.better is not None else text


def _frame_panel(axes: Axes, column: Column, num_lines: int) -> None:
    axes.set_ylim(num_lines - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    hint = "less is better" if column.lower_is_better else "more is better"
    unit = f"{column.unit}, " if column.unit else ""
    top = axes.get_xaxis_transform()
    axes.annotate(column.title, (0, 1), (0, 14), xycoords=top, textcoords="offset points",
                  weight="bold", size=8.5)  # fmt: skip
    axes.annotate(unit + hint, (0, 1), (0, 4), xycoords=top, textcoords="offset points",
                  color=SOFT, size=7.2)  # fmt: skip


def _draw_curves(axes: Axes, report: Report) -> None:
    """Perplexity by position on a log axis, named at the right end of each line."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    curves = [curve for curve in report.curves if curve.positions]
    trained = trained_length(report)
    ends: list[tuple[float, float, str, str]] = []
    for index, curve in enumerate(curves):
        color = LINES[index % len(LINES)]
        points = curve_points(curve)
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=color, lw=1.8, marker="o", ms=2.6)
        ends.append((*points[-1], curve.name, color))
    last = max(curve.positions[-1] + curve.block for curve in curves)
    axes.set_yscale("log")
    axes.set_xlim(0, last)
    if trained is not None and trained < last:
        axes.axvspan(trained, last, color="#f6f1ea", lw=0, zorder=0)
        axes.axvline(trained, color=INK, lw=0.9, ls=(0, (4, 3)))
        axes.annotate(f" trained to {trained:,}", (trained, 1), (3, -10), size=8, color=INK,
                      xycoords=axes.get_xaxis_transform(), textcoords="offset points")  # fmt: skip
    axes.set_title("Perplexity by position", loc="left", size=10, weight="bold", pad=16)
    axes.annotate("log scale, less is better; x is the position in the text, in tokens", (0, 1),
                  (0, 5), xycoords="axes fraction", textcoords="offset points", size=8,
                  color=SOFT)  # fmt: skip
    ticks = [_tick_step(last) * i for i in range(int(last // _tick_step(last)) + 1)]
    axes.set_xticks(ticks, [as_position(int(tick)) for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=FAINT, lw=0.7)
    axes.tick_params(which="both", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _name_ends(axes, ends)


def _tick_step(last: float) -> int:
    """A power of two that gives 4 to 9 ticks."""
    return 2 ** max(0, math.ceil(math.log2(last / 9)))


def _name_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each name right of the axes at the height of its line, pushed apart where needed."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    figure = axes.get_figure(root=True)
    assert figure is not None
    inches = axes.get_position().height * figure.get_size_inches()[1]
    gap = 0.165 / inches
    order = sorted(ends, key=lambda end: end[1])
    heights = spread([(math.log(end[1]) - low) / (high - low) for end in order], gap)
    for (_, value, name, color), y in zip(order, heights, strict=True):
        axes.text(1.012, y, f"{_short(name, 22)}  {value:,.3g}" if value < 1000 else
                  f"{_short(name, 22)}  {value:,.0f}", color=color, va="center", size=8.5,
                  weight="bold", transform=axes.transAxes)  # fmt: skip


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
