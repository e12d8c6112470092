"""`saccade plan`: will it fit? Answered from a model's config, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli import shared_options
from saccade.cli.failure import UsageError, need
from saccade.cli.values import whole_number
from saccade.units import as_bytes, parse_bytes

if TYPE_CHECKING:
    from saccade.runtime.plan import Fit

EXAMPLES = """examples:
  saccade plan --model smollm2 --context 8192
  saccade plan -m model.gguf --context 131072 --memory 8GiB
  saccade plan -m folder --context 32768 -ctk int8 -ctv int8 --memory 16GiB
"""
NOT_COUNTED = (
    "Not counted: the hidden states of a chunk, PyTorch itself, and the copy that a growing cache "
    "makes of one layer."
)


@shared_options.takes(context=shared_options.CONTEXT)
def run(
    model: shared_options.Model,
    length: Annotated[Any, typer.Option(
        "--context", metavar="N", parser=whole_number(1),
        help="tokens in context (default: --ctx-size, or what the model was trained for)",
    )] = None,
    memory: Annotated[Any, typer.Option(
        "--memory", metavar="SIZE", parser=parse_bytes,
        help="say which settings fit into this (8GiB)",
    )] = None,
    *,
    context: shared_options.Values,
) -> int:  # fmt: skip
    """How much memory a model will need, from its config, before it is loaded."""
    params = shared_options.context_params(context)
    need("transformers", purpose="saccade plan")
    from saccade.core import BadInput, Unsupported
    from saccade.hf.plan import plan

    try:
        made = plan(model, params, length)
        print(made)
        if memory is not None:
            print(f"\nIn {as_bytes(memory)}, {made.n_ctx:,} tokens of context:\n")
            print(fitting_table(made.what_fits(memory)))
    except (BadInput, Unsupported) as error:
        raise UsageError(shared_options.with_flags(str(error))) from error
    print(f"\n{NOT_COUNTED}")
    return 0


def fitting_table(fits: Sequence[Fit]) -> str:
    """What fits and what does not, a line each."""
    rows = [("setting", "needs", "fits", "longest context")]
    for fit in fits:
        longest = "any length" if fit.longest is None else f"{fit.longest:,} tokens"
        rows.append((fit.setting, as_bytes(fit.needed), "yes" if fit.fits else "no", longest))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for setting, needs, verdict, longest in rows:
        lines.append(
            f"{setting:<{widths[0]}}  {needs:>{widths[1]}}  {verdict:<{widths[2]}}  "
            f"{longest:>{widths[3]}}"
        )
    return "\n".join(lines)
