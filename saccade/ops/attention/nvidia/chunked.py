"""Many queries over a ring or quantized keys: chunk by chunk of keys, each of them plain and dense.

The decoding kernels read such storage where it lies, with few rows a tile.  A prompt has thousands
of rows, so its keys go through the prefill kernels instead: a ring's span as it is, a quantized
history dequantized one chunk at a time.  The chunks are combined by their lse, and at most
CHUNK_BYTES of the history exist in full precision at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from saccade.core import AttentionOutput, DenseKV, KeyRange, QuantizedKV
from saccade.core.kv import KVView
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.combine import Combiner, with_sink_logits
from saccade.ops.kv_write.quantize import dequantize_range

CHUNK_BYTES = 128 * 2**20


class KVChunk(NamedTuple):
    """Keys and values `[B, Hkv, n, D]` at the positions `first` .. `first + n - 1`."""

    k: Tensor
    v: Tensor
    first: int


def suits(call: AttentionCall) -> bool:
    """Whether a call can be cut into chunks: its masks are by position, or by column."""
    return isinstance(call.kv, (DenseKV, QuantizedKV)) and call.blocks is None


def run(call: AttentionCall, attend: Callable[[AttentionCall], AttentionOutput]) -> AttentionOutput:
    """Attention of a call that `suits`, each chunk by `attend`, a kernel for plain dense keys."""
    batch, heads, num_queries, _ = call.q.shape
    combined = Combiner((batch, heads, num_queries, call.kv.shape[4]), call.q)
    for chunk in chunks_of(call.kv, _visible_ranges(call)):
        start, stop = _attending_queries(call, chunk)
        if start < stop:
            combined.add(attend(_on_chunk(call, chunk, start, stop)), start, stop)
    result = combined.result()
    return result if call.sink_logits is None else with_sink_logits(result, call.sink_logits)


def chunks_of(kv: KVView, ranges: tuple[KeyRange, ...]) -> Iterator[KVChunk]:
    """The chunks that cover the ranges of positions, and little more."""
    batch, heads, _, dim, value_dim = kv.shape
    size = CHUNK_BYTES // (batch * heads * (dim + value_dim) * kv.dtype.itemsize)
    if isinstance(kv, QuantizedKV):
        size = max(1, size // kv.k_group) * kv.k_group
        starts = range(0, kv.num_quantized, size)
        cuts = [KeyRange(start, min(start + size, kv.num_quantized)) for start in starts]
        for cut in cuts:
            if _overlap(cut, ranges):
                yield KVChunk(*dequantize_range(kv, *cut), cut.start)
        if kv.recent_k.shape[2]:
            yield KVChunk(kv.recent_k, kv.recent_v, kv.num_quantized)
        return
    assert isinstance(kv, DenseKV)
    for slot, position, length in kv.spans:
        if _overlap(KeyRange(position, position + length), ranges):
            yield KVChunk(kv.k.narrow(2, slot, length), kv.v.narrow(2, slot, length), position)


def _overlap(keys: KeyRange, ranges: tuple[KeyRange, ...]) -> bool:
    return any(keys.start < r.stop and r.start < keys.stop for r in ranges)


def _visible_ranges(call: AttentionCall) -> tuple[KeyRange, ...]:
    """Positions visible to any query; all of them where the q_offset is a device tensor."""
    end = call.kv.shape[2]
    if not isinstance(call.q_offset, int):
        return (KeyRange(0, end),)
    return call.mask.key_ranges(*call.q_bounds(0, call.q.shape[2]), end)


def _attending_queries(call: AttentionCall, chunk: KVChunk) -> tuple[int, int]:
    """The queries start .. stop-1 that, by position, may attend to a key of a chunk."""
    num_queries, last = call.q.shape[2], chunk.first + chunk.k.shape[2] - 1
    start, stop = 0, num_queries
    if isinstance(call.q_offset, int) and call.mask.causal:
        start = max(0, chunk.first - call.q_offset)
        if call.mask.window is not None and chunk.first >= call.mask.sinks:
            stop = min(stop, last + call.mask.window - call.q_offset)
    return start, stop


def _on_chunk(call: AttentionCall, chunk: KVChunk, start: int, stop: int) -> AttentionCall:
    """The part of a call between some queries and a chunk, whose first key is now position 0."""
    first, length = chunk.first, chunk.k.shape[2]
    columns = slice(first, first + length)
    attn_mask, padding = call.attn_mask, call.key_padding
    return call.with_(
        q=call.q[:, :, start:stop],
        kv=DenseKV(chunk.k, chunk.v),
        mask=replace(call.mask, sinks=max(0, call.mask.sinks - first)),
        q_offset=call.q_offset + start - first,
        kv_lens=None if call.kv_lens is None else (call.kv_lens - first).clamp(0, length),
        key_padding=None if padding is None else padding[:, columns],
        attn_mask=None if attn_mask is None else attn_mask[:, :, start:stop, columns],
        sink_logits=None,
    )
