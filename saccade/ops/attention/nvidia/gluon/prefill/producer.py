"""The warp of the Gluon kernel that fetches: queries, keys and values, through the copy engine."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from saccade.ops.attention.nvidia.gluon.prefill.seqlen_info import rows_of_tile
from saccade.ops.attention.nvidia.gluon.prefill.tile_scheduler import (
    amount_of_work,
    key_tile,
    next_stage,
    piece_of_work,
    plan,
)


@gluon.jit
def describe(x, batch, heads, length, BLOCK: gl.constexpr, D: gl.constexpr):
    """The copy engine's description of `[batch, heads, length, D]`, read in blocks of rows."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [1, 1, BLOCK, D], x.ptr.dtype.element_ty
    )
    return tma.make_tensor_descriptor(
        x.ptr, [batch, heads, length, D], [x.batch, x.head, x.row, 1], [1, 1, BLOCK, D], LAYOUT
    )


@gluon.jit
def _fetch(
    desc, memory, full, empty, phase, b, kv_head, start, keys, row_extents,
    N: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Ask for keys (or values) start .. start + N - 1 as soon as their stage is empty.

    Pages shorter than a tile arrive in one stage side by side; where a row has ended, page 0 stands
    in, and whoever reads hides what it holds.
    """
    if PAGE is None:
        mbarrier.wait(empty, phase)
        mbarrier.expect(full, desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [b, kv_head, start, 0], full, memory)
    else:
        BOX: gl.constexpr = desc.block_type.shape[2]
        table = row_extents.pages + b.to(gl.int64) * row_extents.pages_row + start // PAGE
        # Page numbers are asked for before the wait, which they then do not lengthen.
        pages = ()
        for i in gl.static_range(N // BOX):
            pages += (gl.load(table + i, mask=start + i * BOX < keys, other=0),)
        mbarrier.wait(empty, phase)
        mbarrier.expect(full, N // BOX * desc.block_type.nbytes)
        for i in gl.static_range(N // BOX):
            tma.async_copy_global_to_shared(
                desc, [pages[i], kv_head, start % PAGE, 0], full,
                memory.slice(i * BOX, BOX, dim=2),
            )  # fmt: skip


@gluon.jit
def produce(
    asked, CAUSAL: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr,
    CONSUMERS: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Fetch everything the consumers will read, in their order, as soon as there is room."""
    q_desc, k_desc, v_desc, memory, sizes, mask_args, block_lists, row_extents = asked
    q_mem, k_mem, v_mem, bars = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turns = bars
    all_q, all_k, offset, heads, groups, tiles, section, num_work = sizes
    K_STAGES: gl.constexpr = k_mem.shape[0]
    V_STAGES: gl.constexpr = v_mem.shape[0]
    Q_STAGES: gl.constexpr = q_mem.shape[0] // CONSUMERS
    k_stage, k_phase, v_stage, v_phase, q_stage, q_phase = 0, 1, 0, 1, 0, 1
    for w in range(amount_of_work(num_work)):
        at, tile = piece_of_work(w, tiles, section, num_work)
        b = at // heads
        h = at % heads
        q_first, k_first, q_len, k_len, q_offset, tile = rows_of_tile(
            row_extents, b, tile, all_q, all_k, offset
        )
        arrived = q_full.index(q_stage)
        mbarrier.wait(q_empty.index(q_stage), q_phase)
        mbarrier.expect(arrived, CONSUMERS * q_desc.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                q_desc, [b, h, q_first + tile * M + c * ROWS, 0], arrived,
                q_mem.index(q_stage * CONSUMERS + c),
            )  # fmt: skip
        q_stage, q_phase = next_stage(q_stage, q_phase, Q_STAGES)
        where, _right, _full, total, num_keys = plan(
            tile, q_len, k_len, q_offset, mask_args, block_lists, b, h // groups, CAUSAL, M, N
        )
        for j in range(total):
            start = k_first + key_tile(j, where, block_lists) * N
            _fetch(
                k_desc, k_mem.index(k_stage), k_full.index(k_stage), k_empty.index(k_stage),
                k_phase, b, h // groups, start, num_keys, row_extents, N, PAGE,
            )  # fmt: skip
            k_stage, k_phase = next_stage(k_stage, k_phase, K_STAGES)
            _fetch(
                v_desc, v_mem.index(v_stage), v_full.index(v_stage), v_empty.index(v_stage),
                v_phase, b, h // groups, start, num_keys, row_extents, N, PAGE,
            )  # fmt: skip
            v_stage, v_phase = next_stage(v_stage, v_phase, V_STAGES)
