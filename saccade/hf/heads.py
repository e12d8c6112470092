"""MHA, GQA and MQA on one loaded model: its key and value projections rebuilt, then put back.

expand_to_mha   every query head gets a copy of its KV head: the output is the same, the cache
                is as large as that of a model that never had GQA
pool_to_mqa     all KV heads become their mean (GQA, arXiv 2305.13245, section 2.1, before its
                further training): the cache shrinks, and quality suffers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.hf.layers import attention_modules, text_config


@contextmanager
def expand_to_mha(model: PreTrainedModel) -> Iterator[None]:
    """The model with as many KV heads as query heads and the same output; restored on exit.

    Raises:
        Unsupported: a model without separate k_proj and v_proj linear layers.
    """
    config = text_config(model)
    groups = config.num_attention_heads // config.num_key_value_heads
    with _rebuilt_heads(
        model, config.num_attention_heads, lambda rows: rows.repeat_interleave(groups, dim=0)
    ):
        yield


@contextmanager
def pool_to_mqa(model: PreTrainedModel) -> Iterator[None]:
    """The model with one KV head, the mean of its own; restored on exit.

    Raises:
        Unsupported: a model without separate k_proj and v_proj linear layers.
    """
    with _rebuilt_heads(model, 1, lambda rows: rows.mean(dim=0, keepdim=True)):
        yield


@contextmanager
def _rebuilt_heads(
    model: PreTrainedModel, num_kv_heads: int, convert: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """The model with `num_kv_heads`; `convert` makes them from rows `[Hkv, D, ...]`."""
    config = text_config(model)
    own, heads = config.num_key_value_heads, config.num_attention_heads
    modules = [module for _, module in attention_modules(model)]
    for module in modules:
        _check_projections(module)
    with ExitStack() as undo:
        _set(undo, config, "num_key_value_heads", num_kv_heads)
        for module in modules:
            for name in ("k_proj", "v_proj"):
                _set(undo, module, name, _converted(getattr(module, name), own, convert))
            for name, value in (
                ("num_key_value_heads", num_kv_heads),
                ("num_key_value_groups", heads // num_kv_heads),
            ):
                if hasattr(module, name):
                    _set(undo, module, name, value)
        yield


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute, and note that the old value (the same object) has to come back."""
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _check_projections(module: nn.Module) -> None:
    for name in ("k_proj", "v_proj"):
        if not isinstance(getattr(module, name, None), nn.Linear):
            raise Unsupported(
                f"changing the number of KV heads needs a linear {name} in every attention layer, "
                f"but {type(module).__name__} has none. It works for Llama, Mistral, Qwen and "
                "Gemma shapes."
            )


@torch.no_grad()
def _converted(linear: nn.Linear, num_heads: int, convert: Callable[[Tensor], Tensor]) -> nn.Linear:
    """A new linear layer whose output rows, head by head, went through `convert`."""
    own = {name: getattr(linear, name) for name in ("weight", "bias")}
    rows = {
        name: convert(part.unflatten(0, (num_heads, -1))).flatten(0, 1).contiguous()
        for name, part in own.items()
        if part is not None
    }
    new = nn.Linear(linear.in_features, len(rows["weight"]), bias="bias" in rows, device="meta")
    for name, part in rows.items():
        setattr(new, name, nn.Parameter(part, requires_grad=own[name].requires_grad))
    return new.train(linear.training)
