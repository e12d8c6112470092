"""Measure which backend is fastest for which calls on this CPU, and make rules of the figures.

Every backend first computes a small call of each series, which is judged by the reference in
float64, and at full size the backends have to agree; a wrong one is never timed.  Samples of the
backends alternate, and the fastest sample of each counts, since other work on the machine only
adds time.  PyTorch's kernels come first where they win by more than timings move; everywhere else
that was measured the rule says by how much our kernels win.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.bench.gate import limits
from saccade.bench.rule_cases import Series
from saccade.bench.timing import interleave
from saccade.core import DenseKV
from saccade.ops.attention import dispatch
from saccade.ops.attention.api import attend
from saccade.ops.attention.call import AttentionCall
from saccade.ops.tuning.rules import Rule
from saccade.report.numbers import as_time

BACKENDS = ("cpu", "sdpa")
TITLES = {"cpu": "saccade's kernels", "sdpa": "PyTorch's SDPA"}
MARGIN = 1.05  # the same backend moves by that much from run to run
AGREE = 2e-2  # relative distance of large results in 16 bits
SMALL = 160  # queries and keys of the call that is judged
Run = Callable[[], tuple[Tensor, ...]]
Timer = Callable[[Sequence[Run], float], list[float]]
"""Seconds of each run, given a budget of seconds for each."""


@dataclass(slots=True, kw_only=True)
class Figures:
    """One size of a series as it was measured.

    Attributes:
        seconds: of each backend that is right; refused: why others were not timed.
    """

    queries: int
    keys: int
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    refused: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def winner(self) -> str | None:
        """The backend that comes first; None where nothing could be compared."""
        if len(self.seconds) < len(BACKENDS):
            return None
        ours, theirs = (self.seconds[name] for name in BACKENDS)
        return "sdpa" if ours > MARGIN * theirs else "cpu"

    @property
    def gain(self) -> float:
        """The other backend's time over the winner's."""
        ours, theirs = (self.seconds[name] for name in BACKENDS)
        return ours / theirs if self.winner == "sdpa" else theirs / ours


def timed(runs: Sequence[Run], budget: float) -> list[float]:
    """Seconds of the fastest sample of each run, the samples alternating."""
    return [timing.best for timing in interleave(runs, budget=budget)]


def measure(series: Series, *, budget: float, timer: Timer = timed) -> Iterator[Figures]:
    """The figures of each size of a series."""
    wrong = {name: _judge(series, name) for name in BACKENDS}
    for queries, keys in series.sizes:
        figures = Figures(queries=queries, keys=keys)
        figures.refused = {name: reason for name, reason in wrong.items() if reason}
        call = series.call(queries, keys)
        runs = {name: run_of(call, name) for name in BACKENDS if not wrong[name]}
        figures.refused |= _disagreeing(runs)
        for name in figures.refused:
            runs.pop(name, None)
        if runs:
            _time(figures, runs, budget, timer)
        if figures.winner == "sdpa":  # has to win twice: other work may have slowed ours
            _time(figures, runs, budget, timer)
        yield figures


def _time(figures: Figures, runs: dict[str, Run], budget: float, timer: Timer) -> None:
    """Note the seconds of each run where they are less than before."""
    for name, seconds in zip(runs, timer(list(runs.values()), budget), strict=True):
        figures.seconds[name] = min(seconds, figures.seconds.get(name, math.inf))


def run_of(call: AttentionCall, backend: str) -> Run:
    """The call by a backend: its output, or with gradients those of q, k and v too."""
    if not call.needs_grad:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(call, backend=backend).out,)

        return forward
    assert isinstance(call.kv, DenseKV)
    leaves = (call.q, call.kv.k, call.kv.v)

    def train() -> tuple[Tensor, ...]:
        out = attend(call, backend=backend).out
        return (out, *torch.autograd.grad(out, leaves, torch.ones_like(out)))

    return train


def _judge(series: Series, backend: str) -> str:
    """What is wrong with a backend's result of a small call, "" where nothing is."""
    queries, keys = series.sizes[0]
    small = min(queries, SMALL), min(keys, SMALL)
    call = series.call(*small)
    try:
        reason = dispatch.refusal(call, backend)
        if reason is not None:
            return f"cannot: {reason}"
        got = run_of(call, backend)()
    except Exception as error:  # a backend that breaks down must not end the run
        return f"failed: {type(error).__name__}: {error}".splitlines()[0]
    exact, eager = (run_of(widened(call, d), "reference")() for d in (torch.float64, torch.float32))
    for at, (ours, truth, plain) in enumerate(zip(got, exact, eager, strict=True)):
        verdict = judge_rows(ours, truth, plain.to(ours.dtype), gradient=at > 0)
        if verdict:
            return f"WRONG: {verdict}"
    return ""


def judge_rows(got: Tensor, truth: Tensor, eager: Tensor, *, gradient: bool) -> str:
    """What the gate says of a tensor `[B, H, L, D]`; the batch counts as heads."""
    got, truth, eager = (x.detach().flatten(0, 1)[None] for x in (got, truth, eager))
    rows, share = torch.arange(got.shape[2]), 1.0 if gradient else 0.01
    expected = limits("result", rows, truth, eager, got.dtype, least_share=share)
    return expected.judge(got).reason


def widened(call: AttentionCall, dtype: torch.dtype) -> AttentionCall:
    """The same numbers in another type."""
    assert isinstance(call.kv, DenseKV)
    needs_grad = call.needs_grad
    q, k, v = (
        x.detach().to(dtype).requires_grad_(needs_grad) for x in (call.q, call.kv.k, call.kv.v)
    )
    return call.with_(q=q, kv=DenseKV(k, v))


def _disagreeing(runs: dict[str, Run]) -> dict[str, str]:
    """Backends whose result of the full size is unlike the first one's."""
    found: dict[str, str] = {}
    standard: tuple[Tensor, ...] | None = None
    for name, run in runs.items():
        try:
            result = run()
        except Exception as error:  # as above
            found[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            continue
        standard = standard or result
        apart = max(_distance(*pair) for pair in zip(result, standard, strict=True))
        if not apart < AGREE:
            found[name] = f"WRONG: {apart:.2g} away from the result of {next(iter(runs))}"
    return found


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative distance of two tensors; infinite where one is not finite."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    apart = float((ours - theirs).norm() / theirs.norm())
    return apart if math.isfinite(apart) else math.inf


def rules_of(series: Series, figures: Sequence[Figures], source: str) -> list[Rule]:
    """A rule for each run of sizes with one winner."""
    made: list[Rule] = []
    first = 0
    while first < len(figures):
        winner, last = figures[first].winner, first
        while last + 1 < len(figures) and figures[last + 1].winner == winner:
            last += 1
        if winner is not None:
            why = clause(series, figures[first : last + 1])
            conditions = series.conditions(first, last)
            made.append(Rule(order=order_of(winner), why=why, source=source, **conditions))
        first = last + 1
    return made


def order_of(winner: str) -> tuple[str, ...]:
    """The winner, then the other one."""
    return (winner, *(name for name in BACKENDS if name != winner))


def clause(series: Series, figures: Sequence[Figures]) -> str:
    """`PyTorch's SDPA takes 34.6 ms, saccade's kernels 45.0 ms (9/3 heads, D 64, ...)`."""
    longest = figures[-1]
    winner = longest.winner
    assert winner is not None
    other = order_of(winner)[1]
    gains = sorted(each.gain for each in figures)
    times = f"{gains[0]:.2f}" if len(gains) == 1 else f"{gains[0]:.2f} to {gains[-1]:.2f}"
    heads, kv_heads = series.heads
    return (
        f"{TITLES[winner]}, {times} times the speed of {TITLES[other]} "
        f"({as_time(longest.seconds[winner])} against {as_time(longest.seconds[other])}: "
        f"{series.kind.name}, {series.dtype}, {heads}/{kv_heads} heads, D {series.dim}, "
        f"{longest.queries} queries, {longest.keys} keys)"
    )


def as_trial(series: Series, figures: Figures) -> dict[str, Any]:
    """A row of the record."""
    heads, kv_heads = series.heads
    row: dict[str, Any] = {
        "case": series.kind.name, "dtype": series.dtype, "heads": heads, "kv_heads": kv_heads,
        "head_dim": series.dim, "queries": figures.queries, "keys": figures.keys,
        "ms": {name: round(1e3 * s, 4) for name, s in figures.seconds.items()},
    }  # fmt: skip
    if figures.refused:
        row["cannot"] = figures.refused
    return row | {"winner": figures.winner}
