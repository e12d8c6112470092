"""From options to the cache of a layer."""

from __future__ import annotations

import torch

from saccade.cache.base import LayerCache
from saccade.cache.dense import DenseCache
from saccade.cache.late_quantized import LateQuantizedCache
from saccade.cache.offloaded import OffloadedCache, StagingBuffers
from saccade.cache.paged import PagedCache
from saccade.cache.quantized import QuantizedCache
from saccade.cache.quantized_ring import QuantizedRing
from saccade.cache.ragged import RaggedCache
from saccade.cache.ring import RingCache
from saccade.cache.summaries import KeySummaries, SummarizingCache
from saccade.ops.selection import SummaryKind

STORAGE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BITS = {"int8": 8, "int4": 4, "fp8": 8}
LEAST_WINDOW = 128
"""Narrower windows keep the dtype of the keys: most tokens would wait for a group anyway."""


def make_layer_cache(
    *,
    window: int | None = None,
    sinks: int = 0,
    chunk: int = 1,
    checkpoints: int = 0,
    type_k: str | None = None,
    type_v: str | None = None,
    page_size: int | None = None,
    compressed: bool = False,
    ragged: bool = False,
    staging: StagingBuffers | None = None,
    reserve: int = 0,
    summary: tuple[SummaryKind, int] | None = None,
) -> LayerCache:
    """The cache of a layer: a ring where there is a window, else as storage types and options say.

    Args:
        window: keys a token attends to, itself counted; None for all.
        sinks: first tokens that stay visible outside the window.
        chunk: most tokens appended at once.
        checkpoints: positions that a ring can roll back to; see RingCache.
        type_k, type_v: f32, bf16, f16, int8, int4 or fp8; None keeps the dtype of the keys.
        page_size: tokens of a page, for a paged cache; None for one buffer.
        compressed: a policy will choose keys, which are quantized behind it.
        ragged: KV heads will keep different numbers of keys.
        staging: for keys in host memory, the buffers on the device, shared by all layers.
        reserve: tokens to allocate for at once, when the final length is known.
        summary: (kind, tokens of a block) of summaries that a cache of all keys keeps of them, for
            a sparse pattern; None for none.
    """
    cache = _plain_cache(
        window, sinks, chunk, checkpoints, type_k, type_v, page_size, compressed, ragged, staging,
        reserve,
    )  # fmt: skip
    if summary is not None and window is None and isinstance(cache, SummarizingCache):
        cache.summaries = KeySummaries(*summary)
    return cache


def _plain_cache(
    window: int | None,
    sinks: int,
    chunk: int,
    checkpoints: int,
    type_k: str | None,
    type_v: str | None,
    page_size: int | None,
    compressed: bool,
    ragged: bool,
    staging: StagingBuffers | None,
    reserve: int,
) -> LayerCache:
    """See `make_layer_cache`."""
    if type_k in BITS and type_v in BITS and (window is None or window >= LEAST_WINDOW):
        bits_k, bits_v, fp8 = BITS[type_k], BITS[type_v], "fp8" in (type_k, type_v)
        if window is None:
            kind = LateQuantizedCache if compressed else QuantizedCache
            return kind(bits_k=bits_k, bits_v=bits_v, fp8=fp8, reserve=reserve)
        return QuantizedRing(
            window=window, sinks=sinks, checkpoints=checkpoints,
            bits_k=bits_k, bits_v=bits_v, fp8=fp8,
        )  # fmt: skip
    dtype = STORAGE.get(type_k or "")
    if window is not None:
        return RingCache(
            window=window, sinks=sinks, chunk=chunk, dtype=dtype, checkpoints=checkpoints
        )
    if ragged:
        return RaggedCache(dtype=dtype, reserve=reserve)
    if staging is not None:
        return OffloadedCache(staging, dtype=dtype, reserve=reserve)
    if page_size is not None:
        return PagedCache(page_size=page_size, dtype=dtype)
    return DenseCache(dtype=dtype, reserve=reserve)
