"""Forward attention for Hopper in Gluon: a warp-specialized, persistent kernel.

One CTA per multiprocessor computes its work tiles, those with most keys first.  One producer warp
loads Q, K and V by TMA; two or three consumer warpgroups of 64 queries each compute.  They
synchronize by mbarriers: a pipeline stage is full when its bytes have arrived, and empty when every
consumer has read it.
Source: Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from saccade.ops.attention.nvidia.gluon.prefill.consumer import consume
from saccade.ops.attention.nvidia.gluon.prefill.producer import produce, tensor_descriptor
from saccade.ops.gpu.triton_lang import LOG2E


@gluon.jit(
    do_not_specialize=[
        "q_len",
        "k_len",
        "q_offset",
        "batch",
        "heads",
        "groups",
        "num_q_tiles",
        "heads_per_section",
        "num_work_tiles",
        "num_pages",
        "splits",
        "out_split",
        "lse_split",
    ]
)
def forward_kernel(
    q, k, v, out, lse, sink_logits, softcap, alibi_slopes, alibi_slopes_batch, mask_args,
    block_lists, varlen, scale, q_len, k_len, q_offset, batch, heads, groups, num_q_tiles,
    heads_per_section, num_work_tiles, num_pages, splits, out_split, lse_split,
    CAUSAL: gl.constexpr, DIM: gl.constexpr, V_DIM: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, PINGPONG: gl.constexpr, DIRECT_STORE: gl.constexpr,
    REGISTERS: gl.constexpr, ZERO_V_TAIL: gl.constexpr, PAGE_SIZE: gl.constexpr,
    PACK: gl.constexpr, SPLIT_KV: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v over visible keys; q, k, v, out are StridedTensors, lse `[B, H, Lq]`.

    Args:
        varlen: a VarlenInfo; heads_per_section: see `work_tile`.
        DIM, V_DIM: head dimension of q and k, and of v and out.
        D, DV: of their tiles, powers of two; TMA fills the columns past DIM and V_DIM with zeros.
        REGISTERS: of a thread of a consumer; the producer gets what is left.
        ZERO_V_TAIL: sequences may end before the storage that their tiles are loaded from.
        PAGE_SIZE: slots of a page, k and v being a pool of `num_pages` pages; None: they are dense.
        BLOCK_M: queries of a tile, each of PACK heads of one KV head: 64 rows a consumer.
        SPLIT_KV: the keys are divided into `splits`; out and lse are float32 and of the first, and
            out_split and lse_split are the strides between splits.
        PARTS: blocks of a selection that a tile of keys holds side by side.
    """
    ROWS: gl.constexpr = BLOCK_M // CONSUMERS
    PRODUCER_REGISTERS: gl.constexpr = 504 - CONSUMERS * REGISTERS
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    q_desc = tensor_descriptor(q, batch, heads, q_len, DIM, ROWS, D, PACK)
    if PAGE_SIZE is None:
        BOX: gl.constexpr = BLOCK_N // PARTS
        k_desc = tensor_descriptor(k, batch, heads // groups, k_len, DIM, BOX, D)
        v_desc = tensor_descriptor(v, batch, heads // groups, k_len, V_DIM, BOX, DV)
    else:
        BOX: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
        k_desc = tensor_descriptor(k, num_pages, heads // groups, PAGE_SIZE, DIM, BOX, D)
        v_desc = tensor_descriptor(v, num_pages, heads // groups, PAGE_SIZE, V_DIM, BOX, DV)
    if DIRECT_STORE:
        o_desc = q_desc  # never used
    else:
        o_desc = tensor_descriptor(out, batch, heads, q_len, V_DIM, ROWS, DV)
    q_smem = gl.allocate_shared_memory(
        DTYPE, [Q_STAGES * CONSUMERS, 1, PACK, ROWS, D], q_desc.layout
    )
    k_smem = gl.allocate_shared_memory(DTYPE, [K_STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [V_STAGES, 1, 1, BLOCK_N, DV], v_desc.layout)
    if DIRECT_STORE:
        o_smem = q_smem  # never written
    else:
        o_smem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, 1, ROWS, DV], o_desc.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    v_zeroed = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)  # for ZERO_V_TAIL
    pingpong = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_zeroed.index(i), count=1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(pingpong.index(i), count=1)
    fence_async_shared()

    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, pingpong)
    sizes = (q_len, k_len, q_offset, heads, groups, num_q_tiles, heads_per_section, num_work_tiles,
             splits)  # fmt: skip
    units = scale * LOG2E, softcap  # of S, see scores.py, and the factor under its exponential
    if softcap is not None:
        units = 2 * LOG2E * softcap, 2 * LOG2E * scale / softcap
    smem = (q_smem, k_smem, v_smem, bars)
    producer_args = (q_desc, k_desc, v_desc, smem, sizes, mask_args, block_lists, varlen)
    split_strides = (out_split, lse_split)
    alibi = (alibi_slopes, alibi_slopes_batch)
    args = (out, o_desc, lse, split_strides, sink_logits, o_smem, v_zeroed, smem, sizes, mask_args,
            block_lists, varlen, units, alibi)  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (args, CAUSAL, BLOCK_M, BLOCK_N, ROWS, PINGPONG, DIRECT_STORE, CONSUMERS,
                       ZERO_V_TAIL, DIM, V_DIM, PACK, SPLIT_KV, PARTS, 0)),
            (consume, (args, CAUSAL, BLOCK_M, BLOCK_N, ROWS, PINGPONG, DIRECT_STORE, CONSUMERS,
                       ZERO_V_TAIL, DIM, V_DIM, PACK, SPLIT_KV, PARTS, 1)),
            (produce, (producer_args, CAUSAL, BLOCK_M, BLOCK_N, ROWS, CONSUMERS, PAGE_SIZE, PACK,
                       SPLIT_KV, PARTS)),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (args, CAUSAL, BLOCK_M, BLOCK_N, ROWS, PINGPONG, DIRECT_STORE, CONSUMERS,
                       ZERO_V_TAIL, DIM, V_DIM, PACK, SPLIT_KV, PARTS, 0)),
            (consume, (args, CAUSAL, BLOCK_M, BLOCK_N, ROWS, PINGPONG, DIRECT_STORE, CONSUMERS,
                       ZERO_V_TAIL, DIM, V_DIM, PACK, SPLIT_KV, PARTS, 1)),
            (consume, (args, CAUSAL, BLOCK_M, BLOCK_N, ROWS, PINGPONG, DIRECT_STORE, CONSUMERS,
                       ZERO_V_TAIL, DIM, V_DIM, PACK, SPLIT_KV, PARTS, 2)),
            (produce, (producer_args, CAUSAL, BLOCK_M, BLOCK_N, ROWS, CONSUMERS, PAGE_SIZE, PACK,
                       SPLIT_KV, PARTS)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
