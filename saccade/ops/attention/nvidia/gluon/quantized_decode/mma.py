"""The two products of attention with quantized operands, as they are stored, in registers.

    S^T [keys, rows]      = K_int @ (q * k_scale)^T + q @ k_offset
    O^T [channels, rows] += V_int^T @ (p * v_scale)^T + v_offset^T @ p^T

Scales of keys belong to channels, so they are folded into the queries once a tile; scales of values
belong to tokens and are folded into the weights.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.ptx.convert import mul_f16x2, prmt
from saccade.ops.attention.nvidia.gluon.ptx.mma import mma_m16n8k16
from saccade.ops.attention.nvidia.gluon.quantized_decode.dequantize import (
    F16_DENORM_MIN,
    fold_k_scale,
    mid_integer,
    minus_mid_integer_f16x2,
    unpack_k,
    unpack_v,
)


@gluon.jit
def mma_half_head(q, x, D: gl.constexpr, HALF: gl.constexpr, acc):
    """acc + q @ x over half a head: rows 0 to 7 and 8 to 15 of C hold a part each.

    Four neighbouring registers of x are an A fragment as they were loaded, whose upper and lower
    rows are different channels; each of two products is right in one of them.
    """
    upper, lower = acc
    for i in gl.static_range(HALF * (D // 16), (HALF + 1) * (D // 16), 4):
        a = (x[i], x[i + 1], x[i + 2], x[i + 3])
        upper = mma_m16n8k16(a, (q[i], q[i + 2]), upper)
        lower = mma_m16n8k16(a, (q[i + 1], q[i + 3]), lower)
    return upper, lower


@gluon.jit
def offset_scores(q, scaled_q, scale, offset, D: gl.constexpr, HALF: gl.constexpr,
                  FORMAT: gl.constexpr):  # fmt: skip
    """What is added to all scores of a tile, over half a head, for the two query rows of a lane.

    q @ offset + mid * (q @ scale - sum of scaled_q): the second term takes back what rounding
    q * scale to float16 does to the middle integer of the range.
    """
    MID: gl.constexpr = mid_integer(FORMAT)
    zero = gl.full(q[0].shape, 0.0, gl.float32, q[0].type.layout)
    zeros = (zero, zero, zero, zero)
    upper, lower = mma_half_head(q, offset, D, HALF, (zeros, zeros))
    if MID != 0:
        x = gl.full(q[0].shape, minus_mid_integer_f16x2(FORMAT), gl.int32, q[0].type.layout)
        for i in gl.static_range(HALF * (D // 16), (HALF + 1) * (D // 16), 4):
            upper = mma_m16n8k16((x, x, x, x), (scaled_q[i], scaled_q[i + 1]), upper)
            lower = mma_m16n8k16((x, x, x, x), (scaled_q[i + 2], scaled_q[i + 3]), lower)
    first, second = upper[0] + lower[2], upper[1] + lower[3]
    if MID != 0:
        upper, lower = mma_half_head(q, scale, D, HALF, (zeros, zeros))
        first += MID * (upper[0] + lower[2])
        second += MID * (upper[1] + lower[3])
    return first, second


@gluon.jit
def mma_qk(q, k_regs, scale, offset, D: gl.constexpr, FORMAT: gl.constexpr):
    """Scores of keys 8 g .. 8 g + 7 and two query rows, and what is to be added to each row's.

    The scores are four registers for every two keys.
    """
    REGS: gl.constexpr = D // 32
    scaled_q = fold_k_scale(q, scale, D, FORMAT)
    first, second = offset_scores(q, scaled_q, scale, offset, D, 0, FORMAT)
    first_high, second_high = offset_scores(q, scaled_q, scale, offset, D, 1, FORMAT)
    if FORMAT == "int4":  # queries of the upper half are a sixteenth
        first_high, second_high = first_high * 16, second_high * 16
    first, second = first + first_high, second + second_high
    if FORMAT != "fp8":
        first, second = first * F16_DENORM_MIN, second * F16_DENORM_MIN
    zero = gl.full(q[0].shape, 0.0, gl.float32, q[0].type.layout)
    zeros = (zero, zero, zero, zero)
    s = (zeros, zeros, zeros, zeros)
    for half in gl.static_range(2):
        for reg in gl.static_range(REGS):
            s = mma_k_channels(s, scaled_q, k_regs, half, reg, REGS, FORMAT)
    return s[0] + s[1] + s[2] + s[3], first, second


@gluon.jit
def mma_k_channels(s, scaled_q, k_regs, HALF: gl.constexpr, REG: gl.constexpr, REGS: gl.constexpr,
                   FORMAT: gl.constexpr):  # fmt: skip
    """s + (four channels of eight keys) @ (q * scale)."""
    AT: gl.constexpr = 2 * (HALF * REGS + REG)
    b = (scaled_q[AT], scaled_q[AT + 1])
    return (
        mma_k_pair(s[0], k_regs, 0, b, HALF, REG, REGS, FORMAT),
        mma_k_pair(s[1], k_regs, 2, b, HALF, REG, REGS, FORMAT),
        mma_k_pair(s[2], k_regs, 4, b, HALF, REG, REGS, FORMAT),
        mma_k_pair(s[3], k_regs, 6, b, HALF, REG, REGS, FORMAT),
    )


@gluon.jit
def mma_k_pair(s, k_regs, KEY: gl.constexpr, b, HALF: gl.constexpr, REG: gl.constexpr,
               REGS: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """s + (four channels of keys KEY and KEY + 1) @ b."""
    a0, a2 = unpack_k(k_regs, KEY, HALF, REG, REGS, FORMAT)
    a1, a3 = unpack_k(k_regs, KEY + 1, HALF, REG, REGS, FORMAT)
    return mma_m16n8k16((a0, a1, a2, a3), b, s)


@gluon.jit
def pack_keys(qparams, KEY: gl.constexpr, V_GROUPS: gl.constexpr, GROUP: gl.constexpr):
    """Scales or offsets of a lane's values KEY and KEY + 8 as an f16x2."""
    if V_GROUPS == 2:
        x, y = qparams[KEY], qparams[KEY + 8]
        pair = prmt(x, y, 0x5410 if GROUP == 0 else 0x7632)
    else:
        x, y = qparams[KEY // 2], qparams[KEY // 2 + 4]
        pair = prmt(x, y, 0x5410 if KEY % 2 == 0 else 0x7632)
    return pair


@gluon.jit
def fold_v_scale(p, scale, V_GROUPS: gl.constexpr, GROUP: gl.constexpr):
    """Weights, pairs over keys KEY and KEY + 8 of a lane, times the scales of their values."""
    found = ()
    for key in gl.static_range(8):
        found += (mul_f16x2(p[key], pack_keys(scale, key, V_GROUPS, GROUP)),)
    return found


@gluon.jit
def mma_v_offsets(acc, p, offset, V_GROUPS: gl.constexpr):
    """acc + offsets @ p for both halves of a head: rows 0 to 7 and 8 to 15 of C."""
    for i in gl.static_range(0, 8, 2):
        low, next_low = pack_keys(offset, i, V_GROUPS, 0), pack_keys(offset, i + 1, V_GROUPS, 0)
        high, next_high = low, next_low
        if V_GROUPS == 2:
            high, next_high = (
                pack_keys(offset, i, V_GROUPS, 1), pack_keys(offset, i + 1, V_GROUPS, 1)
            )  # fmt: skip
        acc = mma_m16n8k16((low, high, next_low, next_high), (p[i], p[i + 1]), acc)
    return acc


@gluon.jit
def mma_pv(acc, v_regs, p, HALF: gl.constexpr, TILE: gl.constexpr, REGS: gl.constexpr,
           FORMAT: gl.constexpr):  # fmt: skip
    """acc + channels 2 TILE, 2 TILE + 1 of each row g and half, over all keys, times weights."""
    STEP: gl.constexpr = REGS if FORMAT == "int4" else 2 * REGS  # from key to key
    AT: gl.constexpr = TILE // 2 + (0 if FORMAT == "int4" else HALF * REGS)
    for i in gl.static_range(4):
        a0, a1 = unpack_v(
            v_regs[2 * i * STEP + AT], v_regs[(2 * i + 8) * STEP + AT], TILE % 2, HALF, FORMAT
        )
        a2, a3 = unpack_v(
            v_regs[(2 * i + 1) * STEP + AT], v_regs[(2 * i + 9) * STEP + AT], TILE % 2, HALF, FORMAT
        )
        acc = mma_m16n8k16((a0, a1, a2, a3), (p[2 * i], p[2 * i + 1]), acc)
    return acc
