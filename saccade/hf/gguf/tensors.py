"""Which tensors of a GGUF file make each parameter of a model: data, and what undoes the converter.

The parameter's name has `{}` for the numbers in it, the tensor's for the number of the layer.
A name that ends in `.weight` or `.bias` may stand without it, for both.  `a|b` means that files
call it one or the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: the config, the numbers in the parameter's name, its ending."""

    config: Any
    numbers: tuple[int, ...]
    ending: str


Make = Callable[[list[Tensor], Place], Tensor]


def _as_it_is(parts: list[Tensor], _: Place) -> Tensor:
    return parts[0]


@dataclass(frozen=True, slots=True)
class Source:
    """The tensors of one parameter, and how it is made of them.

    Attributes:
        on_rows: what makes the rows of a matrix `[out, in]` from those of the one tensor, whatever
            a row is (blocks of bytes, too); None where the parameter is more than other rows.
    """

    tensors: tuple[str, ...]
    make: Make = _as_it_is
    on_rows: Make | None = None


Sources = Mapping[str, Source]
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.|$)")


def source_of(
    parameter: str, sources: Sources, config: Any
) -> tuple[list[str], Source, Place] | None:
    """(tensors, source, place) of a parameter; None if the table lacks it."""
    numbers = tuple(int(number) for number in _NUMBER.findall(parameter))
    pattern = _NUMBER.sub("{}", parameter)
    for ending in ("", ".weight", ".bias"):
        if pattern.endswith(ending) and (source := sources.get(pattern.removesuffix(ending))):
            names = [name.replace("{}", str(*numbers[:1])) for name in source.tensors]
            endings = ["|".join(part + ending for part in name.split("|")) for name in names]
            return endings, source, Place(config, numbers, ending)
    return None


def _rows(number: str) -> Make:
    """Undo the order in which GGUF's llama rotates: pairs are neighbours there, halves here."""

    def make(parts: list[Tensor], at: Place) -> Tensor:
        heads = getattr(at.config, number)
        rows = parts[0].reshape(heads, parts[0].shape[0] // heads // 2, 2, *parts[0].shape[1:])
        return rows.transpose(1, 2).reshape(parts[0].shape)

    return make


def _minus_one(parts: list[Tensor], at: Place) -> Tensor:
    return parts[0] - 1 if at.ending == ".weight" else parts[0]


def _transposed(parts: list[Tensor], at: Place) -> Tensor:
    return parts[0].T if at.ending == ".weight" else parts[0]


def _stacked(parts: list[Tensor], _: Place) -> Tensor:
    """Gate and up of all experts, one above the other."""
    return torch.cat(parts, dim=1)


def _interleaved(parts: list[Tensor], _: Place) -> Tensor:
    """Gate and up of all experts of gpt-oss, alternating; weights stand `[expert, in, out]`."""
    return torch.stack(parts, dim=2).flatten(1, 2).transpose(1, -1)


def _interleaved_bias(parts: list[Tensor], _: Place) -> Tensor:
    return torch.stack(parts, dim=2).flatten(1, 2)


def _swapped(parts: list[Tensor], _: Place) -> Tensor:
    return parts[0].transpose(1, 2)


def _one_row(parts: list[Tensor], _: Place) -> Tensor:
    return parts[0].reshape(1, -1)


def _one_channel(parts: list[Tensor], at: Place) -> Tensor:
    return parts[0].unsqueeze(1) if at.ending == ".weight" else parts[0]


def _row_of_head(parts: list[Tensor], at: Place) -> Tensor:
    return parts[0].reshape(-1, parts[0].shape[-1])[at.numbers[1]]


def _log_of_minus(parts: list[Tensor], _: Place) -> Tensor:
    return torch.log(-parts[0])


def _grouped(parts: list[Tensor], at: Place) -> Tensor:
    """Fused q, k and v: per KV head its queries, its key and its value."""
    heads = at.config.num_attention_heads
    groups = getattr(at.config, "num_kv_heads", heads)
    dim = parts[0].shape[0] // (heads + 2 * groups)
    rest = parts[0].shape[1:]
    query, key, value = parts[0].split([heads * dim, groups * dim, groups * dim])
    query = query.reshape(groups, heads // groups, dim, *rest)
    key, value = (part.reshape(groups, 1, dim, *rest) for part in (key, value))
    return torch.cat((query, key, value), dim=1).reshape(parts[0].shape)


def _table(top: Mapping[str, str], layers: str, block: Mapping[str, str | Source]) -> Sources:
    """Names of the whole model and of one layer, as sources."""
    whole = {name: _of(tensor) for name, tensor in top.items()}
    for name, tensor in block.items():
        source = _of(tensor) if isinstance(tensor, str) else tensor
        stems = tuple("|".join(f"blk.{{}}.{s}" for s in t.split("|")) for t in source.tensors)
        whole[f"{layers}.{{}}.{name}"] = replace(source, tensors=stems)
    return whole


def _of(tensor: str) -> Source:
    return Source((tensor,), on_rows=_as_it_is)


def _other_rows(tensor: str, make: Make) -> Source:
    """The rows of one tensor in another order."""
    return Source((tensor,), make, on_rows=make)


def _norms_minus_one(sources: Sources) -> Sources:
    """Models that multiply by 1 + weight: the converter adds the 1."""
    return {
        name: Source(source.tensors, _minus_one) if name.endswith("norm") else source
        for name, source in sources.items()
    }


_TOP: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ATTENTION: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_QK_NORMS: Final = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_MLP: Final = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_PERMUTED: Final = {
    "self_attn.q_proj": _other_rows("attn_q", _rows("num_attention_heads")),
    "self_attn.k_proj": _other_rows("attn_k", _rows("num_key_value_heads")),
}
_EXPERTS: Final = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": Source(
        ("ffn_gate_exps.weight", "ffn_up_exps.weight"), _stacked, on_rows=_stacked
    ),
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
_SHARED_EXPERT: Final = {
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": Source(("ffn_gate_inp_shexp",), _one_row),
}
_PLAIN_MLP: Final = {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}

LLAMA: Final = _table(_TOP, "model.layers", _ATTENTION | _MLP | _PERMUTED)
MIXTRAL: Final = _table(_TOP, "model.layers", _ATTENTION | _EXPERTS | _PERMUTED)
QWEN2: Final = _table(_TOP, "model.layers", _ATTENTION | _MLP)
QWEN2_MOE: Final = _table(_TOP, "model.layers", _ATTENTION | _EXPERTS | _SHARED_EXPERT)
QWEN3: Final = _table(_TOP, "model.layers", _ATTENTION | _QK_NORMS | _MLP)
QWEN3_MOE: Final = _table(_TOP, "model.layers", _ATTENTION | _QK_NORMS | _EXPERTS)
MINIMAX_M2: Final = _table(
    _TOP,
    "model.layers",
    _ATTENTION | _QK_NORMS | _EXPERTS | {"mlp.e_score_correction_bias": "exp_probs_b.bias"},
)
GPT_OSS: Final = _table(
    _TOP,
    "model.layers",
    _ATTENTION
    | {
        "post_attention_layernorm": "post_attention_norm|ffn_norm",
        "self_attn.sinks": "attn_sinks.weight|attn_sinks",
        "mlp.router": "ffn_gate_inp",
        "mlp.experts.gate_up_proj": Source(
            ("ffn_gate_exps.weight", "ffn_up_exps.weight"), _interleaved
        ),
        "mlp.experts.gate_up_proj_bias": Source(
            ("ffn_gate_exps.bias", "ffn_up_exps.bias"), _interleaved_bias
        ),
        "mlp.experts.down_proj": Source(("ffn_down_exps.weight",), _swapped),
        "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
    },
)
PHI3: Final = _table(
    _TOP,
    "model.layers",
    {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
)
GEMMA: Final = _norms_minus_one(_table(_TOP, "model.layers", _ATTENTION | _MLP))
GEMMA2: Final = _norms_minus_one(
    _table(
        _TOP,
        "model.layers",
        _ATTENTION
        | _QK_NORMS
        | _MLP
        | {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
    )
)
NEMOTRON: Final = _norms_minus_one(_table(_TOP, "model.layers", _ATTENTION | _PLAIN_MLP))
STARCODER2: Final = _table(
    _TOP, "model.layers", _ATTENTION | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
)
STABLELM: Final = _table(
    _TOP,
    "model.layers",
    _ATTENTION
    | _MLP
    | {
        "self_attn.q_layernorm.norms.{}": Source(("attn_q_norm",), _row_of_head),
        "self_attn.k_layernorm.norms.{}": Source(("attn_k_norm",), _row_of_head),
    },
)
LFM2: Final = _table(
    _TOP | {"model.embedding_norm": "token_embd_norm|output_norm"},
    "model.layers",
    {
        "operator_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "conv.conv": Source(("shortconv.conv",), _one_channel),
        "conv.in_proj": "shortconv.in_proj",
        "conv.out_proj": "shortconv.out_proj",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down",
    },
)
GPT2: Final = _table(
    {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    "transformer.h",
    {
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "attn.c_attn": Source(("attn_qkv",), _transposed, on_rows=_as_it_is),
        "attn.c_proj": Source(("attn_output",), _transposed, on_rows=_as_it_is),
        "mlp.c_fc": Source(("ffn_up",), _transposed, on_rows=_as_it_is),
        "mlp.c_proj": Source(("ffn_down",), _transposed, on_rows=_as_it_is),
    },
)
_FUSED: Final = {
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": _other_rows("attn_qkv", _grouped),
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_FUSED_TOP: Final = {
    "transformer.word_embeddings": "token_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
FALCON: Final = _table(
    _FUSED_TOP, "transformer.h", _FUSED | {"ln_mlp": "attn_norm", "ln_attn": "attn_norm_2"}
)
BLOOM: Final = _table(
    _FUSED_TOP | {"transformer.word_embeddings_layernorm": "token_embd_norm"},
    "transformer.h",
    _FUSED | {"post_attention_layernorm": "ffn_norm"},
)
MAMBA: Final = _table(
    {
        "backbone.embeddings": "token_embd",
        "backbone.norm_f": "output_norm",
        "lm_head": "output",
    },
    "backbone.layers",
    {
        "norm": "attn_norm",
        "mixer.A_log": Source(("ssm_a",), _log_of_minus),
        "mixer.D": "ssm_d",
        "mixer.conv1d": Source(("ssm_conv1d",), _one_channel),
        "mixer.in_proj": "ssm_in",
        "mixer.x_proj": "ssm_x",
        "mixer.dt_proj": "ssm_dt",
        "mixer.out_proj": "ssm_out",
    },
)
