"""cp.async: copies from global to shared memory that a warp does not wait for, and L2 prefetch.

Copies of a thread belong to groups: `cp_async_commit` closes one, `cp_async_wait` waits until no
more than so many groups are in flight.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@triton.constexpr_function
def _cp_async_asm(smem_offset, gmem_offset):
    return (
        f"cp.async.cg.shared.global [$1 + {smem_offset}], [$2 + {gmem_offset}], 16, $3;"
        " mov.u32 $0, 0;"
    )


@gluon.jit
def cp_async_16(smem, gmem, size, SMEM_OFFSET: gl.constexpr, GMEM_OFFSET: gl.constexpr):
    """Issue a copy of 16 bytes a thread from `gmem` + GMEM_OFFSET to `smem` + SMEM_OFFSET.

    Where `size` is 0 instead of 16 nothing is read, at no cost: zeros are written.
    """
    asm: gl.constexpr = _cp_async_asm(SMEM_OFFSET, GMEM_OFFSET)
    gl.inline_asm_elementwise(asm, "=r,r,l,r", [smem, gmem, size], gl.int32, False, 1)


@gluon.jit
def cp_async_commit(thread):
    """The copies issued since the last call become one group."""
    gl.inline_asm_elementwise(
        "cp.async.commit_group; mov.u32 $0, 0;", "=r,r", [thread], gl.int32, False, 1
    )


@triton.constexpr_function
def _cp_async_wait_asm(groups):
    return f"cp.async.wait_group {groups}; bar.warp.sync -1; mov.u32 $0, 0;"


@gluon.jit
def cp_async_wait(thread, GROUPS: gl.constexpr):
    """Wait until at most GROUPS groups are in flight, for all lanes of a warp."""
    asm: gl.constexpr = _cp_async_wait_asm(GROUPS)
    gl.inline_asm_elementwise(asm, "=r,r", [thread], gl.int32, False, 1)


@gluon.jit
def warp_sync(thread):
    """Barrier of one warp: loads before it stay before, and every lane has done them."""
    gl.inline_asm_elementwise(
        "bar.warp.sync -1; mov.u32 $0, 0;", "=r,r", [thread], gl.int32, False, 1
    )


@triton.constexpr_function
def _prefetch_asm(size):
    return (
        "{ .reg .pred p; setp.ne.s32 p, $2, 0;"
        f" @p cp.async.bulk.prefetch.L2.global [$1], {size}; mov.b32 $0, 0; }}"
    )


@gluon.jit
def prefetch_l2(gmem, predicate, SIZE: gl.constexpr):
    """Prefetch SIZE bytes at `gmem` into the L2 cache, by threads whose `predicate` is not 0."""
    asm: gl.constexpr = _prefetch_asm(SIZE)
    args = [gmem + predicate.to(gl.int64) * 0, predicate]
    gl.inline_asm_elementwise(asm, "=r,l,r", args, gl.int32, False, 1)
