"""Attention over quantized keys and values on GPUs, without ever writing them back in full.

A tile of keys lies in one group of tokens, so its scales and offsets are one row; those of values
are one column.  Integers become float16 by bit operations alone: 0x6400 | n is 1024 + n in
float16, so for 16-bit queries products are computed in float16 (finer than bfloat16) and sums in
float32.  A head is processed in two halves, because that is how 4-bit integers share bytes
(saccade.core.formats).

Four bytes are loaded as one 32-bit integer and converted in registers, between two layouts in
shared memory: loaded as bytes, the layout of tensor-core operands would make the compiler gather
every byte by itself.
"""

# Triton's language has no types.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.gpu.triton_lang import (
    LOWEST,
    block_list_at,
    head_pointer,
    key_tiles,
    load_tile,
    online_softmax,
    real_keys,
    scores_of,
    seqlen_of,
    split_range,
    store_split,
    tile_mask,
    unit_of,
)

# Weights times scales are small: multiplied by this, they stay above float16's denormal numbers.
V_FACTOR = tl.constexpr(256.0)


@triton.constexpr_function
def unpack_ptx(bits, side, start):
    """PTX that converts the four bytes of a 32-bit integer, minus `start`, to float16.

    0x6400 | n is 1024 + n, so a byte permutation converts.  With 4 bits, each byte holds a value of
    either half of the head; `side` says of which.
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
def unpack_fp8_ptx():
    """The same for four e4m3 numbers, on any GPU: the bits of 1/256 of the number, times 256."""
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
def unpack_nth(packed, n: tl.constexpr, BITS: tl.constexpr, SIDE: tl.constexpr, FROM: tl.constexpr,
              FLOAT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The n-th quantized value of each 32-bit integer as a float, minus FROM."""
    value = nth_value(packed, n, BITS, SIDE)
    if FLOAT:
        bits = ((value & 0x80) << 8) | ((value & 0x7F) << 7)
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(DTYPE) * 256
    return value.to(DTYPE) - FROM


@triton.jit
def nth_value(packed, n: tl.constexpr, BITS: tl.constexpr, SIDE: tl.constexpr):
    """The n-th byte of each 32-bit integer, or its nibble for one half of the head."""
    if BITS == 4:
        return (packed >> (8 * n + 4 * SIDE)) & 15
    return (packed >> (8 * n)) & 255


@triton.jit
def unpack(packed, BITS: tl.constexpr, SIDE: tl.constexpr, FROM: tl.constexpr,
           FLOAT: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Quantized values of one half of a head as floats, minus FROM; 4-bit `packed` has both."""
    if FAST and DTYPE == tl.float16:
        text: tl.constexpr = unpack_fp8_ptx() if FLOAT else unpack_ptx(BITS, SIDE, FROM)
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            text, "=h,=h,=h,=h,r", [packed], is_pure=True, pack=1,
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        )  # fmt: skip
    else:
        c0 = unpack_nth(packed, 0, BITS, SIDE, FROM, FLOAT, DTYPE)
        c1 = unpack_nth(packed, 1, BITS, SIDE, FROM, FLOAT, DTYPE)
        c2 = unpack_nth(packed, 2, BITS, SIDE, FROM, FLOAT, DTYPE)
        c3 = unpack_nth(packed, 3, BITS, SIDE, FROM, FLOAT, DTYPE)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def load_packed(strided, b, kv_head, at, real, index, HALF: tl.constexpr, SIDE: tl.constexpr):
    """Quantized values of one half of a head for tokens `at`, four bytes per 32-bit integer."""
    where = (head_pointer(strided, b, kv_head) + at * strided.row + SIDE * HALF).to(
        tl.pointer_type(tl.int32)
    )
    keep = real[:, None] & (index < HALF // 4)[None, :]
    return tl.load(where[:, None] + index[None, :], mask=keep, other=0)


@triton.jit
def load_channels(strided, b, kv_head, group, dims, HALF: tl.constexpr, SIDE: tl.constexpr):
    """Scales (or offsets) of one half of the channels for a group of tokens."""
    at = head_pointer(strided, b, kv_head) + group * strided.row + SIDE * HALF + dims
    return tl.load(at, mask=dims < HALF, other=0.0)


@triton.jit
def load_tokens(strided, b, kv_head, at, real, group):
    """Scales (or offsets) of one group of channels for tokens `at`."""
    where = head_pointer(strided, b, kv_head) + at * strided.row + group
    return tl.load(where, mask=real, other=0.0)


@triton.jit
def load_quantized(k, v, b, kv_head, start, real, columns, dims, value_dims, HALF: tl.constexpr,
          V_HALF: tl.constexpr, BITS_K: tl.constexpr, BITS_V: tl.constexpr,
          K_GROUP: tl.constexpr, V_GROUP: tl.constexpr):  # fmt: skip
    """Quantized K and V, scales and offsets of a tile of tokens: (lower, upper half) of each."""
    at = (start + columns).to(tl.int64)
    group = (start // K_GROUP).to(tl.int64)
    other: tl.constexpr = V_HALF // V_GROUP  # channel group of the upper half, where a half has one
    k_index = tl.arange(0, dims.shape[0] // 4)
    v_index = tl.arange(0, value_dims.shape[0] // 4)
    return (
        (
            load_packed(k.qdata, b, kv_head, at, real, k_index, HALF, 0),
            load_packed(k.qdata, b, kv_head, at, real, k_index, HALF, 1 if BITS_K == 8 else 0),
        ),
        (
            load_packed(v.qdata, b, kv_head, at, real, v_index, V_HALF, 0),
            load_packed(v.qdata, b, kv_head, at, real, v_index, V_HALF, 1 if BITS_V == 8 else 0),
        ),
        (
            load_channels(k.scale, b, kv_head, group, dims, HALF, 0),
            load_channels(k.scale, b, kv_head, group, dims, HALF, 1),
        ),
        (
            load_channels(k.offset, b, kv_head, group, dims, HALF, 0),
            load_channels(k.offset, b, kv_head, group, dims, HALF, 1),
        ),
        (
            load_tokens(v.scale, b, kv_head, at, real, 0),
            load_tokens(v.scale, b, kv_head, at, real, other),
        ),
        (
            load_tokens(v.offset, b, kv_head, at, real, 0),
            load_tokens(v.offset, b, kv_head, at, real, other),
        ),
    )


@triton.jit
def dequantize_keys(qdata, scale, offset):
    """One half of a tile of keys: qdata * scale + offset, both of its group of tokens."""
    return qdata * scale.to(qdata.dtype)[None, :] + offset.to(qdata.dtype)[None, :]


@triton.jit
def centred(scale, offset, MIDDLE: tl.constexpr):
    """(scale, offset of the middle of the range) of each token, both times V_FACTOR."""
    scale = scale.to(tl.float32) * V_FACTOR
    return scale, offset.to(tl.float32) * V_FACTOR + MIDDLE * scale


@triton.jit
def token_scales(v, b, kv_head, at, real, group, MIDDLE: tl.constexpr):
    """The same, loaded for one group of channels or a tile of them."""
    scale = load_tokens(v.scale, b, kv_head, at, real, group)
    return centred(scale, load_tokens(v.offset, b, kv_head, at, real, group), MIDDLE)


@triton.jit
def accumulate_values(p, acc, qdata, scale, offset, PRECISION: tl.constexpr):
    """acc + p @ (qdata * scale + offset), scale and offset of each token multiplied into p."""
    acc += tl.sum(p * offset[None, :], 1)[:, None]
    weights = (p * scale[None, :]).to(qdata.dtype)
    return tl.dot(weights, qdata, acc, input_precision=PRECISION)


@triton.jit
def accumulate_grouped_values(p, acc, qdata, v, b, kv_head, at, real, channels, last,
                              MIDDLE: tl.constexpr, GROUP: tl.constexpr,
                              PRECISION: tl.constexpr):  # fmt: skip
    """The same where a half of the head spans several groups of channels."""
    group = (tl.minimum(channels, last) // GROUP)[None, :]
    scale, offset = token_scales(
        v, b, kv_head, at[:, None], real[:, None], group, MIDDLE
    )  # fmt: skip
    values = (qdata.to(tl.float32) * scale + offset).to(qdata.dtype)
    return tl.dot(p.to(qdata.dtype), values, acc, input_precision=PRECISION)


@triton.jit
def first_key(i, block_lists, block_list, num_sinks, first, BLOCK: tl.constexpr):
    """Position of the first key of the i-th tile."""
    if block_lists.tiles is not None:
        return tl.load(block_list + i) * BLOCK
    return tl.where(i < num_sinks, i, i - num_sinks + first) * BLOCK


@triton.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def quantized_decode_kernel(
    q, k, v, out, lse, seqlen_info, mask_args, score_args, block_lists, q_len, k_len, q_offset,
    splits, out_split, lse_split, kv_heads, groups,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BITS_K: tl.constexpr,
    BITS_V: tl.constexpr, FLOAT_K: tl.constexpr, FLOAT_V: tl.constexpr, K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr, STAGES: tl.constexpr, CAUSAL: tl.constexpr, RAW: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(out, lse) of one split, as decode_kernel; BLOCK_D and BLOCK_V cover half a head."""
    HALF: tl.constexpr = HEAD_DIM // 2
    V_HALF: tl.constexpr = VALUE_DIM // 2
    MIDDLE: tl.constexpr = 0 if FLOAT_V else 2 ** (BITS_V - 1)
    ONE_SCALE: tl.constexpr = V_GROUP % V_HALF == 0  # each half lies in one group of channels
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    _, _, _, k_len, q_offset, _ = seqlen_of(seqlen_info, b, kv_head, tile, q_len, k_len, q_offset)
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
    if score_args.alibi_slopes is not None:
        slope_at = score_args.alibi_slopes + b * score_args.alibi_slopes_batch + h
        slope = tl.load(slope_at, mask=q_real, other=0.0)[:, None]
    unit = unit_of(score_args, RAW)
    first_q = q_offset + tile * BLOCK_M // groups
    last_q = q_offset + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // groups, q_len - 1)
    num_sinks, first, _, _, last = key_tiles(first_q, last_q, k_len, mask_args, CAUSAL, BLOCK_N)
    block_list = 0
    if block_lists.tiles is not None:
        block_list, _, last = block_list_at(block_lists, b, kv_head, tile)
        num_sinks, first = 0, 0
    begin, end = split_range(split, splits, first, last, num_sinks)

    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    low = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    high = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):
        start = first_key(i, block_lists, block_list, num_sinks, first, BLOCK_N)
        k_pos = start + columns
        real = real_keys(mask_args, b, k_pos, k_len)
        k_packed, v_packed, k_scales, k_offsets, v_scales, v_offsets = load_quantized(
            k, v, b, kv_head, start, real, columns, dims, value_dims, HALF, V_HALF, BITS_K, BITS_V,
            K_GROUP, V_GROUP,
        )  # fmt: skip
        k_low = unpack(k_packed[0], BITS_K, 0, 0, FLOAT_K, q_low.dtype, FAST)
        k_high = unpack(k_packed[1], BITS_K, 1, 0, FLOAT_K, q_low.dtype, FAST)
        k_low = dequantize_keys(k_low, k_scales[0], k_offsets[0])
        k_high = dequantize_keys(k_high, k_scales[1], k_offsets[1])
        qk = tl.dot(q_low, k_low.T, input_precision=PRECISION)
        qk = tl.dot(q_high, k_high.T, qk, input_precision=PRECISION)
        s = scores_of(qk, score_args, slope, q_pos[:, None], k_pos[None, :], RAW)
        mask = tile_mask(
            mask_args, b, h[:, None], kv_head, index[:, None], q_pos[:, None], k_pos[None, :],
            real[None, :], q_real[:, None], CAUSAL,
        )  # fmt: skip
        s = tl.where(mask, s, float("-inf"))
        m, l, p, rescale = online_softmax(m, l, s, unit)
        v_low = unpack(v_packed[0], BITS_V, 0, MIDDLE, FLOAT_V, q_low.dtype, FAST)
        v_high = unpack(v_packed[1], BITS_V, 1, MIDDLE, FLOAT_V, q_low.dtype, FAST)
        low *= rescale[:, None]
        high *= rescale[:, None]
        if ONE_SCALE:
            low_scale, low_offset = centred(v_scales[0], v_offsets[0], MIDDLE)
            high_scale, high_offset = centred(v_scales[1], v_offsets[1], MIDDLE)
            low = accumulate_values(p, low, v_low, low_scale, low_offset, PRECISION)
            high = accumulate_values(p, high, v_high, high_scale, high_offset, PRECISION)
        else:
            at = k_pos.to(tl.int64)
            low = accumulate_grouped_values(
                p, low, v_low, v, b, kv_head, at, real, value_dims, VALUE_DIM - 1, MIDDLE, V_GROUP,
                PRECISION,
            )  # fmt: skip
            high = accumulate_grouped_values(
                p, high, v_high, v, b, kv_head, at, real, value_dims + V_HALF, VALUE_DIM - 1,
                MIDDLE, V_GROUP, PRECISION,
            )  # fmt: skip
    low /= V_FACTOR
    high /= V_FACTOR
    store_split(
        m, l, low, unit, out, lse, score_args, split, out_split, lse_split, b, h, index, q_len,
        q_real, kv_heads * groups, value_dims, V_HALF,
    )  # fmt: skip
    store_split(
        m, l, high, unit, out, lse, score_args, split, out_split, lse_split, b, h, index, q_len,
        q_real, kv_heads * groups, value_dims + V_HALF, VALUE_DIM,
    )  # fmt: skip
