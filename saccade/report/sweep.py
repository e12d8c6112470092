"""The same configurations at several lengths of the context: tables and curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from saccade.report.comparison import Report, SweepPoint
from saccade.report.line_chart import Chart, Series, line_chart
from saccade.report.numbers import (
    MISSING,
    as_bytes,
    as_position,
    as_seconds,
    significant,
    with_error,
)
from saccade.report.positions import trained_length
from saccade.report.table import Cell, Heading, Line, Table
from saccade.report.verdict import finite


@dataclass(frozen=True, slots=True)
class Measure:
    """One quantity over the length: the field of `SweepPoint`, its title, how it is written."""

    key: str
    title: str
    show: Callable[[float], str]


def _nats(value: float) -> str:
    return with_error(value, None, most_decimals=5) if value < 1 else significant(value)


MEASURES = (
    Measure("peak_bytes", "Peak memory", as_bytes),
    Measure("cache_bytes", "Cache", as_bytes),
    Measure("ttft_seconds", "Time to first token", as_seconds),
    Measure("prefill_tps", "Prefill, tokens/s", significant),
    Measure("decode_tps", "Decode, tokens/s", significant),
    Measure("perplexity", "Perplexity", significant),
    Measure("kl", "KL, nats", _nats),
)
LEAST_KL = 1e-6  # what is nearer to the exact model is drawn there: it is rounding
MOST_TICKS = 6
DRAWN = ("peak_bytes", "ttft_seconds", "decode_tps", "kl")


def lengths(report: Report) -> list[int]:
    """The lengths that were tried, the shortest first."""
    return sorted({point.n_context for point in report.sweep})


def configurations(report: Report) -> list[str]:
    """The names of the configurations in the order of the record."""
    return list(dict.fromkeys(point.name for point in report.sweep))


def sweep_tables(report: Report) -> list[tuple[str, Table]]:
    """(title, table) of each measured quantity: a line a configuration, a column a length."""
    headings = [Heading(as_position(length)) for length in lengths(report)]
    return [
        (measure.title, Table(headings, _lines(report, measure), "tokens of context"))
        for measure in MEASURES
        if any(finite(point, measure.key) is not None for point in report.sweep)
    ]


def _lines(report: Report, measure: Measure) -> list[Line]:
    points = {(point.name, point.n_context): point for point in report.sweep}
    return [
        Line(name, [_cell(points.get((name, length)), measure) for length in lengths(report)])
        for name in configurations(report)
    ]


def _cell(point: SweepPoint | None, measure: Measure) -> Cell:
    if point is None:
        return Cell(MISSING)
    value = finite(point, measure.key)
    if value is not None:
        return Cell(measure.show(value))
    return Cell(MISSING if point.status == "ok" else point.status)


def sweep_charts(report: Report) -> list[str]:
    """Memory, time to first token, speed of decoding and KL by length, as SVG text."""
    found = [_chart(report, measure) for measure in MEASURES if measure.key in DRAWN]
    return [picture for picture in found if picture]


def _chart(report: Report, measure: Measure) -> str:
    series = [
        Series(name, _points(report, name, measure.key), ink)
        for ink, name in enumerate(configurations(report))
    ]
    trained = trained_length(report)
    chart = Chart(
        label=f"{measure.title} by length of the context, one line for each configuration; "
        "the table below has the numbers",
        x="tokens of context",
        y=f"{measure.title}, at least {LEAST_KL:f}" if measure.key == "kl" else measure.title,
        show_x=lambda value: as_position(round(value)),
        show_y=(lambda value: significant(value, 1)) if measure.key == "kl" else measure.show,
        ticks_x=_ticks(report),
        binary_y=measure.show is as_bytes,
        boundary=None if trained is None else (trained, "trained length"),
        series=series,
    )
    return line_chart(chart)


def _ticks(report: Report) -> list[int]:
    """The lengths themselves, where they are few."""
    found = [length for length in lengths(report) if length > 0]
    return found if len(found) <= MOST_TICKS else []


def _points(report: Report, name: str, key: str) -> list[tuple[float, float]]:
    return [
        (point.n_context, max(value, LEAST_KL) if key == "kl" else value)
        for point in report.sweep
        if point.name == name and (value := finite(point, key)) is not None
    ]
