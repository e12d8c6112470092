"""`saccade eval`: tasks with known answers, under every set of options, beside the model as it is.

For each length and task the model is scored as it is first.  Only where it solves the task itself,
a policy is scored on it: what a policy loses cannot be seen in answers that were wrong before.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from saccade.core import BadInput
from saccade.evals.answering import Asked, answer
from saccade.evals.frame import Frame, Prompt, end_tokens, frame_of, length_of, prompt_of
from saccade.evals.gpu_failure import GPUFailed, end_if_failed
from saccade.evals.grid import EvalRow, dense_row
from saccade.evals.kept import Finished, KeptSamples, Place
from saccade.evals.rounds import sentence
from saccade.evals.tasks import TASKS, Room, Sample, TooShort, chosen, essay_of, samples_of
from saccade.hf.identity import as_text, model_identity
from saccade.hf.load import LoadedModel
from saccade.hf.model import HFModel
from saccade.report.evaluation import DENSE, Evaluation, Score
from saccade.report.leaderboard import Prediction
from saccade.report.record import origin
from saccade.runtime import ContextParams
from saccade.runtime.auto_scaling import reaching
from saccade.runtime.budgets import budget_in_keys

GATE = 0.8
SEED = 42  # RULER's
BOTH: tuple[Asked, ...] = ("after", "before")
OnProgress = Callable[[float, int, str], None]
_SECONDS = 10.0
"""At most so often a run says how much of a sample it has read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to score.

    Attributes:
        tasks: names of tasks or groups; contexts: tokens of prompt and answers together.
        rows: sets of options beside the model as it is; asked: when questions are read, for rows
            with a policy.
        samples: of each task and length; seed: same seed, same texts; gate: least mean score of
            the model as it is.
        text: in which needles are hidden; None: Python's help topics.
        raw: no chat template.
        n_batch: tokens that are read at once.
    """

    tasks: Sequence[str]
    contexts: Sequence[int]
    rows: Sequence[EvalRow] = ()
    asked: Sequence[Asked] = BOTH
    samples: int = 20
    seed: int = SEED
    gate: float = GATE
    text: str | None = None
    raw: bool = False
    n_batch: int = 512

    @property
    def columns(self) -> list[tuple[EvalRow, Asked | None]]:
        """The rows besides the dense one, each with the moments at which it is asked."""
        return [
            (row, asked)
            for row in self.rows
            for asked in ((None,) if row.params.kv_policy is None else tuple(self.asked))
        ]


def run(
    model: LoadedModel,
    plan: Plan,
    *,
    keep: Path | None = None,
    on_progress: OnProgress = lambda done, total, label: None,
) -> tuple[Evaluation, list[Prediction]]:
    """Score everything; Ctrl-C, SIGTERM and a GPU that fails keep what is finished.

    Args:
        keep: a file of finished samples; those in it are not computed again.
        on_progress: called with (samples done, all of them, what is scored now), and while a
            sample is read, which may take long, with a part of one.

    Returns:
        The record, not `complete` where it was stopped, and every answer.

    Raises:
        BadInput: an unknown task, a context into which none of them fits, no tokenizer, a budget
            of too few bytes, or a file of samples of another model, text or seed.
    """
    begin = time.perf_counter()
    work = _Work(model, plan, chosen(plan.tasks), keep, on_progress)
    try:
        work.run()
    except KeyboardInterrupt:
        work.report.complete = False
    except GPUFailed as failed:
        work.report.complete = False
        work.report.settings["stopped_by"] = sentence(failed.error)
    work.report.seconds = time.perf_counter() - begin
    return work.report, work.predictions


@dataclass(frozen=True, slots=True)
class _Cell:
    """The samples of one task at one length."""

    task: str
    context: int
    samples: list[Sample]
    prompts: list[Prompt]


class _Work:
    """A run and how far it is."""

    def __init__(
        self,
        model: LoadedModel,
        plan: Plan,
        tasks: list[str],
        keep: Path | None,
        on_progress: OnProgress,
    ) -> None:
        if model.tokenizer is None:
            raise BadInput(f"{model.name} has no tokenizer. Give a model that brings one.")
        self.plan, self.tasks = plan, tasks
        self.predictions: list[Prediction] = []
        self._tokenizer: Any = model.tokenizer
        self._model = HFModel(model.model, name=model.name, n_ctx_train=model.n_ctx_train)
        for row in plan.rows:  # too few bytes are refused before anything is read
            budget_in_keys(row.params, self._model.facts)
        self._frame = frame_of(model.tokenizer, raw=plan.raw)
        config = getattr(model.model, "generation_config", None)
        self._ends = end_tokens(self._frame, model.tokenizer, config)
        self._essay = essay_of(plan.text)
        self.report = _record(model, self._model, plan, self._frame, self._essay)
        self._kept = KeptSamples(keep, _made_with(model, plan))
        self._progress, self._done = on_progress, 0

    @property
    def _total(self) -> int:
        cells = len(self.tasks) * len(self.plan.contexts)
        return cells * self.plan.samples * (1 + len(self.plan.columns))

    def run(self) -> None:
        for context in self.plan.contexts:
            for task in self.tasks:
                self._cell(task, context)
        results = self.report.results
        if results and all(result.status == "does not fit" for result in results):
            raise BadInput(f"{results[0].note} Give a longer one.")
        self._progress(self._total, self._total, "done")

    def _cell(self, task: str, context: int) -> None:
        """One task at one length: the model as it is, then what the gate lets through."""
        try:
            cell = self._made(task, context)
        except TooShort as error:
            for row, asked in ((dense_row(self.plan.n_batch), None), *self.plan.columns):
                self._without(Score(
                    task=task, context=context, row=row.name, asked=asked or "",
                    status="does not fit", note=str(error),
                ))  # fmt: skip
            return
        dense = self._score(cell, dense_row(self.plan.n_batch), None, None)
        closed = self._closed(dense)
        for row, asked in self.plan.columns:
            if closed:
                self._without(Score(
                    task=task, context=context, row=row.name, asked=asked or "", status="gated",
                    note=closed,
                ))  # fmt: skip
            else:
                self._score(cell, row, asked, dense)

    def _made(self, task: str, context: int) -> _Cell:
        def count(text: str) -> int:
            return len(self._tokenizer(text, add_special_tokens=False).input_ids)

        def length(sample: Sample) -> int:
            return length_of(prompt_of(sample, self._frame, self._tokenizer), sample)

        self._progress(self._done, self._total, f"{task} at {context:,}: texts")
        room = Room(context, count, self._essay)
        samples = samples_of(TASKS[task], self.plan.samples, self.plan.seed, room, length)
        prompts = [prompt_of(sample, self._frame, self._tokenizer) for sample in samples]
        return _Cell(task, context, samples, prompts)

    def _closed(self, dense: Score) -> str:
        """Why no policy is scored on a task, "" where one is."""
        where = f"{dense.task} at {dense.context:,} tokens"
        if dense.mean is None:
            return f"the model itself was not scored on {where}, so no policy is."
        if dense.mean >= self.plan.gate:
            return ""
        return (
            f"the model itself solves {dense.mean:.2f} of {where} ({dense.low:.2f}-"
            f"{dense.high:.2f}), less than the gate of {self.plan.gate:g}, so no policy is scored "
            "on it."
        )

    def _without(self, score: Score) -> None:
        """A result without samples."""
        self.report.results.append(score)
        self._done += self.plan.samples

    def _score(self, cell: _Cell, row: EvalRow, asked: Asked | None, dense: Score | None) -> Score:
        """All samples of a cell under one set of options."""
        result = Score(task=cell.task, context=cell.context, row=row.name, asked=asked or "")
        self.report.results.append(result)
        begin, found = self._done, list[Finished]()
        params, said = reaching(row.params, self._model.facts, cell.context)
        if said:
            self.report.settings["scaling"] = said
        try:
            for index in range(len(cell.samples)):
                label = f"{cell.task} at {cell.context:,}: {result.column}"
                self._progress(self._done, self._total, label)
                found.append(self._sample(cell, index, params, result, asked))
                self._done += 1
        except KeyboardInterrupt:
            result.status, result.note = "stopped", f"{result.column}: stopped before the end."
            raise
        except BadInput:
            raise
        except Exception as error:  # a model's own code runs here; the other rows stay
            result.status, result.note = "failed", f"{result.column}: {sentence(error)}"
            end_if_failed(self._model.device, error)
        finally:
            _fill(result, found, dense)
        self._done = begin + len(cell.samples)
        return result

    def _sample(
        self, cell: _Cell, index: int, params: ContextParams, result: Score, asked: Asked | None
    ) -> Finished:
        """One sample, computed or found; its answers become predictions."""
        sample, prompt = cell.samples[index], cell.prompts[index]
        place = Place(result.row, result.asked, cell.task, cell.context, index)
        digest = _digest(sample, prompt)
        finished = self._kept.get(place, digest)
        if finished is None:
            outcome = answer(
                self._model, params, prompt, sample, asked=asked or "after",
                tokenizer=self._tokenizer, ends=self._ends, on_progress=self._reading(cell, result),
            )  # fmt: skip
            finished = Finished(
                prompt=digest, answers=outcome.answers, scores=outcome.scores,
                cache_bytes=outcome.cache_bytes, seconds=outcome.seconds,
            )  # fmt: skip
            self._kept.add(place, finished)
        for turn, text in zip(sample.turns, finished.answers, strict=True):
            self.predictions.append(Prediction(place=place, turn=turn, text=text))
        return finished

    def _reading(self, cell: _Cell, result: Score) -> Callable[[int, int], None]:
        """What shows how much of a sample is read, every few seconds."""
        last = time.monotonic()

        def read(done: int, total: int) -> None:
            nonlocal last
            if done < total and time.monotonic() - last > _SECONDS:
                last = time.monotonic()
                label = f"{cell.task} at {cell.context:,}: {result.column}, {done:,} tokens read"
                self._progress(self._done + done / total, self._total, label)

        return read


def _fill(result: Score, found: Sequence[Finished], dense: Score | None) -> None:
    result.fill([each.score for each in found], dense)
    if not found:
        return
    result.cache_bytes = fmean(each.cache_bytes for each in found)
    result.seconds = fmean(each.seconds for each in found)
    if len(found[0].scores) > 1:
        result.turns = [fmean(turn) for turn in zip(*(each.scores for each in found), strict=True)]


def _digest(sample: Sample, prompt: Prompt) -> str:
    """What a sample's result depends on, in 16 digits."""
    asked = [(turn.question, turn.prefix) for turn in prompt.turns]
    right = [(turn.answers, turn.rule, turn.n_predict, turn.choices) for turn in sample.turns]
    text = json.dumps([prompt.context, asked, right])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _made_with(model: LoadedModel, plan: Plan) -> dict[str, Any]:
    identity = as_text(model_identity(model.model))
    return {
        "model": model.name,
        "weights_and_config": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "seed": plan.seed,
        "batch_size": plan.n_batch,
    }


def _record(
    model: LoadedModel, runner: HFModel, plan: Plan, frame: Frame, essay: list[str]
) -> Evaluation:
    facts = runner.facts
    return Evaluation(
        **origin(),
        model={
            "name": model.name,
            "trained_length": facts.n_ctx_train,
            "dtype": str(facts.dtype).removeprefix("torch."),
            "weights": model.weights,
        },
        settings={
            "samples": plan.samples,
            "seed": plan.seed,
            "gate": plan.gate,
            "n_batch": plan.n_batch,
            "template": not frame.special,
            "device": str(runner.device),
            "essay": "pydoc_data.topics" if plan.text is None else "a file",
            "essay_sha256": hashlib.sha256(" ".join(essay).encode()).hexdigest()[:16],
            "rows": {DENSE: {}} | {row.name: row.options for row in plan.rows},
        },
    )
