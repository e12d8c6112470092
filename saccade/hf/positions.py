"""How a model of transformers tells positions apart, asked of a model without memory."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.hf.layers import text_config
from saccade.hf.rope import rotary_modules
from saccade.hf.scaled_rotary import SCALED_TYPE, scaled_rotary
from saccade.rope import ParsedRope
from saccade.runtime.params import ContextParams
from saccade.runtime.positions import Positions
from saccade.runtime.rope_options import configured_ropes

_EXTRA_ROWS: Final = 8
"""Tables of learned positions may have a few rows more than positions (OPT has two)."""


def positions_of(model: PreTrainedModel, n_ctx_train: int) -> Positions:
    """Positions of a model, which may be on the meta device.

    Args:
        n_ctx_train: what its config says; a table of so many rows has one for each position.
    """
    config = text_config(model)
    if not any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return Positions(rule=None, limit=_rows(model, n_ctx_train))
    modules = list(rotary_modules(model))
    try:
        ropes = configured_ropes(config, only_known=True)
    except (ValueError, TypeError, AttributeError) as error:
        return Positions(refusal=str(error))
    rope = _scaled_one(ropes)
    refusal = _refusal(modules, config) if modules else "its rotary modules are of no known kind."
    return Positions(rule=rope.rule, base=rope.base, refusal=refusal)


def _scaled_one(ropes: dict[str | None, ParsedRope]) -> ParsedRope:
    """The rule that scaling options change."""
    for kind in (None, SCALED_TYPE):
        if kind in ropes:
            return ropes[kind]
    return next(iter(ropes.values()))


def _refusal(modules: list[nn.Module], config: Any) -> str | None:
    """Why scaling options would be refused: they are tried on modules built anew, with memory."""
    params = ContextParams(rope_scaling_type="linear", rope_freq_scale=0.5)
    for module in modules:
        own: Any = getattr(module, "config", config)
        kind: Any = type(module)
        try:
            with torch.device("cpu"):
                built = kind(own)
        except Exception:  # a class that is built in another way: `attach` will say
            continue
        try:
            scaled_rotary(built, own, params)
        except (Unsupported, ValueError) as error:
            return str(error)
    return None


def _rows(model: PreTrainedModel, n_ctx_train: int) -> int | None:
    """Positions that a table of learned or computed rows has, None where there is no such table."""
    tokens: Any = model.get_input_embeddings()
    words = set() if tokens is None else set(map(id, tokens.parameters()))
    tables = [*model.named_parameters(), *model.named_buffers()]
    for name, table in tables:
        fits = table.dim() == 2 and 0 <= table.shape[0] - n_ctx_train <= _EXTRA_ROWS
        if fits and id(table) not in words and _names_positions(name):
            return n_ctx_train
    return None


def _names_positions(name: str) -> bool:
    """Whether the name of a table says that its rows are positions, as all of transformers do."""
    return "pos" in name or "wpe" in name
