"""dQ is accumulated in global memory by atomics, in the order in which threads hold it.

The accumulator of a tile of 64 queries and half of the head dimension is `[requests, 128 threads,
4]` in float32: the four numbers of a thread's request are two columns of rows r and r + 8, so that
a request of a warp covers 512 consecutive bytes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.backward.tile_scheduler import BLOCK_M


def _reductions(requests: int) -> str:
    """PTX of `requests` reductions of four numbers: one address, immediate offsets."""
    lines = [
        f"red.relaxed.gpu.global.add.v4.f32 [$1 + {2048 * i}], "
        f"{{{', '.join(f'${4 * i + j + 2}' for j in range(4))}}}; "
        for i in range(requests)
    ]
    return "".join(lines) + "mov.u32 $0, 0;"


REDUCE_64, REDUCE_32 = gl.constexpr(_reductions(8)), gl.constexpr(_reductions(4))


@gluon.jit
def _registers(x):
    """A tile [64, 64 | 32] of an accumulator as tensors [4 warps, 8 rows, 4 columns]: registers."""
    if x.shape[1] == 64:
        cut = x.reshape([4, 2, 8, 2, 2, 2, 4, 2]).permute((0, 2, 6, 7, 1, 5, 4, 3))
    else:
        cut = x.reshape([4, 2, 8, 2, 2, 4, 2]).permute((0, 2, 5, 6, 1, 4, 3))
    parts = (cut,)
    for _ in gl.static_range(len(cut.shape) - 3):  # first half of the columns, then of these, ...
        split = ()
        for i in gl.static_range(len(parts)):
            split = split + gl.split(parts[i])
        parts = split
    return parts


@gluon.jit
def accumulate_dq(dq, base):
    """Add a tile of dQ in registers to the accumulator at `base`."""
    LAYOUT: gl.constexpr = dq.type.layout
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    col = gl.arange(0, dq.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    thread = _registers((row // 16) * 32 + (row % 8) * 4 + (col % 8) // 2)[0]
    address, parts = ((base + thread * 4).to(gl.int64),), _registers(dq)
    PTX: gl.constexpr = REDUCE_64 if dq.shape[1] == 64 else REDUCE_32
    CONSTRAINTS: gl.constexpr = "=r,l" + ",r" * len(parts)
    gl.inline_asm_elementwise(PTX, CONSTRAINTS, address + parts, gl.int32, False, 1)
