"""The producer warp of the gradients: it loads K and V once, then tiles of queries, by TMA."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from saccade.ops.attention.nvidia.gluon.backward.tile_scheduler import (
    BLOCK_M,
    CONSUMERS,
    KEYS,
    ds_buffer,
    kv_work_tile,
    next_q_tile,
)
from saccade.ops.attention.nvidia.gluon.prefill.tile_scheduler import next_stage


@gluon.jit
def tensor_descriptor(
    x, batch, heads, length, ROWS: gl.constexpr, D: gl.constexpr, SWIZZLE: gl.constexpr
):
    """TMA descriptor of a StridedTensor `[batch, heads, length, D]`, in boxes of ROWS x D."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=SWIZZLE, element_bitwidth=16, rank=4
    )
    return tma.make_tensor_descriptor(
        x.ptr, [batch, heads, length, D], [x.batch, x.head, x.row, 1], [1, 1, ROWS, D], LAYOUT
    )


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, do_desc, stat_desc, k_smem, v_smem, q_smem, do_smem, lse_smem,
    delta_smem, bars, sizes, mask_args, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Load K and V, then Q, dO, lse and delta of every tile of queries, in the consumers' order.

    A stage is empty when both consumers have stored dS of the next tile.
    """
    kv_full, q_full, do_full, ds_full = bars
    STAGES: gl.constexpr = q_smem.shape[0]
    q_len, _k_len, _q_offset, num_splits, groups, gqa_splits, _splits_per_section = sizes
    b, split, start, first, count, _full_from, _full_to = kv_work_tile(sizes, mask_args, CAUSAL)
    kv_head, tiles = split // gqa_splits, gl.cdiv(q_len, BLOCK_M)
    mbarrier.expect(kv_full, CONSUMERS * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for c in gl.static_range(CONSUMERS):
        k_start = start + c * KEYS
        tma.async_copy_global_to_shared(k_desc, [b, kv_head, k_start, 0], kv_full, k_smem.index(c))
        tma.async_copy_global_to_shared(v_desc, [b, kv_head, k_start, 0], kv_full, v_smem.index(c))
    h, tile, stage = split * groups, first, 0
    row = ((b * num_splits * groups + h) * tiles + first) * 2
    for i in range(groups * count):
        buffer, phase = ds_buffer(i - STAGES + 1)
        mbarrier.wait(ds_full.index(buffer), phase, pred=i >= STAGES)
        full = q_full.index(stage)
        mbarrier.expect(full, q_desc.block_type.nbytes + stat_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(stat_desc, [row, 0], full, lse_smem.index(stage))
        tma.async_copy_global_to_shared(
            q_desc, [b, h, tile * BLOCK_M, 0], full, q_smem.index(stage)
        )
        full = do_full.index(stage)
        mbarrier.expect(full, do_desc.block_type.nbytes + stat_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(stat_desc, [row + 1, 0], full, delta_smem.index(stage))
        tma.async_copy_global_to_shared(
            do_desc, [b, h, tile * BLOCK_M, 0], full, do_smem.index(stage)
        )
        h, tile, row = next_q_tile(h, tile, row, first, count, tiles - count, 2)
        stage, _phase = next_stage(stage, 0, STAGES)
