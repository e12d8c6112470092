"""Masking and online softmax over the eight keys of a lane, for two query rows.

Sums are rescaled only where a maximum rises by more than RESCALE_THRESHOLD powers of two, as in
FlashAttention-4; until then weights may exceed 1.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

INITIAL_MAX = gl.constexpr(-1e24)  # below every score, and finite after the factor 2^24
P_SHIFT = gl.constexpr(6.0)  # weights are enlarged by 2^6, clear of float16's denormal numbers
RESCALE_THRESHOLD = gl.constexpr(3.0)  # weights may grow by 2^3 before sums are rescaled


@gluon.jit
def mask_scores(s, k_first, q_pos0, q_pos1, k_len, mask_args, CAUSAL: gl.constexpr):
    """Scores of keys k_first .. k_first + 7, -inf where a row does not attend to a key."""
    masked = ()
    for key in gl.static_range(8):
        k_pos = k_first + key
        for column in gl.static_range(2):
            q_pos = q_pos0 if column == 0 else q_pos1
            visible = k_pos < k_len
            if CAUSAL:
                visible = visible & (k_pos <= q_pos)
            if mask_args.window is not None:
                near = q_pos - k_pos < mask_args.window
                if mask_args.sinks is not None:
                    near = near | (k_pos < mask_args.sinks)
                visible = visible & near
            masked += (gl.where(visible, s[2 * key + column], float("-inf")),)
    return masked


@gluon.jit
def selected_rows(mask_args, b, kv_head, k_first, row, k_len, q_len, GROUPS: gl.constexpr):
    """Whether query rows `row` and `row` + 1 select the block of keys k_first .. k_first + 7."""
    at = mask_args.block_mask + b * mask_args.block_mask_batch
    at = at + kv_head.to(gl.int64) * mask_args.block_mask_head + k_first // mask_args.k_block
    first = gl.minimum(row // GROUPS, q_len - 1) // mask_args.q_block
    second = gl.minimum((row + 1) // GROUPS, q_len - 1) // mask_args.q_block
    stored = k_first < k_len
    return (
        gl.load(at + first.to(gl.int64) * mask_args.block_mask_row, mask=stored, other=0) != 0,
        gl.load(at + second.to(gl.int64) * mask_args.block_mask_row, mask=stored, other=0) != 0,
    )


@gluon.jit
def mask_rows(s, selected):
    """Scores of eight keys, -inf for each of the two rows that does not select them."""
    masked = ()
    for key in gl.static_range(8):
        masked += (gl.where(selected[0], s[2 * key], float("-inf")),)
        masked += (gl.where(selected[1], s[2 * key + 1], float("-inf")),)
    return masked


@gluon.jit
def lane_max(s, COLUMN: gl.constexpr):
    """The largest score of a lane's eight keys."""
    largest = s[COLUMN]
    for key in gl.static_range(1, 8):
        largest = gl.maximum(largest, s[2 * key + COLUMN])
    return largest


@gluon.jit
def exp2_scores(s, shift, scale_log2, COLUMN: gl.constexpr):
    """(weights of eight keys, their sum) of a row: exp2(score * scale_log2 - shift)."""
    p = (gl.exp2(s[COLUMN] * scale_log2 - shift),)
    total = p[0]
    for key in gl.static_range(1, 8):
        p += (gl.exp2(s[2 * key + COLUMN] * scale_log2 - shift),)
        total += p[key]
    return p, total


@gluon.jit
def rescale_fragment(c, factor0, factor1):
    """A C fragment times the factors of its two rows."""
    return c[0] * factor0, c[1] * factor1, c[2] * factor0, c[3] * factor1


@gluon.jit
def rescale(acc, offset_acc, row_max, new_max, row_sum, scale_log2):
    """(acc, offset_acc, row_sum) relative to a new maximum."""
    factor0 = gl.exp2((row_max[0] - new_max[0]) * scale_log2)
    factor1 = gl.exp2((row_max[1] - new_max[1]) * scale_log2)
    new_acc = ()
    for j in gl.static_range(len(acc)):
        new_acc += (rescale_fragment(acc[j], factor0, factor1),)
    return (
        new_acc,
        rescale_fragment(offset_acc, factor0, factor1),
        (row_sum[0] * factor0, row_sum[1] * factor1),
    )
