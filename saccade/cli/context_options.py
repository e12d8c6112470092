"""ContextParams as command-line options, in the spelling of llama.cpp where it has one.

One table: adding a field of ContextParams is one line here, and a test finds what is missing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saccade.cli.parser import UsageError, number, whole_number

if TYPE_CHECKING:
    from saccade.runtime.params import ContextParams

_ON_OFF = {"on": "enabled", "off": "disabled"}


def _flash_attn(text: str) -> str:
    return _ON_OFF.get(text, text)


def _switch(text: str) -> bool:
    if text not in _ON_OFF:
        raise argparse.ArgumentTypeError(f"expected on or off, got {text!r}")
    return text == "on"


def _budget(text: str) -> int | float:
    """A share where it has a point or a per cent sign, else tokens."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected tokens (512) or a share (0.25 or 25%), got {text!r}"
        ) from None


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        flags: spellings, the one to show in messages first.
        field: of ContextParams.
        parse: text to value; choices: values it may have.
    """

    flags: tuple[str, ...]
    field: str
    parse: Callable[[str], Any]
    help: str
    choices: tuple[str, ...] | None = None
    metavar: str | None = "N"


OPTIONS = (
    Option(("--ctx-size", "-c"), "n_ctx", whole_number(1),
           "most tokens in context (default: what the model was trained for)"),
    Option(("--batch-size", "-b"), "n_batch", whole_number(1),
           "most tokens read in one step (default: 512)"),
    Option(("--flash-attn", "-fa"), "flash_attn", _flash_attn,
           "auto, enabled (or on), disabled (or off: materialised scores)",
           ("auto", "enabled", "disabled"), None),
    Option(("--cache-type-k", "-ctk", "--type-k"), "type_k", str, "storage of keys",
           ("f32", "bf16", "f16", "int8", "int4", "fp8"), None),
    Option(("--cache-type-v", "-ctv", "--type-v"), "type_v", str, "storage of values",
           ("f32", "bf16", "f16", "int8", "int4", "fp8"), None),
    Option(("--page-size",), "page_size", whole_number(1),
           "keep keys in pages of N tokens instead of one buffer"),
    Option(("--kv-offload",), "offload_kqv", _switch,
           "off keeps keys in host memory, fetched layer by layer (default: on)", None, "on|off"),
    Option(("--rope-scaling",), "rope_scaling_type", str, "how positions are stretched",
           ("none", "linear", "ntk", "dynamic", "yarn"), None),
    Option(("--rope-freq-base",), "rope_freq_base", number, "base of the rotary frequencies"),
    Option(("--rope-freq-scale",), "rope_freq_scale", number, "1 / factor of the stretch"),
    Option(("--yarn-orig-ctx",), "yarn_orig_ctx", whole_number(1),
           "length the model was trained for before stretching"),
    Option(("--yarn-ext-factor",), "yarn_ext_factor", number,
           "1 mixes in unscaled high frequencies, 0 interpolates them all"),
    Option(("--yarn-attn-factor",), "yarn_attn_factor", number, "magnitude of the rotary tables"),
    Option(("--yarn-beta-fast",), "yarn_beta_fast", number, "upper bound of the ramp, in turns"),
    Option(("--yarn-beta-slow",), "yarn_beta_slow", number, "lower bound of the ramp, in turns"),
    Option(("--keep",), "n_keep", whole_number(0),
           "when the context is full, keep the first N tokens and forget half of the rest"),
    Option(("--swa",), "n_swa", whole_number(1),
           "window: a token sees the last N tokens, itself counted"),
    Option(("--sinks",), "n_sinks", whole_number(0),
           "first tokens that stay visible outside the window"),
    Option(("--ctx-checkpoints",), "ctx_checkpoints", whole_number(0),
           "positions that sliding layers can be taken back to (default: 0)"),
    Option(("--sparse",), "sparse", str, "read only chosen blocks of keys",
           ("strided", "block_topk"), None),
    Option(("--kv-policy",), "kv_policy", str,
           "how the cache is compressed after the prompt: snapkv, ada_snapkv", None, "NAME"),
    Option(("--kv-budget",), "kv_budget", _budget,
           "what it keeps of the prompt: tokens (512) or a share (0.25, 25%%)", None, "N|SHARE"),
    Option(("--backend",), "backend", str,
           "the attention backend by name, which never falls back", None, "NAME"),
    Option(("--fused-layers",), "fused_layers", _switch,
           "fused norms, linear layers and MLPs (default: on for a GPU)", None, "on|off"),
)  # fmt: skip


def add_context_options(parser: argparse.ArgumentParser) -> None:
    """Add all of OPTIONS, and `--rope-scale`, the other way to say `--rope-freq-scale`."""
    group = parser.add_argument_group("context options")
    for option in OPTIONS:
        group.add_argument(
            *option.flags,
            dest=option.field,
            type=option.parse,
            choices=option.choices,
            metavar=option.metavar,
            help=option.help,
        )
        if option.field == "rope_scaling_type":
            group.add_argument(
                "--rope-scale", type=number, metavar="FACTOR", help="factor of the stretch"
            )


def context_params(args: argparse.Namespace) -> ContextParams:
    """The ContextParams that were asked for.

    Raises:
        UsageError: options that contradict each other, in the words of the command line.
    """
    from saccade.runtime.params import ContextParams
    from saccade.sparse import PATTERNS

    given = {option.field: getattr(args, option.field) for option in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if "sparse" in given:
        given["sparse"] = PATTERNS[given["sparse"]]()
    if args.rope_scale is not None:
        if "rope_freq_scale" in given:
            raise UsageError("--rope-scale and --rope-freq-scale say the same thing. Give one.")
        if args.rope_scale < 1:
            raise UsageError(f"--rope-scale is a factor of at least 1, got {args.rope_scale:g}.")
        given["rope_freq_scale"] = 1 / args.rope_scale
    try:
        return ContextParams(**given)
    except ValueError as error:
        raise UsageError(in_flags(str(error))) from error


def in_flags(message: str) -> str:
    """A message about fields of ContextParams, about options instead."""
    for option in OPTIONS:
        if "_" in option.field:  # the others are words of English too
            message = re.sub(rf"(?<![\w-]){option.field}\b", option.flags[0], message)
    return message
