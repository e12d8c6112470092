"""What a model caches of a few tokens, read in a cache of its own: how its keys are rotated."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.cache import DenseCache
from saccade.core.kv import dense
from saccade.hf.cache import SaccadeCache
from saccade.hf.facts import trained_length
from saccade.hf.key_rotation import Cached, KeyRotation, find_rotations
from saccade.hf.layers import text_config
from saccade.hf.rope import distinct_frequencies, rotary_tables
from saccade.hf.rope_tables import reaching
from saccade.hf.runs import Run, activated, run_in_force
from saccade.hf.split_forward import hidden_states


def probe_cache(model: PreTrainedModel, run: Run | None) -> SaccadeCache:
    """An empty cache of all keys, to see what the model does with a few tokens."""
    return SaccadeCache(model.config, lambda layer, window: DenseCache(), run=run)


@torch.inference_mode()
def key_rotations(model: PreTrainedModel, run: Run | None, length: int) -> list[KeyRotation]:
    """The rotation of the keys of every layer that keeps any, in order.

    Args:
        run: the options it computes under; None: what is in force for the model.
        length: of the text whose rotary tables the keys have.

    Raises:
        Unsupported: keys that are moved by no rotation that is known here.
    """
    in_force = run or run_in_force(model)
    rotary = {} if in_force is None else in_force.rotary

    def read(tokens: Tensor, positions: Tensor | None) -> list[Cached]:
        return _read_keys(model, run, tokens, positions)

    def found() -> list[KeyRotation]:
        return find_rotations(
            read,
            distinct_frequencies(rotary_tables(model, rotary, length)),
            vocab_size=text_config(model).vocab_size,
            longest=trained_length(model.config, type(model)),
        )

    return activated(run, lambda: reaching(length, found))


def _read_keys(
    model: PreTrainedModel, run: Run | None, tokens: Tensor, positions: Tensor | None
) -> list[Cached]:
    """What each layer caches of these tokens, in a cache of its own."""
    cache = probe_cache(model, run)
    where = {} if positions is None else {"position_ids": positions.to(model.device)}
    hidden_states(
        model,
        input_ids=tokens.to(model.device),
        past_key_values=cache,
        use_cache=True,
        **where,
    )
    views = [dense(store.view()) for store in cache.stores if isinstance(store, DenseCache)]
    return [Cached(view.k, view.v) for view in views]
