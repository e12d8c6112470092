"""Gradients of attention for Hopper in Gluon: five products a tile, dQ accumulated by atomics.

A CTA owns 128 keys of a KV head and loops over the queries of its group to which they are visible.
One producer warp loads K and V once, and by tiles of 64 queries Q, dO, lse and delta; each of two
consumer warpgroups owns 64 of the keys (`consumer.py`).  dQ belongs to no CTA: it is accumulated in
float32 in the order of the registers (`dq_accum.py`), and `postprocess.py` converts it.  These
additions come in no fixed order: two runs differ in the last bits of dQ.
Source: Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from saccade.ops.attention.nvidia.gluon.backward.consumer import consume
from saccade.ops.attention.nvidia.gluon.backward.producer import produce, tensor_descriptor
from saccade.ops.attention.nvidia.gluon.backward.tile_scheduler import BLOCK_M, CONSUMERS, KEYS


@gluon.jit(do_not_specialize=["q_len", "k_len", "q_offset", "batch", "num_splits", "groups",
                              "gqa_splits", "splits_per_section"])  # fmt: skip
def backward_kernel(
    q, k, v, dout, dk, dv, lse_delta, dq_accum, mask_args, scale, q_len, k_len, q_offset, batch,
    num_splits, groups, gqa_splits, splits_per_section,
    CAUSAL: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK and dV of 128 keys, and their share of dQ; q .. dv are StridedTensors.

    Args:
        dk, dv: `[B, num_splits, Lk, D]`.  A split is `groups` query heads, and `gqa_splits` of them
            read the same KV head.
        lse_delta: `[B * H * tiles, 2, 64]` as `preprocess_kernel` makes it; dq_accum: see there.
        splits_per_section: see `kv_work_tile`.
        REGISTERS: of a thread of a consumer.
    """
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    heads = num_splits * groups
    q_desc = tensor_descriptor(q, batch, heads, q_len, BLOCK_M, D, 128)
    do_desc = tensor_descriptor(dout, batch, heads, q_len, BLOCK_M, D, 128)
    # Half of the columns of K, of D bytes, are an operand of dQ: its swizzle is as wide.
    k_desc = tensor_descriptor(k, batch, num_splits // gqa_splits, k_len, KEYS, D, D)
    v_desc = tensor_descriptor(v, batch, num_splits // gqa_splits, k_len, KEYS, D, 128)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    stat_desc = tma.make_tensor_descriptor(
        lse_delta, [batch * heads * gl.cdiv(q_len, BLOCK_M) * 2, BLOCK_M], [BLOCK_M, 1],
        [1, BLOCK_M], FLAT,
    )  # fmt: skip
    k_smem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, 1, KEYS, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, 1, KEYS, D], v_desc.layout)
    q_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], FLAT)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], FLAT)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_M], DTYPE)
    ds_smem = gl.allocate_shared_memory(DTYPE, [4 * CONSUMERS, KEYS, BLOCK_M], DS)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(4):
        mbarrier.init(ds_full.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
    fence_async_shared()

    bars = (kv_full, q_full, do_full, ds_full)
    sizes = (q_len, k_len, q_offset, num_splits, groups, gqa_splits, splits_per_section)
    gl.warp_specialize([
        (consume, (
            dk, dv, dq_accum, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, bars,
            sizes, mask_args, scale, CAUSAL, 0,
        )),
        (consume, (
            dk, dv, dq_accum, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, bars,
            sizes, mask_args, scale, CAUSAL, 1,
        )),
        (produce, (
            q_desc, k_desc, v_desc, do_desc, stat_desc, k_smem, v_smem, q_smem, do_smem, lse_smem,
            delta_smem, bars, sizes, mask_args, CAUSAL,
        )),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
