"""`saccade compare`: every technique, on a real model and a real text, each cell measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saccade.core import BadInput
from saccade.evals.claims import claims_of
from saccade.evals.curves import measure_curve, position_params
from saccade.evals.needle import needles_for
from saccade.evals.rounds import Table
from saccade.evals.rows import SDPA, TEXTBOOK, Rows, RowSpec, rows_for
from saccade.evals.sweep import Sweep
from saccade.evals.text import default_text
from saccade.evals.trial import make_trial, token_tensor
from saccade.hf.load import LoadedModel
from saccade.hf.model import HFModel
from saccade.report.comparison import Report
from saccade.report.record import origin


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


QUICK = Sizes(context=1024, scored=192, steps=12, curve=0, rounds=2, repeat_until=72)
FULL = Sizes(context=3072, scored=512, steps=24, curve=12288, rounds=3, repeat_until=330)
LEAST_CONTEXT = 256


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
    seconds: float | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Measure all rows (or those named), the curves and the sweep; Ctrl-C keeps what is finished.

    Args:
        text: what it reads; default the help topics of this Python.
        tokens: ids to read instead of a text, for a model without a tokenizer: no needles then.
        context: tokens of context; default 1024 (quick) or 3072.
        quick: small sizes and no curves past the trained length.
        rows: names, or parts of names, of rows to measure; the two of transformers always run.
        sweep: lengths at which a few configurations are measured too.
        scored: False leaves the columns of quality empty, as for random weights.
        seconds: nothing new begins after that time.
        on_progress: called before each step and at the end.

    Raises:
        BadInput: no tokenizer, a text too short, or a row that does not exist.
    """
    begin = time.perf_counter()
    sizes = _sizes(context, quick)
    read = _tokens(model, text) if tokens is None else list(tokens)
    runner = HFModel(model.model, name=model.name, n_ctx_train=model.n_ctx_train)
    count = needles_for(sizes.context) if tokens is None and scored else 0
    trial = make_trial(
        model, runner, read, context=sizes.context, scored=sizes.scored, needles=count,
        steps=sizes.steps,
    )  # fmt: skip
    trial.scored = scored
    known = rows_for(runner.facts, n_context=sizes.context, total=trial.total, n_batch=sizes.batch)
    chosen = _chosen(known, rows, quick)
    report = _report(model, runner, text, read, sizes, quick)
    report.settings |= {"needles": count} | ({"scaling": known.scaling} if known.scaling else {})
    table = Table(report, trial, known.exact)
    swept = Sweep(model, runner, read, sweep, n_batch=sizes.batch, scored=scored)
    curves = _curves(runner, sizes, read) if rows is None and scored else {}
    total = len(chosen) * sizes.rounds + len(curves) + swept.steps
    done = 0

    def late(limit: float | None) -> bool:
        return limit is not None and time.perf_counter() - begin > limit

    def step(label: str) -> None:
        nonlocal done
        on_progress(Progress(done, total, label, report))
        done += 1

    try:
        table.warm_up()
        for spec in chosen:
            step(spec.name)
            table.first(spec, late=late(seconds))
        for again in range(1, sizes.rounds):
            for spec in chosen:
                step(f"{spec.name}, round {again + 1}")
                if not late(sizes.repeat_until) and not late(seconds):
                    table.again(spec)
        for name, params in curves.items():
            step(f"perplexity by position: {name}")
            curve = measure_curve(name, runner, params, token_tensor(read[: sizes.curve]))
            report.curves.append(curve)
        swept.run(report, step, lambda: late(seconds))
        on_progress(Progress(total, total, "done", report))
    except KeyboardInterrupt:
        report.complete = False
    table.finish()
    report.claims = claims_of(report)
    report.seconds = time.perf_counter() - begin
    return report


def _sizes(context: int | None, quick: bool) -> Sizes:
    base = QUICK if quick else FULL
    if context is None:
        return base
    if context < LEAST_CONTEXT:
        raise BadInput(
            f"a comparison needs a context of at least {LEAST_CONTEXT} tokens, got {context}."
        )
    return replace(base, context=context)


def _tokens(model: LoadedModel, text: str | None) -> list[int]:
    if model.tokenizer is None:
        raise BadInput(f"{model.name} has no tokenizer. Give a model that brings one.")
    tokenizer: Any = model.tokenizer
    return tokenizer(default_text() if text is None else text).input_ids


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


def _curves(runner: HFModel, sizes: Sizes, tokens: Sequence[int]) -> dict[str, Any]:
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
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in model.model.parameters()}
    return Report(
        **origin(),
        model={
            "name": model.name,
            "layers": facts.num_layers,
            "heads": f"{facts.num_heads} query, {facts.num_kv_heads} key/value",
            "query_heads": facts.num_heads,
            "kv_heads": facts.num_kv_heads,
            "head_dim": facts.head_dim,
            "trained_length": facts.n_ctx_train,
            "dtype": str(facts.dtype).removeprefix("torch."),
            "weight_bytes": sum(weights.values()),
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
