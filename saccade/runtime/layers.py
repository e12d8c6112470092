"""From ContextParams to one layer: its window, its cache, its backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from saccade.cache import LayerCache, StagingBuffers, make_layer_cache
from saccade.cache.make import STORAGE
from saccade.runtime.compression import wants_ragged
from saccade.runtime.params import ContextParams
from saccade.sparse import summary_of

LARGEST_RING: Final = 1 << 16
"""A ring allocates its whole window.  Some configs set one wider than they were trained for: such
layers get a cache that grows with the text, over which the window is a mask."""


def narrowed_window(own: int | None, params: ContextParams) -> tuple[int | None, int]:
    """(window, sinks) by which the params replace a layer's own window, or (None, 0).

    Sinks are for layers that are full attention in the model: those learned to rest on the first
    tokens.  A layer with a window of its own never saw them from afar, and does worse with them.
    """
    if params.n_swa is None or (own is not None and own <= params.n_swa):
        return None, 0
    return params.n_swa, params.n_sinks if own is None else 0


def layer_cache(
    own: int | None,
    params: ContextParams,
    *,
    staging: StagingBuffers | None = None,
    reserve: int = 0,
    ragged: bool = False,
) -> LayerCache:
    """An empty cache for a layer; see `make_layer_cache` for `staging`, `reserve` and `ragged`.

    Args:
        own: the model's own window of this layer, None for full attention.
    """
    window, sinks = narrowed_window(own, params)
    if params.kv_every is not None:
        reserve = 0  # the whole text is never stored
    ring = own if own is not None and own <= LARGEST_RING else None
    return make_layer_cache(
        window=window or ring,
        sinks=sinks,
        checkpoints=params.ctx_checkpoints,
        type_k=params.type_k,
        type_v=params.type_v,
        page_size=params.page_size,
        compressed=params.kv_policy is not None,
        ragged=ragged or wants_ragged(params.kv_policy),
        staging=staging,
        reserve=reserve,
        summary=summary_of(params.sparse) if own is None else None,
    )


def without_own_dtype(params: ContextParams, dtype: torch.dtype) -> ContextParams:
    """The same options, where storage in the dtype of the model is None: it is what None means."""
    if params.type_k is None or STORAGE.get(params.type_k) != dtype:
        return params
    return replace(params, type_k=None, type_v=None)  # plain types of both are equal


def backend_of(params: ContextParams) -> str:
    """Name of the backend for `attend`, or "auto"."""
    return params.backend or ("reference" if params.flash_attn == "disabled" else "auto")
