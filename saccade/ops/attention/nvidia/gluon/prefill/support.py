"""Which calls the Gluon prefill kernel takes: dense keys, pages, and chunks of other storage.

Loaded on any machine, so nothing here imports Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import DenseKV, PagedKV, QuantizedKV
from saccade.ops.attention.call import MANY_QUERIES, AttentionCall
from saccade.ops.attention.nvidia.gluon.prefill.selected import heads_of_tile, parts_of_tile
from saccade.ops.attention.nvidia.gluon.support import layout_refusal, scale_refusal

TILE_KEYS = {64: 128, 128: 128, 256: 64}  # keys of a tile, by its head dimension
DIMS = range(33, max(TILE_KEYS) + 1)  # narrower heads would fill less than half a tile
SHORTEST_PAGE = 16


def tile_dim(dim: int) -> int:
    """Columns of the tiles of heads of `dim`: the next of TILE_KEYS; those past `dim` are zeros."""
    return next(width for width in TILE_KEYS if dim <= width)


def refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run a call over dense keys or pages, or None."""
    kv = call.kv
    if not isinstance(kv, PagedKV) and not (isinstance(kv, DenseKV) and kv.is_plain):
        return "it supports plain dense keys and pages, and no other view"
    return (
        _mask_refusal(call)
        or scale_refusal(call)
        or _page_refusal(call)
        or _blocks_refusal(call)
        or _storage_refusal(call, kv.k, kv.v)
    )


def chunked_refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run a prompt over a ring or quantized keys by chunks, or None."""
    reason = _mask_refusal(call) or scale_refusal(call)
    if reason is not None:
        return reason
    if not call.is_plain:
        return "over rings and quantized keys it takes one q_offset and no kv_lens or blocks"
    kv = call.kv
    if isinstance(kv, QuantizedKV):
        # What is dequantized is contiguous; where no recent keys follow, queries alone matter.
        k, v = (kv.recent_k, kv.recent_v) if kv.recent_k.numel() else (call.q, call.q)
        return _storage_refusal(call, k, v) or _dims_refusal(kv)
    assert isinstance(kv, DenseKV)
    return _storage_refusal(call, kv.k, kv.v)


def _dims_refusal(kv: QuantizedKV) -> str | None:
    dim, value_dim = kv.shape[3:]
    return None if dim == value_dim else f"head_dim is {dim} but value_dim {value_dim}"


def _mask_refusal(call: AttentionCall) -> str | None:
    if call.key_padding is not None or call.attn_mask is not None:
        return "it supports no key_padding and no attn_mask"
    return None


def _page_refusal(call: AttentionCall) -> str | None:
    """A tile of keys has to consist of full pages, or to lie in one."""
    dim = call.q.shape[3]
    if not isinstance(call.kv, PagedKV) or dim not in DIMS:
        return None
    keys, size = TILE_KEYS[tile_dim(dim)], call.kv.page_size
    if (keys % size and size % keys) or size < SHORTEST_PAGE:
        return (
            f"pages of {size} keys are shorter than {SHORTEST_PAGE}, or neither divide its "
            f"tiles of {keys} nor are multiples of them"
        )
    return None


def _blocks_refusal(call: AttentionCall) -> str | None:
    """Tiles have to lie in blocks of a selection."""
    blocks, dim = call.blocks, call.q.shape[3]
    if blocks is None or dim not in DIMS:
        return None
    if not call.with_(blocks=None).is_plain or not isinstance(call.kv, DenseKV):
        return "it selects blocks of plain dense keys only, the same number for every row"
    if call.q.shape[2] <= MANY_QUERIES:
        return f"it takes blocks for more than {MANY_QUERIES} queries; Triton divides keys for few"
    heads = heads_of_tile(blocks.q_block, call.q.shape[1] // call.kv.shape[1])
    parts = parts_of_tile(blocks.k_block, TILE_KEYS[tile_dim(dim)])
    if heads is None or parts is None:
        return (
            f"blocks of {blocks.q_block} queries x {blocks.k_block} keys, for "
            f"{call.q.shape[1] // call.kv.shape[1]} heads a KV head, do not fill its tiles"
        )
    if parts > 1 and call.mask.window is not None:
        return f"under a window it takes no blocks of {blocks.k_block} keys"
    if heads > 1 and call.sink_logits is not None:
        return f"with learned sinks it takes no blocks of {blocks.q_block} queries"
    return None


def _storage_refusal(call: AttentionCall, k: Tensor, v: Tensor) -> str | None:
    """What TMA and the tensor cores do not take."""
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"{call.q.dtype} is not one of bfloat16, float16"
    if k.dtype != call.q.dtype or v.dtype != call.q.dtype:
        return f"q is {call.q.dtype} but keys are {k.dtype}"
    if call.kv.shape[2] == 0:
        return "there are no keys"
    return layout_refusal((call.q, k, v), DIMS, equal=False) or _value_dim_refusal(k, v)


def _value_dim_refusal(k: Tensor, v: Tensor) -> str | None:
    """Shared memory is shared out for values that are no wider than keys."""
    if tile_dim(v.shape[3]) <= tile_dim(k.shape[3]):
        return None
    return f"value_dim {v.shape[3]} needs wider tiles than head_dim {k.shape[3]}"
