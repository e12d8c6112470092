"""Forward attention over fp8 Q, K and V for Hopper, in Gluon.

The structure is that of the prefill kernel: one producer warp, two consumer warpgroups of 64
queries.  fp8 changes how P becomes an operand (`softmax.py`), the layout of V (`transpose.py`) and
the accumulation of O (`consumer.py`).  Pingpong scheduling costs more than it gains here.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from saccade.ops.attention.nvidia.gluon.fp8.consumer import consume
from saccade.ops.attention.nvidia.gluon.fp8.producer import (
    BLOCK_N,
    CONSUMERS,
    ROWS,
    pipeline_barriers,
    produce,
)
from saccade.ops.attention.nvidia.gluon.prefill.producer import tensor_descriptor
from saccade.ops.gpu.triton_lang import LOG2E


@gluon.jit(
    do_not_specialize=[
        "q_len",
        "k_len",
        "k_padded",
        "q_offset",
        "batch",
        "heads",
        "groups",
        "num_q_tiles",
        "heads_per_section",
        "num_work_tiles",
    ]
)
def forward_kernel(
    q, k, v, out, lse, sink_logits, scales, mask_args, block_lists, scale, q_len, k_len, k_padded,
    q_offset, batch, heads, groups, num_q_tiles, heads_per_section, num_work_tiles,
    CAUSAL: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr, KV_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v over visible keys; q, k, v, out are StridedTensors, lse `[B, H, Lq]`.

    Args:
        v: as `transpose_v` makes it, of k_padded keys.
        scales: float32 of q `[B, H]`, k and v `[B, Hkv]`.
        REGISTERS: of a thread of a consumer.
    """
    FP8: gl.constexpr = q.ptr.dtype.element_ty
    q_desc = tensor_descriptor(q, batch, heads, q_len, D, ROWS, D)
    k_desc = tensor_descriptor(k, batch, heads // groups, k_len, D, BLOCK_N, D)
    v_desc = tensor_descriptor(v, batch, heads // groups, D, k_padded, D, BLOCK_N)
    o_desc = tensor_descriptor(out, batch, heads, q_len, D, ROWS, D)
    q_smem = gl.allocate_shared_memory(FP8, [Q_STAGES * CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(FP8, [KV_STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(FP8, [KV_STAGES, 1, 1, D, BLOCK_N], v_desc.layout)
    o_smem = gl.allocate_shared_memory(
        out.ptr.dtype.element_ty, [CONSUMERS, 1, 1, ROWS, D], o_desc.layout
    )
    q_full, q_empty = pipeline_barriers(Q_STAGES, CONSUMERS)
    k_full, k_empty = pipeline_barriers(KV_STAGES, CONSUMERS)
    v_full, v_empty = pipeline_barriers(KV_STAGES, CONSUMERS)
    fence_async_shared()

    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (q_len, k_len, q_offset, heads, groups, num_q_tiles, heads_per_section, num_work_tiles)
    smem = (q_smem, k_smem, v_smem, bars)
    scale_log2 = scale * LOG2E
    producer_args = (q_desc, k_desc, v_desc, smem, sizes, mask_args, block_lists)
    args = (
        o_desc, lse, sink_logits, scales, o_smem, smem, sizes, mask_args, block_lists, scale_log2,
    )  # fmt: skip
    gl.warp_specialize([
        (consume, (args, CAUSAL, 0)),
        (consume, (args, CAUSAL, 1)),
        (produce, (producer_args, CAUSAL)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
