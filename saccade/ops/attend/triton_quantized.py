"""Attention over quantised keys and values on GPUs, without ever writing them back in full.

The scales leave the inner product.  A tile of keys lies in one group of tokens, so with
`key = code * scale + offset` (per channel)

    q . key = (q * scale) . code + q . offset

and codes, small integers, are exact in every 16-bit type.  Values have a scale a token, which
joins the weights: `sum p * value = (p * scale) . code + sum p * offset`.  Codes count from their
middle, so that rounding hurts as little as it can.  Everything is done by halves of a head, which
is how four-bit codes share bytes (saccade.core.formats).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from saccade.ops.attend.triton_decode import share_of, store_split
from saccade.ops.tiles import (
    LOWEST,
    extent,
    key_tiles,
    load_tile,
    online_softmax,
    real_keys,
    scores_of,
    unit_of,
    visible,
    visit_list,
)


class Coded(NamedTuple):
    """Quantised `[B, Hkv, N, D]`: Planes of codes, scales and offsets."""

    codes: Any
    scale: Any
    offset: Any


@triton.jit
def head_of(plane, b, kv_head):
    """Pointer to the first row of a head."""
    return plane.ptr + b * plane.batch + kv_head.to(tl.int64) * plane.head


@triton.jit
def load_codes(at, keep, dims, HALF: tl.constexpr, BITS: tl.constexpr, like):
    """Both halves of a tile of codes, as numbers around 0 in the type that `like` points to."""
    held = keep[:, None] & (dims < HALF)[None, :]
    low = tl.load(at[:, None] + dims[None, :], mask=held, other=0)
    if BITS == 4:
        high = (low >> 4) - 8
        low = (low & 15) - 8
    else:
        high = tl.load(at[:, None] + (dims + HALF)[None, :], mask=held, other=0) - 128
        low = low - 128
    dtype: tl.constexpr = like.dtype.element_ty
    return low.to(tl.int8, bitcast=True).to(dtype), high.to(tl.int8, bitcast=True).to(dtype)


@triton.jit
def scaled_query(q_half, scale_at, offset_at, held, BITS: tl.constexpr):
    """(q * scale, q . offset) of one half, for one group of keys."""
    scale = tl.load(scale_at, mask=held, other=0.0).to(tl.float32)
    offset = tl.load(offset_at, mask=held, other=0.0).to(tl.float32)
    wide = q_half.to(tl.float32)
    turned = tl.sum(wide * (offset + 2 ** (BITS - 1) * scale)[None, :], 1)
    return (wide * scale[None, :]).to(q_half.dtype), turned


@triton.jit
def weigh_codes(p, acc, codes, scale_at, offset_at, real, channels, GROUP: tl.constexpr,
                LAST: tl.constexpr, FOLD: tl.constexpr, BITS: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """acc + p @ values for one half, which holds `channels`; LAST is the last real one."""
    if FOLD:  # the half lies in one group of channels: one scale a token
        first = tl.min(channels, 0) // GROUP
        scale = tl.load(scale_at + first, mask=real, other=0.0).to(tl.float32)
        offset = tl.load(offset_at + first, mask=real, other=0.0).to(tl.float32)
        acc += tl.sum(p * (offset + 2 ** (BITS - 1) * scale)[None, :], 1)[:, None]
        weights = (p * scale[None, :]).to(codes.dtype)
        return tl.dot(weights, codes, acc, input_precision=PRECISION)
    group = (tl.minimum(channels, LAST) // GROUP)[None, :]
    scale = tl.load(scale_at[:, None] + group, mask=real[:, None], other=0.0).to(tl.float32)
    offset = tl.load(offset_at[:, None] + group, mask=real[:, None], other=0.0).to(tl.float32)
    values = (codes.to(tl.float32) + 2 ** (BITS - 1)) * scale + offset
    return tl.dot(p.to(codes.dtype), values.to(codes.dtype), acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def quantized_kernel(
    q,
    k,
    v,
    out,
    lse,
    bounds,
    rules,
    terms,
    visits,
    q_len,
    k_len,
    q_offset,
    splits,
    out_split,
    lse_split,
    kv_heads,
    groups,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BITS_K: tl.constexpr,
    BITS_V: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(out, lse) of one split, as decode_kernel; BLOCK_D and BLOCK_V hold half a head."""
    HALF: tl.constexpr = HEAD_DIM // 2
    V_HALF: tl.constexpr = VALUE_DIM // 2
    FOLD: tl.constexpr = V_HALF <= V_GROUP and (V_GROUP % V_HALF == 0)
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    _, _, _, k_len, q_offset, _ = extent(bounds, b, kv_head, tile, q_len, k_len, q_offset)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    index = rows // groups
    h = kv_head * groups + rows % groups
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_V)
    q_real = index < q_len
    q_pos = index + q_offset
    q_at = q.ptr + b * q.batch + h.to(tl.int64) * q.head + index.to(tl.int64) * q.row
    q_low = load_tile(q_at[:, None] + dims[None, :], q_real, dims, HALF, True)
    q_high = load_tile(q_at[:, None] + dims[None, :] + HALF, q_real, dims, HALF, True)
    slope = 0.0
    if terms.slopes is not None:
        slope = tl.load(terms.slopes + b * terms.slopes_batch + h, mask=q_real, other=0.0)[:, None]
    unit = unit_of(terms, RAW)
    first_q = q_offset + tile * BLOCK_M // groups
    last_q = q_offset + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // groups, q_len - 1)
    num_sinks, first, _, _, last = key_tiles(first_q, last_q, k_len, rules, CAUSAL, BLOCK_N)
    if visits.tiles is not None:
        visited, _, last = visit_list(visits, b, kv_head, tile)
        num_sinks, first = 0, 0
    begin, end = share_of(split, splits, first, last, num_sinks)

    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    low = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    high = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        if visits.tiles is not None:
            start = tl.load(visited + i) * BLOCK_N
        else:
            start = tl.where(i < num_sinks, i, i - num_sinks + first) * BLOCK_N
        k_pos = start + columns
        real = real_keys(rules, b, k_pos, k_len)
        at = k_pos.to(tl.int64)
        k_low, k_high = load_codes(
            head_of(k.codes, b, kv_head) + at * k.codes.row, real, dims, HALF, BITS_K, q.ptr
        )
        group = head_of(k.scale, b, kv_head) + (start // K_GROUP).to(tl.int64) * k.scale.row
        offset = head_of(k.offset, b, kv_head) + (start // K_GROUP).to(tl.int64) * k.offset.row
        s_low, turned = scaled_query(q_low, group + dims, offset + dims, dims < HALF, BITS_K)
        s_high, more = scaled_query(
            q_high, group + dims + HALF, offset + dims + HALF, dims < HALF, BITS_K
        )
        qk = tl.dot(s_low, k_low.T, input_precision=PRECISION)
        qk = tl.dot(s_high, k_high.T, qk, input_precision=PRECISION) + (turned + more)[:, None]
        s = scores_of(qk, terms, slope, q_pos[:, None], k_pos[None, :], RAW)
        see = visible(
            rules, b, h[:, None], kv_head, index[:, None], q_pos[:, None], k_pos[None, :],
            real[None, :], q_real[:, None], CAUSAL,
        )  # fmt: skip
        s = tl.where(see, s, float("-inf"))
        m, l, p, shrink = online_softmax(m, l, s, unit)
        v_low, v_high = load_codes(
            head_of(v.codes, b, kv_head) + at * v.codes.row, real, value_dims, V_HALF, BITS_V, q.ptr
        )
        scale = head_of(v.scale, b, kv_head) + at * v.scale.row
        offset = head_of(v.offset, b, kv_head) + at * v.offset.row
        low = weigh_codes(p, low * shrink[:, None], v_low, scale, offset, real, value_dims,
                          V_GROUP, VALUE_DIM - 1, FOLD, BITS_V, PRECISION)  # fmt: skip
        high = weigh_codes(p, high * shrink[:, None], v_high, scale, offset, real,
                           value_dims + V_HALF, V_GROUP, VALUE_DIM - 1, FOLD, BITS_V,
                           PRECISION)  # fmt: skip
    store_split(
        m, l, low, unit, out, lse, terms, split, out_split, lse_split, b, h, index, q_len, q_real,
        kv_heads * groups, value_dims, V_HALF,
    )  # fmt: skip
    store_split(
        m, l, high, unit, out, lse, terms, split, out_split, lse_split, b, h, index, q_len, q_real,
        kv_heads * groups, value_dims + V_HALF, VALUE_DIM,
    )  # fmt: skip
