"""Stretching the rotary positions of a loaded model, and putting them back.

Changing `config.rope_parameters` of a loaded transformers model does nothing: the frequencies
live in its rotary modules.  Here those modules are exchanged for ScaledRotary, which turns
positions into angles in float64, and the very same modules are put back on exit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.cache import ShiftKeys
from saccade.core import Unsupported
from saccade.hf.layers import text_config
from saccade.rope import (
    DynamicNTK,
    Frequencies,
    Linear,
    LongRoPE,
    NTKAware,
    ParsedRope,
    Unscaled,
    YaRN,
    inverse_frequencies,
    parse,
    shift_keys,
    tables,
)
from saccade.rope.rules import Rule
from saccade.runtime.params import ContextParams

_SCALED_TYPE: Final = "full_attention"
"""The layer type whose positions are stretched where each type has its own; the others see only a
window, which training has covered."""

_YARN_OPTIONS: Final = {
    "yarn_ext_factor": "ext_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


class ScaledRotary(nn.Module):
    """A rotary module with our frequencies; same call and same layout of cos and sin as before.

    Args:
        ropes: what each layer type turns by; one entry under None where all layers agree.
        pairs: number of turning pairs of each layer type.
        layout: "half" `[.., R/2]`, "halves" (the half twice) or "neighbours" (each value twice).
    """

    def __init__(
        self, ropes: dict[str | None, ParsedRope], pairs: dict[str | None, int], layout: str
    ) -> None:
        super().__init__()
        self.ropes, self.pairs, self.layout = ropes, pairs, layout
        self._fixed = {kind: self.frequencies(kind) for kind in ropes}

    def frequencies(self, kind: str | None = None, seq_len: int | None = None) -> Frequencies:
        """Frequencies of a layer type for a sequence of that length."""
        rope, dim = self.ropes[kind], 2 * self.pairs[kind]
        return inverse_frequencies(rope.rule, base=rope.base, rotary_dim=dim, seq_len=seq_len)

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for positions `[B, L]`, in the dtype of x."""
        kind = layer_type if layer_type in self.ropes else None
        found = self._fixed[kind]
        if isinstance(self.ropes[kind].rule, DynamicNTK | LongRoPE):
            found = self.frequencies(kind, seq_len=int(position_ids.max()) + 1)
        cos, sin = tables(
            found.inv_freq, position_ids.to(x.device), found.attention_factor, dtype=x.dtype
        )
        return _laid_out(cos, self.layout), _laid_out(sin, self.layout)


def _laid_out(table: Tensor, layout: str) -> Tensor:
    if layout == "half":
        return table
    if layout == "halves":
        return torch.cat((table, table), dim=-1)
    return table.repeat_interleave(2, dim=-1)


@dataclass(frozen=True, slots=True)
class _Place:
    """A rotary module and where it hangs."""

    parent: nn.Module
    name: str
    module: nn.Module


@contextmanager
def scaled_rope(model: PreTrainedModel, params: ContextParams) -> Iterator[None]:
    """The model with the rotary positions that the params ask for; restored on exit.

    Args:
        params: `rope_*` and `yarn_*` options and `n_ctx`; nothing happens if all are None.

    Raises:
        Unsupported: a model without rotary modules, or with some of a kind not known here.
        ValueError: options that do not fit together, or a scaling factor nobody gives.
    """
    if not asks_for_rope(params):
        yield
        return
    config = text_config(model)
    places = _places(model)
    if not places:
        raise Unsupported(
            f"rope options were given, but {type(model).__name__} has no rotary positions that "
            "could be scaled. Leave rope_* and yarn_* unset for this model."
        )
    exchanged = [(place, _rebuilt(place.module, config, params)) for place in places]
    try:
        for place, module in exchanged:
            setattr(place.parent, place.name, module)
        yield
    finally:
        for place, _ in exchanged:
            setattr(place.parent, place.name, place.module)


def asks_for_rope(params: ContextParams) -> bool:
    """Whether any option changes the rotary positions (n_ctx alone does not)."""
    names = ("rope_scaling_type", "rope_freq_base", "rope_freq_scale", *_YARN_OPTIONS)
    return any(getattr(params, name) is not None for name in names)


def rotary_frequencies(model: PreTrainedModel, layer_type: str | None = None) -> Frequencies:
    """What the model turns by now, float64 on the CPU.

    Args:
        layer_type: for models whose layer types have frequencies of their own.

    Raises:
        Unsupported: a model without rotary modules.
    """
    module = _first(model).module
    if isinstance(module, ScaledRotary):
        return module.frequencies(layer_type if layer_type in module.ropes else None)
    prefix = f"{layer_type}_" if hasattr(module, f"{layer_type}_inv_freq") else ""
    inv_freq = getattr(module, f"{prefix}inv_freq").double().cpu()
    return Frequencies(inv_freq, float(getattr(module, f"{prefix}attention_scaling", 1.0)))


def describe_rope(model: PreTrainedModel) -> dict[str, str]:
    """The rotary rule in force for each layer type, in words; nothing for models without one."""
    config = text_config(model)
    if not _places(model) or not getattr(config, "rope_parameters", None):
        return {}
    module = _first(model).module
    ropes = module.ropes if isinstance(module, ScaledRotary) else configured_ropes(config)
    return {f"rope of {kind or 'all'} layers": str(rope) for kind, rope in ropes.items()}


def key_shifter(model: PreTrainedModel, layer_type: str | None = None) -> ShiftKeys:
    """The function that moves cached keys `[B, Hkv, n, D]` by a number of positions.

    Raises:
        Unsupported: no rotary modules, or frequencies that change with the length.
    """
    module = _first(model).module
    own = layer_type if hasattr(module, f"{layer_type}_inv_freq") else None
    if isinstance(module, ScaledRotary):
        own, layout = (layer_type if layer_type in module.ropes else None), module.layout
        changing = isinstance(module.ropes[own].rule, DynamicNTK | LongRoPE)
    else:
        kind: Any = module.rope_type
        changing = (kind if own is None else kind[own]) in ("dynamic", "longrope")
        name = "inv_freq" if own is None else f"{own}_inv_freq"
        layout = _layout(module, own, getattr(module, name).numel())
    if changing:
        raise Unsupported(
            "cached keys cannot be moved: the rotary frequencies of this model change with the "
            "length. Use yarn, ntk or linear scaling with n_keep."
        )
    inv_freq = rotary_frequencies(model, layer_type).inv_freq
    return partial(_shifted, inv_freq=inv_freq, interleaved=layout == "neighbours")


def _shifted(k: Tensor, delta: int, *, inv_freq: Tensor, interleaved: bool) -> Tensor:
    return shift_keys(k, inv_freq, delta, interleaved=interleaved)


def _first(model: PreTrainedModel) -> _Place:
    places = _places(model)
    if not places:
        raise Unsupported(f"{type(model).__name__} has no rotary positions.")
    return places[0]


def _places(model: nn.Module) -> list[_Place]:
    """The rotary modules of the decoder; those of a vision tower have no rope_type."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, ScaledRotary) or (
            hasattr(module, "rope_type") and any("inv_freq" in name for name in module._buffers)
        ):
            parent, _, name = path.rpartition(".")
            found.append(_Place(model.get_submodule(parent), name, module))
    return found


def _rebuilt(module: nn.Module, config: Any, params: ContextParams) -> ScaledRotary:
    """The module that takes the place of `module` under these params."""
    if isinstance(module, ScaledRotary):  # attached twice: the params of the inner one win
        ropes, pairs, layout = module.ropes, module.pairs, module.layout
    else:
        ropes = configured_ropes(config)
        pairs = {
            kind: getattr(module, "inv_freq" if kind is None else f"{kind}_inv_freq").numel()
            for kind in ropes
        }
        layout = _layout(module, next(iter(ropes)), pairs[next(iter(ropes))])
    changed = {
        kind: scaled(rope, params, config) if kind in (None, _SCALED_TYPE) else rope
        for kind, rope in ropes.items()
    }
    return ScaledRotary(changed, pairs, layout)


def configured_ropes(config: Any) -> dict[str | None, ParsedRope]:
    """The rule of each layer type, or of all layers under None, as the config says."""
    given: Mapping[str, Any] = config.rope_parameters
    nested = any(isinstance(value, Mapping) for value in given.values())
    parts: dict[str | None, Any] = {**given} if nested else {None: given}
    return {
        kind: parse(
            part,
            max_position_embeddings=config.max_position_embeddings,
            original_max_position_embeddings=getattr(
                config, "original_max_position_embeddings", None
            ),
        )
        for kind, part in parts.items()
        if part is not None
    }


def _layout(module: nn.Module, kind: str | None, pairs: int) -> str:
    """How the module lays out its cos, found by asking a copy of it for one position."""
    probe = copy.deepcopy(module)  # modules of dynamic rules change their state when called
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


def scaled(rope: ParsedRope, params: ContextParams, config: Any) -> ParsedRope:
    """The model's own rule changed as the params say.

    Raises:
        ValueError: yarn options for another rule, or a factor that nothing determines.
    """
    trained = params.yarn_orig_ctx or _trained(rope.rule, config.max_position_embeddings)
    rule = _rule(rope.rule, params, trained)
    yarn = {
        theirs: getattr(params, ours)
        for ours, theirs in _YARN_OPTIONS.items()
        if getattr(params, ours) is not None
    }
    if yarn and not isinstance(rule, YaRN):
        raise ValueError(
            f"yarn options need rope_scaling_type='yarn', but the rule in force is "
            f"{type(rule).__name__}. Set it, or leave the yarn_* options unset."
        )
    base = rope.base if params.rope_freq_base is None else params.rope_freq_base
    return rope._replace(rule=replace(rule, **yarn), base=float(base))


def _rule(own: Rule, params: ContextParams, trained: int) -> Rule:
    """The scaling rule, yarn options apart."""
    kind = params.rope_scaling_type
    if kind == "none":
        return Unscaled()
    if kind is None and params.rope_freq_scale is None:
        return own
    factor = _factor(params, trained, kind or "linear")
    if kind is None:
        return _refactored(own, factor)
    return _named(kind, own, factor, trained)


def _refactored(own: Rule, factor: float) -> Rule:
    """The model's own rule with another factor; plain interpolation where it has none."""
    if isinstance(own, Linear | NTKAware | DynamicNTK | YaRN):
        return replace(own, factor=factor)
    if isinstance(own, Unscaled):
        return Linear(factor=factor)
    raise ValueError(
        f"rope_freq_scale cannot be applied to the model's own {type(own).__name__} scaling. "
        "Set rope_scaling_type too."
    )


def _named(kind: str, own: Rule, factor: float, trained: int) -> Rule:
    """The rule of that name."""
    if kind == "linear":
        return Linear(factor=factor)
    if kind == "ntk":
        return NTKAware(factor=factor)
    if kind == "dynamic":
        return DynamicNTK(factor=factor, original_max_position=trained)
    if isinstance(own, YaRN):  # keeps what this model was trained with: ramp, mscale, truncate
        return replace(own, factor=factor, original_max_position=trained)
    return YaRN(factor=factor, original_max_position=trained)


def _trained(own: Rule, served: int) -> int:
    """Length the model was trained for before any scaling."""
    if isinstance(own, Linear):
        return max(2, round(served / own.factor))
    return getattr(own, "original_max_position", served)


def _factor(params: ContextParams, trained: int, kind: str) -> float:
    if params.rope_freq_scale is not None:
        return 1.0 / params.rope_freq_scale
    if params.n_ctx is None:
        raise ValueError(
            f"rope_scaling_type={kind!r} needs to know how far to stretch: set n_ctx (beyond the "
            f"{trained} tokens of training) or rope_freq_scale."
        )
    return max(1.0, params.n_ctx / trained)
