"""Split-KV decoding over quantized keys and values on Hopper, without converting integers.

A CTA is one warp, which takes 64 keys at a time.  Eight query rows (heads of a group times queries)
are the columns of both products, so quantized tensors are their A operands (mma.py) and no lane
works for rows that do not exist.  Scales are folded into queries and weights; what belongs to all
keys of a tile (q @ k_offset) is added where scores become exponents.

Which lane holds what (ptx/mma.py): lane t of a row of four reads neighbouring channels of keys, and
8 g .. 8 g + 7 are the keys of row g; for values row g reads neighbouring channels, and lane t the
keys 16 t .. 16 t + 15.  P becomes a B operand by one 8 x 8 transposition in registers (movmatrix).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.ptx.async_copy import cp_async_wait, warp_sync
from saccade.ops.attention.nvidia.gluon.ptx.convert import pack_f16x2
from saccade.ops.attention.nvidia.gluon.ptx.memory import static_shared_memory
from saccade.ops.attention.nvidia.gluon.ptx.mma import (
    column_allreduce_max,
    column_allreduce_sum,
    movmatrix_trans,
)
from saccade.ops.attention.nvidia.gluon.quantized_decode.dequantize import F16_DENORM_MIN
from saccade.ops.attention.nvidia.gluon.quantized_decode.epilogue import BLOCK_M, store_output
from saccade.ops.attention.nvidia.gluon.quantized_decode.mma import (
    fold_v_scale,
    mma_pv,
    mma_qk,
    mma_v_offsets,
)
from saccade.ops.attention.nvidia.gluon.quantized_decode.producer import (
    BLOCK_N,
    QPARAM_BYTES,
    issue_k_copies,
    issue_v_copies,
    prefetch_tile,
    quantized_gmem,
)
from saccade.ops.attention.nvidia.gluon.quantized_decode.smem import (
    load_k,
    load_k_qparams,
    load_q_fragments,
    load_v,
    load_v_qparams,
    zero_past_end,
    zero_v_rows,
)
from saccade.ops.attention.nvidia.gluon.quantized_decode.softmax import (
    INITIAL_MAX,
    P_SHIFT,
    RESCALE_THRESHOLD,
    exp2_scores,
    lane_max,
    mask_rows,
    mask_scores,
    rescale,
    selected_rows,
)
from saccade.ops.gpu.triton_lang import LOG2E, block_list_at, key_tiles, pdl_begin, seqlen_of


@gluon.jit
def tiles_of(m_tile, q_len, q_offset, k_len, mask_args, GROUPS: gl.constexpr,
             CAUSAL: gl.constexpr):  # fmt: skip
    """Tiles of keys that queries attend to: (how many, sinks, first, full from, full to)."""
    first_q = q_offset + m_tile * BLOCK_M // GROUPS
    last_q = q_offset + gl.minimum((m_tile * BLOCK_M + BLOCK_M - 1) // GROUPS, q_len - 1)
    num_sinks, first, full_from, full_to, last = key_tiles(
        first_q, last_q, k_len, mask_args, CAUSAL, BLOCK_N
    )
    return num_sinks + last - first, num_sinks, first, full_from, full_to


@gluon.jit
def query_gmem(q, b, kv_head, row, GROUPS: gl.constexpr):
    """Address of query row // GROUPS of head row % GROUPS of a group, in 16 bits."""
    at = (row % GROUPS + kv_head * GROUPS).to(gl.int64) * q.head
    at += (row // GROUPS).to(gl.int64) * q.row + b * q.batch
    return q.ptr.to(gl.int64) + at * 2


@gluon.jit
def tile_index(i, num_tiles, num_sinks, first, tiles):
    """The i-th tile to compute: that of a list, or sink tiles first, then those of the window."""
    if tiles is not None:
        return gl.load(tiles + gl.maximum(gl.minimum(i, num_tiles - 1), 0))
    return gl.where(i < num_sinks, i, i - num_sinks + first)


@gluon.jit
def copy_size(lane, i, num_tiles, tile, k_len):
    """Bytes that a lane copies at a time: none where the i-th tile is not to be computed."""
    return gl.where((lane < (num_tiles - i) * 32) & (tile * BLOCK_N < k_len), 16, 0)


@gluon.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def quantized_decode_kernel(
    q, k, v, out, lse, seqlen_info, mask_args, block_lists, sink_logits, scale, q_len, k_len,
    q_offset, out_split, lse_split, KV_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr,
    K_FORMAT: gl.constexpr, V_FORMAT: gl.constexpr, K_GROUP: gl.constexpr, V_GROUPS: gl.constexpr,
    CAUSAL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """(out, lse) of one split: 64 keys a step, the copies of the next ones in flight.

    The splits of a head take its tiles round-robin, so what they read at a time lies together.
    Listed tiles are those with a selected block; where some keys of them are not selected,
    mask_args has the blocks.
    """
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    TILES_ON_DEVICE: gl.constexpr = (
        seqlen_info.q_offsets is not None
        or seqlen_info.kv_lens is not None
        or block_lists.tiles is not None
    )
    if TILES_ON_DEVICE:
        pdl_begin(PDL)
    K_ROW: gl.constexpr = D // 2 if K_FORMAT == "int4" else D  # bytes
    V_ROW: gl.constexpr = D // 2 if V_FORMAT == "int4" else D
    lane = gl.arange(0, 32, layout=L)
    g, t = lane // 4, lane % 4
    split, splits, m_tile = gl.program_id(0), gl.num_programs(0), gl.program_id(1)
    b = (gl.program_id(2) // KV_HEADS).to(gl.int64)
    kv_head = gl.program_id(2) % KV_HEADS
    _, _, _, k_len, q_offset, _ = seqlen_of(seqlen_info, b, kv_head, m_tile, q_len, k_len, q_offset)
    rows = q_len * GROUPS
    num_tiles, num_sinks, first, full_from, full_to = tiles_of(
        m_tile, q_len, q_offset, k_len, mask_args, GROUPS, CAUSAL
    )
    tiles = None
    if block_lists.tiles is not None:
        tiles, _, num_tiles = block_list_at(block_lists, b, kv_head, m_tile)

    k_gmem, v_gmem = quantized_gmem(k, b, kv_head), quantized_gmem(v, b, kv_head)
    # Shared memory: keys, values, scales and offsets of keys, scales and offsets of values.
    V_SMEM: gl.constexpr = BLOCK_N * K_ROW
    K_QPARAMS: gl.constexpr = V_SMEM + BLOCK_N * V_ROW
    V_QPARAMS: gl.constexpr = K_QPARAMS + QPARAM_BYTES
    SIZE: gl.constexpr = V_QPARAMS + QPARAM_BYTES
    smem = static_shared_memory(lane, SIZE)
    tile = tile_index(split, num_tiles, num_sinks, first, tiles)
    if not TILES_ON_DEVICE:
        prefetch_tile(
            k_gmem, v_gmem, tile, lane, split < num_tiles, K_ROW, V_ROW, K_GROUP, V_GROUPS, D
        )
        pdl_begin(PDL)
    size = copy_size(lane, split, num_tiles, tile, k_len)
    issue_k_copies(smem, smem + K_QPARAMS, k_gmem, tile, lane, size, K_ROW, K_GROUP, D)
    issue_v_copies(smem + V_SMEM, smem + V_QPARAMS, v_gmem, tile, lane, size, V_ROW, V_GROUPS)
    k_lane = g * (8 * K_ROW) + ((t * (D // 8)) ^ (g % 2 * 64))
    v_lane = V_SMEM + t * (16 * V_ROW) + ((g * (D // 16)) ^ (t * 32))

    q_gmem = query_gmem(q, b, kv_head, gl.minimum(m_tile * BLOCK_M + g, rows - 1), GROUPS)
    q_frags = load_q_fragments(q_gmem + t * (D // 4), D, K_FORMAT, q.ptr.dtype.element_ty)
    q_pos0 = (m_tile * BLOCK_M + 2 * t) // GROUPS + q_offset
    q_pos1 = (m_tile * BLOCK_M + 2 * t + 1) // GROUPS + q_offset

    scale_log2 = scale * LOG2E
    if K_FORMAT != "fp8":
        scale_log2 = scale_log2 / F16_DENORM_MIN
    threshold = RESCALE_THRESHOLD / scale_log2
    zero = gl.full([32], 0.0, gl.float32, L)
    zeros = (zero, zero, zero, zero)
    row_max = (zero + INITIAL_MAX, zero + INITIAL_MAX)
    row_sum = (zero, zero)
    offset_acc = zeros
    acc = (zeros,) * (D // 16)
    for i in range(split, num_tiles, splits):
        if mask_args.block_mask is not None:
            selected = selected_rows(mask_args, b, kv_head, tile * BLOCK_N + g * 8,
                                     m_tile * BLOCK_M + 2 * t, k_len, q_len, GROUPS)  # fmt: skip
        next_tile = tile_index(i + splits, num_tiles, num_sinks, first, tiles)
        cp_async_wait(lane, 1)
        k_scale = load_k_qparams(smem + K_QPARAMS + t * (D // 4), D)
        k_offset = load_k_qparams(smem + K_QPARAMS + 2 * D + t * (D // 4), D)
        k_regs = load_k(smem + k_lane, K_ROW, D)
        s, bias0, bias1 = mma_qk(q_frags, k_regs, k_scale, k_offset, D, K_FORMAT)
        warp_sync(lane)
        size = copy_size(lane, i + splits, num_tiles, next_tile, k_len)
        issue_k_copies(smem, smem + K_QPARAMS, k_gmem, next_tile, lane, size, K_ROW, K_GROUP, D)
        cp_async_wait(lane, 1)
        v_scale = load_v_qparams(smem + V_QPARAMS + t * (32 * V_GROUPS), V_GROUPS)
        v_offset = load_v_qparams(smem + V_QPARAMS + (2 * BLOCK_N + t * 32) * V_GROUPS, V_GROUPS)
        if (tile < full_from) | (tile >= full_to):
            k_pos = tile * BLOCK_N
            s = mask_scores(s, k_pos + g * 8, q_pos0, q_pos1, k_len, mask_args, CAUSAL)
            v_scale = zero_past_end(v_scale, k_pos + t * 16, k_len, V_GROUPS)
            v_offset = zero_past_end(v_offset, k_pos + t * 16, k_len, V_GROUPS)
            if V_FORMAT == "fp8":
                zero_v_rows(smem + V_SMEM, lane, k_len - k_pos, V_ROW)
        if mask_args.block_mask is not None:
            s = mask_rows(s, selected)
        max0, max1 = lane_max(s, 0) + bias0, lane_max(s, 1) + bias1
        rises = (max0 > row_max[0] + threshold) | (max1 > row_max[1] + threshold)
        if gl.max(rises.to(gl.int32), axis=0) > 0:
            new_max = (
                gl.maximum(row_max[0], column_allreduce_max(max0)),
                gl.maximum(row_max[1], column_allreduce_max(max1)),
            )
            acc, offset_acc, row_sum = rescale(
                acc, offset_acc, row_max, new_max, row_sum, scale_log2
            )
            row_max = new_max
        p0, sum0 = exp2_scores(s, (row_max[0] - bias0) * scale_log2 - P_SHIFT, scale_log2, 0)
        p1, sum1 = exp2_scores(s, (row_max[1] - bias1) * scale_log2 - P_SHIFT, scale_log2, 1)
        row_sum = (row_sum[0] + sum0, row_sum[1] + sum1)
        p = ()
        for key in gl.static_range(8):
            p += (movmatrix_trans(pack_f16x2(p0[key], p1[key])),)
        offset_acc = mma_v_offsets(offset_acc, p, v_offset, V_GROUPS)
        scaled_p = fold_v_scale(p, v_scale, V_GROUPS, 0)
        v_regs = load_v(smem + v_lane, V_ROW, D)
        new_acc = ()
        for j in gl.static_range(D // 16):
            if j == D // 32 and V_GROUPS == 2:
                scaled_p = fold_v_scale(p, v_scale, V_GROUPS, 1)
            new_acc += (
                mma_pv(acc[j], v_regs, scaled_p, j // (D // 32), j % (D // 32), D // 64, V_FORMAT),
            )
        acc = new_acc
        warp_sync(lane)
        issue_v_copies(smem + V_SMEM, smem + V_QPARAMS, v_gmem, next_tile, lane, size, V_ROW,
                       V_GROUPS)  # fmt: skip
        tile = next_tile
    row_sum = (column_allreduce_sum(row_sum[0]), column_allreduce_sum(row_sum[1]))
    store_output(acc, offset_acc, row_max, row_sum, scale_log2, out, lse, sink_logits, m_tile,
                 split, out_split, lse_split, b, kv_head, KV_HEADS, GROUPS, q_len, g, t, D,
                 V_FORMAT)  # fmt: skip
