"""`saccade plan`: which options make this context run in this memory, how fast, at what cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli import shared_options
from saccade.cli.advice import as_json, as_text
from saccade.cli.failure import UsageError, need
from saccade.cli.lengths import length as tokens
from saccade.cli.loading import as_options, check_model
from saccade.cli.outputs import check_outputs, file_option
from saccade.units import parse_bytes

if TYPE_CHECKING:
    from saccade.advice.recommend import Advice
    from saccade.runtime.params import ContextParams
    from saccade.runtime.plan_blueprint import Blueprint

EXAMPLES = """examples:
  saccade plan --model smollm2 --context 32k --memory 2GiB
  saccade plan -m model.gguf --context 131072 --memory 24GiB --device cuda
  saccade plan -m folder --context 64k --json
  saccade plan -m smollm2 --context 4k --memory 1GiB --measure --svg a.svg
"""


@shared_options.takes(context=shared_options.CONTEXT)
def run(
    model: shared_options.Model,
    device: shared_options.Device = "auto",
    dtype: shared_options.DType = "auto",
    weights: Annotated[Any, shared_options.WEIGHTS_OPTION] = None,
    length: Annotated[Any, typer.Option(
        "--context", metavar="N", parser=tokens,
        help="tokens to hold, such as 32768 or 32k (default: --ctx-size, or the trained length)",
    )] = None,
    memory: Annotated[Any, typer.Option(
        "--memory", metavar="SIZE", parser=parse_bytes,
        help="what may be used, with its unit: 8GiB (default: what is available on the device)",
    )] = None,
    measure: Annotated[bool, typer.Option(
        "--measure", help="load the model and try the settings that fit, a short run each",
    )] = False,
    svg: Annotated[str | None, file_option("--svg", "with --measure: the picture of it")] = None,
    html: Annotated[str | None, file_option("--html", "the same as a page")] = None,
    as_json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    *,
    context: shared_options.Values,
) -> int:  # fmt: skip
    """One command that holds this context in this memory, with its memory, speed and quality.

    Nothing is loaded: sizes come from the model's header, times from a measurement of this machine
    that is made once. The exit code is 2 where nothing fits.
    """
    check_model(model)
    if context["n_draft"] is not None:
        raise UsageError(
            "--draft changes no memory beyond that of --sparse, which is counted: leave it out."
        )
    params = shared_options.context_params(context)
    if (svg or html) and not measure:
        raise UsageError("--svg and --html draw what --measure measures. Add --measure.")
    check_outputs({"--svg": svg, "--html": html})
    from saccade.core import BadInput, Unsupported

    try:
        advice = _advice(
            model, device, dtype, weights, length, memory, params,
            chunked=context["n_batch"] is not None,
        )  # fmt: skip
        said = {"model": model, "device": device, "dtype": dtype, "weights": weights or "file"}
        trials = _measured(said, advice, (svg, html)) if measure else []
    except (BadInput, Unsupported) as error:
        raise UsageError(as_options(shared_options.with_flags(str(error), context))) from error
    if as_json_:
        print(json.dumps(as_json(advice, said, trials), indent=1))
    else:
        print(as_text(advice, said, trials))
    return 0 if advice.chosen else 2


def _advice(
    model: str, device: str, dtype: str, weights: str | None, length: int | None,
    memory: int | None, params: ContextParams, *, chunked: bool,
) -> Advice:  # fmt: skip
    import torch

    from saccade.advice.machine import machine
    from saccade.advice.recommend import advise

    wanted = shared_options.DTYPES[dtype]
    where = machine(device, memory)
    asked = None if wanted is None else getattr(torch, wanted)
    found = blueprint(model, asked, weights or "file", where.kind)
    if length is not None and params.n_ctx not in (None, length):
        raise UsageError(
            f"--context {length} and --ctx-size {params.n_ctx} both say how many tokens. Give one."
        )
    held = length or params.n_ctx or found.facts.n_ctx_train
    params = replace(params, n_ctx=None)  # the recommendation sets it where it has to be
    return advise(found, params, held, where, chunk_is_asked=chunked, may_round=weights is None)


def blueprint(model: str, dtype: Any, weights: str, device: str) -> Blueprint:
    """Sizes of a model, by transformers where its files alone do not tell.

    Raises:
        BadInput, Unsupported: no model, one that cannot be planned, or weights of a form that
            excludes the dtype.
    """
    import torch

    from saccade.runtime.located import located
    from saccade.runtime.plan_files import blueprint_of
    from saccade.runtime.weights import held_as

    path = located(model)
    held, dtype = held_as(weights, dtype, device, is_folder=path.is_dir())
    found = blueprint_of(path, dtype, torch.float32)
    if found is None:
        need("transformers", purpose="saccade plan")
        from saccade.hf.plan import blueprint as described

        found = described(path, dtype)
    return found.holding(held)


def _measured(
    said: dict[str, str], advice: Advice, files: tuple[str | None, str | None]
) -> list[Any]:
    """What the settings that fit took on the model itself, drawn to files."""
    need("transformers", purpose="saccade plan --measure")
    from saccade.advice.trials import page, picture, trials
    from saccade.cli.loading import load
    from saccade.report.files import write_whole

    found: list[Any] = []
    for weights, some in advice.by_weights(said["weights"]):
        found += trials(load(said["model"], said["device"], said["dtype"], weights), some)
    for name, draw in zip(files, (picture, page), strict=True):
        if name is not None:
            write_whole(Path(name).expanduser(), draw(found))
    return found
