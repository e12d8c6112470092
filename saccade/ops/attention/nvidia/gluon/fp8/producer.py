"""The producer warp of the fp8 kernel, its tiles and pipeline stages."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from saccade.ops.attention.nvidia.gluon.prefill.tile_scheduler import (
    kv_tile,
    kv_tile_plan,
    work_tile,
    work_tile_count,
)

CONSUMERS, ROWS = gl.constexpr(2), gl.constexpr(64)  # consumer warpgroups, queries of each
BLOCK_M, BLOCK_N = gl.constexpr(128), gl.constexpr(128)  # queries and keys of a tile


@gluon.jit
def stage_of(n, STAGES: gl.constexpr):
    """The pipeline stage of the n-th tile, and the phase of its mbarrier."""
    return n % STAGES, (n // STAGES) & 1


@gluon.jit
def pipeline_barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
    """mbarriers of each stage: full when its bytes have arrived, empty when all have read them."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


@gluon.jit
def produce(args, CAUSAL: gl.constexpr):
    """Load all tiles that the consumers read, in their order, each as soon as a stage is empty."""
    q_desc, k_desc, v_desc, smem, sizes, mask_args, block_lists = args
    q_smem, k_smem, v_smem, bars = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    q_len, k_len, q_offset, heads, groups, num_q_tiles, heads_per_section, num_work_tiles = sizes
    STAGES: gl.constexpr = k_smem.shape[0]
    Q_STAGES: gl.constexpr = q_smem.shape[0] // CONSUMERS
    n = gl.to_tensor(0)
    for i in range(work_tile_count(num_work_tiles)):
        bh, tile = work_tile(i, num_q_tiles, heads_per_section, num_work_tiles)
        b = bh // heads
        h = bh % heads
        stage, phase = stage_of(i, Q_STAGES)
        full = q_full.index(stage)
        mbarrier.wait(q_empty.index(stage), phase ^ 1)
        mbarrier.expect(full, CONSUMERS * q_desc.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                q_desc, [b, h, tile * BLOCK_M + c * ROWS, 0], full,
                q_smem.index(stage * CONSUMERS + c),
            )  # fmt: skip
        plan, _right_end, _full_end, num_tiles, _num_keys = kv_tile_plan(
            tile, q_len, k_len, q_offset, mask_args, block_lists, b, h // groups,
            CAUSAL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        for j in range(num_tiles):
            k_start = kv_tile(j, plan, block_lists) * BLOCK_N
            stage, phase = stage_of(n, STAGES)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [b, h // groups, k_start, 0], k_full.index(stage), k_smem.index(stage)
            )
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_desc, [b, h // groups, 0, k_start], v_full.index(stage), v_smem.index(stage)
            )
            n += 1
