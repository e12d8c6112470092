"""One row of the comparison: read the context, score a continuation, retrieve the needles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.compress import compress_context
from saccade.evals import quality
from saccade.evals.needle import Needle
from saccade.evals.peak import PeakMemory
from saccade.evals.rows import RowSpec
from saccade.report.comparison import Row
from saccade.runtime import Context, Model, Sampler
from saccade.runtime.importance import token_importance


@dataclass(slots=True, kw_only=True)
class Trial:
    """What every row measures on.

    Attributes:
        context: tokens `[n]` with the needles in them; continuation: scored tokens `[m]`.
        exact: log-probabilities of the baseline `[m - 1, vocab]`, once there is one.
        heads: opens the model with another number of KV heads ("mha", "mqa").
    """

    model: Model
    context: Tensor
    continuation: Tensor
    needles: list[Needle]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    heads: Callable[[str], AbstractContextManager[Model]]
    num_answer: int = 10
    exact: Tensor | None = None


def measure(spec: RowSpec, trial: Trial) -> Row:
    """Run one configuration and fill a row."""
    row = Row(name=spec.name, group=spec.group, options=spec.options())
    with trial.heads(spec.heads) if spec.heads else nullcontext(trial.model) as model:
        peak = PeakMemory()
        peak.start()
        start = time.perf_counter()
        context = _important_tokens(spec, trial, model)
        with Context(model, spec.params, reserve=_length(context, trial)) as ctx:
            last = ctx.append(context)
            ctx.compress()
            row.prefill_tps = len(trial.context) / (time.perf_counter() - start)
            row.peak_bytes = peak.bytes()
            row.cache_bytes = ctx.cache_bytes
            _score(ctx, last, trial, row)
            _ask(ctx, trial, row)
    return row


def _length(context: Tensor, trial: Trial) -> int:
    """Tokens the caches will store in all, so that they are allocated once."""
    questions = sum(len(trial.encode(n.question)) + trial.num_answer for n in trial.needles)
    return len(context) + len(trial.continuation) + questions


def _important_tokens(spec: RowSpec, trial: Trial, model: Model) -> Tensor:
    """The context, or the share of its tokens that the model itself finds important."""
    if spec.token_share is None:
        return trial.context
    with Context(model, spec.params) as ctx:
        scores = token_importance(ctx, trial.context)
    return compress_context(trial.context, scores, round(spec.token_share * len(trial.context)))


def _score(ctx: Context, last: Tensor, trial: Trial, row: Row) -> None:
    """Perplexity and divergence over the continuation, teacher-forced."""
    targets = trial.continuation
    hidden = ctx.append(targets, wanted=len(targets))
    states = torch.cat((last, hidden[:-1]))  # the state before each target
    ours = quality.log_probs(ctx, states)
    exact = ours if trial.exact is None else trial.exact
    result = quality.compare(ours, exact, targets)
    row.perplexity, row.perplexity_se = _known(result.perplexity), _known(result.perplexity_se)
    row.kl, row.kl_se, row.same_top = _known(result.kl), _known(result.kl_se), result.same_top
    if trial.exact is None:
        trial.exact = ours


def _known(value: float) -> float | None:
    """None for what is no number: a record does not store a broken model's perplexity."""
    return value if math.isfinite(value) else None


def _ask(ctx: Context, trial: Trial, row: Row) -> None:
    """Ask for every needle, one after another; the answers are also the decode benchmark."""
    found = 0
    for needle in trial.needles:
        generated = ctx.stream(
            trial.encode(needle.question), n_predict=trial.num_answer, sampler=Sampler()
        )
        found += needle.value in trial.decode([each.token for each in generated])
    if trial.needles:
        row.needle, row.needle_trials = found / len(trial.needles), len(trial.needles)
    if ctx.stats.decode_tokens:
        row.decode_tps = ctx.stats.decode_tokens / ctx.stats.decode_seconds
