"""A record with invented numbers, for everything that shows or stores one."""

from __future__ import annotations

from saccade.bench.bars import evaluate
from saccade.bench.cases import CASES, Case
from saccade.bench.ceilings import EXTENSION, Ceilings
from saccade.bench.cpu import _row
from saccade.bench.record import Benchmark, Row

PEAK, BANDWIDTH = 200e9, 20e9


def case(name: str) -> Case:
    """The case of the table with that name."""
    return next(case for case in CASES if case.name == name)


def row(name: str, seconds: float | None, *, backend: str = "cpu", ours: bool = True) -> Row:
    """A timed row of a case."""
    made = _row(case(name), backend, ours=ours)
    made.seconds, made.spread, made.best, made.samples = seconds, 0.02, seconds, 9
    return made


def record() -> Benchmark:
    """Prefill, decoding, window and backward, with one wrong kernel and one refusal."""
    ceilings = Ceilings(
        threads=2, source=EXTENSION, target="avx2", peak_samples=[PEAK, 0.97 * PEAK],
        bandwidth_samples=[BANDWIDTH],
    )  # fmt: skip
    rows = [
        row("prefill 9/3 D64 N2048 fp32", 0.030),
        row("prefill 9/3 D64 N2048 fp32", 0.120, backend="torch", ours=False),
        row("prefill 9/3 D64 N2048 bf16", 0.033),
        row("prefill 9/3 D64 N2048 int8", 0.040),
        row("decode 32/8 D128 4k keys bf16", 0.001),
        row("decode 32/8 D128 4k keys bf16", 0.080, backend="torch", ours=False),
        row("decode 32/8 D128 4k keys int4", 0.0004),
        row("dense 8/2 D64 N8192 fp32", 0.42),
        row("window 1024 8/2 D64 N32768 fp32", 0.43),
        row("backward 8/8 D64 N2048 fp32", 0.09),
        row("backward 8/8 D64 N2048 fp32", 0.3, backend="torch", ours=False),
    ]
    wrong = row("decode 32/8 D128 4k keys int8", None)
    wrong.status, wrong.error, wrong.note = "WRONG", float("inf"), "out has [bold] elements"
    refused = row("decode 32/8 D128 32k keys int8", None)
    refused.status, refused.note = "cannot", "no kernel for that"
    machine = {"cpu": "Test CPU", "torch": "2.13.0"}
    made = Benchmark(
        revision=None, command="saccade bench cpu", environment=machine, ceilings=ceilings,
        date="2026-01-01T00:00:00+00:00", rows=[*rows, wrong, refused], seconds=61.0,
    )  # fmt: skip
    for each in made.rows:
        each.bars = evaluate(made, each, case(each.case)) if each.ours else []
    return made
