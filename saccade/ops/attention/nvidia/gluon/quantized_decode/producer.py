"""Asynchronous copies of quantized tiles into a warp's shared memory, and prefetch into L2.

A warp copies 64 keys or values, and their scales and offsets (qparams), 16 bytes a lane at a time.
They lie in shared memory as in global memory, except for an XOR swizzle against bank conflicts: the
lanes of a warp, which read rows 8 (keys) or 16 (values) apart, access different banks.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.ptx.async_copy import (
    cp_async_16,
    cp_async_commit,
    prefetch_l2,
)

BLOCK_N = gl.constexpr(64)  # keys of a tile
QPARAM_BYTES = gl.constexpr(512)  # of scales and offsets: 16 bytes of each lane


@gluon.jit
def head_gmem(strided, b, kv_head, SIZE: gl.constexpr):
    """Address of the first row of a head, of elements of SIZE bytes."""
    return (
        strided.ptr.to(gl.int64) + (b * strided.batch + kv_head.to(gl.int64) * strided.head) * SIZE
    )


@gluon.jit
def quantized_gmem(quantized, b, kv_head):
    """Addresses of a head's qdata, scales and offsets."""
    return (
        head_gmem(quantized.qdata, b, kv_head, 1),
        head_gmem(quantized.scale, b, kv_head, 2),
        head_gmem(quantized.offset, b, kv_head, 2),
    )


@gluon.jit
def copy_k(smem, gmem, lane, size, ROW: gl.constexpr):
    """Issue copies of 64 quantized keys, 512 bytes at a time; bit 6 is swizzled by 8 rows."""
    for n in gl.static_range(ROW // 8):
        if ROW >= 64:
            swizzled = (lane * 16) ^ (64 * ((64 * n // ROW) % 2))
        else:
            swizzled = (lane * 16) ^ (64 * (lane // 16))
        cp_async_16(smem + swizzled, gmem + lane * 16, size, 512 * n, 512 * n)


@gluon.jit
def copy_v(smem, gmem, lane, size, ROW: gl.constexpr):
    """Issue copies of 64 quantized values; bits 5 and 6 are swizzled by 16 rows."""
    for n in gl.static_range(ROW // 8):
        swizzled = (lane * 16) ^ (32 * ((32 * n // ROW) % 4))
        cp_async_16(smem + swizzled, gmem + lane * 16, size, 512 * n, 512 * n)


@gluon.jit
def copy_qparams(smem, scale, offset, lane, size, SIZE: gl.constexpr):
    """Issue copies of SIZE bytes of scales and as many of offsets, which lie behind them.

    Surplus lanes copy the same bytes to addresses that are never read.
    """
    LANES: gl.constexpr = SIZE // 16  # for each of the two
    at = lane % LANES
    gmem = gl.where(lane % (2 * LANES) < LANES, scale, offset) + at * 16
    cp_async_16(smem + lane * 16, gmem, size, 0, 0)


@gluon.jit
def issue_k_copies(smem, qparams_smem, gmem, tile, lane, size, ROW: gl.constexpr,
                   GROUP: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """Issue copies of qdata, scales and offsets of a tile of keys: one group."""
    qdata, scale, offset = gmem
    tile = tile.to(gl.int64)
    group = tile * BLOCK_N // GROUP * (2 * D)
    copy_k(smem, qdata + tile * (BLOCK_N * ROW), lane, size, ROW)
    copy_qparams(qparams_smem, scale + group, offset + group, lane, size, 2 * D)
    cp_async_commit(lane)


@gluon.jit
def issue_v_copies(smem, qparams_smem, gmem, tile, lane, size, ROW: gl.constexpr,
                   V_GROUPS: gl.constexpr):  # fmt: skip
    """The same for a tile of values."""
    qdata, scale, offset = gmem
    tile = tile.to(gl.int64)
    copy_v(smem, qdata + tile * (BLOCK_N * ROW), lane, size, ROW)
    at = tile * (2 * BLOCK_N * V_GROUPS)
    copy_qparams(qparams_smem, scale + at, offset + at, lane, size, 2 * BLOCK_N * V_GROUPS)
    cp_async_commit(lane)


@gluon.jit
def prefetch_tile(k_gmem, v_gmem, tile, lane, exists, K_ROW: gl.constexpr, V_ROW: gl.constexpr,
                  K_GROUP: gl.constexpr, V_GROUPS: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """Prefetch a tile, where it `exists`, into L2 before the previous kernel has ended (PDL).

    Kernels that still write go through the same cache, so no stale data is ever read.
    """
    predicate = gl.where((lane == 0) & exists, 1, 0)
    tile = tile.to(gl.int64)
    group = tile * BLOCK_N // K_GROUP * (2 * D)
    at = tile * (2 * BLOCK_N * V_GROUPS)
    prefetch_l2(k_gmem[0] + tile * (BLOCK_N * K_ROW), predicate, BLOCK_N * K_ROW)
    prefetch_l2(v_gmem[0] + tile * (BLOCK_N * V_ROW), predicate, BLOCK_N * V_ROW)
    for i in gl.static_range(1, 3):
        prefetch_l2(k_gmem[i] + group, predicate, 2 * D)
        prefetch_l2(v_gmem[i] + at, predicate, 2 * BLOCK_N * V_GROUPS)
