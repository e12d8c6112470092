"""One row of the comparison: read the context, score a continuation, retrieve the needles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.evals import quality
from saccade.evals.gpu_failure import wait
from saccade.evals.needle import Question, answered
from saccade.evals.rows import RowSpec
from saccade.evals.speed import Rounds
from saccade.evals.subject import Ours, Subject, Theirs, implementation
from saccade.hf.model import HFModel
from saccade.hf.packed_layers import weights_bytes
from saccade.ops.allocated import AllocatedPeak
from saccade.report.comparison import Row, SweepPoint
from saccade.runtime.importance import HEAD_CHUNK


@dataclass(slots=True, kw_only=True)
class Trial:
    """What every row measures on.

    Attributes:
        model: as it was loaded.
        context: tokens `[n]` with the needles in them; continuation: tokens `[m]` behind it, scored
            unless `scored` is False, as for random weights.
        questions: asked behind the continuation.
        heads: opens the model with another number of KV heads ("mha", "mqa").
        steps: how many tokens of the continuation are read one by one, as in decoding.
    """

    model: HFModel
    context: Tensor
    continuation: Tensor
    questions: list[Question]
    heads: Callable[[str], AbstractContextManager[HFModel]]
    steps: int = 12
    scored: bool = True

    @property
    def total(self) -> int:
        """Tokens that are read in all."""
        return len(self.context) + len(self.continuation) + self.asked

    @property
    def asked(self) -> int:
        """Tokens of questions and answers."""
        return sum(len(question.tokens) for question in self.questions)


@dataclass(slots=True, kw_only=True)
class Seen:
    """What a row predicted, kept until it is known what it is compared with.

    Attributes:
        log_probs: before each token of the continuation `[m, vocab]`; None once compared.
        nll: negative log-likelihoods of these tokens `[m]`.
        answers: whether each question was answered.
    """

    log_probs: Tensor | None
    nll: Tensor
    answers: list[bool]


@contextmanager
def opened(spec: RowSpec, trial: Trial, model: HFModel) -> Iterator[Subject]:
    """The configuration of a row, ready to read; closed and restored on exit."""
    if spec.theirs is not None:
        with implementation(model.model, spec.theirs):
            yield Theirs(model.model, spec.params.n_batch)
        return
    kept = round((spec.token_share or 1.0) * len(trial.context))
    ours = Ours(model, spec.params, spec.token_share, reserve=kept + trial.steps)
    with ours.ctx:
        yield ours


@contextmanager
def _model_of(spec: RowSpec, trial: Trial) -> Iterator[HFModel]:
    """The model of a row, with the heads that it needs."""
    if spec.heads in ("mha", "mqa"):
        with trial.heads(spec.heads) as model:
            yield model
    else:
        yield trial.model


def _compile(spec: RowSpec, trial: Trial, model: HFModel) -> None:
    """On a GPU kernels are compiled by their first call, which is not timed."""
    if model.device.type == "cuda":
        with opened(spec, trial, model) as subject:
            subject.read(trial.context)
            subject.write(trial.continuation[:2])


def measure(spec: RowSpec, trial: Trial, row: Row | SweepPoint, rounds: Rounds) -> Seen | None:
    """The first round of a configuration: memory and quality into `row`, times into `rounds`.

    Returns:
        What it predicted; None where nothing is scored.
    """
    device = trial.model.device
    with _model_of(spec, trial) as model, ExitStack() as stack:
        _compile(spec, trial, model)
        with AllocatedPeak(device) as peak:
            subject = stack.enter_context(opened(spec, trial, model))
            begin = time.perf_counter()
            subject.read(trial.context)
            wait(device)
            prefill = time.perf_counter() - begin
        row.peak_bytes, row.cache_bytes = peak.bytes, subject.cache_bytes
        row.total_bytes = weights_bytes(model.model) + peak.bytes
        written = trial.continuation[: trial.steps]
        begin = time.perf_counter()
        steps = subject.write(written)
        first = prefill + steps.stamps[0] - begin
        rounds.add(prefill, first, steps.seconds())
        if not trial.scored:
            return None
        # A pattern selects keys for a block of queries: a question of its own is one block.
        apart = spec.params.sparse is not None
        return _predictions(subject, trial, torch.stack(steps.logits), apart=apart)


def measure_speed(spec: RowSpec, trial: Trial, rounds: Rounds) -> None:
    """One round more, of times alone."""
    with _model_of(spec, trial) as model, opened(spec, trial, model) as subject:
        begin = time.perf_counter()
        subject.read(trial.context)
        wait(trial.model.device)
        prefill = time.perf_counter() - begin
        steps = subject.write(trial.continuation[: trial.steps])
        rounds.add(prefill, steps.stamps[0] - begin, steps.seconds())


def _predictions(subject: Subject, trial: Trial, first: Tensor, *, apart: bool) -> Seen:
    """Predictions before each token of the continuation, and the answers.

    Args:
        first: logits before the tokens that were read one by one, and behind the last of them.
        apart: whether questions are read one by one.
    """
    rest = trial.continuation[trial.steps :]
    parts = [first.log_softmax(-1)]
    if len(rest):
        parts.append(quality.log_probs(subject, subject.states(rest)))
    found = torch.cat(parts)[: len(trial.continuation)].cpu()
    nll = quality.losses(found, trial.continuation)
    asked = [[q] for q in trial.questions] if apart else [trial.questions]
    answers = [answer for some in asked for answer in _answers(subject, some)]
    return Seen(log_probs=found, nll=nll, answers=answers)


def _answers(subject: Subject, asked: Sequence[Question]) -> list[bool]:
    if not asked:
        return []
    states = subject.states(torch.tensor([token for q in asked for token in q.tokens]))
    best = [subject.logits(part).argmax(-1).cpu() for part in states.split(HEAD_CHUNK)]
    return answered(asked, torch.cat(best))


def fill_perplexity(row: Row | SweepPoint, seen: Seen) -> None:
    """Perplexity of the continuation; None for what is no number."""
    value, error = quality.perplexity(seen.nll)
    row.perplexity = finite(value)
    if isinstance(row, Row):
        row.perplexity_se = finite(error)


def fill_divergence(row: Row | SweepPoint, seen: Seen, exact: Tensor) -> None:
    """Distance from the exact row's log-probabilities; those of this row are let go."""
    if seen.log_probs is None:
        return
    found = quality.divergence(seen.log_probs, exact)
    row.kl, row.kl_se = finite(found.kl), finite(found.kl_se)
    if isinstance(row, Row):
        row.same_top = found.same_top
    seen.log_probs = None


def finite(value: float) -> float | None:
    """None for what is no number: a record does not store a broken model's perplexity."""
    return value if math.isfinite(value) else None
