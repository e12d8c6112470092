"""The producer warp of the prefill kernel: it loads Q, K and V by TMA and computes nothing."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from saccade.ops.attention.nvidia.gluon.prefill.seqlen_info import seqlens_of_tile
from saccade.ops.attention.nvidia.gluon.prefill.tile_scheduler import (
    kv_starts,
    kv_tile_plan,
    next_stage,
    split_of_plan,
    work_of,
    work_tile_count,
)


@gluon.jit
def tensor_descriptor(
    x, batch, heads, rows, width, BOX_ROWS: gl.constexpr, BOX_WIDTH: gl.constexpr,
    BOX_HEADS: gl.constexpr = 1,
):  # fmt: skip
    """TMA descriptor of a StridedTensor `[batch, heads, rows, width]`, in boxes of one batch."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [1, BOX_HEADS, BOX_ROWS, BOX_WIDTH], x.ptr.dtype.element_ty
    )
    return tma.make_tensor_descriptor(
        x.ptr, [batch, heads, rows, width], [x.batch, x.head, x.row, 1],
        [1, BOX_HEADS, BOX_ROWS, BOX_WIDTH], LAYOUT,
    )  # fmt: skip


@gluon.jit
def _load_kv_tile(
    desc, smem, full, empty, phase, b, kv_head, k_first, starts, num_keys, varlen,
    BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Issue the copies of keys (or values) of a tile, whose parts begin at `starts`, into a stage.

    Parts, and pages shorter than a tile, fill a stage side by side.  Past the end of a sequence
    page 0 is loaded; consumers mask its scores and zero its values.
    """
    BOX: gl.constexpr = desc.block_type.shape[2]
    k_start = k_first + starts[0]
    if PAGE_SIZE is None:
        mbarrier.wait(empty, phase)
        mbarrier.expect(full, PARTS * desc.block_type.nbytes)
        if PARTS == 1:
            tma.async_copy_global_to_shared(desc, [b, kv_head, k_start, 0], full, smem)
        else:
            for i in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    desc, [b, kv_head, k_first + starts[i], 0], full,
                    smem.slice(i * BOX, BOX, dim=2),
                )  # fmt: skip
    else:
        entry = varlen.page_table + b.to(gl.int64) * varlen.page_table_stride + k_start // PAGE_SIZE
        # Page numbers are loaded before the wait, so that their latency overlaps with it.
        pages = ()
        for i in gl.static_range(BLOCK_N // BOX):
            pages += (gl.load(entry + i, mask=k_start + i * BOX < num_keys, other=0),)
        mbarrier.wait(empty, phase)
        mbarrier.expect(full, BLOCK_N // BOX * desc.block_type.nbytes)
        for i in gl.static_range(BLOCK_N // BOX):
            tma.async_copy_global_to_shared(
                desc, [pages[i], kv_head, k_start % PAGE_SIZE, 0], full,
                smem.slice(i * BOX, BOX, dim=2),
            )  # fmt: skip


@gluon.jit
def produce(
    args, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, ROWS: gl.constexpr,
    CONSUMERS: gl.constexpr, PAGE_SIZE: gl.constexpr, PACK: gl.constexpr, SPLIT_KV: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """Load all tiles that the consumers read, in their order, each as soon as a stage is empty."""
    q_desc, k_desc, v_desc, smem, sizes, mask_args, block_lists, varlen = args
    q_smem, k_smem, v_smem, bars = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _pingpong = bars
    all_q, all_k, offset, _heads, groups, _q_tiles, _section, num_work_tiles, splits = sizes
    K_STAGES: gl.constexpr = k_smem.shape[0]
    V_STAGES: gl.constexpr = v_smem.shape[0]
    Q_STAGES: gl.constexpr = q_smem.shape[0] // CONSUMERS
    k_stage, k_phase, v_stage, v_phase, q_stage, q_phase = 0, 1, 0, 1, 0, 1
    for i in range(work_tile_count(num_work_tiles)):
        b, h, tile, split = work_of(i, sizes, PACK, SPLIT_KV)
        q_start, k_start, q_len, k_len, q_offset, tile = seqlens_of_tile(
            varlen, b, tile, all_q, all_k, offset
        )
        full = q_full.index(q_stage)
        mbarrier.wait(q_empty.index(q_stage), q_phase)
        mbarrier.expect(full, CONSUMERS * q_desc.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                q_desc, [b, h, q_start + tile * BLOCK_M + c * ROWS, 0], full,
                q_smem.index(q_stage * CONSUMERS + c),
            )  # fmt: skip
        q_stage, q_phase = next_stage(q_stage, q_phase, Q_STAGES)
        found = kv_tile_plan(
            tile, q_len, k_len, q_offset, mask_args, block_lists, b, h // groups,
            CAUSAL, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip
        if SPLIT_KV:
            found = split_of_plan(found, split, splits)
        plan, _right_end, _full_end, num_tiles, num_keys = found
        for j in range(num_tiles):
            starts = kv_starts(j, plan, block_lists, BLOCK_N, PARTS)
            _load_kv_tile(
                k_desc, k_smem.index(k_stage), k_full.index(k_stage), k_empty.index(k_stage),
                k_phase, b, h // groups, k_start, starts, num_keys, varlen, BLOCK_N, PAGE_SIZE,
                PARTS,
            )  # fmt: skip
            k_stage, k_phase = next_stage(k_stage, k_phase, K_STAGES)
            _load_kv_tile(
                v_desc, v_smem.index(v_stage), v_full.index(v_stage), v_empty.index(v_stage),
                v_phase, b, h // groups, k_start, starts, num_keys, varlen, BLOCK_N, PAGE_SIZE,
                PARTS,
            )  # fmt: skip
            v_stage, v_phase = next_stage(v_stage, v_phase, V_STAGES)
