"""`saccade compare`: every technique, on a real model and a real text, each cell measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from saccade.core import BadInput, Unsupported
from saccade.core.hardware import available_memory
from saccade.evals.curves import measure_curve, position_params
from saccade.evals.measure import Trial, measure
from saccade.evals.needle import hide, make_needles
from saccade.evals.rows import BASELINE, RowSpec, specs, unchunked_batch
from saccade.evals.text import default_text
from saccade.hf.convert import expand_to_mha, pool_to_mqa
from saccade.hf.load import LoadedModel
from saccade.hf.model import HFModel
from saccade.report.comparison import Report, Row
from saccade.report.record import origin
from saccade.runtime import Context, ContextParams, Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large a run is.

    Attributes:
        context: tokens read before anything is scored; scored: tokens of the continuation.
        needles: hidden facts; curve: tokens of the perplexity-by-position curves, 0 for none.
    """

    context: int
    scored: int
    needles: int
    curve: int
    batch: int = 512


QUICK = Sizes(context=1536, scored=256, needles=2, curve=0)
FULL = Sizes(context=3072, scored=512, needles=3, curve=12288)


WARM_UP = 256


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
    context: int | None = None,
    quick: bool = False,
    rows: Sequence[str] | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Measure all rows (or those named) and the curves; Ctrl-C ends it with what is finished.

    Args:
        text: what it reads; default the help topics of this Python.
        context: tokens of context; default 1536 (quick) or 3072.
        quick: small sizes and no curves past the trained length.
        rows: names, or parts of names, of rows to measure; the baseline always runs.
        on_progress: called before each step and at the end.

    Raises:
        BadInput: no tokenizer, a text too short, or a row that does not exist.
    """
    start = time.perf_counter()
    sizes = _sizes(context, quick)
    tokenizer = _tokenizer(model)
    tokens = tokenizer(default_text() if text is None else text).input_ids
    runner = HFModel(model.model, name=model.name)
    trial = _trial(model, tokenizer, runner, tokens, sizes)
    facts = runner.facts
    unchunked = unchunked_batch(sizes.context, sizes.batch, facts.num_heads, available_memory())
    known = specs(sizes.context, sizes.batch, facts.n_ctx_train, unchunked)
    chosen = _chosen(known, rows, quick)
    report = _report(model, runner, text, tokens, sizes, quick)
    curves = _curves(runner, sizes, tokens) if rows is None else {}
    total = len(chosen) + len(curves)
    try:
        _warm_up(runner, trial)
        for i, spec in enumerate(chosen):
            on_progress(Progress(i, total, spec.name, report))
            report.rows.append(_measure_row(spec, trial))
        for i, (name, params) in enumerate(curves.items()):
            label = f"perplexity by position: {name}"
            on_progress(Progress(len(chosen) + i, total, label, report))
            report.curves.append(
                measure_curve(name, runner, params, torch.tensor(tokens[: sizes.curve]))
            )
        on_progress(Progress(total, total, "done", report))
    except KeyboardInterrupt:
        report.complete = False
    report.seconds = time.perf_counter() - start
    return report


def _warm_up(runner: HFModel, trial: Trial) -> None:
    """Read a little untimed: cold pages and starting threads would slow the first row."""
    with Context(runner) as ctx:
        ctx.append(trial.context[:WARM_UP])


def _measure_row(spec: RowSpec, trial: Trial) -> Row:
    """The measured row; one that this model cannot run says why, and the others still run."""
    try:
        return measure(spec, trial)
    except (Unsupported, BadInput, MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
        if spec.name == BASELINE or (isinstance(error, RuntimeError) and not out_of_memory):
            raise
        note = "not enough memory" if out_of_memory else str(error)
        return Row(
            name=spec.name, group=spec.group, options=spec.options(), status="failed", note=note
        )


def _sizes(context: int | None, quick: bool) -> Sizes:
    base = QUICK if quick else FULL
    if context is None:
        return base
    least = 256
    if context < least:
        raise BadInput(f"a comparison needs a context of at least {least} tokens, got {context}.")
    return replace(base, context=context)


def _tokenizer(model: LoadedModel) -> Any:
    if model.tokenizer is None:
        raise BadInput(f"{model.name} has no tokenizer. Give a model that brings one.")
    return model.tokenizer


def _trial(
    model: LoadedModel, tokenizer: Any, runner: HFModel, tokens: list[int], sizes: Sizes
) -> Trial:
    needed = sizes.context + sizes.scored
    if len(tokens) < needed:
        raise BadInput(
            f"the text has {len(tokens)} tokens, but a context of {sizes.context} and "
            f"{sizes.scored} scored tokens need {needed}. Give a longer text or a smaller context."
        )

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    needles = make_needles(sizes.needles)
    hidden = hide(tokens, needles, encode, sizes.context)
    rest = sizes.context - sum(len(encode(n.sentence)) for n in needles)

    @contextmanager
    def heads(kind: str) -> Iterator[Model]:
        convert: Callable[..., AbstractContextManager[object]]
        convert = {"mha": expand_to_mha, "mqa": pool_to_mqa}[kind]
        with convert(model.model):
            yield HFModel(model.model, name=model.name)

    return Trial(
        model=runner,
        context=torch.tensor(hidden),
        continuation=torch.tensor(tokens[rest : rest + sizes.scored]),
        needles=needles,
        encode=encode,
        decode=tokenizer.decode,
        heads=heads,
    )


def _chosen(known: list[RowSpec], names: Sequence[str] | None, quick: bool) -> list[RowSpec]:
    if names is None:
        return [spec for spec in known if spec.quick or not quick]
    wanted = [known[0]]
    for name in names:
        found = [spec for spec in known if name.lower() in spec.name.lower()]
        if not found:
            listed = "; ".join(spec.name for spec in known)
            raise BadInput(f"no row is called {name!r}; expected one of: {listed}.")
        wanted += [spec for spec in found if spec not in wanted]
    return wanted


def _curves(runner: HFModel, sizes: Sizes, tokens: list[int]) -> dict[str, ContextParams]:
    """Curves to measure: none in a quick run, or where the text does not reach that far."""
    past = sizes.curve > runner.facts.n_ctx_train and len(tokens) >= sizes.curve
    if not past:
        return {}
    return position_params(sizes.curve, runner.facts.n_ctx_train, sizes.batch)


def _report(
    model: LoadedModel,
    runner: HFModel,
    text: str | None,
    tokens: list[int],
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
            "head_dim": facts.head_dim,
            "trained_length": facts.n_ctx_train,
            "dtype": str(facts.dtype).removeprefix("torch."),
        },
        text={
            "source": "pydoc_data.topics" if text is None else "a file",
            "tokens": len(tokens),
        },
        settings={
            "n_context": sizes.context,
            "n_scored": sizes.scored,
            "needles": sizes.needles,
            "n_batch": sizes.batch,
            "n_curve": sizes.curve,
            "quick": quick,
        },
        baseline=BASELINE,
    )
