"""The end of the quantized decode kernel: output and lse of a split."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.epilogue import finalize_softmax
from saccade.ops.attention.nvidia.gluon.ptx.convert import float_as_int, pack_bf16x2, pack_f16x2
from saccade.ops.attention.nvidia.gluon.ptx.memory import st_global
from saccade.ops.attention.nvidia.gluon.quantized_decode.dequantize import dequant_factor
from saccade.ops.attention.nvidia.gluon.quantized_decode.softmax import INITIAL_MAX, P_SHIFT

BLOCK_M = gl.constexpr(8)  # query rows (heads of a group times queries) of a CTA


@gluon.jit
def store_output(acc, offset_acc, row_max, row_sum, scale_log2, out, lse, sink_logits, m_tile,
                 split, out_split, lse_split, b, kv_head, KV_HEADS: gl.constexpr,
                 GROUPS: gl.constexpr, q_len, g, t, D: gl.constexpr,
                 V_FORMAT: gl.constexpr):  # fmt: skip
    """Write the output and lse of the two rows of a lane."""
    for c in gl.static_range(2):
        row = m_tile * BLOCK_M + 2 * t + c
        index = row // GROUPS
        h = kv_head * GROUPS + row % GROUPS
        keep = index < q_len
        l = row_sum[c]
        m = gl.where(l == 0, INITIAL_MAX, row_max[c] * scale_log2 - P_SHIFT)
        row_lse, rescale, divisor = finalize_softmax(m, l, sink_logits, h, keep & (split == 0))
        at = lse + split.to(gl.int64) * lse_split + (b * KV_HEADS * GROUPS + h) * q_len + index
        gl.store(at, row_lse, mask=keep & (g == 0))
        at = split.to(gl.int64) * out_split + b * out.batch
        at = at + h.to(gl.int64) * out.head + index.to(gl.int64) * out.row + g * (D // 16)
        values = ()
        for j in gl.static_range(D // 16):
            for odd in gl.static_range(2):
                value = acc[j][2 * odd + c] * dequant_factor(V_FORMAT, j // (D // 32))
                values += ((value + offset_acc[2 * (j // (D // 32)) + c]) * (rescale / divisor),)
        store_row(out.ptr, at, values, keep.to(gl.int32), D)


@gluon.jit
def store_row(ptr, at, values, keep, D: gl.constexpr):
    """Store D / 16 values at element `at`, and as many half a head further on."""
    SIZE: gl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    regs = ()
    for i in gl.static_range(0, D // 8, 4 // SIZE):
        if SIZE == 4:
            regs += (float_as_int(values[i]),)
        elif ptr.dtype.element_ty == gl.bfloat16:
            regs += (pack_bf16x2(values[i], values[i + 1]),)
        else:
            regs += (pack_f16x2(values[i], values[i + 1]),)
    gmem = ptr.to(gl.int64) + at * SIZE
    HALF: gl.constexpr = D // 16 * SIZE // 4  # registers of half a head
    for i in gl.static_range(0, 2 * HALF, 2 if HALF == 2 else 4):
        address = gmem + (i // HALF * (D // 2 * SIZE) + i % HALF * 4)
        if HALF == 2:
            st_global(address, (regs[i], regs[i + 1]), keep)
        else:
            st_global(address, (regs[i], regs[i + 1], regs[i + 2], regs[i + 3]), keep)
