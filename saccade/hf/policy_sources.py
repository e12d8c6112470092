"""What KV policies ask of a transformers model: how its keys rotate, and its output projections."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor
from transformers import PreTrainedModel

from saccade.cache import ShiftKeys
from saccade.core import Unsupported
from saccade.hf.cached_keys import key_rotations
from saccade.hf.heads import output_name
from saccade.hf.layers import attention_modules, layer_kinds, text_config
from saccade.hf.runs import Run
from saccade.runtime.compression import Sources


def sources_of(run: Run, length: int) -> Sources:
    """The sources of a run for a text of a length."""

    @lru_cache(maxsize=1)
    def rotations() -> list[ShiftKeys]:
        return list(key_rotations(run.model, run, length))

    return Sources(lambda layer: rotations()[layer], lambda layer: output_weights(run.model, layer))


def output_weights(model: PreTrainedModel, layer: int) -> Tensor:
    """The output projection of a layer, `[H, Dv, hidden]`.

    Args:
        layer: its place among the layers that keep keys.

    Raises:
        Unsupported: a layer without a linear layer of a known name behind its heads.
    """
    with_keys = [i for i, kind in enumerate(layer_kinds(model.config)) if kind.keys]
    modules = dict(attention_modules(model))
    module = modules.get(with_keys[layer])
    name = None if module is None else output_name(module)
    if module is None or name is None:
        raise Unsupported(
            f"CriticalKV weighs values by the output projection of their layer, expected o_proj, "
            f"out_proj or dense, but {type(model).__name__} has none in layer {layer}. Choose "
            "another kv_policy, such as 'snapkv'."
        )
    weight: Tensor = getattr(module, name).weight.detach()
    heads = getattr(module, "num_heads", None) or text_config(model).num_attention_heads
    return weight.T.unflatten(0, (heads, -1))
