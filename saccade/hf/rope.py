"""RoPE of a loaded model: the rotary tables of a run, and the frequencies in force.

Changing `config.rope_parameters` of a loaded transformers model does nothing: the frequencies
are buffers of its rotary modules.  A run that scales positions has a ScaledRotary for each of them,
which computes angles in float64; `saccade.hf.runs` calls it in place of the module's forward while
that run is in force.  The modules themselves are not replaced.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.hf.layers import text_config
from saccade.hf.rope_options import asks_for_rope, configured_ropes, depends_on_length, scaled
from saccade.hf.rope_tables import FittedRotary, follows_length, pristine, reached, reaching
from saccade.rope import (
    DynamicNTK,
    Frequencies,
    LongRoPE,
    ParsedRope,
    Rule,
    inverse_frequencies,
    tables,
)
from saccade.runtime.params import ContextParams

_SCALED_TYPE: Final = "full_attention"
"""The layer type whose positions are scaled where each type has its own; the others attend only to
a window, which is shorter than the trained length."""


class ScaledRotary:
    """cos and sin of scaled positions; the same call and the same layout as the module's forward.

    Args:
        ropes: base and scaling rule of each layer type; one entry under None where all agree.
        pairs: number of rotated pairs of each layer type.
        layout: "half" `[.., R/2]`, "halves" (the half twice) or "neighbours" (each value twice).
    """

    def __init__(
        self, ropes: dict[str | None, ParsedRope], pairs: dict[str | None, int], layout: str
    ) -> None:
        self.ropes, self.pairs, self.layout = ropes, pairs, layout
        self.positions: Tensor | None = None
        self._fixed = {kind: self.frequencies(kind) for kind in ropes}

    def frequencies(self, kind: str | None = None, seq_len: int | None = None) -> Frequencies:
        """Frequencies of a layer type for a sequence of that length."""
        rope, dim = self.ropes[kind], 2 * self.pairs[kind]
        return inverse_frequencies(rope.rule, base=rope.base, rotary_dim=dim, seq_len=seq_len)

    @property
    def follows_length(self) -> bool:
        """Whether any table changes with the length of the text."""
        return any(depends_on_length(rope.rule) for rope in self.ropes.values())

    @torch.no_grad()
    def __call__(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for positions `[B, L]`, in the dtype of x."""
        kind = layer_type if layer_type in self.ropes else None
        found, self.positions = self._fixed[kind], position_ids
        if depends_on_length(self.ropes[kind].rule):
            length = reached()
            length = int(position_ids.max()) + 1 if length is None else length
            found = self.frequencies(kind, seq_len=length)
        cos, sin = tables(
            found.inv_freq, position_ids.to(x.device), found.attention_factor, dtype=x.dtype
        )
        return _laid_out(cos, self.layout), _laid_out(sin, self.layout)

    def table_key(self, length: int) -> Hashable:
        """Equal for two lengths that have the same tables."""
        return tuple(_table_key(rope.rule, length) for rope in self.ropes.values())


def _table_key(rule: Rule, length: int) -> Hashable:
    if isinstance(rule, DynamicNTK):
        return max(length, rule.original_max_position)
    return isinstance(rule, LongRoPE) and length > rule.original_max_position


def _laid_out(table: Tensor, layout: str) -> Tensor:
    if layout == "half":
        return table
    if layout == "halves":
        return torch.cat((table, table), dim=-1)
    return table.repeat_interleave(2, dim=-1)


Rotary = ScaledRotary | FittedRotary | nn.Module
"""What computes cos and sin: ours, or a rotary module of transformers."""


def run_rotary(model: PreTrainedModel, params: ContextParams) -> dict[nn.Module, Rotary]:
    """Rotary module -> what a run under these params calls instead; empty for the model's own.

    Raises:
        Unsupported: a model without rotary modules, or with some of a kind not known here.
        ValueError: options that do not fit together, or a scaling factor that nothing gives.
    """
    modules = list(rotary_modules(model))
    if not asks_for_rope(params):
        return {module: FittedRotary(module) for module in modules if follows_length(module)}
    if not modules:
        raise Unsupported(
            f"rope options were given, but {type(model).__name__} has no rotary positions that "
            "could be scaled. Leave rope_* and yarn_* unset for this model."
        )
    config = text_config(model)
    return {module: _scaled_rotary(module, config, params) for module in modules}


def rotary_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The rotary modules of the decoder; those of a vision tower have no rope_type."""
    for module in model.modules():
        if hasattr(module, "rope_type") and any("inv_freq" in name for name in module._buffers):
            yield module


def table_key(rotary: Iterable[Rotary], length: int) -> Hashable:
    """Equal for two lengths of a text that have the same tables under `Run.rotary`."""
    return tuple(r.table_key(length) for r in rotary if isinstance(r, ScaledRotary | FittedRotary))


def follow_length(rotary: Iterable[Rotary]) -> bool:
    """Whether any of the tables of a run changes with the length of the text."""
    ours = (module for module in rotary if isinstance(module, ScaledRotary | FittedRotary))
    return any(module.follows_length for module in ours)


def last_length(rotary: Iterable[Rotary]) -> int | None:
    """Largest position of the last call plus 1, where any table depends on it; else None."""
    for module in rotary:
        if isinstance(module, ScaledRotary | FittedRotary) and module.follows_length:
            return None if module.positions is None else int(module.positions.max()) + 1
    return None


def first_rotary(model: PreTrainedModel, in_force: Mapping[nn.Module, Rotary]) -> Rotary:
    """What computes cos and sin in the text decoder under `Run.rotary` of the run in force.

    Raises:
        Unsupported: a model without rotary modules.
    """
    for module in rotary_modules(model):
        return in_force.get(module, module)
    raise Unsupported(f"{type(model).__name__} has no rotary positions.")


def frequencies_of(rotary: Rotary, layer_type: str | None = None) -> Frequencies:
    """The frequencies of a layer type, float64 on the CPU."""
    if isinstance(rotary, ScaledRotary):
        return rotary.frequencies(layer_type if layer_type in rotary.ropes else None)
    rotary = rotary.asked() if isinstance(rotary, FittedRotary) else rotary
    prefix = f"{layer_type}_" if hasattr(rotary, f"{layer_type}_inv_freq") else ""
    inv_freq = getattr(rotary, f"{prefix}inv_freq").double().cpu()
    return Frequencies(inv_freq, float(getattr(rotary, f"{prefix}attention_scaling", 1.0)))


def table_length(rotary: Iterable[Rotary], seen: int, before: int | None) -> int | None:
    """The length whose tables all keys of a cache have, after a call that adds some.

    Args:
        rotary: those in force; seen: tokens in the cache; before: the length of their tables.

    Raises:
        Unsupported: the new keys have other tables than those in the cache.
    """
    rotary = tuple(rotary)
    length = reached() or last_length(rotary)
    if length is None or not seen or before is None:
        return length
    if table_key(rotary, length) == table_key(rotary, before):
        return before
    raise Unsupported(
        "the rotary tables of this model change with the length of the text: the cache holds keys "
        f"of a text of {before} tokens, and this call reaches {length}. Read the whole text in one "
        "call with an empty cache, or use saccade.Context, which reads it again where it has to."
    )


def ropes_in_force(
    model: PreTrainedModel, in_force: Mapping[nn.Module, Rotary]
) -> dict[str | None, ParsedRope]:
    """Base and scaling rule of each layer type, or of all under None; empty without RoPE."""
    config = text_config(model)
    if not any(rotary_modules(model)) or not getattr(config, "rope_parameters", None):
        return {}
    rotary = first_rotary(model, in_force)
    return rotary.ropes if isinstance(rotary, ScaledRotary) else configured_ropes(config)


def rotary_tables(
    model: nn.Module, in_force: Mapping[nn.Module, Rotary], length: int | None = None
) -> list[Frequencies]:
    """What every rotary module computes with, for a text of `length` tokens."""
    found: list[Frequencies] = []
    with reaching(length):
        for module in model.modules():
            if any(name.endswith("inv_freq") for name in module._buffers):
                found += _tables_of(in_force.get(module, module), length)
    return found


def _tables_of(rotary: Rotary, length: int | None) -> list[Frequencies]:
    if isinstance(rotary, ScaledRotary):
        return [rotary.frequencies(kind, length) for kind in rotary.ropes]
    module = rotary.asked() if isinstance(rotary, FittedRotary) else pristine(rotary)
    found: list[Frequencies] = []
    for name, buffer in module._buffers.items():
        if name.endswith("inv_freq") and buffer is not None and buffer.dim() == 1:
            magnitude = getattr(module, f"{name.removesuffix('inv_freq')}attention_scaling", 1.0)
            found.append(Frequencies(buffer.double().cpu(), float(magnitude)))
    return found


def distinct_frequencies(tables: Iterable[Frequencies]) -> list[Tensor]:
    """The frequencies `[R/2]` of the tables, each once."""
    kept: list[Tensor] = []
    for inv_freq, _ in tables:
        if not any(torch.equal(inv_freq, other) for other in kept):
            kept.append(inv_freq)
    return kept


def _scaled_rotary(module: nn.Module, config: Any, params: ContextParams) -> ScaledRotary:
    """What stands in for a rotary module under these params."""
    ropes = configured_ropes(config)
    pairs = {kind: _num_pairs(module, kind) for kind in ropes}
    layout = _layout(module, next(iter(ropes)), pairs[next(iter(ropes))])
    changed = {
        kind: scaled(rope, params, config) if kind in (None, _SCALED_TYPE) else rope
        for kind, rope in ropes.items()
    }
    return ScaledRotary(changed, pairs, layout)


def _num_pairs(module: nn.Module, kind: str | None) -> int:
    return getattr(module, "inv_freq" if kind is None else f"{kind}_inv_freq").numel()


def _layout(module: nn.Module, kind: str | None, pairs: int) -> str:
    """How the module lays out its cos, found by calling a copy of it for one position."""
    probe = pristine(module)  # modules of dynamic rules change their state when called
    device = next(probe.buffers()).device
    x = torch.zeros(1, 1, 2 * pairs, device=device)
    where = torch.ones(1, 1, dtype=torch.int64, device=device)
    answer = probe(x, where) if kind is None else probe(x, where, kind)
    cos = answer[0] if isinstance(answer, tuple) else None
    if cos is not None and cos.shape[-1] == pairs:
        return "half"
    if cos is not None and cos.shape[-1] == 2 * pairs:
        return "halves" if torch.equal(cos[..., :pairs], cos[..., pairs:]) else "neighbours"
    raise Unsupported(
        f"{type(module).__name__} does not return cos and sin tables for {pairs} pairs, so its "
        "positions cannot be scaled here. Leave rope_* and yarn_* unset for this model."
    )
