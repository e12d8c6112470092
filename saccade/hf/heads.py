"""The projections of one attention layer, head by head, read from its linear layers and put back.

A layer has q_proj, k_proj and v_proj (Llama, Mistral, Qwen, Gemma, ...) or one qkv_proj that holds
their rows in this order (Phi-3).  What leaves the heads goes through o_proj, also called dense or
out_proj.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from saccade.core import Unsupported
from saccade.hf.packed_layers import StoredLayer

SEPARATE: Final = ("q_proj", "k_proj", "v_proj")
FUSED: Final = "qkv_proj"
_OUTPUTS: Final = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True, slots=True)
class Heads:
    """The maps of one attention layer.

    Attributes:
        q, k, v: `[heads, head_dim, inputs]`; with a bias it is one more column of inputs, which is
            multiplied by 1.
        o: `[hidden, query heads, value_dim]`, without its bias; None where no layer of a known
            name takes what leaves the heads.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor | None


@dataclass(frozen=True, slots=True)
class Swap:
    """Attributes of an attention layer, its linear layers among them, before and after."""

    module: nn.Module
    before: dict[str, Any]
    after: dict[str, Any]

    def put(self, values: Mapping[str, Any]) -> None:
        """Give the layer these attributes; the same objects come back."""
        for name, value in values.items():
            setattr(self.module, name, value)


def check_projections(module: nn.Module) -> None:
    """Raise Unsupported unless keys and values of a layer come from linear layers known here."""
    names = (FUSED,) if hasattr(module, FUSED) else SEPARATE
    for name in names:
        linear = getattr(module, name, None)
        plain = isinstance(linear, nn.Linear) and linear.weight.is_floating_point()
        if not plain and not isinstance(linear, StoredLayer):
            raise Unsupported(
                f"changing the number of KV heads needs a linear {name} in every attention layer, "
                f"but {type(module).__name__} has none. It works for models with q_proj, k_proj "
                "and v_proj, such as Llama, Mistral, Qwen and Gemma, and for Phi-3."
            )


@torch.no_grad()
def read_heads(module: nn.Module, num_heads: int, num_kv_heads: int) -> Heads:
    """The maps of a layer, as views of its parameters where there is no bias."""
    if hasattr(module, FUSED):
        q, k, v = split_rows(_with_bias(getattr(module, FUSED)), num_heads, num_kv_heads)
    else:
        q, k, v = (_with_bias(getattr(module, name)) for name in SEPARATE)
    name = output_name(module)
    output = None if name is None else getattr(module, name).weight.detach()
    return Heads(
        q.unflatten(0, (num_heads, -1)),
        k.unflatten(0, (num_kv_heads, -1)),
        v.unflatten(0, (num_kv_heads, -1)),
        None if output is None else output.unflatten(1, (num_heads, -1)),
    )


def output_name(module: nn.Module) -> str | None:
    """What the layer calls the linear layer that reads its heads."""
    for name in _OUTPUTS:
        if isinstance(getattr(module, name, None), nn.Linear | StoredLayer):
            return name
    return None


@torch.no_grad()
def layers_of(module: nn.Module, heads: Heads, old: Heads) -> dict[str, nn.Linear]:
    """New linear layers of these maps, by the names of those that they replace in the layer.

    Args:
        old: the maps that the layer has; those that are the same objects are left out.
    """
    rows = [part.flatten(0, 1) for part in (heads.q, heads.k, heads.v)]
    same = [heads.q is old.q, heads.k is old.k, heads.v is old.v]
    made: dict[str, nn.Linear] = {}
    if hasattr(module, FUSED):
        if not all(same):
            made[FUSED] = _linear(getattr(module, FUSED), torch.cat(rows))
    else:
        for name, part, kept in zip(SEPARATE, rows, same, strict=True):
            if not kept:
                made[name] = _linear(getattr(module, name), part)
    name = output_name(module)
    if name is not None and heads.o is not None and heads.o is not old.o:
        output: Any = getattr(module, name)
        weight = heads.o.flatten(1)
        made[name] = _linear(
            output,
            weight if output.bias is None else torch.cat((weight, output.bias[:, None]), dim=1),
        )
    return made


def split_rows(rows: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, ...]:
    """The rows of q, k and v in those of a fused layer."""
    width = len(rows) // (num_heads + 2 * num_kv_heads)
    return rows.split([num_heads * width, num_kv_heads * width, num_kv_heads * width])


def _with_bias(linear: Any) -> Tensor:
    """`[outputs, inputs]`, or one more column with a bias."""
    weight = linear.weight.detach()
    return weight if linear.bias is None else torch.cat((weight, linear.bias[:, None]), dim=1)


def _linear(old: Any, rows: Tensor) -> nn.Linear:
    """A linear layer of plain numbers, in the dtype and state of an old one, plain or packed."""
    parts = {"weight": rows if old.bias is None else rows[:, :-1]}
    if old.bias is not None:
        parts["bias"] = rows[:, -1]
    outputs, inputs = parts["weight"].shape
    new = nn.Linear(inputs, outputs, bias="bias" in parts, device="meta")
    for name, part in parts.items():
        own = getattr(old, name)
        value = part.detach().to(own.dtype).contiguous()
        setattr(new, name, nn.Parameter(value, requires_grad=own.requires_grad))
    return new.train(old.training)
