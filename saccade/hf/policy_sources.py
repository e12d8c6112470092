"""What KV policies ask of a transformers model: how its keys rotate, and its output projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.cache import ShiftKeys
from saccade.core import Unsupported
from saccade.hf.cache import SaccadeCache
from saccade.hf.cached_keys import key_rotations
from saccade.hf.cached_shapes import positions_said
from saccade.hf.heads import output_name
from saccade.hf.layers import attention_modules, layer_kinds, text_config
from saccade.hf.rope_tables import reaching
from saccade.hf.runs import Run, activated
from saccade.hf.settings import LayerSettings
from saccade.hf.split_forward import counts_from_zero, hidden_states
from saccade.runtime.model import ModelCache
from saccade.runtime.observing import Sources
from saccade.runtime.rereading import Reader, plain


def sources_of(run: Run, length: int, reader: Reader) -> Sources:
    """The sources of a run for a text of a length."""

    @lru_cache(maxsize=1)
    def rotations() -> list[ShiftKeys]:
        return list(key_rotations(run.model, run, length))

    return Sources(
        lambda layer: rotations()[layer], lambda layer: output_weights(run.model, layer), reader
    )


def reader_of_run(
    run: Run, texts: Sequence[Sequence[int]], new_cache: Callable[[Run], SaccadeCache]
) -> Reader:
    """What reads texts a second time in the middle of a `generate` call.

    Args:
        texts: of each row, without padding.
        new_cache: empty caches under the options of a run.
    """
    model = run.model

    def new(ragged: bool) -> SaccadeCache:
        params = plain(run.params, ragged=ragged)
        return new_cache(replace(run, params=params, settings=LayerSettings(model.config, params)))

    def hidden(tokens: Tensor, cache: ModelCache) -> Tensor:
        assert isinstance(cache, SaccadeCache), "caches come from new"
        options: dict[str, Any] = {"input_ids": tokens.to(model.device), "use_cache": True}
        if counts_from_zero(model):
            at = torch.arange(cache.seen, cache.seen + tokens.shape[1], device=model.device)
            options["position_ids"] = at[None]

        def read() -> Tensor:
            with torch.inference_mode():
                return hidden_states(model, **options, past_key_values=cache)

        return activated(cache.run, lambda: reaching(cache.reaches, read))

    def limit() -> int | None:
        return positions_said(type(model), model.config).limit

    return Reader(lambda: texts, new, hidden, run.params.n_batch, limit)


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
