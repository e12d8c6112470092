"""Attention over quantised keys and values on GPUs, without ever writing them back in full.

A tile of keys lies in one group of tokens, so its scales and offsets are one row; those of values
are one column.  Codes become numbers by bits alone: 0x6400 | code is 1024 + code in float16, so for
16-bit queries products are taken in float16 (finer than bfloat16) and sums in float32.  Everything
is done by halves of a head, which is how four-bit codes share bytes (saccade.core.formats).

Codes are loaded as words of four and become numbers in registers, on the way from one shared tile
to another: loaded as bytes, the order of the matrix units would make the compiler gather each one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from saccade.ops.attention.nvidia.triton.decode import share_of, store_split
from saccade.ops.gpu.triton_lang import (
    LOWEST,
    block_list_at,
    extent,
    key_tiles,
    load_tile,
    online_softmax,
    real_keys,
    scores_of,
    unit_of,
    visible,
)

# Weights times scales are small: enlarged, they stay clear of float16's denormal numbers.
ENLARGED = tl.constexpr(256.0)


class Coded(NamedTuple):
    """Quantised `[B, Hkv, N, D]`: Planes of codes, scales and offsets."""

    qdata: Any
    scale: Any
    offset: Any


@triton.jit
def head_of(strided, b, kv_head):
    """Pointer to the first row of a head."""
    return strided.ptr + b * strided.batch + kv_head.to(tl.int64) * strided.head


@triton.constexpr_function
def unpacking(bits, side, start):
    """PTX that makes four numbers in float16 from four bytes of codes in a word, minus `start`.

    0x6400 | code is 1024 + code, so a permutation of bytes is a conversion.
    """
    narrow = f"shr.b32 t, t, {4 * side}; and.b32 t, t, 0x0f0f0f0f;" if bits == 4 else ""
    return (
        f"{{ .reg .b32 t, x, y, from; mov.b32 t, $4; {narrow}"
        f" mov.b32 from, {(0x6400 + start) * 65537};"
        " prmt.b32 x, t, 0x64646464, 0x4140; prmt.b32 y, t, 0x64646464, 0x4342;"
        " sub.f16x2 x, x, from; sub.f16x2 y, y, from;"
        " mov.b32 {$0, $1}, x; mov.b32 {$2, $3}, y; }"
    )


@triton.constexpr_function
def unpacking_fp8():
    """The same from four e4m3 codes, on any card: the bits of 1/256 of the number, times 256."""
    half = (
        "and.b32 s, {0}, 0x80008000; shr.b32 {0}, {0}, 1;"
        " lop3.b32 {0}, {0}, 0x3f803f80, s, 0xea; mul.rn.f16x2 {0}, {0}, m;"
    )
    return (
        "{ .reg .b32 t, x, y, s, m; mov.b32 t, $4; mov.b32 m, 0x5c005c00;"
        " prmt.b32 x, t, 0, 0x1404; prmt.b32 y, t, 0, 0x3424; "
        + half.replace("{0}", "x") + half.replace("{0}", "y")
        + " mov.b32 {$0, $1}, x; mov.b32 {$2, $3}, y; }"
    )  # fmt: skip


@triton.jit
def number_of(words, n: tl.constexpr, BITS: tl.constexpr, SIDE: tl.constexpr, FROM: tl.constexpr,
              FLOAT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The n-th code of each word as a number, minus FROM."""
    code = byte_of(words, n, BITS, SIDE)
    if FLOAT:
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(DTYPE) * 256
    return code.to(DTYPE) - FROM


@triton.jit
def byte_of(words, n: tl.constexpr, BITS: tl.constexpr, SIDE: tl.constexpr):
    """The n-th byte of each word, or one of its nibbles."""
    if BITS == 4:
        return (words >> (8 * n + 4 * SIDE)) & 15
    return (words >> (8 * n)) & 255


@triton.jit
def as_numbers(words, BITS: tl.constexpr, SIDE: tl.constexpr, FROM: tl.constexpr,
               FLOAT: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Codes of one half of a head, minus FROM, from its words (of both halves for 4 bits)."""
    if FAST and DTYPE == tl.float16:
        text: tl.constexpr = unpacking_fp8() if FLOAT else unpacking(BITS, SIDE, FROM)
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            text, "=h,=h,=h,=h,r", [words], is_pure=True, pack=1,
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        )  # fmt: skip
    else:
        c0 = number_of(words, 0, BITS, SIDE, FROM, FLOAT, DTYPE)
        c1 = number_of(words, 1, BITS, SIDE, FROM, FLOAT, DTYPE)
        c2 = number_of(words, 2, BITS, SIDE, FROM, FLOAT, DTYPE)
        c3 = number_of(words, 3, BITS, SIDE, FROM, FLOAT, DTYPE)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def load_words(strided, b, kv_head, at, real, words, HALF: tl.constexpr, SIDE: tl.constexpr):
    """Codes of one half of a head for tokens `at`, four bytes a word."""
    where = (head_of(strided, b, kv_head) + at * strided.row + SIDE * HALF).to(
        tl.pointer_type(tl.int32)
    )
    held = real[:, None] & (words < HALF // 4)[None, :]
    return tl.load(where[:, None] + words[None, :], mask=held, other=0)


@triton.jit
def load_channels(strided, b, kv_head, group, dims, HALF: tl.constexpr, SIDE: tl.constexpr):
    """Scales (or offsets) of one half of the channels for a group of tokens."""
    at = head_of(strided, b, kv_head) + group * strided.row + SIDE * HALF + dims
    return tl.load(at, mask=dims < HALF, other=0.0)


@triton.jit
def load_tokens(strided, b, kv_head, at, real, group):
    """Scales (or offsets) of one group of channels for tokens `at`."""
    where = head_of(strided, b, kv_head) + at * strided.row + group
    return tl.load(where, mask=real, other=0.0)


@triton.jit
def fetch(k, v, b, kv_head, start, real, columns, dims, value_dims, HALF: tl.constexpr,
          V_HALF: tl.constexpr, BITS_K: tl.constexpr, BITS_V: tl.constexpr,
          K_GROUP: tl.constexpr, V_GROUP: tl.constexpr):  # fmt: skip
    """Everything stored of the tokens from `start`: words, scales, offsets, by halves."""
    at = (start + columns).to(tl.int64)
    group = (start // K_GROUP).to(tl.int64)
    other: tl.constexpr = V_HALF // V_GROUP  # group of the upper half, where each half has one
    k_words = tl.arange(0, dims.shape[0] // 4)
    v_words = tl.arange(0, value_dims.shape[0] // 4)
    return (
        load_words(k.qdata, b, kv_head, at, real, k_words, HALF, 0),
        load_words(k.qdata, b, kv_head, at, real, k_words, HALF, 1 if BITS_K == 8 else 0),
        load_words(v.qdata, b, kv_head, at, real, v_words, V_HALF, 0),
        load_words(v.qdata, b, kv_head, at, real, v_words, V_HALF, 1 if BITS_V == 8 else 0),
        load_channels(k.scale, b, kv_head, group, dims, HALF, 0),
        load_channels(k.scale, b, kv_head, group, dims, HALF, 1),
        load_channels(k.offset, b, kv_head, group, dims, HALF, 0),
        load_channels(k.offset, b, kv_head, group, dims, HALF, 1),
        load_tokens(v.scale, b, kv_head, at, real, 0),
        load_tokens(v.scale, b, kv_head, at, real, other),
        load_tokens(v.offset, b, kv_head, at, real, 0),
        load_tokens(v.offset, b, kv_head, at, real, other),
    )


@triton.jit
def keys_of(qdata, scale, offset):
    """One half of a tile of keys from codes and the scales of its group."""
    return qdata * scale.to(qdata.dtype)[None, :] + offset.to(qdata.dtype)[None, :]


@triton.jit
def about_middle(scale, offset, MIDDLE: tl.constexpr):
    """(scale, offset of the middle code) of each token, enlarged."""
    scale = scale.to(tl.float32) * ENLARGED
    return scale, offset.to(tl.float32) * ENLARGED + MIDDLE * scale


@triton.jit
def token_scales(coded, b, kv_head, at, real, group, MIDDLE: tl.constexpr):
    """The same, read from memory for one group of channels or a tile of them."""
    scale = load_tokens(coded.scale, b, kv_head, at, real, group)
    return about_middle(scale, load_tokens(coded.offset, b, kv_head, at, real, group), MIDDLE)


@triton.jit
def weigh(p, acc, qdata, scale, offset, PRECISION: tl.constexpr):
    """acc + p @ (codes * scale + offset), with scale and offset of each token in the weights."""
    acc += tl.sum(p * offset[None, :], 1)[:, None]
    weights = (p * scale[None, :]).to(qdata.dtype)
    return tl.dot(weights, qdata, acc, input_precision=PRECISION)


@triton.jit
def weigh_groups(p, acc, qdata, coded, b, kv_head, at, real, channels, last, MIDDLE: tl.constexpr,
                 GROUP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The same where a half of the head spans several groups of channels."""
    group = (tl.minimum(channels, last) // GROUP)[None, :]
    scale, offset = token_scales(
        coded, b, kv_head, at[:, None], real[:, None], group, MIDDLE
    )  # fmt: skip
    values = (qdata.to(tl.float32) * scale + offset).to(qdata.dtype)
    return tl.dot(p.to(qdata.dtype), values, acc, input_precision=PRECISION)


@triton.jit
def first_key(i, block_lists, visited, num_sinks, first, BLOCK: tl.constexpr):
    """Position of the first key of the i-th tile."""
    if block_lists.tiles is not None:
        return tl.load(visited + i) * BLOCK
    return tl.where(i < num_sinks, i, i - num_sinks + first) * BLOCK


@triton.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def quantized_kernel(
    q,
    k,
    v,
    out,
    lse,
    seqlen_info,
    mask_args,
    score_args,
    block_lists,
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
    FLOAT_K: tl.constexpr,
    FLOAT_V: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """(out, lse) of one split, as decode_kernel; BLOCK_D and BLOCK_V hold half a head."""
    HALF: tl.constexpr = HEAD_DIM // 2
    V_HALF: tl.constexpr = VALUE_DIM // 2
    MIDDLE: tl.constexpr = 0 if FLOAT_V else 2 ** (BITS_V - 1)
    ONE_SCALE: tl.constexpr = V_GROUP % V_HALF == 0  # each half lies in one group of channels
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    _, _, _, k_len, q_offset, _ = extent(seqlen_info, b, kv_head, tile, q_len, k_len, q_offset)
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
    if score_args.slopes is not None:
        slope = tl.load(
            score_args.slopes + b * score_args.slopes_batch + h, mask=q_real, other=0.0
        )[:, None]
    unit = unit_of(score_args, RAW)
    first_q = q_offset + tile * BLOCK_M // groups
    last_q = q_offset + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // groups, q_len - 1)
    num_sinks, first, _, _, last = key_tiles(first_q, last_q, k_len, mask_args, CAUSAL, BLOCK_N)
    visited = 0
    if block_lists.tiles is not None:
        visited, _, last = block_list_at(block_lists, b, kv_head, tile)
        num_sinks, first = 0, 0
    begin, end = share_of(split, splits, first, last, num_sinks)

    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    low = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    high = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        start = first_key(i, block_lists, visited, num_sinks, first, BLOCK_N)
        k_pos = start + columns
        real = real_keys(mask_args, b, k_pos, k_len)
        here = fetch(k, v, b, kv_head, start, real, columns, dims, value_dims, HALF, V_HALF, BITS_K,
                     BITS_V, K_GROUP, V_GROUP)  # fmt: skip
        k_low = as_numbers(here[0], BITS_K, 0, 0, FLOAT_K, q_low.dtype, FAST)
        k_high = as_numbers(here[1], BITS_K, 1, 0, FLOAT_K, q_low.dtype, FAST)
        k_low = keys_of(k_low, here[4], here[6])
        k_high = keys_of(k_high, here[5], here[7])
        qk = tl.dot(q_low, k_low.T, input_precision=PRECISION)
        qk = tl.dot(q_high, k_high.T, qk, input_precision=PRECISION)
        s = scores_of(qk, score_args, slope, q_pos[:, None], k_pos[None, :], RAW)
        see = visible(
            mask_args, b, h[:, None], kv_head, index[:, None], q_pos[:, None], k_pos[None, :],
            real[None, :], q_real[:, None], CAUSAL,
        )  # fmt: skip
        s = tl.where(see, s, float("-inf"))
        m, l, p, shrink = online_softmax(m, l, s, unit)
        v_low = as_numbers(here[2], BITS_V, 0, MIDDLE, FLOAT_V, q_low.dtype, FAST)
        v_high = as_numbers(here[3], BITS_V, 1, MIDDLE, FLOAT_V, q_low.dtype, FAST)
        low *= shrink[:, None]
        high *= shrink[:, None]
        if ONE_SCALE:
            low_scale, low_offset = about_middle(here[8], here[10], MIDDLE)
            high_scale, high_offset = about_middle(here[9], here[11], MIDDLE)
            low = weigh(p, low, v_low, low_scale, low_offset, PRECISION)
            high = weigh(p, high, v_high, high_scale, high_offset, PRECISION)
        else:
            at = k_pos.to(tl.int64)
            low = weigh_groups(p, low, v_low, v, b, kv_head, at, real, value_dims,
                               VALUE_DIM - 1, MIDDLE, V_GROUP, PRECISION)  # fmt: skip
            high = weigh_groups(p, high, v_high, v, b, kv_head, at, real, value_dims + V_HALF,
                                VALUE_DIM - 1, MIDDLE, V_GROUP, PRECISION)  # fmt: skip
    low /= ENLARGED
    high /= ENLARGED
    store_split(
        m, l, low, unit, out, lse, score_args, split, out_split, lse_split, b, h, index, q_len, q_real,
        kv_heads * groups, value_dims, V_HALF,
    )  # fmt: skip
    store_split(
        m, l, high, unit, out, lse, score_args, split, out_split, lse_split, b, h, index, q_len, q_real,
        kv_heads * groups, value_dims + V_HALF, VALUE_DIM,
    )  # fmt: skip
