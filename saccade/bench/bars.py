"""Bars evaluated: from timed rows and ceilings to met, missed, or not measured."""

from __future__ import annotations

from saccade.bench.cases import Bar, Case
from saccade.bench.products import PRODUCT
from saccade.bench.reads import READS
from saccade.bench.record import BarResult, Benchmark, Row


def evaluate(record: Benchmark, row: Row, case: Case) -> list[BarResult]:
    """Results of the bars of `case` for a row of ours."""
    return [_result(bar, value_of(bar, row, record)) for bar in case.bars]


def _result(bar: Bar, value: float | None) -> BarResult:
    met = None
    if value is not None:
        met = value <= bar.limit if bar.at_most else value >= bar.limit
    return BarResult(
        measure=bar.measure, limit=bar.limit, against=bar.against, value=value, met=met
    )


def value_of(bar: Bar, row: Row, record: Benchmark) -> float | None:
    """What the bar measures, None where something it needs was not timed."""
    if row.seconds is None:
        return None
    if bar.measure == "peak":
        return row.flops / row.seconds / record.ceilings.fma_peak
    if bar.measure == "bandwidth":
        alone = record.find(
            row.case, READS
        )  # sampled alternately with the row, where it was measured
        rate = alone.byte_rate if alone is not None else None
        return row.nbytes / row.seconds / (rate or record.ceilings.read_bandwidth)
    beside = {"torch": "torch", "product": PRODUCT}.get(bar.measure)
    other = record.find(row.case, beside) if beside else record.find(bar.against, row.backend)
    if other is None or other.seconds is None:
        return None
    if bar.measure == "product":
        return row.flops / row.seconds / (other.flops / other.seconds)
    if bar.measure == "time":
        return row.seconds / other.seconds
    if bar.measure == "pairs":
        return row.seconds / (row.flops * other.seconds / other.flops)
    return other.seconds / row.seconds
