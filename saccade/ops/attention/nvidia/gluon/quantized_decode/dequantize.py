"""The two products of attention with codes as they are stored, in registers.

A code c is never converted: as bits of a float16 it is the number c * 2^-24, which the matrix units
read exactly (the upper four bits of a byte are 16 c * 2^-24), and `factor_of` makes it good.  Two
codes of keys are one instruction that spreads bytes, two of values one and a half.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.ptx import from_fp8, multiply, pick_bytes, times

TINY = gl.constexpr(2.0**-24)  # what the lowest bit of a float16 means


@gluon.jit
def channels_of_word(words, ROW: gl.constexpr, SIDE: gl.constexpr, WORD: gl.constexpr,
                     WORDS: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """Four channels of a key as two pairs (int4: the even ones, then the odd ones)."""
    if FORMAT == "int4":
        x = words[ROW * WORDS + WORD]
        MASK: gl.constexpr = 0x00F000F0 if SIDE == 1 else 0x000F000F
        pairs = (x & MASK, (x >> 8) & MASK)
    else:
        x = words[(ROW * 2 + SIDE) * WORDS + WORD]
        if FORMAT == "fp8":
            pairs = (from_fp8(x, 0), from_fp8(x, 1))
        else:
            zero = gl.full(x.shape, 0, gl.int32, x.type.layout)
            pairs = (pick_bytes(x, zero, 0x4140), pick_bytes(x, zero, 0x4342))
    return pairs


@gluon.jit
def keys_of_words(x, y, PAIR: gl.constexpr, SIDE: gl.constexpr, FORMAT: gl.constexpr):
    """Channels 2 PAIR and 2 PAIR + 1 of the words of two keys, each a pair over the keys."""
    if FORMAT == "fp8":
        both = pick_bytes(x, y, 0x7362 if PAIR == 1 else 0x5140)
        pairs = (from_fp8(both, 0), from_fp8(both, 1))
    else:
        both = pick_bytes(x, y, 0x7632 if PAIR == 1 else 0x5410)
        if FORMAT == "int4":
            MASK: gl.constexpr = 0x00F000F0 if SIDE == 1 else 0x000F000F
            pairs = (both & MASK, (both >> 8) & MASK)
        else:
            zero = gl.full(x.shape, 0, gl.int32, x.type.layout)
            pairs = (both & 0x00FF00FF, pick_bytes(both, zero, 0x4341))
    return pairs


@gluon.jit
def scaled_queries(q, scale, D: gl.constexpr, FORMAT: gl.constexpr):
    """q * scale, rounded, in the order of the codes: a pair of right sides for each word."""
    found = ()
    for i in gl.static_range(D // 16):
        low, high = times(q[2 * i], scale[2 * i]), times(q[2 * i + 1], scale[2 * i + 1])
        if FORMAT == "int4":
            low, high = pick_bytes(low, high, 0x5410), pick_bytes(low, high, 0x7632)
        found += (low, high)
    return found


@gluon.jit
def half_products(q, numbers, D: gl.constexpr, SIDE: gl.constexpr, found):
    """found + q @ numbers over half a head: its rows 0 to 7 and 8 to 15 hold a part each.

    Four neighbouring numbers are a left side as they were loaded, whose upper and lower rows are
    different channels; each of two products is right in one of them.
    """
    upper, lower = found
    for i in gl.static_range(SIDE * (D // 16), (SIDE + 1) * (D // 16), 4):
        left = (numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3])
        upper = multiply(left, (q[i], q[i + 2]), upper)
        lower = multiply(left, (q[i + 1], q[i + 3]), lower)
    return upper, lower


@gluon.jit
def middle_scores(q, rounded, scale, offset, D: gl.constexpr, SIDE: gl.constexpr,
                  FORMAT: gl.constexpr):  # fmt: skip
    """q @ offset, and what the rounding of q * scale makes of the middle code, for half a head.

    q @ offset + middle * (q @ scale - sum of the rounded q * scale), for the two query rows of a
    thread.
    """
    MIDDLE: gl.constexpr = middle_of(FORMAT)
    zero = gl.full(q[0].shape, 0.0, gl.float32, q[0].type.layout)
    nothing = (zero, zero, zero, zero)
    upper, lower = half_products(q, offset, D, SIDE, (nothing, nothing))
    if MIDDLE != 0:
        x = gl.full(q[0].shape, without_middle(FORMAT), gl.int32, q[0].type.layout)
        for i in gl.static_range(SIDE * (D // 16), (SIDE + 1) * (D // 16), 4):
            upper = multiply((x, x, x, x), (rounded[i], rounded[i + 1]), upper)
            lower = multiply((x, x, x, x), (rounded[i + 2], rounded[i + 3]), lower)
    first, second = upper[0] + lower[2], upper[1] + lower[3]
    if MIDDLE != 0:
        upper, lower = half_products(q, scale, D, SIDE, (nothing, nothing))
        first += MIDDLE * (upper[0] + lower[2])
        second += MIDDLE * (upper[1] + lower[3])
    return first, second


@triton.constexpr_function
def middle_of(form):
    """The code in the middle of a format's range, around which rounding errors average out."""
    return {"int4": 8, "int8": 128, "fp8": 0}[form]


@triton.constexpr_function
def without_middle(form):
    """-middle_of(form) twice, as bits of float16."""
    return {"int4": 0xC800C800, "int8": 0xD800D800, "fp8": 0}[form]


@gluon.jit
def scores_of_keys(q, words, scale, offset, D: gl.constexpr, FORMAT: gl.constexpr):
    """Scores of keys 8 g .. 8 g + 7 and two query rows, and what is to be added to each row's.

    The scores are four registers for every two keys.
    """
    WORDS: gl.constexpr = D // 32
    rounded = scaled_queries(q, scale, D, FORMAT)
    first, second = middle_scores(q, rounded, scale, offset, D, 0, FORMAT)
    first_high, second_high = middle_scores(q, rounded, scale, offset, D, 1, FORMAT)
    if FORMAT == "int4":  # queries of the upper half are a sixteenth
        first_high, second_high = first_high * 16, second_high * 16
    first, second = first + first_high, second + second_high
    if FORMAT != "fp8":
        first, second = first * TINY, second * TINY
    zero = gl.full(q[0].shape, 0.0, gl.float32, q[0].type.layout)
    nothing = (zero, zero, zero, zero)
    s = (nothing, nothing, nothing, nothing)
    for side in gl.static_range(2):
        for word in gl.static_range(WORDS):
            s = add_channels(s, rounded, words, side, word, WORDS, FORMAT)
    return s[0] + s[1] + s[2] + s[3], first, second


@gluon.jit
def add_channels(s, rounded, words, SIDE: gl.constexpr, WORD: gl.constexpr, WORDS: gl.constexpr,
                 FORMAT: gl.constexpr):  # fmt: skip
    """s + (four channels of eight keys) @ (q * scale)."""
    AT: gl.constexpr = 2 * (SIDE * WORDS + WORD)
    right = (rounded[AT], rounded[AT + 1])
    return (
        add_keys(s[0], words, 0, right, SIDE, WORD, WORDS, FORMAT),
        add_keys(s[1], words, 2, right, SIDE, WORD, WORDS, FORMAT),
        add_keys(s[2], words, 4, right, SIDE, WORD, WORDS, FORMAT),
        add_keys(s[3], words, 6, right, SIDE, WORD, WORDS, FORMAT),
    )


@gluon.jit
def add_keys(s, words, KEY: gl.constexpr, right, SIDE: gl.constexpr, WORD: gl.constexpr,
             WORDS: gl.constexpr, FORMAT: gl.constexpr):  # fmt: skip
    """s + (four channels of keys KEY and KEY + 1) @ right."""
    a0, a2 = channels_of_word(words, KEY, SIDE, WORD, WORDS, FORMAT)
    a1, a3 = channels_of_word(words, KEY + 1, SIDE, WORD, WORDS, FORMAT)
    return multiply((a0, a1, a2, a3), right, s)


@gluon.jit
def add_values(acc, words, weights, SIDE: gl.constexpr, TILE: gl.constexpr, WORDS: gl.constexpr,
               FORMAT: gl.constexpr):  # fmt: skip
    """acc + channels 2 TILE, 2 TILE + 1 of each row g and half, over all keys, times weights."""
    STEP: gl.constexpr = WORDS if FORMAT == "int4" else 2 * WORDS  # from key to key
    AT: gl.constexpr = TILE // 2 + (0 if FORMAT == "int4" else SIDE * WORDS)
    for i in gl.static_range(4):
        a0, a1 = keys_of_words(
            words[2 * i * STEP + AT], words[(2 * i + 8) * STEP + AT], TILE % 2, SIDE, FORMAT
        )
        a2, a3 = keys_of_words(
            words[(2 * i + 1) * STEP + AT], words[(2 * i + 9) * STEP + AT], TILE % 2, SIDE, FORMAT
        )
        acc = multiply((a0, a1, a2, a3), (weights[2 * i], weights[2 * i + 1]), acc)
    return acc


@triton.constexpr_function
def factor_of(form, side):
    """What a code times a weight has to be multiplied by, given how its bits were read."""
    if form == "fp8":
        return 1.0
    return 2.0**20 if form == "int4" and side == 1 else 2.0**24
