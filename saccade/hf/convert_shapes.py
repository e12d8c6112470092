"""What another number of KV heads changes in a model, found by building both without memory.

No class is known here by name: the model's own class is built twice on the meta device, with the
numbers of heads before and after.  Where their modules have other sizes, the loaded model gets the
new ones; where a parameter that is no key or value projection would change its shape (Olmo 2 norms
all heads together), the model is refused.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from saccade.core import Unsupported
from saccade.hf.heads import FUSED, SEPARATE
from saccade.hf.layers import text_config


@dataclass(frozen=True, slots=True)
class Changes:
    """What is different in modules and parameters, by their names.

    Attributes:
        attributes: new values of plain attributes of a module; shapes: new ones of parameters.
    """

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)


def head_changes(model: PreTrainedModel, num_kv_heads: int) -> Changes:
    """What a model of this class has other than now with `num_kv_heads`.

    Raises:
        Unsupported: something would change that is not known here.
    """
    own = text_config(model).num_key_value_heads
    if own == num_kv_heads:
        return Changes()
    old, new = (_without_memory(model, count) for count in (own, num_kv_heads))
    changes = Changes()
    before = dict(old.named_modules())
    for name, module in new.named_modules():
        found = _different(before[name], module)
        if found:
            changes.attributes[name] = found
    sizes = {name: part.shape for name, part in model.named_parameters()}
    for name, part in new.named_parameters():
        if name in sizes and part.shape != sizes[name]:
            _check_known(model, name)
            changes.shapes[name] = part.shape
    return changes


def _without_memory(model: PreTrainedModel, num_kv_heads: int) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    text_config(config).num_key_value_heads = num_kv_heads
    try:
        with torch.device("meta"), no_init_weights():
            return type(model)._from_config(config, attn_implementation="eager")
    except Exception as error:  # whatever a class says about a config that it cannot use
        raise Unsupported(
            f"{type(model).__name__} cannot be built with {num_kv_heads} KV heads: {error}"
        ) from error


def _different(old: nn.Module, new: nn.Module) -> dict[str, Any]:
    """Plain numbers that another number of heads has changed in a module."""
    return {
        name: value
        for name, value in vars(new).items()
        if isinstance(value, int | float | tuple) and vars(old).get(name) != value
    }


def _check_known(model: PreTrainedModel, name: str) -> None:
    layer = name.rpartition(".")[0].rpartition(".")[2]
    if layer not in (*SEPARATE, FUSED):
        raise Unsupported(
            f"with another number of KV heads {name} of {type(model).__name__} has another shape, "
            "and only the projections of keys and values can be converted. Use a model whose norms "
            "do not depend on the number of KV heads."
        )
