"""Masks of the gradients: what S^T is accumulated onto."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.backward.tile_scheduler import BLOCK_M, KEYS
from saccade.ops.gpu.triton_lang import LOWEST


@gluon.jit
def mask_bias(
    tile, full_from, full_to, k_start, k_len, q_offset, mask_args, CAUSAL: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Initial S^T [keys, queries]: 0, or LOWEST where a key is not visible to a query.

    A mask after the product, in a branch, would copy the accumulator while products are in flight.
    """
    bias = gl.zeros([KEYS, BLOCK_M], gl.float32, LAYOUT)
    partial = tile < full_from
    if mask_args.window is not None:
        partial = partial | (tile >= full_to)
    if partial:
        k_pos = k_start + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
        column = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, LAYOUT))[None, :]
        q_pos = q_offset + tile * BLOCK_M + column
        masked = k_pos >= k_len
        if CAUSAL:
            masked = masked | (k_pos > q_pos)
        if mask_args.window is not None:
            far = q_pos - k_pos >= mask_args.window
            if mask_args.sinks is not None:
                far = far & (k_pos >= mask_args.sinks)
            masked = masked | far
        bias = gl.where(masked, LOWEST, bias)
    return bias
