"""V transposed for fp8 products, with the keys of each group of 16 in the order of P's registers.

wgmma reads 8-bit operands along the summed dimension only, so V `[N, D]` has to be `[D, N]`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu.intmath import cdiv
from saccade.ops.gpu.replay import launch_kernel

GROUP = 16  # keys that are reordered among themselves, see `softmax.py`
TILE_BYTES = 16384  # of a CTA


@triton.jit
def transpose_kernel(
    v, v_batch, v_head, v_row, out, heads, length, padded,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """V `[B, H, length, D]` as `[B, H, D, padded]`, groups of keys reordered, 0 past the end.

    Args:
        v: fp8 as bytes; out: contiguous bytes.
        padded: length rounded up to a multiple of GROUP.
    """
    bh = tl.program_id(1)
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Slot 4c + 2i + e of a group holds key 8i + 2c + e.
    keys = (slots & -16) + ((slots & 2) << 2) + ((slots >> 1) & 6) + (slots & 1)
    dims = tl.arange(0, D)
    rows = v + (bh // heads).to(tl.int64) * v_batch + (bh % heads).to(tl.int64) * v_head
    rows += keys.to(tl.int64)[:, None] * v_row + dims[None, :]
    qdata = tl.load(rows, mask=(keys < length)[:, None], other=0)
    columns = out + (bh.to(tl.int64) * D + dims)[:, None] * padded + slots[None, :]
    tl.store(columns, tl.trans(qdata), mask=(slots < padded)[None, :])


def transpose_v(v: Tensor) -> Tensor:
    """fp8 V `[B, H, N, D]` as `[B, H, D, N]` in the kernel's order, N rounded up to GROUP."""
    batch, heads, length, dim = v.shape
    padded = cdiv(length, GROUP) * GROUP
    out = torch.empty(batch, heads, dim, padded, dtype=v.dtype, device=v.device)
    block = TILE_BYTES // dim
    launch_kernel(transpose_kernel, (cdiv(padded, block), batch * heads), 
        v.view(torch.uint8), *v.stride()[:3], out.view(torch.uint8), heads, length, padded,
        D=dim, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
