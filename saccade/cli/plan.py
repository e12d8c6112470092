"""`saccade plan`: will it fit? Answered from a model's config, before anything is loaded."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saccade.cli.context_options import add_context_options, context_params, in_flags
from saccade.cli.failure import need
from saccade.cli.parser import UsageError, whole_number
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


def add_arguments(parser: ArgumentParser) -> None:
    """The options of `saccade plan`."""
    parser.add_argument(
        "--model", "-m", metavar="PATH|NAME", required=True,
        help="a .gguf file, a folder saved by transformers, or a name (smollm2); only its config "
        "is read",
    )  # fmt: skip
    parser.add_argument(
        "--context", metavar="N", type=whole_number(1),
        help="tokens in context (default: --ctx-size, or what the model was trained for)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", metavar="SIZE", type=size, help="say which settings fit into this (8GiB)"
    )
    add_context_options(parser)


def size(text: str) -> int:
    """The type of an option that takes an amount of memory."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: Namespace) -> int:
    """Plan and print."""
    params = context_params(args)
    need("transformers", purpose="saccade plan")
    from saccade.core import BadInput, Unsupported
    from saccade.hf.plan import plan

    try:
        made = plan(args.model, params, args.context)
        print(made)
        if args.memory is not None:
            print(f"\nIn {as_bytes(args.memory)}, {made.n_ctx:,} tokens of context:\n")
            print(fitting_table(made.what_fits(args.memory)))
    except (BadInput, Unsupported) as error:
        raise UsageError(in_flags(str(error))) from error
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
