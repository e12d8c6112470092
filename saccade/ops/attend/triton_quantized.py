"""Attention over quantised keys and values on GPUs, without ever writing them back in full.

A tile of keys lies in one group of tokens, so its scales and offsets are one row; those of values
are one column.  Codes become numbers by bits alone: 0x6400 | code is 1024 + code in float16, so for
16-bit queries products are taken in float16 (finer than bfloat16) and sums in float32.  Everything
is done by halves of a head, which is how four-bit codes share bytes (saccade.core.formats).
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

# Weights times scales are small: enlarged, they stay clear of float16's denormal numbers.
ENLARGED = tl.constexpr(256.0)


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
def load_codes(at, keep, dims, HALF: tl.constexpr, BITS: tl.constexpr, FROM: tl.constexpr,
               DTYPE: tl.constexpr):  # fmt: skip
    """Both halves of a tile of codes, as numbers counted from FROM."""
    held = keep[:, None] & (dims < HALF)[None, :]
    low = tl.load(at[:, None] + dims[None, :], mask=held, other=0)
    if BITS == 4:
        return as_numbers(low & 15, FROM, DTYPE), as_numbers(low >> 4, FROM, DTYPE)
    high = tl.load(at[:, None] + (dims + HALF)[None, :], mask=held, other=0)
    return as_numbers(low, FROM, DTYPE), as_numbers(high, FROM, DTYPE)


@triton.jit
def as_numbers(codes, FROM: tl.constexpr, DTYPE: tl.constexpr):
    """Codes below 256, minus FROM, in a floating type."""
    if DTYPE == tl.float16:
        return (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + FROM)
    return codes.to(DTYPE) - FROM


@triton.jit
def keys_of(codes, coded, b, kv_head, group, dims, HALF: tl.constexpr, SIDE: tl.constexpr):
    """One half of a tile of keys that lie in one group of tokens."""
    channels = SIDE * HALF + dims
    scale_at = head_of(coded.scale, b, kv_head) + group * coded.scale.row + channels
    offset_at = head_of(coded.offset, b, kv_head) + group * coded.offset.row + channels
    scale = tl.load(scale_at, mask=dims < HALF, other=0.0).to(codes.dtype)
    offset = tl.load(offset_at, mask=dims < HALF, other=0.0).to(codes.dtype)
    return codes * scale[None, :] + offset[None, :]


@triton.jit
def token_scales(coded, b, kv_head, at, real, group, MIDDLE: tl.constexpr):
    """(scale, offset of the middle code) of each token, for one group of channels, enlarged."""
    scale_at = head_of(coded.scale, b, kv_head) + at * coded.scale.row + group
    offset_at = head_of(coded.offset, b, kv_head) + at * coded.offset.row + group
    scale = tl.load(scale_at, mask=real, other=0.0).to(tl.float32) * ENLARGED
    offset = tl.load(offset_at, mask=real, other=0.0).to(tl.float32) * ENLARGED
    return scale, offset + MIDDLE * scale


@triton.jit
def weigh(p, acc, codes, scale, offset, PRECISION: tl.constexpr):
    """acc + p @ (codes * scale + offset), with scale and offset of each token in the weights."""
    acc += tl.sum(p * offset[None, :], 1)[:, None]
    weights = (p * scale[None, :]).to(codes.dtype)
    return tl.dot(weights, codes, acc, input_precision=PRECISION)


@triton.jit
def weigh_groups(p, acc, codes, coded, b, kv_head, at, real, channels, last, MIDDLE: tl.constexpr,
                 GROUP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The same where a half of the head spans several groups of channels."""
    group = (tl.minimum(channels, last) // GROUP)[None, :]
    scale, offset = token_scales(
        coded, b, kv_head, at[:, None], real[:, None], group, MIDDLE
    )  # fmt: skip
    values = (codes.to(tl.float32) * scale + offset).to(codes.dtype)
    return tl.dot(p.to(codes.dtype), values, acc, input_precision=PRECISION)


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
    MIDDLE: tl.constexpr = 2 ** (BITS_V - 1)
    ONE_SCALE: tl.constexpr = V_GROUP % V_HALF == 0  # each half lies in one group of channels
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
    if PRECISION != "ieee":
        q_low, q_high = q_low.to(tl.float16), q_high.to(tl.float16)
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
        if ONE_SCALE:  # asked for early: these loads are too narrow to be pipelined
            low_scale, low_offset = token_scales(v, b, kv_head, at, real, 0, MIDDLE)
            high_scale, high_offset = token_scales(
                v, b, kv_head, at, real, V_HALF // V_GROUP, MIDDLE
            )
        group = (start // K_GROUP).to(tl.int64)
        k_at = head_of(k.codes, b, kv_head) + at * k.codes.row
        low_codes, high_codes = load_codes(k_at, real, dims, HALF, BITS_K, 0, q_low.dtype)
        k_low = keys_of(low_codes, k, b, kv_head, group, dims, HALF, 0)
        k_high = keys_of(high_codes, k, b, kv_head, group, dims, HALF, 1)
        qk = tl.dot(q_low, k_low.T, input_precision=PRECISION)
        qk = tl.dot(q_high, k_high.T, qk, input_precision=PRECISION)
        s = scores_of(qk, terms, slope, q_pos[:, None], k_pos[None, :], RAW)
        see = visible(
            rules, b, h[:, None], kv_head, index[:, None], q_pos[:, None], k_pos[None, :],
            real[None, :], q_real[:, None], CAUSAL,
        )  # fmt: skip
        s = tl.where(see, s, float("-inf"))
        m, l, p, shrink = online_softmax(m, l, s, unit)
        v_at = head_of(v.codes, b, kv_head) + at * v.codes.row
        v_low, v_high = load_codes(v_at, real, value_dims, V_HALF, BITS_V, MIDDLE, q_low.dtype)
        low *= shrink[:, None]
        high *= shrink[:, None]
        if ONE_SCALE:
            low = weigh(p, low, v_low, low_scale, low_offset, PRECISION)
            high = weigh(p, high, v_high, high_scale, high_offset, PRECISION)
        else:
            low = weigh_groups(p, low, v_low, v, b, kv_head, at, real, value_dims,
                               VALUE_DIM - 1, MIDDLE, V_GROUP, PRECISION)  # fmt: skip
            high = weigh_groups(p, high, v_high, v, b, kv_head, at, real, value_dims + V_HALF,
                                VALUE_DIM - 1, MIDDLE, V_GROUP, PRECISION)  # fmt: skip
    low /= ENLARGED
    high /= ENLARGED
    store_split(
        m, l, low, unit, out, lse, terms, split, out_split, lse_split, b, h, index, q_len, q_real,
        kv_heads * groups, value_dims, V_HALF,
    )  # fmt: skip
    store_split(
        m, l, high, unit, out, lse, terms, split, out_split, lse_split, b, h, index, q_len, q_real,
        kv_heads * groups, value_dims + V_HALF, VALUE_DIM,
    )  # fmt: skip
