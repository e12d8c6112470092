"""dQ of Hopper's gradients is added to memory in the order in which threads hold it.

A tile of 64 queries and half of the head's dimensions lies as `[requests, 128 threads, 4]`: a
thread's four numbers of a request are two columns of rows r and r + 8, so that a request of a warp
covers 512 bytes in a row.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS = gl.constexpr(64)


def _additions(requests: int) -> str:
    """Four numbers a request: one address, immediate offsets."""
    lines = [
        f"red.relaxed.gpu.global.add.v4.f32 [$1 + {2048 * i}], "
        f"{{{', '.join(f'${4 * i + j + 2}' for j in range(4))}}}; "
        for i in range(requests)
    ]
    return "".join(lines) + "mov.u32 $0, 0;"


ADD_UP_64, ADD_UP_32 = gl.constexpr(_additions(8)), gl.constexpr(_additions(4))


@gluon.jit
def _registers(x):
    """A tile [64, 64 | 32] of an accumulator as tensors [4 warps, 8 rows, 4 columns]: registers."""
    if x.shape[1] == 64:
        cut = x.reshape([4, 2, 8, 2, 2, 2, 4, 2]).permute((0, 2, 6, 7, 1, 5, 4, 3))
    else:
        cut = x.reshape([4, 2, 8, 2, 2, 4, 2]).permute((0, 2, 5, 6, 1, 4, 3))
    parts = (cut,)
    for _ in gl.static_range(len(cut.shape) - 3):  # first half of the columns, then of these, ...
        found = ()
        for i in gl.static_range(len(parts)):
            found = found + gl.split(parts[i])
        parts = found
    return parts


@gluon.jit
def add_up(dq, base):
    """Add a tile in registers to its place in memory."""
    LAYOUT: gl.constexpr = dq.type.layout
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    col = gl.arange(0, dq.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    thread = _registers((row // 16) * 32 + (row % 8) * 4 + (col % 8) // 2)[0]
    address, parts = ((base + thread * 4).to(gl.int64),), _registers(dq)
    TEXT: gl.constexpr = ADD_UP_64 if dq.shape[1] == 64 else ADD_UP_32
    WHERE: gl.constexpr = "=r,l" + ",r" * len(parts)
    gl.inline_asm_elementwise(TEXT, WHERE, address + parts, gl.int32, False, 1)
