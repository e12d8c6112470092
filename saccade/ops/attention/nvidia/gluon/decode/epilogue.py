"""The end of the decode kernel: partial results of the warps are combined in shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.epilogue import finalize_softmax
from saccade.ops.attention.nvidia.gluon.ptx.memory import ld_shared_f32, st_shared_f32
from saccade.ops.attention.nvidia.gluon.ptx.mma import column_allreduce_sum
from saccade.ops.gpu.triton_lang import LOWEST

BLOCK_M = gl.constexpr(8)  # query rows of a tile: the columns of a product


@gluon.jit
def store_warp_partial(smem, state, thread, M_TILE: gl.constexpr, D: gl.constexpr,
                       M_TILES: gl.constexpr):  # fmt: skip
    """Store a warp's (row_max, row_sum, O) of a tile of rows into its part of shared memory."""
    ROW_BYTES: gl.constexpr = (D + 4) * 4
    MAXIMA: gl.constexpr = BLOCK_M * M_TILES * ROW_BYTES
    m0, m1, l0, l1, acc = state
    lane = thread % 32
    g, t = lane // 4, lane % 4
    partial = smem + thread // 32 * ((ROW_BYTES + 8) * BLOCK_M * M_TILES)
    at = partial + (M_TILE * BLOCK_M + 2 * t) * ROW_BYTES + g * 4
    for j in gl.static_range(D // 16):
        for e in gl.static_range(4):
            st_shared_f32(at, acc[j][e], (16 * j + e // 2 * 8) * 4 + e % 2 * ROW_BYTES)
    at = partial + (M_TILE * BLOCK_M + 2 * t) * 4
    st_shared_f32(at, m0, MAXIMA)
    st_shared_f32(at, m1, MAXIMA + 4)
    st_shared_f32(at, column_allreduce_sum(l0), MAXIMA + 4 * BLOCK_M * M_TILES)
    st_shared_f32(at, column_allreduce_sum(l1), MAXIMA + 4 * BLOCK_M * M_TILES + 4)


@gluon.jit
def combine_warps(smem, row, channel, scale_log2, D: gl.constexpr, WARPS: gl.constexpr,
                  M_TILES: gl.constexpr):  # fmt: skip
    """(row_max, row_sum, O at four channels D / 4 apart) over all warps."""
    ROW_BYTES: gl.constexpr = (D + 4) * 4
    MAXIMA: gl.constexpr = BLOCK_M * M_TILES * ROW_BYTES
    PARTIAL: gl.constexpr = (ROW_BYTES + 8) * BLOCK_M * M_TILES
    row_max = ld_shared_f32(smem + row * 4, MAXIMA)
    for w in gl.static_range(1, WARPS):
        row_max = gl.maximum(row_max, ld_shared_f32(smem + row * 4, w * PARTIAL + MAXIMA))
    row_sum = row_max * 0.0
    acc = (row_sum, row_sum, row_sum, row_sum)
    for w in gl.static_range(WARPS):
        rescale = gl.exp2(
            (ld_shared_f32(smem + row * 4, w * PARTIAL + MAXIMA) - row_max) * scale_log2
        )
        row_sum += (
            ld_shared_f32(smem + row * 4, w * PARTIAL + MAXIMA + 4 * BLOCK_M * M_TILES) * rescale
        )
        new_acc = ()
        for c in gl.static_range(4):
            o = ld_shared_f32(smem + row * ROW_BYTES + channel * 4, w * PARTIAL + c * D)
            new_acc += (acc[c] + o * rescale,)
        acc = new_acc
    return row_max, row_sum, acc


@gluon.jit
def store_output(smem, out, lse, sink_logits, scale_log2, split, out_split, lse_split, b, kv_head,
                 q_len, thread, KV_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr,
                 WARPS: gl.constexpr, ROWS: gl.constexpr):  # fmt: skip
    """Combine the warps and write output and lse; a thread has four channels D / 4 apart."""
    ROW_THREADS: gl.constexpr = D // 4
    M_TILES: gl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    ROUNDS: gl.constexpr = (ROWS * ROW_THREADS + 32 * WARPS - 1) // (32 * WARPS)
    for i in gl.static_range(ROUNDS):
        item = thread + i * (32 * WARPS)
        row, channel = gl.minimum(item // ROW_THREADS, ROWS - 1), item % ROW_THREADS
        row_max, row_sum, acc = combine_warps(smem, row, channel, scale_log2, D, WARPS, M_TILES)
        index = row // GROUPS
        h = kv_head * GROUPS + row % GROUPS
        keep = (item < ROWS * ROW_THREADS) & (index < q_len)
        # Where no key is visible, row_max * scale_log2 is huge; two roundings of it must never be
        # subtracted.
        row_max = gl.where(row_sum == 0, LOWEST, row_max * scale_log2)
        row_lse, rescale, divisor = finalize_softmax(
            row_max, row_sum, sink_logits, h, keep & (split == 0)
        )
        at = lse + split.to(gl.int64) * lse_split + (b * KV_HEADS * GROUPS + h) * q_len + index
        gl.store(at, row_lse, mask=keep & (channel == 0))
        at = out.ptr + split.to(gl.int64) * out_split + b * out.batch + channel
        at += h.to(gl.int64) * out.head + index.to(gl.int64) * out.row
        for c in gl.static_range(4):
            value = (acc[c] * (rescale / divisor)).to(out.ptr.dtype.element_ty)
            gl.store(at + c * ROW_THREADS, value, mask=keep)
