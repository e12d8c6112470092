"""The consumer warpgroups of the fp8 kernel: each computes attention of 64 rows of a tile.

Tensor cores sum fp8 products in fewer than 14 bits: over 65536 values of one sign such a sum loses
half of itself.  So P V of every tile is a sum of its own and is added to O in float32, while the
tensor cores compute S of the next tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from saccade.ops.attention.nvidia.gluon.fp8.producer import (
    BLOCK_M,
    BLOCK_N,
    CONSUMERS,
    ROWS,
    stage_of,
)
from saccade.ops.attention.nvidia.gluon.fp8.softmax import P_EXPONENT, online_softmax, p_operand
from saccade.ops.attention.nvidia.gluon.prefill.mask import apply_mask
from saccade.ops.attention.nvidia.gluon.prefill.softmax import add_sink, add_sums
from saccade.ops.attention.nvidia.gluon.prefill.tile_scheduler import (
    kv_tile,
    kv_tile_plan,
    work_tile,
    work_tile_count,
)
from saccade.ops.gpu.triton_lang import LN2, LOWEST


@gluon.jit
def _mainloop(
    state, begin, end, num_tiles, plan, q_tile, q_pos, smem, scale_log2, k_len, mask_args,
    block_lists, zero, MASK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Tiles of keys begin .. end - 1: S of tile j, then P V of tile j - 1, then softmax of j."""
    _q_smem, k_smem, v_smem, bars = smem
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty = bars
    STAGES: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = k_smem.shape[4]
    for j in range(begin, end):
        o, pv, o_rescale, row_max, row_sum, rescale, packed, n = state
        S: gl.constexpr = row_max.type.layout.parent
        O: gl.constexpr = o.type.layout
        k_stage, _phase = stage_of(n, STAGES)
        v_stage, v_phase = stage_of(n - 1, STAGES)
        p = p_operand(packed, zero, O)
        k_tile = k_smem.index(k_stage).reshape([BLOCK_N, D]).permute((1, 0))
        s_async = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
        s_async = warpgroup_mma(q_tile, k_tile, s_async, use_acc=False, is_async=True)
        o = o * o_rescale[:, None] + pv
        o_rescale = gl.convert_layout(rescale, gl.SliceLayout(1, O))
        mbarrier.wait(v_full.index(v_stage), v_phase)
        v_tile = v_smem.index(v_stage).reshape([D, BLOCK_N]).permute((1, 0))
        pv = gl.zeros([ROWS, D], gl.float32, O)
        pv = warpgroup_mma(p, v_tile, pv, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_async])
        mbarrier.arrive(k_empty.index(k_stage))
        if MASK:
            k_start = kv_tile(j, plan, block_lists) * BLOCK_N
            s = apply_mask(s, q_pos, k_start, k_len, mask_args, CAUSAL, S)
        packed, sums, row_max, rescale = online_softmax(s, row_max, scale_log2)
        row_sum = add_sums(row_sum, sums, rescale)
        # This wait keeps the compiler from moving the wait for P V before the softmax.
        n += 1
        next_stage, next_phase = stage_of(n, STAGES)
        mbarrier.wait(k_full.index(next_stage), next_phase, pred=j + 1 < num_tiles)
        pv = warpgroup_mma_wait(0, deps=[pv])
        mbarrier.arrive(v_empty.index(v_stage))
        state = o, pv, o_rescale, row_max, row_sum, rescale, packed, n
    return state


@gluon.jit
def _first_tile(
    q_tile, q_pos, k_start, smem, n, scale_log2, k_len, mask_args, has_next,
    CAUSAL: gl.constexpr, S: gl.constexpr, O: gl.constexpr,
):  # fmt: skip
    """The state after S and softmax of the first tile of keys, before its P V."""
    _q_smem, k_smem, _v_smem, bars = smem
    _q_full, _q_empty, k_full, k_empty, _v_full, _v_empty = bars
    STAGES: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = k_smem.shape[4]
    stage, phase = stage_of(n, STAGES)
    mbarrier.wait(k_full.index(stage), phase)
    k_tile = k_smem.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
    s_async = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
    s_async = warpgroup_mma(q_tile, k_tile, s_async, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_async])
    mbarrier.arrive(k_empty.index(stage))
    s = apply_mask(s, q_pos, k_start, k_len, mask_args, CAUSAL, S)
    row_max = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S))
    packed, row_sum, row_max, rescale = online_softmax(s, row_max, scale_log2)
    stage, phase = stage_of(n + 1, STAGES)
    mbarrier.wait(k_full.index(stage), phase, pred=has_next)
    o = gl.zeros([ROWS, D], gl.float32, O)
    o_rescale = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, O))
    return o, o, o_rescale, row_max, row_sum, rescale, packed, n + 1


@gluon.jit
def _last_pv(state, smem, zero):
    """O after the P V that is already computed, and that of the last tile."""
    _q_smem, _k_smem, v_smem, bars = smem
    _q_full, _q_empty, _k_full, _k_empty, v_full, v_empty = bars
    o, pv, o_rescale, _row_max, _row_sum, rescale, packed, n = state
    O: gl.constexpr = o.type.layout
    D: gl.constexpr = v_smem.shape[3]
    stage, phase = stage_of(n - 1, v_smem.shape[0])
    mbarrier.wait(v_full.index(stage), phase)
    p = p_operand(packed, zero, O)
    o = o * o_rescale[:, None] + pv
    v_tile = v_smem.index(stage).reshape([D, BLOCK_N]).permute((1, 0))
    pv = gl.zeros([ROWS, D], gl.float32, O)
    pv = warpgroup_mma(p, v_tile, pv, use_acc=False, is_async=True)
    pv = warpgroup_mma_wait(0, deps=[pv])
    mbarrier.arrive(v_empty.index(stage))
    return o * gl.convert_layout(rescale, gl.SliceLayout(1, O))[:, None] + pv


@gluon.jit
def _normalize(o, row_max, row_sum, scale_log2, v_scale, sink_logits, h):
    """O times v_scale and divided by its row sums, and the lse; every row has a visible key."""
    ROW: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    max_log2 = row_max * scale_log2 - P_EXPONENT
    if sink_logits is not None:
        o, max_log2, row_sum = add_sink(o, max_log2, row_sum, sink_logits, h)
    o = o * gl.convert_layout(v_scale / row_sum, ROW)[:, None]
    return o, (max_log2 + gl.log2(row_sum)) * LN2


@gluon.jit
def _scale_log2(scales, scale, b, h, heads, groups):
    """Factor of raw scores of a head; NaN if negative, for which the maximum would be wrong."""
    q_scale, k_scale, _v_scale = scales
    factor = gl.load(q_scale + b * heads + h) * scale
    factor *= gl.load(k_scale + b * (heads // groups) + h // groups)
    return gl.where(factor >= 0, gl.maximum(factor, 1e-30), float("nan"))


@gluon.jit
def consume(args, CAUSAL: gl.constexpr, CONSUMER: gl.constexpr):
    """Attention of the ROWS queries of each work tile that belong to this consumer."""
    o_desc, lse, sink_logits, scales, o_smem, smem, sizes, mask_args, block_lists, scale = args
    q_smem, k_smem, _v_smem, bars = smem
    q_full, q_empty, _k_full, _k_empty, _v_full, _v_empty = bars
    q_len, k_len, q_offset, heads, groups, num_q_tiles, heads_per_section, num_work_tiles = sizes
    D: gl.constexpr = k_smem.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 32])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 32])
    Q_STAGES: gl.constexpr = q_smem.shape[0] // CONSUMERS
    index = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    zero = k_len >> 31  # unknown to the compiler, see `p_operand`
    n = gl.to_tensor(0)
    for i in range(work_tile_count(num_work_tiles)):
        bh, tile = work_tile(i, num_q_tiles, heads_per_section, num_work_tiles)
        b = bh // heads
        h = bh % heads
        scale_log2 = _scale_log2(scales, scale, b, h, heads, groups)
        row = tile * BLOCK_M + CONSUMER * ROWS
        q_pos = q_offset + row + index
        plan, right_end, full_end, num_tiles, _num_keys = kv_tile_plan(
            tile, q_len, k_len, q_offset, mask_args, block_lists, b, h // groups,
            CAUSAL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        stage, phase = stage_of(i, Q_STAGES)
        mbarrier.wait(q_full.index(stage), phase)
        q_tile = q_smem.index(stage * CONSUMERS + CONSUMER).reshape([ROWS, D])
        k_start = kv_tile(0, plan, block_lists) * BLOCK_N
        state = _first_tile(
            q_tile, q_pos, k_start, smem, n, scale_log2, k_len, mask_args, num_tiles > 1,
            CAUSAL, S, O,
        )  # fmt: skip
        if CAUSAL:
            state = _mainloop(
                state, 1, right_end, num_tiles, plan, q_tile, q_pos, smem, scale_log2, k_len,
                mask_args, block_lists, zero, True, CAUSAL,
            )  # fmt: skip
        state = _mainloop(
            state, gl.maximum(right_end, 1), full_end, num_tiles, plan, q_tile, q_pos, smem,
            scale_log2, k_len, mask_args, block_lists, zero, False, CAUSAL,
        )  # fmt: skip
        if mask_args.window is not None:
            state = _mainloop(
                state, gl.maximum(full_end, 1), num_tiles, num_tiles, plan, q_tile, q_pos, smem,
                scale_log2, k_len, mask_args, block_lists, zero, True, CAUSAL,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(stage))
        _o, _pv, _o_rescale, row_max, row_sum, _rescale, _packed, n = state
        o = _last_pv(state, smem, zero)
        row_sum = gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, S))
        v_scale = gl.load(scales[2] + b * (heads // groups) + h // groups)
        o, row_lse = _normalize(o, row_max, row_sum, scale_log2, v_scale, sink_logits, h)
        lse_pointers = lse + bh.to(gl.int64) * q_len + row + index
        gl.store(lse_pointers, row_lse, mask=row + index < q_len)
        tma.store_wait(0)  # of the tile before
        o_smem.index(CONSUMER).reshape([ROWS, D]).store(o.to(o_smem.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [b, h, row, 0], o_smem.index(CONSUMER))
    tma.store_wait(0)
