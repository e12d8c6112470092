"""Many queries over a ring or over codes, on GPUs: piece by piece, each a run of plain keys.

The kernels for few queries read such storage where it lies, with few rows a tile.  A prompt has
thousands of rows, so it pays to hand its keys to the kernels for plain keys: a span of a ring as
it is, a quantised history written out some of it at a time.  The pieces are joined by their lse,
and no more than PIECE_BYTES of the history is ever there in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from saccade.core import AttentionOutput, DenseKV, KeyRange, QuantizedKV
from saccade.core.kv import KVView
from saccade.ops.attention import rules
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.combine import Combiner, with_sink_logits
from saccade.ops.attention.nvidia import gluon_backend as gluon
from saccade.ops.attention.nvidia.problem import dense_problem
from saccade.ops.attention.nvidia.triton.launch import forward
from saccade.ops.kv_write.quantize import dequantize_range

PIECE_BYTES = 128 * 2**20


class Piece(NamedTuple):
    """Keys and values `[B, Hkv, n, D]` at the positions `first` .. `first + n - 1`."""

    k: Tensor
    v: Tensor
    first: int


def suits(call: AttentionCall) -> bool:
    """Whether a call can be cut: everything it says of keys is by position, or by column."""
    return isinstance(call.kv, (DenseKV, QuantizedKV)) and call.blocks is None


def run_pieces(call: AttentionCall) -> AttentionOutput:
    """Attention of a call that `suits`."""
    joined = Combiner((*call.q.shape[:3], call.kv.shape[4]), call.q)
    for piece in pieces_of(call.kv, _seen_ranges(call)):
        start, stop = _seeing_queries(call, piece)
        if start < stop:
            joined.add(_attend(_moved(call, piece, start, stop)), start, stop)
    result = joined.result()
    return result if call.sink_logits is None else with_sink_logits(result, call.sink_logits)


def pieces_of(kv: KVView, ranges: tuple[KeyRange, ...]) -> Iterator[Piece]:
    """The pieces that cover the ranges of positions, and little more."""
    batch, heads, _, dim, value_dim = kv.shape
    size = PIECE_BYTES // (batch * heads * (dim + value_dim) * kv.dtype.itemsize)
    if isinstance(kv, QuantizedKV):
        size = max(1, size // kv.k_group) * kv.k_group
        starts = range(0, kv.num_packed, size)
        cuts = [KeyRange(start, min(start + size, kv.num_packed)) for start in starts]
        for cut in cuts:
            if _overlap(cut, ranges):
                yield Piece(*dequantize_range(kv, *cut), cut.start)
        if kv.recent_k.shape[2]:
            yield Piece(kv.recent_k, kv.recent_v, kv.num_packed)
        return
    assert isinstance(kv, DenseKV)
    for slot, position, length in kv.spans:
        if _overlap(KeyRange(position, position + length), ranges):
            yield Piece(kv.k.narrow(2, slot, length), kv.v.narrow(2, slot, length), position)


def _overlap(keys: KeyRange, ranges: tuple[KeyRange, ...]) -> bool:
    return any(keys.start < r.stop and r.start < keys.stop for r in ranges)


def _seen_ranges(call: AttentionCall) -> tuple[KeyRange, ...]:
    """Positions that any query may see; all where only the device knows where queries are."""
    end = call.kv.shape[2]
    if not isinstance(call.q_offset, int):
        return (KeyRange(0, end),)
    return call.mask.key_ranges(*call.q_bounds(0, call.q.shape[2]), end)


def _seeing_queries(call: AttentionCall, piece: Piece) -> tuple[int, int]:
    """The queries start .. stop-1 that see any key of a piece by position (or may do so)."""
    num_queries, last = call.q.shape[2], piece.first + piece.k.shape[2] - 1
    start, stop = 0, num_queries
    if isinstance(call.q_offset, int) and call.mask.causal:
        start = max(0, piece.first - call.q_offset)
        if call.mask.window is not None and piece.first >= call.mask.sinks:
            stop = min(stop, last + call.mask.window - call.q_offset)
    return start, stop


def _moved(call: AttentionCall, piece: Piece, start: int, stop: int) -> AttentionCall:
    """The part of a call between some queries and a piece, whose first key is now position 0."""
    first, length = piece.first, piece.k.shape[2]
    columns = slice(first, first + length)
    foreign, padding = call.attn_mask, call.key_padding
    return call.with_(
        q=call.q[:, :, start:stop],
        kv=DenseKV(piece.k, piece.v),
        mask=replace(call.mask, sinks=max(0, call.mask.sinks - first)),
        q_offset=call.q_offset + start - first,
        kv_lens=None if call.kv_lens is None else (call.kv_lens - first).clamp_min(0),
        key_padding=None if padding is None else padding[:, columns],
        attn_mask=None if foreign is None else foreign[:, :, start:stop, columns],
        sink_logits=None,
    )


def _attend(call: AttentionCall) -> AttentionOutput:
    """Attention over plain keys by the faster of the kernels that can."""
    rule = rules.preferred(call)
    if rule is not None and "gluon" in rule.order and gluon.refusal(call) is None:
        return gluon.run(call)
    return forward(dense_problem(call))
