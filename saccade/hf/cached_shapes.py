"""Shapes of what every layer of a model caches, found by running the model without memory.

A config has many ways to say how many heads a layer has and how wide they are, per layer, for
values apart, as latents.  So no field is read: a model of that config is built on the meta device,
where tensors have shapes and no contents, and reads two tokens.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from saccade.cache import DenseCache, LayerCache, StateCache
from saccade.hf.cache import SaccadeCache
from saccade.hf.layers import text_config
from saccade.hf.positions import positions_of
from saccade.hf.split_forward import hidden_states
from saccade.runtime.positions import ROTARY, Positions

KVShape = tuple[int, int, int]
"""KV heads, width of a key, width of a value."""


class CachedShapes(NamedTuple):
    """What a model caches.

    Attributes:
        keys: shape of each layer that keeps keys, in order.
        state_numbers: numbers in all recurrent and convolution states of one row together.
    """

    keys: tuple[KVShape, ...]
    state_numbers: int


def cached_shapes(
    model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> CachedShapes | None:
    """Shapes for a model of this class and config; None where it cannot run without memory."""
    return _found(model_class, _Config(_own(model_class, config))).shapes


def positions_said(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Positions:
    """How a model of this class and config tells positions apart."""
    return _found(model_class, _Config(_own(model_class, config))).positions


def _own(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    kind = model_class.config_class
    return config if kind is None or isinstance(config, kind) else text_config(config)


class _Found(NamedTuple):
    """What a model without memory shows."""

    shapes: CachedShapes | None
    positions: Positions


class _Config:
    """A config that is equal to another one with the same contents."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config, self._contents = config, config.to_json_string(use_diff=False)

    def __hash__(self) -> int:
        return hash(self._contents)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and other._contents == self._contents


@lru_cache(maxsize=16)
def _found(model_class: type[PreTrainedModel], key: _Config) -> _Found:
    positions = ROTARY
    try:
        with torch.device("meta"), torch.inference_mode(), no_init_weights():
            model = model_class._from_config(copy.deepcopy(key.config), attn_implementation="eager")
            with suppress(Exception):  # experts whose shapes do not depend on the routing
                model.set_experts_implementation("batched_mm")
            length = getattr(text_config(model.config), "max_position_embeddings", 0)
            positions = positions_of(model, length)
            cache = SaccadeCache(model.config, _dense)
            tokens = torch.ones(1, 2, dtype=torch.int64)
            hidden_states(model.eval(), input_ids=tokens, past_key_values=cache, use_cache=True)
        return _Found(_shapes_in(cache), positions)
    except Exception:  # whatever a model class does that has no meaning without memory
        return _Found(None, positions)


def _dense(layer: int, window: int | None) -> LayerCache:
    return DenseCache()


def _shapes_in(cache: SaccadeCache) -> CachedShapes:
    keys: list[KVShape] = []
    numbers = 0
    for store in cache.stores:
        if isinstance(store, DenseCache):
            _, heads, _, key, value = store.view().shape
            keys.append((heads, key, value))
        elif isinstance(store, StateCache):
            numbers += sum(state.numel() for state in store.state().tensors.values())
    return CachedShapes(tuple(keys), numbers)
