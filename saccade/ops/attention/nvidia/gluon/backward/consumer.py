"""The consumer warpgroups of the gradients: each owns 64 keys, and half of the dimensions of dQ.

Per tile of queries a consumer computes

    S^T = K Q^T      P^T = exp2(S^T - lse)      dP^T = V dO^T      dS^T = P^T * (dP^T - delta)

with keys as rows, so that P^T and dS^T come out of wgmma in the registers from which they are its
operands again: dV += P^T dO and dK += dS^T Q.  dS^T also goes to shared memory, where both
consumers read it to compute dQ = dS K, of the tile before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from saccade.ops.attention.nvidia.gluon.backward.dq_accum import accumulate_dq
from saccade.ops.attention.nvidia.gluon.backward.mask import mask_bias
from saccade.ops.attention.nvidia.gluon.backward.tile_scheduler import (
    BLOCK_M,
    CONSUMERS,
    KEYS,
    ds_buffer,
    kv_work_tile,
    next_q_tile,
)
from saccade.ops.attention.nvidia.gluon.prefill.consumer import to_16_bits
from saccade.ops.attention.nvidia.gluon.prefill.tile_scheduler import next_stage
from saccade.ops.gpu.triton_lang import LOG2E


@gluon.jit
def _to_float32(x):
    """16 bits in float32, a pair at a time, so that they stay packed until they are used."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [x], gl.float32, True, 2
        )
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .f16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
            "=&r,=r,r", [x], gl.float32, True, 2,
        )  # fmt: skip


@gluon.jit
def _issue_dq(ds_smem, buffer, k_smem, dq, zero, CONSUMER: gl.constexpr):
    """Issue dQ = dS K of a tile, for this consumer's half of the dimensions."""
    D: gl.constexpr = k_smem.shape[4]
    HALF: gl.constexpr = D // 2
    for c in gl.static_range(CONSUMERS):
        dq = warpgroup_mma(
            ds_smem.index(buffer * CONSUMERS + c).permute((1, 0)),
            k_smem.index(c + zero).reshape([KEYS, D]).slice(CONSUMER * HALF, HALF, dim=1),
            dq,
            use_acc=c > 0,
            is_async=True,
        )
    return dq


@gluon.jit
def _softmax(s, lse, scale_log2):
    """P^T, recomputed from S^T and the lse of the forward pass."""
    x = s * scale_log2 - lse[None, :]
    # Not pure, so that the compiler does not move exponentials behind the waits that follow.
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], gl.float32, False, 1
    )


@gluon.jit
def consume(
    dk_out, dv_out, dq_accum, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, bars,
    sizes, mask_args, scale, CAUSAL: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys, and half of the dimensions of the share of 128 keys in dQ.

    The tensor cores compute dV of a tile and S of the next one during dS, and dQ of the tile before
    and dK during the exponentials of the next one.
    """
    kv_full, q_full, do_full, ds_full = bars
    q_len, k_len, q_offset, num_splits, groups, _gqa_splits, _splits_per_section = sizes
    D: gl.constexpr = k_smem.shape[4]
    HALF: gl.constexpr = D // 2
    DTYPE: gl.constexpr = k_smem.dtype
    STAGES: gl.constexpr = q_smem.shape[0]
    # Accumulate dQ one step later, during the products, where registers allow it.
    DELAY_DQ: gl.constexpr = D == 64
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    b, split, start, first, count, full_from, full_to = kv_work_tile(sizes, mask_args, CAUSAL)
    skipped = gl.cdiv(q_len, BLOCK_M) - count
    k_start = start + CONSUMER * KEYS
    scale_log2 = scale * LOG2E
    k_tile = k_smem.index(CONSUMER).reshape([KEYS, D])
    v_tile = v_smem.index(CONSUMER).reshape([KEYS, D])
    dk = gl.zeros([KEYS, D], gl.float32, O)
    dv = gl.zeros([KEYS, D], gl.float32, O)
    dp = gl.zeros([KEYS, BLOCK_M], gl.float32, S)
    dq = gl.zeros([BLOCK_M, HALF], gl.float32, DQ)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    tile = first
    row = (b * num_splits + split) * groups * (count + skipped) + first
    total = groups * count
    # Rows of dq_accum; the first steps add to a spare tile in front of all others.
    two_before, before = gl.to_tensor(-1), gl.to_tensor(-1)
    mbarrier.wait(kv_full, 0)

    bias = mask_bias(tile, full_from, full_to, k_start, k_len, q_offset, mask_args, CAUSAL, S)
    mbarrier.wait(q_full.index(0), 0, pred=total > 0)
    q_tile = q_smem.index(0).reshape([BLOCK_M, D])
    s_async = warpgroup_mma(k_tile, q_tile.permute((1, 0)), bias, is_async=True)
    lse = lse_smem.index(0).reshape([BLOCK_M]).load(COLUMN)
    s = warpgroup_mma_wait(0, deps=[s_async])
    p = _softmax(s, lse, scale_log2)
    mbarrier.wait(do_full.index(0), 0, pred=total > 0)
    for i in range(total):
        _h, tile, next_row = next_q_tile(0, tile, row, first, count, skipped, 1)
        q_tile = q_smem.index(stage).reshape([BLOCK_M, D])
        do_tile = do_smem.index(stage).reshape([BLOCK_M, D])
        p16 = to_16_bits(p, DTYPE)
        # Unknown to the compiler, which would otherwise keep descriptors of K and V in registers.
        zero = i >> 30
        v_tile = v_smem.index(CONSUMER + zero).reshape([KEYS, D])
        if not DELAY_DQ:
            bias = mask_bias(
                tile, full_from, full_to, k_start, k_len, q_offset, mask_args, CAUSAL, S
            )
        dp_async = warpgroup_mma(v_tile, do_tile.permute((1, 0)), dp, use_acc=False, is_async=True)
        p_operand = gl.convert_layout(p16, gl.DotOperandLayout(0, O, 2))
        dv_async = warpgroup_mma(p_operand, do_tile, dv, is_async=True)
        if DELAY_DQ:
            accumulate_dq(
                dq, dq_accum + (two_before.to(gl.int64) * CONSUMERS + CONSUMER) * (BLOCK_M * HALF)
            )
            bias = mask_bias(
                tile, full_from, full_to, k_start, k_len, q_offset, mask_args, CAUSAL, S
            )
        # S of the next tile; after the last one it is that of stale memory, and unused.
        delta = delta_smem.index(stage).reshape([BLOCK_M]).load(COLUMN)
        stage, phase = next_stage(stage, phase, STAGES)
        mbarrier.wait(q_full.index(stage), phase, pred=i + 1 < total)
        dp = warpgroup_mma_wait(1, deps=[dp_async])
        next_q = q_smem.index(stage).reshape([BLOCK_M, D])
        k_tile = k_smem.index(CONSUMER + zero).reshape([KEYS, D])
        s_async = warpgroup_mma(k_tile, next_q.permute((1, 0)), bias, is_async=True)
        buffer, ds_phase = ds_buffer(i - 1)
        mbarrier.wait(ds_full.index(buffer), ds_phase, pred=i > 0)
        ds = _to_float32(p16) * (dp - delta[None, :])
        this_buffer, _phase = ds_buffer(i)
        ds_tile = ds_smem.index(this_buffer * CONSUMERS + CONSUMER)
        ds_tile.store(to_16_bits(ds, DTYPE))
        fence_async_shared()
        mbarrier.arrive(ds_full.index(this_buffer))
        dq_async = _issue_dq(ds_smem, buffer, k_smem, dq, zero, CONSUMER)
        dk_async = warpgroup_mma(ds_tile, q_tile, dk, is_async=True)
        lse = lse_smem.index(stage).reshape([BLOCK_M]).load(COLUMN)
        dv, p_operand, s = warpgroup_mma_wait(3, deps=[dv_async, p_operand, s_async])
        p = _softmax(s, lse, scale_log2)
        # This wait keeps the compiler from moving the wait for dQ before the exponentials.
        mbarrier.wait(do_full.index(stage), phase, pred=i + 1 < total)
        if DELAY_DQ:
            dq, dk = warpgroup_mma_wait(0, deps=[dq_async, dk_async])
        else:
            dq = warpgroup_mma_wait(1, deps=[dq_async])
            accumulate_dq(
                dq, dq_accum + (before.to(gl.int64) * CONSUMERS + CONSUMER) * (BLOCK_M * HALF)
            )
            # Completed long ago; keeps the compiler from waiting for dK before it accumulates.
            mbarrier.wait(kv_full, 0)
            dk = warpgroup_mma_wait(0, deps=[dk_async])
        two_before, before, row = before, row, next_row
    if DELAY_DQ:
        accumulate_dq(
            dq, dq_accum + (two_before.to(gl.int64) * CONSUMERS + CONSUMER) * (BLOCK_M * HALF)
        )
    buffer, phase = ds_buffer(total - 1)
    mbarrier.wait(ds_full.index(buffer), phase, pred=total > 0)
    dq = warpgroup_mma_wait(0, deps=[_issue_dq(ds_smem, buffer, k_smem, dq, 0, CONSUMER)])
    accumulate_dq(dq, dq_accum + (before.to(gl.int64) * CONSUMERS + CONSUMER) * (BLOCK_M * HALF))
    _store(dk_out, b, split, k_start, k_len, dk * scale)
    _store(dv_out, b, split, k_start, k_len, dv)


@gluon.jit
def _store(out, b, split, k_start, k_len, grad):
    """Store the rows of dK or dV."""
    G: gl.constexpr = grad.type.layout
    row = k_start + gl.arange(0, KEYS, layout=gl.SliceLayout(1, G))
    dims = gl.arange(0, grad.shape[1], layout=gl.SliceLayout(0, G))
    base = out.ptr + b.to(gl.int64) * out.batch + split.to(gl.int64) * out.head
    pointers = base + (row.to(gl.int64) * out.row)[:, None] + dims[None, :]
    gl.store(pointers, grad.to(out.ptr.dtype.element_ty), mask=(row < k_len)[:, None])
