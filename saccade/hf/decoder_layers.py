"""Which decoders of transformers the C++ step computes, and how it is told of their layers.

Only classes whose source was read (`allowlist.json`) are described, with plain or packed weights
and without hooks, adapters or forwards of their own.  What the description rests on is noted
(`Unchanged`), so a model that is changed while a Context is open runs as transformers runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from operator import contains, is_
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, activations

from saccade.hf.allowlist import kind_of
from saccade.hf.fused_layers import is_linear, is_untouched
from saccade.hf.fused_norms import EPS
from saccade.hf.layers import layer_kinds
from saccade.hf.packed_layers import HalfLinear, PackedLinear
from saccade.hf.split_forward import is_watched
from saccade.ops.attention.cpu.binding import record
from saccade.ops.linear import PackedWeight
from saccade.ops.linear.native import record_packed

PLAIN_ATTENTION: Final = frozenset(
    f"{name}Attention"
    for name in ("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "SeedOss", "Cwm", "Gemma")
) | {"Gemma2Attention", "Gemma3Attention"}
"""Listed attention classes that are q, k, v = proj(x), norms of each head where they have them,
RoPE, cache, attention, o_proj: nothing between, no gate, no multiplier."""

CAPPED: Final = ("Gemma2Attention",)
"""Those that give `attn_logit_softcapping` to attention; Gemma 3 has the attribute alone."""

_ACTIVATIONS: Final[dict[type, int]] = {
    nn.SiLU: 0,
    activations.SiLUActivation: 0,
    activations.GELUTanh: 1,
}
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


class NotDescribed(Exception):
    """The C++ step does not compute this model."""


class Unchanged:
    """What a description rests on; `holds` says whether all of it is still so.

    It is asked for every token, of a thousand objects: the loops are those of built-in functions.
    """

    def __init__(self) -> None:
        self._empty: list[dict[Any, Any]] = []
        self._owners: list[dict[str, Any]] = []
        self._parts: list[Any] = []
        self._attributes: list[dict[str, Any]] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []

    def module(self, module: Any, *, own_forward: bool = False) -> None:
        """A module without hooks, whose parts and parameters are those that it has now."""
        if not own_forward:
            self._attributes.append(vars(module))
        self._empty += [module._forward_hooks, module._forward_pre_hooks]
        for owner in (module._modules, module._parameters, module._buffers):
            (self._owners if owner else self._empty).append(owner)
            self._parts += owner.values()
        tensors = [each for each in module._parameters.values() if each is not None]
        self._tensors += tensors
        self._addresses += map(Tensor.data_ptr, tensors)

    def holds(self) -> bool:
        """Whether nothing has changed."""
        parts = chain.from_iterable(map(dict.values, self._owners))
        return (
            not any(self._empty)
            and sum(map(len, self._owners)) == len(self._parts)
            and all(map(is_, parts, self._parts))
            and not any(map(contains, self._attributes, repeat("forward")))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
        )


@dataclass(frozen=True, slots=True)
class Described:
    """A decoder as `saccade._cpu.Decoder` takes it.

    Attributes:
        hidden: width of the residual stream.
        layers, norm, head: arguments of the constructor.
        windows: the model's own window of each layer.
        attention: the attention module of each layer.
        softcap: of the logits, None for none.
        unchanged, unchanged_head: what the layers rest on, and what the logits do.
    """

    hidden: int
    layers: list[tuple[Any, ...]]
    norm: tuple[Any, ...]
    head: tuple[Any, ...]
    windows: tuple[int | None, ...]
    attention: list[Any]
    softcap: float | None
    unchanged: Unchanged
    unchanged_head: Unchanged


def describe(model: PreTrainedModel, forward: Any = None) -> Described | None:
    """How the C++ step computes this model; None where it does not.

    Args:
        forward: of ours, which the decoder may have in place of its class's.
    """
    try:
        return _describe(model, forward)
    except NotDescribed:
        return None


def _describe(model: Any, forward: Any) -> Described:
    decoder = getattr(model, "model", None)
    _require(kind_of(type(model)) == "causal_lm" and kind_of(type(decoder)) == "decoder")
    assert decoder is not None
    config = model.config
    _require(not getattr(config, "use_bidirectional_attention", False))
    _require(vars(decoder).get("forward", forward) is forward or is_watched(model, decoder))
    unchanged, unchanged_head = Unchanged(), Unchanged()
    unchanged.module(model)
    unchanged.module(decoder, own_forward=True)
    unchanged.module(decoder.layers)
    layers = list(decoder.layers)[: config.num_hidden_layers]
    windows = tuple(kind.window for kind in layer_kinds(config))
    _require(len(layers) == len(windows) and all(kind.keys for kind in layer_kinds(config)))
    described = [_layer(each, windows[i], i) for i, each in enumerate(layers)]
    for each in layers:
        for part in each.modules():
            unchanged.module(part)
    unchanged.module(decoder.norm)
    unchanged_head.module(model)
    for part in model.lm_head.modules():
        unchanged_head.module(part)
    _require(unchanged.holds() and unchanged_head.holds())
    return Described(
        hidden=config.hidden_size,
        layers=described,
        norm=_norm(decoder.norm),
        head=_weight(model.lm_head),
        windows=windows,
        attention=[each.self_attn for each in layers],
        softcap=getattr(config, "final_logit_softcapping", None),
        unchanged=unchanged,
        unchanged_head=unchanged_head,
    )


def _require(condition: bool) -> None:
    if not condition:
        raise NotDescribed


def _layer(layer: Any, window: int | None, index: int) -> tuple[Any, ...]:
    """One layer: (heads, kv_heads, head_dim, inner, activation, scale, softcap, norms, weights)."""
    attention, mlp = layer.self_attn, layer.mlp
    _require(type(attention).__name__ in PLAIN_ATTENTION)
    _require(kind_of(type(attention)) == "attention" and kind_of(type(mlp)) == "gated_mlp")
    _require(attention.layer_idx == index and attention.is_causal)
    _require(getattr(attention, "sliding_window", window) == window)
    dim, act = attention.head_dim, _ACTIVATIONS.get(type(mlp.act_fn))
    _require(act is not None and dim % 2 == 0)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    linears = (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    heads, kv_heads = (linear.out_features // dim for linear in projections[:2])
    capped = type(attention).__name__ in CAPPED
    softcap = (attention.attn_logit_softcapping if capped else None) or 0.0
    sizes = (heads, kv_heads, dim, mlp.gate_proj.out_features, act)
    norms = (*_norms(layer), *_head_norms(attention))
    weights = tuple(_weight(linear) for linear in linears)
    return (*sizes, float(attention.scaling), float(softcap), norms, weights)


def _norms(layer: Any) -> Iterator[tuple[Any, ...] | None]:
    """Norms before and behind attention, before and behind the MLP."""
    kind = kind_of(type(layer))
    if kind == "decoder_layer":
        yield from (_norm(layer.input_layernorm), None)
        yield from (_norm(layer.post_attention_layernorm), None)
        return
    _require(kind == "sandwich_layer")
    yield from (_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm))
    yield _norm(layer.pre_feedforward_layernorm)
    yield _norm(layer.post_feedforward_layernorm)


def _head_norms(attention: Any) -> Iterator[tuple[Any, ...] | None]:
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        yield None if norm is None else _norm(norm)
        _require(norm is None or norm.weight.shape == (attention.head_dim,))


def _norm(norm: Any) -> tuple[Any, ...]:
    """(weight, eps, whether 1 is added to the weight)."""
    kind = kind_of(type(norm))
    _require(kind in EPS)
    assert kind is not None
    return _record(norm.weight), float(getattr(norm, EPS[kind])), kind == "rms_norm_plus_one"


def _weight(linear: Any) -> tuple[Any, ...]:
    """(matrix, bias or None)."""
    return _matrix(linear), None if linear.bias is None else _record(linear.bias)


def _matrix(linear: Any) -> tuple[Any, ...]:
    """The weight of a linear layer: plain, or as it is stored."""
    if is_linear(linear):
        _require(linear.weight.is_contiguous())
        return _record(linear.weight)
    _require(type(linear) in (PackedLinear, HalfLinear) and is_untouched(linear))
    stored = linear.packed
    if isinstance(stored, PackedWeight):
        _require(stored.qdata.is_cpu)
        return record_packed(stored)
    _require(stored.values.is_contiguous())
    return _record(stored.values)


def _record(x: Tensor) -> tuple[Any, ...]:
    _require(x.device.type == "cpu" and x.dtype in _FLOATS and type(x.data) is Tensor)
    return record(x)
