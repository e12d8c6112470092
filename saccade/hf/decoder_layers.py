"""Which decoders of transformers the C++ step computes, and how it is told of their layers.

Only classes whose source was read (`allowlist.json`) are described, with plain or packed weights
and without hooks, adapters or forwards of their own.  What the description rests on is noted
(`Unchanged`), so a model that is changed while a Context is open runs as transformers runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from saccade.ops.linear.packed import BLOCK_ROWS

_PLAIN: Final = (
    *("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "SeedOss", "Cwm", "SmolLM3"),
    *("Gemma", "Gemma2", "Gemma3", "Granite", "Olmo2", "Olmo3", "Phi3"),
)
PLAIN_ATTENTION: Final = frozenset(f"{name}Attention" for name in _PLAIN)
"""Listed attention classes that are q, k, v = proj(x), norms of each head or of all where they have
them, RoPE but where `use_rope` is false, cache, attention, o_proj: nothing between, no gate."""

CAPPED: Final = ("Gemma2Attention",)
"""Those that give `attn_logit_softcapping` to attention; Gemma 3 has the attribute alone."""

_ACTIVATIONS: Final[dict[type, int]] = {
    nn.SiLU: 0,
    activations.SiLUActivation: 0,
    activations.GELUTanh: 1,
}
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


_NORMS: Final[dict[str, tuple[str | None, ...]]] = {
    "decoder_layer": ("input_layernorm", None, "post_attention_layernorm", None),
    "multiplied_layer": ("input_layernorm", None, "post_attention_layernorm", None),
    "sandwich_layer": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "postnorm_layer": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}
"""Before and behind attention, before and behind the MLP."""


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
        rotated: whether a layer has RoPE.
        attention: the attention module of each layer.
        softcap: of the logits, None for none.
        multiplier, divisor: of the embeddings, and of the logits.
        unchanged, unchanged_head: what the layers rest on, and what the logits do.
    """

    hidden: int
    layers: list[tuple[Any, ...]]
    norm: tuple[Any, ...]
    head: tuple[Any, ...]
    windows: tuple[int | None, ...]
    rotated: tuple[bool, ...]
    attention: list[Any]
    softcap: float | None
    multiplier: float
    divisor: float
    unchanged: Unchanged
    unchanged_head: Unchanged


def describe(model: PreTrainedModel) -> Described | None:
    """How the C++ step computes this model; None where it does not."""
    try:
        return _describe(model)
    except NotDescribed:
        return None


def _describe(model: Any) -> Described:
    decoder = getattr(model, "model", None)
    _require(kind_of(type(model)) == "causal_lm" and kind_of(type(decoder)) == "decoder")
    assert decoder is not None
    config = model.config
    _require(not getattr(config, "use_bidirectional_attention", False))
    _require("forward" not in vars(decoder) or is_watched(model, decoder))
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
        head=_Rows(model.lm_head).weight(),
        windows=windows,
        rotated=tuple(bool(getattr(each.self_attn, "use_rope", True)) for each in layers),
        attention=[each.self_attn for each in layers],
        softcap=getattr(config, "final_logit_softcapping", None),
        multiplier=getattr(decoder, "embedding_multiplier", 1.0),
        divisor=getattr(config, "logits_scaling", 1.0),
        unchanged=unchanged,
        unchanged_head=unchanged_head,
    )


def _require(condition: bool) -> None:
    if not condition:
        raise NotDescribed


def _layer(layer: Any, window: int | None, index: int) -> tuple[Any, ...]:
    """One layer, as `read_layer` of csrc/layer_arguments.h has it."""
    attention, mlp = layer.self_attn, layer.mlp
    _require(type(attention).__name__ in PLAIN_ATTENTION)
    _require(kind_of(type(attention)) == "attention")
    _require(attention.layer_idx == index and attention.is_causal)
    _require(getattr(attention, "sliding_window", window) == window)
    dim, (q, k, v), (gate, up) = attention.head_dim, _projections(attention), _gate_and_up(mlp)
    act_fn = mlp.activation_fn if kind_of(type(mlp)) == "joined_mlp" else mlp.act_fn
    act = _ACTIVATIONS.get(type(act_fn))
    _require(act is not None and dim % 2 == 0)
    capped = type(attention).__name__ in CAPPED
    softcap = (attention.attn_logit_softcapping if capped else None) or 0.0
    sizes = (q.out // dim, k.out // dim, dim, gate.out, act)
    scales = float(attention.scaling), float(softcap), _residual_multiplier(layer)
    norms = (*_norms(layer), *_head_norms(attention))
    weights = (q, k, v, _Rows(attention.o_proj), gate, up, _Rows(mlp.down_proj))
    return (*sizes, *scales, norms, tuple(each.weight() for each in weights))


def _projections(attention: Any) -> list[_Rows]:
    """Of queries, keys and values, which Phi 3 has in one matrix."""
    joined = getattr(attention, "qkv_proj", None)
    if joined is None:
        return [_Rows(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")]
    q = attention.config.num_attention_heads * attention.head_dim
    kv = attention.num_key_value_heads * attention.head_dim
    return [_Rows(joined, *rows) for rows in ((0, q), (q, q + kv), (q + kv, q + 2 * kv))]


def _gate_and_up(mlp: Any) -> list[_Rows]:
    """Their linear layers, which Phi 3 has in one matrix."""
    if kind_of(type(mlp)) == "joined_mlp":
        inner = mlp.gate_up_proj.out_features // 2
        return [_Rows(mlp.gate_up_proj, 0, inner), _Rows(mlp.gate_up_proj, inner, 2 * inner)]
    _require(kind_of(type(mlp)) in ("gated_mlp", "dropout_mlp"))
    return [_Rows(mlp.gate_proj), _Rows(mlp.up_proj)]


def _residual_multiplier(layer: Any) -> float:
    """What is added to the residual stream is multiplied by it."""
    multiplied = kind_of(type(layer)) == "multiplied_layer"
    return float(layer.residual_multiplier) if multiplied else 1.0


def _norms(layer: Any) -> Iterator[tuple[Any, ...] | None]:
    """Norms before and behind attention, before and behind the MLP."""
    kind = kind_of(type(layer))
    _require(kind in _NORMS)
    assert kind is not None
    yield from (None if name is None else _norm(getattr(layer, name)) for name in _NORMS[kind])


def _head_norms(attention: Any) -> Iterator[tuple[Any, ...] | None]:
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        yield None if norm is None else _norm(norm)


def _norm(norm: Any) -> tuple[Any, ...]:
    """(weight, eps, whether 1 is added to the weight)."""
    kind = kind_of(type(norm))
    _require(kind in EPS)
    assert kind is not None
    return _record(norm.weight), float(getattr(norm, EPS[kind])), kind == "rms_norm_plus_one"


class _Rows:
    """Rows start .. stop-1 of a linear layer, all by default."""

    def __init__(self, linear: Any, start: int = 0, stop: int | None = None) -> None:
        self._linear = linear
        self._rows = slice(start, linear.out_features if stop is None else stop)
        self.out = self._rows.stop - start

    def weight(self) -> tuple[Any, ...]:
        """(matrix, bias or None): plain, or as it is stored."""
        linear, rows = self._linear, self._rows
        bias = None if linear.bias is None else _record(linear.bias[rows])
        if is_linear(linear):
            return _record(linear.weight[rows]), bias
        _require(type(linear) in (PackedLinear, HalfLinear) and is_untouched(linear))
        stored = linear.packed
        if isinstance(stored, PackedWeight):
            _require(stored.qdata.is_cpu)
            return record_packed(_packed_rows(stored, rows)), bias
        return _record(stored.values[rows]), bias


def _packed_rows(stored: PackedWeight, rows: slice) -> PackedWeight:
    """Some rows of a packed weight, in place; whole blocks, where it has rows behind them."""
    out, width = stored.shape
    _require(rows.start % BLOCK_ROWS == 0 and (rows.stop % BLOCK_ROWS == 0 or rows.stop == out))
    blocks = slice(rows.start // BLOCK_ROWS, -(-rows.stop // BLOCK_ROWS))
    parts = (None if x is None else x[blocks] for x in (stored.qdata, stored.scale, stored.minimum))
    qdata, scale, minimum = parts
    assert qdata is not None and scale is not None
    shape = rows.stop - rows.start, width
    return replace(stored, shape=shape, qdata=qdata, scale=scale, minimum=minimum)


def _record(x: Tensor) -> tuple[Any, ...]:
    _require(x.is_contiguous())
    _require(x.device.type == "cpu" and x.dtype in _FLOATS and type(x.data) is Tensor)
    return record(x)
