"""How much memory caches and attention will take, before anything is loaded.

No formula is written twice: the cache itself runs on meta tensors, which have shapes and no memory,
and its `nbytes` are the plan.  Attention runs on fake tensors, see `saccade.ops.planning`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from saccade.core import BadInput, Mask
from saccade.core.hardware import available_memory
from saccade.ops import attend, make_call
from saccade.ops.planning import PeakBytes, without_memory
from saccade.runtime.budgets import budget_in_keys, kept_of_layers
from saccade.runtime.compression import room_behind
from saccade.runtime.layers import backend_of, layer_cache, narrowed_window
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.planned_cache import Run, new_keys, planned_cache, run_all

TRACED = 1 << 14
"""Longest context whose attention is run on fake tensors; the peak of longer ones is linear."""
TRACED_CHUNK, TRACED_TILED = 1 << 12, 1 << 8
"""The same for the tokens that are read at once; less for `tiled`, whose tiles run one by one."""


MOST_BYTES = 1 << 60
"""More than any machine has; a plan of more is refused, before a size overflows 64 bits."""


def chunks(tokens: int, n_batch: int) -> list[Run]:
    """The appends in which `Context.append` reads a prompt."""
    return [(n_batch, tokens // n_batch), (tokens % n_batch, 1)]


def cache_bytes(
    facts: ModelFacts,
    params: ContextParams,
    read: Sequence[Run],
    written: Sequence[Run] | None = None,
    *,
    reserve: int = 0,
) -> int:
    """Bytes that the caches of all layers allocate, exactly; see `Plan` for ragged ones.

    Args:
        read: appends while a prompt is read, in order (see `chunks`).
        written: appends after it; if given, the `kv_policy` is applied in between.

    Raises:
        BadInput: more bytes than can be counted.
    """
    kept = layers_bytes(facts, params, read, written, reserve=reserve)
    return facts.state_bytes + sum(count * nbytes for count, nbytes in kept)


def check_free(facts: ModelFacts, params: ContextParams, tokens: int) -> None:
    """Raise BadInput where caches for so many tokens need more memory than is free."""
    free = available_memory()
    # One token at least: rings and pages are allocated whole.
    needed = cache_bytes(facts, params, [(max(1, tokens), 1)], reserve=tokens)
    if needed > free:
        raise BadInput(
            f"caches for {tokens} tokens need {needed / 2**30:.1f} GiB, but "
            f"{free / 2**30:.1f} GiB of memory are free. Lower n_ctx, set a window (n_swa) or "
            "quantize the cache (type_k='int8', type_v='int8')."
        )


def layers_bytes(
    facts: ModelFacts,
    params: ContextParams,
    read: Sequence[Run],
    written: Sequence[Run] | None = None,
    *,
    reserve: int = 0,
) -> list[tuple[int, int]]:
    """(layers, bytes of the cache of each) for layers that are alike; see `cache_bytes`."""
    tokens = sum(size * count for size, count in (*read, *(written or ())))
    _check_countable(facts, max(tokens, reserve))
    counts: list[int | None] = [None] * len(facts.windows)
    if written is not None:
        params = budget_in_keys(params, facts)
        counts = kept_of_layers(facts, params, sum(size * count for size, count in read))
    found: list[tuple[int, int]] = []
    for (layer, kept), count in Counter(zip(facts.layers(), counts, strict=True)).items():
        cache = planned_cache(layer_cache(layer.windows[0], params, reserve=reserve), layer)
        run_all(cache, read)
        if kept is not None:
            cache = cache.compress(kept, room_behind(params))
        run_all(cache, written or ())
        found.append((count, cache.nbytes))
    return found


def _check_countable(facts: ModelFacts, tokens: int) -> None:
    """Raise BadInput where keys in float64 would take more bytes than MOST_BYTES."""
    per_token = 16 * facts.num_layers * facts.num_kv_heads * facts.head_dim
    if per_token * tokens > MOST_BYTES:
        raise BadInput(
            f"a plan counts up to {MOST_BYTES // max(1, per_token)} tokens for this model, got "
            "more. Lower n_ctx or reserve."
        )


class AttentionPeak:
    """Peak bytes of the attention of one layer while the last chunk of a prompt is read, on a CPU.

    Counted: what is allocated between `append` of the new keys and the output, that is copies of
    keys, scores or tiles of them, masks, output, lse, and the workspaces of native kernels on all
    of torch's threads.  Not counted: queries, new keys, the cache, the selection of a sparse
    pattern.
    """

    def __init__(self, facts: ModelFacts, params: ContextParams) -> None:
        self._facts, self._params = facts, params
        self._known: dict[tuple[int, int], int] = {}

    def at(self, tokens: int) -> int:
        """Bytes for a prompt of so many tokens.

        Extrapolated linearly beyond 2 * TRACED tokens, and beyond 2 * TRACED_CHUNK tokens of the
        last chunk; so is their product, which materialized scores follow.
        """
        return self._of(min(self._params.n_batch, tokens), tokens)

    def _of(self, chunk: int, tokens: int) -> int:
        """Bytes for the last `chunk` of so many tokens."""
        tiled = backend_of(self._params) == "tiled" or self._params.type_k == "fp8"
        most = TRACED_TILED if tiled else TRACED_CHUNK
        if chunk > 2 * most:
            ends = self._of(most, tokens), self._of(2 * most, tokens)
            return _extended(*ends, chunk - 2 * most, most)
        if tokens > 2 * TRACED:
            ends = self._of(chunk, TRACED), self._of(chunk, 2 * TRACED)
            return _extended(*ends, tokens - 2 * TRACED, TRACED)
        if (chunk, tokens) not in self._known:
            facts, params = self._facts, self._params
            self._known[chunk, tokens] = max(
                _layer_attention_bytes(layer, params, layer.windows[0], chunk, tokens)
                for layer, _ in facts.alike()
            )
        return self._known[chunk, tokens]

    def about(self, tokens: int) -> int:
        """`at`, interpolated linearly between two powers of two, for searches with many calls."""
        low = 1 << (tokens.bit_length() - 1)
        near, far = self.at(low), self.at(2 * low)
        return near + (far - near) * (tokens - low) // low


def _extended(near: int, far: int, beyond: int, step: int) -> int:
    """The line through `near` and, a step later, `far`, at `beyond` after that; never falling."""
    return far + max(0, far - near) * beyond // step


def _layer_attention_bytes(
    facts: ModelFacts, params: ContextParams, own: int | None, chunk: int, tokens: int
) -> int:
    cpu = torch.device("cpu")
    window, sinks = narrowed_window(own, params)
    with without_memory():
        cache = layer_cache(own, params, reserve=tokens)
        if tokens > chunk:
            cache.append(*new_keys(facts, tokens - chunk, cpu))
        k, v = new_keys(facts, chunk, cpu)
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
