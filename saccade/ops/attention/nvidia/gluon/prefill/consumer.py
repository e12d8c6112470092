"""The consumer warpgroups of the prefill kernel: each computes attention of 64 rows of a tile.

A consumer issues S = Q K^T of the next tile of keys before O += P V of this one, so that the tensor
cores have work while it computes exponentials.  With PINGPONG scheduling the consumers also issue
alternately (ping-pong), so that the softmax of one overlaps with the products of the other.
Source: Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608).
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

from saccade.ops.attention.nvidia.gluon.prefill.mask import (
    key_positions,
    mask_left,
    mask_right,
    unmasked_range,
)
from saccade.ops.attention.nvidia.gluon.prefill.scores import adjust, scores, slope_of_rows
from saccade.ops.attention.nvidia.gluon.prefill.seqlen_info import seqlens_of_tile, zero_v_tail
from saccade.ops.attention.nvidia.gluon.prefill.softmax import (
    add_sums,
    normalize,
    online_softmax,
    rescale_o,
)
from saccade.ops.attention.nvidia.gluon.prefill.tile_scheduler import (
    kv_starts,
    kv_tile_plan,
    next_stage,
    split_of_plan,
    work_of,
    work_tile_count,
)
from saccade.ops.gpu.triton_lang import LOWEST


@gluon.jit
def to_16_bits(x, DTYPE: gl.constexpr):
    """float32 in 16 bits, packed in pairs."""
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.bfloat16, True, 2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.float16, True, 2
        )


@gluon.jit
def _p_operand(p, DTYPE: gl.constexpr, O: gl.constexpr):
    """P in 16 bits as the register operand of wgmma."""
    return gl.convert_layout(to_16_bits(p, DTYPE), gl.DotOperandLayout(0, O, 2))


@gluon.jit
def _mainloop(
    state, begin, end, num_tiles, unmasked, plan, q_tile, q_pos, k_smem, v_smem, bars, scale_log2,
    score_args, num_keys, mask_args, block_lists, MASK_RIGHT: gl.constexpr, DIM: gl.constexpr,
    CAUSAL: gl.constexpr, PINGPONG: gl.constexpr, PARTS: gl.constexpr, CONSUMERS: gl.constexpr,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """Tiles of keys begin .. end - 1: S of tile j, then P V of tile j - 1, then softmax of j."""
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty, pingpong = bars
    BLOCK_N: gl.constexpr = k_smem.shape[3]
    D: gl.constexpr = k_smem.shape[4]
    K_STAGES: gl.constexpr = k_smem.shape[0]
    V_STAGES: gl.constexpr = v_smem.shape[0]
    for j in range(begin, end):
        o, row_max, row_sum, rescale, p, k_state, v_state, turn_phase = state
        k_stage, k_phase = k_state
        v_stage, v_phase = v_state
        S: gl.constexpr = p.type.layout
        O: gl.constexpr = o.type.layout
        p_operand = _p_operand(p, v_smem.dtype, O)
        if PINGPONG:
            mbarrier.wait(pingpong.index(CONSUMER), turn_phase)
        k_tile = k_smem.index(k_stage).reshape([BLOCK_N, D])
        s_async = scores(q_tile, k_tile, p, DIM)
        o = rescale_o(o, rescale)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        v_tile = v_smem.index(v_stage).reshape([BLOCK_N, v_smem.shape[4]])
        o_async = warpgroup_mma(p_operand, v_tile, o, is_async=True)
        if PINGPONG:
            mbarrier.arrive(pingpong.index((CONSUMER + 1) % CONSUMERS))
            turn_phase ^= 1
        s = warpgroup_mma_wait(1, deps=[s_async])
        mbarrier.arrive(k_empty.index(k_stage))
        starts = kv_starts(j, plan, block_lists, BLOCK_N, PARTS)
        s = adjust(s, score_args, q_pos, starts, CAUSAL, PARTS)
        # A window masks tiles on both sides and leaves few unmasked: one loop serves all of them.
        right = MASK_RIGHT
        if mask_args.window is not None:
            right = starts[0] + BLOCK_N > unmasked[1]
            if starts[0] < unmasked[0]:
                k_pos = key_positions(starts, BLOCK_N, PARTS, S)
                s = mask_left(s, q_pos, k_pos, mask_args)
        if right:
            k_pos = key_positions(starts, BLOCK_N, PARTS, S)
            s = mask_right(s, q_pos, k_pos, num_keys, CAUSAL)
        p, row_max, sums, rescale = online_softmax(s, row_max, scale_log2)
        row_sum = add_sums(row_sum, sums, rescale)
        # This wait keeps the compiler from moving the wait for P V before the softmax.
        k_state = next_stage(k_stage, k_phase, K_STAGES)
        mbarrier.wait(k_full.index(k_state[0]), k_state[1], pred=j + 1 < num_tiles)
        o, p_operand = warpgroup_mma_wait(0, deps=[o_async, p_operand])
        mbarrier.arrive(v_empty.index(v_stage))
        v_state = next_stage(v_stage, v_phase, V_STAGES)
        state = o, row_max, row_sum, rescale, p, k_state, v_state, turn_phase
    return state


@gluon.jit
def _first_tile(
    q_tile, q_pos, starts, p, k_smem, k_state, bars, scale_log2, score_args, num_keys, mask_args,
    has_next, left, DIM: gl.constexpr, CAUSAL: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """S and softmax of the first tile of keys: (row_max, row_sum, rescale, P, k_state)."""
    _q_full, _q_empty, k_full, k_empty, _v_full, _v_empty, _pingpong = bars
    ROWS: gl.constexpr = q_tile.shape[0]
    S: gl.constexpr = p.type.layout
    row_max = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S))
    k_stage, k_phase = k_state
    mbarrier.wait(k_full.index(k_stage), k_phase)
    k_tile = k_smem.index(k_stage).reshape([k_smem.shape[3], k_smem.shape[4]])
    s_async = scores(q_tile, k_tile, p, DIM)
    s = warpgroup_mma_wait(0, deps=[s_async])
    mbarrier.arrive(k_empty.index(k_stage))
    s = adjust(s, score_args, q_pos, starts, CAUSAL, PARTS)
    s = mask_right(s, q_pos, key_positions(starts, s.shape[1], PARTS, S), num_keys, CAUSAL)
    if mask_args.window is not None:
        if left:
            s = mask_left(s, q_pos, key_positions(starts, s.shape[1], PARTS, S), mask_args)
    p, row_max, row_sum, rescale = online_softmax(s, row_max, scale_log2)
    k_state = next_stage(k_stage, k_phase, k_smem.shape[0])
    mbarrier.wait(k_full.index(k_state[0]), k_state[1], pred=has_next)
    return row_max, row_sum, rescale, p, k_state


@gluon.jit
def _last_pv(o, rescale, p, v_smem, v_state, bars):
    """P V of the last tile: (O, v_state)."""
    _q_full, _q_empty, _k_full, _k_empty, v_full, v_empty, _pingpong = bars
    O: gl.constexpr = o.type.layout
    v_stage, v_phase = v_state
    mbarrier.wait(v_full.index(v_stage), v_phase)
    p_operand = _p_operand(p, v_smem.dtype, O)
    o = rescale_o(o, rescale)
    v_tile = v_smem.index(v_stage).reshape([v_smem.shape[3], v_smem.shape[4]])
    o_async = warpgroup_mma(p_operand, v_tile, o, is_async=True)
    o, p_operand = warpgroup_mma_wait(0, deps=[o_async, p_operand])
    mbarrier.arrive(v_empty.index(v_stage))
    return o, next_stage(v_stage, v_phase, v_smem.shape[0])


@gluon.jit
def packed_rows(COUNT: gl.constexpr, PACK: gl.constexpr, LAYOUT: gl.constexpr):
    """Of each of COUNT rows of a tile: which of its PACK heads it belongs to, and its query."""
    index = gl.arange(0, COUNT, layout=LAYOUT)
    return index // (COUNT // PACK), index % (COUNT // PACK)


@gluon.jit
def _tma_store(o_desc, smem, o, origin):
    """Store a tile of O by TMA, which leaves out rows past the end of the tensor."""
    smem.reshape([o.shape[0], o.shape[1]]).store(o.to(o_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [origin[0], origin[1], origin[2], 0], smem)


@gluon.jit
def _direct_store(o_ptr, out, o, origin, count, DIM: gl.constexpr, PACK: gl.constexpr):
    """Store the first `count` queries of each head and DIM columns of a tile of O from registers.

    Args:
        o_ptr: where the tensor begins whose strides are those of `out`.
        origin: (batch, head, query) that row 0 goes to.
    """
    b, h, row = origin
    O: gl.constexpr = o.type.layout
    heads, rows = packed_rows(o.shape[0], PACK, gl.SliceLayout(1, O))
    rows = rows[:, None]
    dims = gl.arange(0, o.shape[1], layout=gl.SliceLayout(0, O))[None, :]
    head = o_ptr + b.to(gl.int64) * out.batch + h.to(gl.int64) * out.head
    if PACK > 1:
        head = head + heads[:, None].to(gl.int64) * out.head
    pointers = head + (row + rows).to(gl.int64) * out.row + dims
    mask = rows < count
    if DIM < o.shape[1]:
        mask = mask & (dims < DIM)
    gl.store(pointers, o.to(o_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def consume(
    args, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, ROWS: gl.constexpr,
    PINGPONG: gl.constexpr, DIRECT_STORE: gl.constexpr, CONSUMERS: gl.constexpr,
    ZERO_V_TAIL: gl.constexpr, DIM: gl.constexpr, V_DIM: gl.constexpr, PACK: gl.constexpr,
    SPLIT_KV: gl.constexpr, PARTS: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Attention of the ROWS queries, of PACK heads, of each work tile that belong to this consumer.

    With SPLIT_KV over one split of the keys: `out` and `lse` are those of the first split.
    """
    (out, o_desc, lse, split_strides, sink_logits, o_smem, v_zeroed, smem, sizes, mask_args,
     block_lists, varlen, units, alibi) = args  # fmt: skip
    q_smem, k_smem, v_smem, bars = smem
    scale_log2, cap_log2 = units
    D: gl.constexpr = q_smem.shape[4]
    DV: gl.constexpr = v_smem.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, DV, 16])
    q_full, q_empty, _k_full, _k_empty, v_full, _v_empty, _pingpong = bars
    all_q, all_k, offset, heads, groups, _q_tiles, _section, num_work_tiles, splits = sizes
    Q_STAGES: gl.constexpr = q_smem.shape[0] // CONSUMERS
    p = gl.zeros([ROWS * PACK, BLOCK_N], gl.float32, S)
    head, index = packed_rows(ROWS * PACK, PACK, gl.SliceLayout(1, S))
    q_state = gl.to_tensor(0), gl.to_tensor(0)
    k_state = gl.to_tensor(0), gl.to_tensor(0)
    v_state = gl.to_tensor(0), gl.to_tensor(0)
    turn_phase = gl.to_tensor(1 if CONSUMER == 0 else 0)
    zeroed_phases = gl.to_tensor(0)
    for i in range(work_tile_count(num_work_tiles)):
        b, h, tile, split = work_of(i, sizes, PACK, SPLIT_KV)
        q_start, _k_start, q_len, k_len, q_offset, tile = seqlens_of_tile(
            varlen, b, tile, all_q, all_k, offset
        )
        row = tile * BLOCK_M + CONSUMER * ROWS
        q_pos = q_offset + row + index
        found = kv_tile_plan(
            tile, q_len, k_len, q_offset, mask_args, block_lists, b, h // groups,
            CAUSAL, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip
        if SPLIT_KV:
            found = split_of_plan(found, split, splits)
        plan, right_end, full_end, num_tiles, num_keys = found
        score_args = cap_log2, None, q_offset + row
        if alibi[0] is not None:
            slope = slope_of_rows(alibi, b, h, head, scale_log2)
            score_args = cap_log2, slope, q_offset + row
        o = gl.zeros([ROWS * PACK, DV], gl.float32, O)
        q_stage, q_phase = q_state
        mbarrier.wait(q_full.index(q_stage), q_phase)
        q_tile = q_smem.index(q_stage * CONSUMERS + CONSUMER).reshape([ROWS * PACK, D])
        unmasked = unmasked_range(q_offset + row, num_keys, mask_args, CAUSAL, ROWS)
        starts = kv_starts(0, plan, block_lists, BLOCK_N, PARTS)
        row_max, row_sum, rescale, p, k_state = _first_tile(
            q_tile, q_pos, starts, p, k_smem, k_state, bars, scale_log2, score_args, num_keys,
            mask_args, num_tiles > 1, starts[0] < unmasked[0], DIM, CAUSAL, PARTS,
        )  # fmt: skip
        if ZERO_V_TAIL:
            zeroed_phases = zero_v_tail(
                v_smem, v_state, v_full, v_zeroed, zeroed_phases, num_keys - starts[0], CONSUMER
            )
        state = o, row_max, row_sum, rescale, p, k_state, v_state, turn_phase
        begin = gl.maximum(right_end, 1)
        end = full_end
        if mask_args.window is not None:
            begin = 1
            end = num_tiles
        elif CAUSAL or block_lists.tiles is not None:
            state = _mainloop(
                state, 1, right_end, num_tiles, unmasked, plan, q_tile, q_pos, k_smem, v_smem,
                bars, scale_log2, score_args, num_keys, mask_args, block_lists, True, DIM, CAUSAL,
                PINGPONG, PARTS, CONSUMERS, CONSUMER,
            )  # fmt: skip
        state = _mainloop(
            state, begin, end, num_tiles, unmasked, plan, q_tile, q_pos, k_smem, v_smem, bars,
            scale_log2, score_args, num_keys, mask_args, block_lists, False, DIM, CAUSAL, PINGPONG,
            PARTS, CONSUMERS, CONSUMER,
        )  # fmt: skip
        o, row_max, row_sum, rescale, p, k_state, v_state, turn_phase = state
        mbarrier.arrive(q_empty.index(q_stage))
        o, v_state = _last_pv(o, rescale, p, v_smem, v_state, bars)
        o, row_lse = normalize(
            o, row_max, row_sum, scale_log2, score_args, q_pos, sink_logits, h, CAUSAL
        )
        bh = (b * heads + h).to(gl.int64)
        if PACK > 1:
            bh += packed_rows(ROWS * PACK, PACK, gl.SliceLayout(1, S))[0]
        lse_pointers = lse + bh * all_q + q_start + row + index
        o_ptr = out.ptr
        if SPLIT_KV:
            o_ptr += split.to(gl.int64) * split_strides[0]
            lse_pointers += split.to(gl.int64) * split_strides[1]
        gl.store(lse_pointers, row_lse, mask=row + index < q_len)
        origin = b, h, q_start + row
        if DIRECT_STORE:
            _direct_store(o_ptr, out, o, origin, q_len - row, V_DIM, PACK)
        else:
            tma.store_wait(0)  # of the tile before
            if varlen.q_tiles is None or row + ROWS <= q_len:
                _tma_store(o_desc, o_smem.index(CONSUMER), o, origin)
            else:
                _direct_store(o_ptr, out, o, origin, q_len - row, V_DIM, PACK)
        q_state = next_stage(q_stage, q_phase, Q_STAGES)
    tma.store_wait(0)
