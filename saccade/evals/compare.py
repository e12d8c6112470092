"""`saccade compare`: every technique, on a real model and a real text, each cell measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saccade.core import BadInput
from saccade.evals.claims import claims_of
from saccade.evals.curves import measure_curve, position_params
from saccade.evals.gpu_failure import THE_ROW_BEFORE, GPUFailed, end_if_failed
from saccade.evals.needle import needles_for
from saccade.evals.rounds import Table, sentence
from saccade.evals.rows import SDPA, TEXTBOOK, Rows, RowSpec, rows_for
from saccade.evals.sweep import SCORED, Sweep
from saccade.evals.text import default_text
from saccade.evals.trial import CALIBRATION, make_trial, token_tensor
from saccade.hf.load import LoadedModel
from saccade.hf.model import HFModel
from saccade.hf.text_tokens import first_tokens
from saccade.report.comparison import Report
from saccade.report.record import origin
from saccade.runtime import ContextParams
from saccade.runtime.auto_scaling import trained_reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large a run is.

    Attributes:
        context: tokens read before anything is scored; scored: tokens of the continuation.
        steps: how many of these are read one by one, to time decoding.
        curve: tokens of the perplexity-by-position curves, 0 for none.
        rounds: how often speeds are measured, as far as `repeat_until` seconds allow.
    """

    context: int
    scored: int
    steps: int
    curve: int
    rounds: int
    repeat_until: float
    batch: int = 512


BATCH_ON_GPU = 2048
STEPS_ON_GPU = 64  # a token takes milliseconds there
QUICK = Sizes(context=1024, scored=192, steps=12, curve=0, rounds=2, repeat_until=60)
FULL = Sizes(context=3072, scored=512, steps=24, curve=12288, rounds=3, repeat_until=330)
LEAST_CONTEXT = 256
NOT_REACHED = "stopped before it was reached"


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run has done: `done` of `total` steps, now at `label`; `report` so far."""

    done: int
    total: int
    label: str
    report: Report


def run(
    model: LoadedModel,
    text: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    context: int | None = None,
    quick: bool = False,
    rows: Sequence[str] | None = None,
    sweep: Sequence[int] = (),
    scored: bool = True,
    n_batch: int | None = None,
    seconds: float | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Measure all rows (or those named), the curves and the sweep.

    Ctrl-C, and a GPU that fails, keep what is finished: the report is not `complete` then.

    Args:
        text: what it reads; default the help topics of this Python.
        tokens: ids to read instead of a text, for a model without a tokenizer: no needles then.
        context: tokens of context; default 1024 (quick) or 3072.
        quick: small sizes and no curves past the trained length.
        rows: names, or parts of names, of rows to measure; the two of transformers always run.
        sweep: lengths at which a few configurations are measured too.
        scored: False leaves the columns of quality empty, as for random weights.
        n_batch: tokens that every row reads at once; default 512, on a GPU 2048.
        seconds: nothing new begins after that time.
        on_progress: called before each step and at the end.

    Raises:
        BadInput: no tokenizer, a text too short, or a row that does not exist.
    """
    begin = time.perf_counter()
    sizes = _sizes(context, quick, n_batch, model.model.device.type)
    used = max(sizes.context + sizes.scored, sizes.curve, *(n + SCORED for n in sweep))
    read = _tokens(model, text, used + CALIBRATION) if tokens is None else list(tokens)
    runner = HFModel(model.model, name=model.name, n_ctx_train=model.n_ctx_train)
    count = needles_for(sizes.context) if tokens is None and scored else 0
    trial = make_trial(
        model, runner, read, context=sizes.context, scored=sizes.scored, needles=count,
        steps=sizes.steps,
    )  # fmt: skip
    trial.scored = scored
    known = rows_for(runner.facts, n_context=sizes.context, total=trial.total, n_batch=sizes.batch)
    report = _report(model, runner, text, read, sizes, quick)
    report.settings |= {"needles": count} | ({"scaling": known.scaling} if known.scaling else {})
    work = _Work(
        report=report,
        sizes=sizes,
        table=Table(report, trial, known.exact),
        chosen=_chosen(known, rows, quick),
        curves=_curves(runner, sizes, read) if rows is None and scored else {},
        sweep=Sweep(model, runner, read, sweep, n_batch=sizes.batch, scored=scored),
        on_progress=on_progress,
        begin=begin,
        seconds=math.inf if seconds is None else seconds,
    )
    try:
        work.run(runner, read)
    except KeyboardInterrupt:
        work.stop(NOT_REACHED)
    except GPUFailed as failed:
        report.settings["stopped_by"] = sentence(failed.error)
        work.stop(THE_ROW_BEFORE)
    work.table.finish()
    report.claims = claims_of(report)
    report.seconds = time.perf_counter() - begin
    return report


@dataclass(slots=True, kw_only=True)
class _Work:
    """What a run has to do, in this order, and how far it is."""

    report: Report
    sizes: Sizes
    table: Table
    chosen: list[RowSpec]
    curves: dict[str, ContextParams]
    sweep: Sweep
    on_progress: Callable[[Progress], None]
    begin: float
    seconds: float
    done: int = 0

    def run(self, runner: HFModel, tokens: Sequence[int]) -> None:
        """All of it, as far as the time reaches."""
        self.table.warm_up()
        for spec in self.chosen:
            self._step(spec.name)
            self.table.first(spec, late=self._late())
        for again in range(1, self.sizes.rounds):
            for spec in self.chosen:
                self._step(f"{spec.name}, round {again + 1}")
                if not self._late(self.sizes.repeat_until):
                    self.table.again(spec)
        for name, params in self.curves.items():
            self._step(f"perplexity by position: {name}")
            self._curve(name, runner, params, tokens)
        self.sweep.run(self.report, self._step, self._late)
        self.done = self._total
        self._step("done")

    def stop(self, why: str) -> None:
        """Put into the record what the run has not reached, and why."""
        self.report.complete = False
        self.table.stop(self.chosen, why)
        measured = {curve.name for curve in self.report.curves}
        missing = {name: why for name in self.curves if name not in measured}
        if missing:
            self.report.settings["missing_curves"] = missing | self.report.settings.get(
                "missing_curves", {}
            )
        self.sweep.stop(self.report, why)

    def _curve(
        self, name: str, runner: HFModel, params: ContextParams, tokens: Sequence[int]
    ) -> None:
        """One curve; the record says why one is missing."""
        text = token_tensor(tokens[: self.sizes.curve])
        try:
            self.report.curves.append(measure_curve(name, runner, params, text))
        except Exception as error:  # any model's own code runs here; finished rows stay
            missing = self.report.settings.setdefault("missing_curves", {})
            missing[name] = sentence(error)
            end_if_failed(runner.device, error)

    @property
    def _total(self) -> int:
        return len(self.chosen) * self.sizes.rounds + len(self.curves) + self.sweep.steps

    def _step(self, label: str) -> None:
        self.on_progress(Progress(self.done, self._total, label, self.report))
        self.done += 1

    def _late(self, limit: float = math.inf) -> bool:
        return time.perf_counter() - self.begin > min(limit, self.seconds)


def _sizes(context: int | None, quick: bool, n_batch: int | None, device: str) -> Sizes:
    base = QUICK if quick else FULL
    if device == "cuda":
        base = replace(base, steps=STEPS_ON_GPU, batch=BATCH_ON_GPU)
    base = base if n_batch is None else replace(base, batch=n_batch)
    if context is None:
        return base
    if context < LEAST_CONTEXT:
        raise BadInput(
            f"a comparison needs a context of at least {LEAST_CONTEXT} tokens, got {context}."
        )
    return replace(base, context=context)


def _tokens(model: LoadedModel, text: str | None, most: int) -> list[int]:
    """The default text, or the first `most` tokens of another one, which may be very long."""
    if model.tokenizer is None:
        raise BadInput(f"{model.name} has no tokenizer. Give a model that brings one.")
    tokenizer: Any = model.tokenizer
    if text is None:
        return tokenizer(default_text()).input_ids
    return first_tokens(tokenizer, text, most, special=True)


def _chosen(known: Rows, names: Sequence[str] | None, quick: bool) -> list[RowSpec]:
    """Those asked for, with what they are compared with and what they are taken from."""
    if names is None:
        return [spec for spec in known.specs if spec.quick or not quick]
    wanted = {TEXTBOOK, SDPA, known.exact}
    for name in names:
        found = [spec for spec in known.specs if name.lower() in spec.name.lower()]
        if not found:
            listed = "; ".join(spec.name for spec in known.specs)
            raise BadInput(f"no row is called {name!r}; expected one of: {listed}.")
        wanted |= {spec.name for spec in found} | {spec.same_as or spec.name for spec in found}
    return [spec for spec in known.specs if spec.name in wanted]


def _curves(runner: HFModel, sizes: Sizes, tokens: Sequence[int]) -> dict[str, ContextParams]:
    """Curves to measure: none in a quick run, or where the text does not reach that far."""
    past = sizes.curve > runner.facts.n_ctx_train and len(tokens) >= sizes.curve
    if not past:
        return {}
    return position_params(sizes.curve, runner.facts.n_ctx_train, sizes.batch)


def _report(
    model: LoadedModel,
    runner: HFModel,
    text: str | None,
    tokens: Sequence[int],
    sizes: Sizes,
    quick: bool,
) -> Report:
    facts = runner.facts
    return Report(
        **origin(),
        model={
            "name": model.name,
            "layers": facts.num_layers,
            "heads": f"{facts.num_heads} query, {facts.num_kv_heads} key/value",
            "query_heads": facts.num_heads,
            "kv_heads": facts.num_kv_heads,
            "head_dim": facts.head_dim,
            "trained_length": trained_reach(ContextParams(), facts),
            "dtype": str(facts.dtype).removeprefix("torch."),
            "weights": model.weights,
            "weight_bytes": model.weights_bytes,
        },
        text={"source": "pydoc_data.topics" if text is None else "a file", "tokens": len(tokens)},
        settings={
            "n_context": sizes.context,
            "n_scored": sizes.scored,
            "n_batch": sizes.batch,
            "n_curve": sizes.curve,
            "quick": quick,
            "device": str(runner.device),
        },
        baseline=TEXTBOOK,
        reference=SDPA,
    )
