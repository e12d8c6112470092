"""How much memory caches and attention will take, before anything is loaded.

No formula is written twice: the cache itself runs on meta tensors, which have shapes and no memory,
and its `nbytes` are the plan.  Attention runs on fake tensors, see `saccade.ops.planning`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saccade.cache import LayerCache
from saccade.core import Mask
from saccade.ops import attend, make_call
from saccade.ops.planning import PeakBytes, without_memory
from saccade.runtime.compression import compress_without_data
from saccade.runtime.layers import backend_of, layer_cache, narrowed_window
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.rollback import checkpoint

TRACED = 1 << 15
"""Longest context whose attention is run on fake tensors; the peak of longer ones is linear."""


def chunks(tokens: int, n_batch: int) -> list[int]:
    """Sizes of the chunks in which `Context.append` reads a prompt."""
    return [n_batch] * (tokens // n_batch) + [tokens % n_batch] * (tokens % n_batch > 0)


def filled_cache(
    facts: ModelFacts,
    params: ContextParams,
    own: int | None,
    steps: Iterable[int],
    *,
    reserve: int = 0,
) -> LayerCache:
    """The cache of a layer after appends of so many tokens each, on meta tensors."""
    cache = layer_cache(own, params, reserve=reserve)
    _append(cache, facts, steps)
    return cache


def cache_bytes(
    facts: ModelFacts,
    params: ContextParams,
    read: Iterable[int],
    written: Iterable[int] | None = None,
    *,
    reserve: int = 0,
) -> int:
    """Bytes that the caches of all layers allocate, exactly; see `Plan` for ragged ones.

    Args:
        read: tokens of each append while a prompt is read, in order (see `chunks`).
        written: tokens of each append after it; if given, the `kv_policy` is applied in between.
    """
    read, after, total = list(read), list(written or ()), facts.state_bytes
    for layer, count in facts.alike():
        cache = filled_cache(layer, params, layer.windows[0], read, reserve=reserve)
        if written is not None and params.kv_budget is not None:
            compress_without_data(cache, params.kv_budget)
        _append(cache, layer, after)
        total += count * cache.nbytes
    return total


class AttentionPeak:
    """Peak bytes of the attention of one layer while the last chunk of a prompt is read, on a CPU.

    Counted: what is allocated between `append` of the new keys and the output, that is copies of
    keys, scores or tiles of them, masks, output, lse, and the workspaces of native kernels on all
    of torch's threads.  Not counted: queries, new keys, the cache, the selection of a sparse
    pattern.
    """

    def __init__(self, facts: ModelFacts, params: ContextParams) -> None:
        self._facts, self._params = facts, params
        self._known: dict[int, int] = {}

    def at(self, tokens: int) -> int:
        """Bytes for a prompt of so many tokens; beyond 2 * TRACED extrapolated linearly."""
        if tokens > 2 * TRACED:
            near, far = self.at(TRACED), self.at(2 * TRACED)
            return far + max(0, far - near) * (tokens - 2 * TRACED) // TRACED
        if tokens not in self._known:
            facts, params = self._facts, self._params
            self._known[tokens] = max(
                _layer_attention_bytes(layer, params, layer.windows[0], tokens)
                for layer, _ in facts.alike()
            )
        return self._known[tokens]

    def about(self, tokens: int) -> int:
        """`at`, interpolated linearly between two powers of two, for searches with many calls."""
        low = 1 << (tokens.bit_length() - 1)
        near, far = self.at(low), self.at(2 * low)
        return near + (far - near) * (tokens - low) // low


def _layer_attention_bytes(
    facts: ModelFacts, params: ContextParams, own: int | None, tokens: int
) -> int:
    chunk, cpu = min(params.n_batch, tokens), torch.device("cpu")
    window, sinks = narrowed_window(own, params)
    with without_memory():
        cache = layer_cache(own, params, reserve=tokens)
        if tokens > chunk:
            cache.append(*_new_keys(facts, tokens - chunk, cpu))
        k, v = _new_keys(facts, chunk, cpu)
        q = torch.empty(1, facts.num_heads, chunk, facts.head_dim, dtype=facts.dtype)
        sink_logits = torch.empty(facts.num_heads) if facts.learned_sinks else None
        with PeakBytes() as counter:
            view = cache.append(k, v)
            attend(
                make_call(
                    q,
                    view,
                    mask=Mask(window=window or own, sinks=sinks),
                    softcap=facts.softcap,
                    sink_logits=sink_logits,
                    q_offset=view.shape[2] - chunk,
                    wants_lse=params.kv_policy is not None,
                ),
                backend=backend_of(params),
            )
    return counter.peak


def _append(cache: LayerCache, facts: ModelFacts, steps: Iterable[int]) -> None:
    for step in steps:
        if step:
            cache.append(*_new_keys(facts, step, torch.device("meta")))
        if step > 1:
            checkpoint([cache])


def _new_keys(facts: ModelFacts, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values of so many tokens."""
    widths = facts.head_dim, facts.value_dim or facts.head_dim
    shapes = [(1, facts.num_kv_heads, count, width) for width in widths]
    k, v = (torch.empty(shape, dtype=facts.dtype, device=device) for shape in shapes)
    return k, v
