"""Sinks that stay near their window in texts beyond the trained length; see `saccade.cache.sinks`.

How the keys of a layer are rotated is found by asking the model (`hf.key_rotation`), when the first
sink has to be moved: most texts end before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from saccade.cache import SlidingCache, StateCache
from saccade.core import Unsupported
from saccade.hf.cache import SaccadeCache
from saccade.hf.cached_keys import key_rotations
from saccade.hf.compressed_generate import prompt_length
from saccade.hf.facts import facts_of
from saccade.hf.key_rotation import KeyRotation
from saccade.hf.runs import Run
from saccade.runtime.auto_scaling import scaled_reach

FindRotations = Callable[[], list[KeyRotation]]


def move_sinks(caches: SaccadeCache, run: Run, n_ctx_train: int | None) -> None:
    """Tell every ring with sinks from which position on they are moved, and how.

    Args:
        n_ctx_train: length that the model was trained for; default what its config says.
    """
    if not run.params.n_sinks:
        return
    reach = _reach(run, n_ctx_train)
    if reach is None:
        return
    find = cache(partial(_rotations, run.model, run, reach))
    stores = [store for store in caches.stores if not isinstance(store, StateCache)]
    for layer, store in enumerate(stores):
        if isinstance(store, SlidingCache):
            store.places.reach = reach
            store.places.shift = partial(_moved, find, layer)


def read_prompt_in_blocks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set `prefill_chunk_size` of a `generate` call whose prompt ends beyond the reach."""
    caches, prompt = kwargs.get("past_key_values"), prompt_length(args, kwargs)
    if not isinstance(caches, SaccadeCache) or prompt is None:
        return
    rings = [store for store in caches.stores if isinstance(store, SlidingCache)]
    block = min((ring.places.block for ring in rings), default=None)
    config = kwargs.get("generation_config")
    given = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if block is None or given is not None:
        return
    if any(ring.places.alike(ring.seen, prompt) < prompt for ring in rings):
        kwargs["prefill_chunk_size"] = block


def _reach(run: Run, n_ctx_train: int | None) -> int | None:
    facts = facts_of(
        run.model.config,
        name="",
        n_ctx_train=n_ctx_train,
        dtype=run.model.dtype,
        model_class=type(run.model),
    )
    return scaled_reach(run.params, facts)


def _moved(find: FindRotations, layer: int, keys: Tensor, delta: int | Tensor) -> Tensor:
    return find()[layer](keys, delta)


def _rotations(model: PreTrainedModel, run: Run, reach: int) -> list[KeyRotation]:
    try:
        return key_rotations(model, run, reach)
    except Unsupported as error:
        raise Unsupported(
            f"this text is longer than the {reach} tokens that {type(model).__name__} was trained "
            "for, where its first tokens have to be moved after the window, and its cached keys "
            "cannot be moved. Give a shorter text, or leave n_sinks unset."
        ) from error
