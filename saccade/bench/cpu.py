"""The CPU benchmark: every case is checked, then timed alternately with its peers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from saccade.bench import ceilings, timing
from saccade.bench.bars import evaluate
from saccade.bench.cases import Case, batches
from saccade.bench.gate import Gate
from saccade.bench.inputs import Inputs, make
from saccade.bench.peers import PEERS, Call, backward, forget_compiled
from saccade.bench.products import product
from saccade.bench.reads import reading
from saccade.bench.record import Benchmark, Row
from saccade.core import Unsupported
from saccade.ops.attention import dispatch
from saccade.ops.attention.api import attend, make_call
from saccade.report.record import origin

BUDGET, QUICK_BUDGET = 2.0, 0.6  # seconds of samples for each candidate
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A call that passed the gate, and the row that its time belongs to."""

    row: Row
    call: Call


def run(
    cases: Sequence[Case],
    *,
    backends: Sequence[str] = ("auto",),
    with_flex: bool = False,
    quick: bool = False,
    on_progress: OnProgress = lambda done, total, label: None,
) -> Benchmark:
    """Measure the cases; Ctrl-C ends the run early and keeps the finished batches.

    Args:
        backends: names of this package's backends; "auto" is the one it would dispatch.
        with_flex: also time compiled FlexAttention.
        quick: fewer samples.
    """
    start = time.perf_counter()
    record = _empty_record(quick)
    todo = batches(cases)
    try:
        for done, batch in enumerate(todo):
            on_progress(done, len(todo), batch[-1].group)
            rows, candidates = _prepare(batch, backends, with_flex)
            _time(candidates, QUICK_BUDGET if quick else BUDGET)
            record.rows += rows
            record.ceilings.sample()
    except KeyboardInterrupt:
        record.complete = False
    named = {case.name: case for case in cases}
    for row in record.rows:
        row.bars = evaluate(record, row, named[row.case]) if row.ours else []
    record.seconds = time.perf_counter() - start
    return record


def _empty_record(quick: bool) -> Benchmark:
    found = ceilings.measure(torch.get_num_threads())
    return Benchmark(**origin(), ceilings=found, quick=quick)


def _prepare(
    batch: Sequence[Case], backends: Sequence[str], with_flex: bool
) -> tuple[list[Row], list[Candidate]]:
    """Rows of a batch, and the candidates among them that computed the right thing."""
    rows: list[Row] = []
    candidates: list[Candidate] = []
    if with_flex:
        forget_compiled()
    for case in batch:
        inputs = make(case)
        gate = Gate(case, inputs)
        for name in dict.fromkeys(backends):
            row, call = _ours(case, inputs, name)
            _admit(row, call, gate, rows, candidates)
        for name in case.peers:
            if name == "flex" and not with_flex:
                continue
            construct = partial(PEERS[name].make, case, inputs)
            _admit(_row(case, name, ours=False), construct, gate, rows, candidates)
        if any(bar.measure == "bandwidth" for bar in case.bars):
            found = reading(_row(case, "", ours=False))
            if found is not None:
                rows.append(found[0])
                candidates.append(Candidate(*found))
        if any(bar.measure == "product" for bar in case.bars):
            found = product(_row(case, "", ours=False))
            rows.append(found[0])
            candidates.append(Candidate(*found))
    return rows, candidates


def _ours(case: Case, inputs: Inputs, backend: str) -> tuple[Row, Callable[[], Call]]:
    """The row of one of this package's backends and what makes its call."""
    description = make_call(inputs.q, inputs.views[0], mask=case.mask, wants_lse=False)
    if backend == "auto":
        verdicts = dispatch.explain(description)
        backend = next(name for name, verdict in verdicts if verdict.startswith("chosen"))
    row = _row(case, backend, ours=True)

    def construct() -> Call:
        dispatch.choose(description, backend)  # raises Unsupported with the reason
        views = cycle(inputs.views)

        def forward() -> Tensor:
            view = next(views)
            return attend(
                make_call(inputs.q, view, mask=case.mask, wants_lse=False), backend=backend
            ).out

        return backward(forward, inputs) if case.work == "backward" else forward

    return row, construct


def _admit(
    row: Row,
    construct: Callable[[], Call],
    gate: Gate,
    rows: list[Row],
    candidates: list[Candidate],
) -> None:
    """Let a call through the gate, or write into its row why not."""
    rows.append(row)
    try:
        call = construct()
        with torch.no_grad():
            verdict = gate.check(call())
    except Unsupported as error:
        row.status, row.note = "cannot", str(error)
    except Exception as error:  # a peer that breaks down must not end the run
        row.status, row.note = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        row.error = verdict.error
        if verdict.passed:
            candidates.append(Candidate(row, call))
        else:
            row.status, row.note = "WRONG", verdict.reason


def _row(case: Case, backend: str, *, ours: bool) -> Row:
    return Row(
        case=case.name,
        group=case.group,
        label=case.label,
        work=case.work,
        storage=case.storage,
        shape={
            "heads": case.heads,
            "kv_heads": case.kv_heads,
            "head_dim": case.head_dim,
            "q_len": case.q_len,
            "kv_len": case.kv_len,
            "window": case.window,
        },
        backend=backend,
        ours=ours,
        flops=case.flops,
        nbytes=case.nbytes,
    )


def _time(candidates: Sequence[Candidate], budget: float) -> None:
    """Fill in the times of the candidates, whose samples alternate."""
    with torch.no_grad():
        times = timing.interleave([candidate.call for candidate in candidates], budget=budget)
    for candidate, taken in zip(candidates, times, strict=True):
        row = candidate.row
        row.seconds, row.spread = taken.seconds, taken.spread
        row.best, row.samples = taken.best, taken.samples
