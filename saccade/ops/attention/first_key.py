"""Views that begin behind position 0: their calls as kernels read them, whose first key is key 0.

Causality, windows and slopes depend on distances alone, so queries, lengths and columns of masks
move down together with the keys.
"""

from __future__ import annotations

from dataclasses import replace

from saccade.core import DenseKV, QuantizedKV, Span
from saccade.core.kv import dense
from saccade.ops.attention.call import AttentionCall


def from_first_key(call: AttentionCall) -> AttentionCall:
    """The same attention over a view that begins at position 0; block selections by position."""
    kv = call.kv
    if not isinstance(kv, QuantizedKV) or not kv.first:
        return call
    first, (padding, lens, mask) = kv.first, (call.key_padding, call.kv_lens, call.attn_mask)
    if call.blocks is not None:  # their blocks begin at multiples of the block size
        tile = dense(kv)
        span = Span(0, first, tile.k.shape[2])
        return call.with_(kv=DenseKV(tile.k, tile.v, (span,), hadamard=kv.hadamard))
    return call.with_(
        kv=replace(kv, first=0),
        mask=replace(call.mask, sinks=max(0, call.mask.sinks - first)),
        q_offset=call.q_offset - first,
        kv_lens=None if lens is None else (lens - first).clamp_min(0),
        key_padding=None if padding is None else padding[:, first:],
        attn_mask=None if mask is None else mask[..., first:],
    )
