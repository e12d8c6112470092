"""Gradients of attention for Hopper in Gluon: five products a tile, dQ added up by atomics.

One program owns 128 keys of a KV head and walks over the queries of its group that see them.  One
warp asks the copy engine for K and V once and for tiles of 64 queries: Q, dO, and a row's lse and
delta.  Each of two consumers (four warps) owns 64 of the keys.  Per tile it computes

    S^T = K Q^T      P^T = exp2(S^T - lse)      dP^T = V dO^T      dS^T = P^T * (dP^T - delta)

with keys as rows, so that P^T and dS^T leave the matrix units in the registers from which they go
back: dV += P^T dO and dK += dS^T Q.  dS^T also goes to shared memory, where both consumers meet to
compute dQ = dS K, each for half of the head's dimensions.  dQ belongs to no program: it is added to
a float32 buffer whose order within a tile is that of the registers (`dq_place`), four numbers a
request, and `convert_kernel` brings it into rows.  The order of these additions is not determined:
two runs differ in the last bits of dQ.
Source: Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from saccade.ops.attend.gluon_schedule import next_stage
from saccade.ops.tiles import LOG2E as LOG2_OF_E
from saccade.ops.tiles import addresses, load_tile

LOG2E = gl.constexpr(1.4426950408889634)
ADD_UP = gl.constexpr(
    "".join(
        f"red.relaxed.gpu.global.add.v4.f32 [$1 + {2048 * i}], "
        f"{{{', '.join(f'${4 * i + j + 2}' for j in range(4))}}}; "
        for i in range(8)
    )
    + "mov.u32 $0, 0;"
)
ROWS, KEYS, CONSUMERS = gl.constexpr(64), gl.constexpr(64), gl.constexpr(2)


@gluon.jit
def _whose(k_len, q_len, q_offset, section, kv_heads, CAUSAL: gl.constexpr):
    """Batch, KV head, first key, first tile of queries, number of tiles, first full tile."""
    tiles = gl.cdiv(k_len, CONSUMERS * KEYS)
    pid = gl.program_id(0)
    per_section = tiles * section
    inside = pid % per_section
    head = (pid // per_section) * section + inside % section
    start = (inside // section) * (CONSUMERS * KEYS)
    q_tiles = gl.cdiv(q_len, ROWS)
    first, full = 0, 0
    if CAUSAL:
        first = gl.minimum(gl.maximum(start - q_offset, 0) // ROWS, q_tiles)
        full = gl.cdiv(gl.maximum(start + CONSUMERS * KEYS - 1 - q_offset, 0), ROWS)
    full = gl.where(start + CONSUMERS * KEYS > k_len, q_tiles, full)
    return head // kv_heads, head % kv_heads, start, first, q_tiles - first, full


@gluon.jit
def _next(h, tile, row, first, count, STEP: gl.constexpr):
    """The next tile of queries: head, tile in it, and its place among all tiles."""
    tile += 1
    wrapped = tile == first + count
    row += gl.where(wrapped, 1 + first, 1) * STEP
    return gl.where(wrapped, h + 1, h), gl.where(wrapped, first, tile), row


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, d_desc, stat_desc, k_mem, v_mem, q_mem, d_mem, lse_mem, delta_mem,
    bars, sizes, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Fetch K and V, then every tile of queries, in the order of the consumers."""
    kv_full, q_full, q_empty, d_full, d_empty, _ds_full, _ds_empty = bars
    q_len, k_len, q_offset, kv_heads, groups, section = sizes
    STAGES: gl.constexpr = q_mem.shape[0]
    b, head, start, first, count, _full = _whose(k_len, q_len, q_offset, section, kv_heads, CAUSAL)
    mbarrier.expect(kv_full, CONSUMERS * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for c in gl.static_range(CONSUMERS):
        at = start + c * KEYS
        tma.async_copy_global_to_shared(k_desc, [b, head, at, 0], kv_full, k_mem.index(c))
        tma.async_copy_global_to_shared(v_desc, [b, head, at, 0], kv_full, v_mem.index(c))
    stage, phase = 0, 1
    h, tile = head * groups, first
    row = ((b * kv_heads * groups + h) * (first + count) + first) * 2
    for _ in range(groups * count):
        full = q_full.index(stage)
        mbarrier.wait(q_empty.index(stage), phase)
        mbarrier.expect(full, q_desc.block_type.nbytes + stat_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(stat_desc, [row, 0], full, lse_mem.index(stage))
        tma.async_copy_global_to_shared(q_desc, [b, h, tile * ROWS, 0], full, q_mem.index(stage))
        full = d_full.index(stage)
        mbarrier.wait(d_empty.index(stage), phase)
        mbarrier.expect(full, d_desc.block_type.nbytes + stat_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(stat_desc, [row + 1, 0], full, delta_mem.index(stage))
        tma.async_copy_global_to_shared(d_desc, [b, h, tile * ROWS, 0], full, d_mem.index(stage))
        h, tile, row = _next(h, tile, row, first, count, 2)
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _halves(x, DTYPE: gl.constexpr):
    """float32 in 16 bits, packed by twos."""
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.bfloat16, True, 2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.float16, True, 2
        )


@gluon.jit
def _registers(x):
    """A tile [64, 64] of an accumulator as 32 tensors [4 warps, 8 rows, 4 columns], one register."""
    parts = (x.reshape([4, 2, 8, 2, 2, 2, 4, 2]).permute((0, 2, 6, 7, 1, 5, 4, 3)),)
    for _ in gl.static_range(5):  # first half of the columns first, then of these, ...
        found = ()
        for i in gl.static_range(len(parts)):
            found = found + gl.split(parts[i])
        parts = found
    return parts


@gluon.jit
def _add_up(dq, base):
    """Add a tile [64, 64] in registers to its buffer [8, 128 threads, 4]: four a request."""
    LAYOUT: gl.constexpr = dq.type.layout
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    col = gl.arange(0, dq.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    thread = _registers((row // 16) * 32 + (row % 8) * 4 + (col % 8) // 2)[0]
    parts = _registers(dq)
    gl.inline_asm_elementwise(
        ADD_UP, "=r,l" + ",r" * 32, [(base + thread * 4).to(gl.int64)] + parts, gl.int32, False, 1
    )


@gluon.jit
def _mask(s, row, start, k_len, q_offset, CAUSAL: gl.constexpr):
    """Scores [keys, queries] of an edge tile, -inf where a query does not see a key."""
    LAYOUT: gl.constexpr = s.type.layout
    k_pos = start + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, LAYOUT))[:, None]
    see = k_pos < k_len
    if CAUSAL:
        q_pos = q_offset + row + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
        see = see & (k_pos <= q_pos)
    return gl.where(see, s, float("-inf"))


@gluon.jit
def _consume(
    dk_desc, dv_desc, dq, k_mem, v_mem, q_mem, d_mem, lse_mem, delta_mem, ds_mem, bars, sizes,
    scale, CAUSAL: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys, and half of the dimensions of what 128 keys give to dQ."""
    kv_full, q_full, q_empty, d_full, d_empty, ds_full, ds_empty = bars
    q_len, k_len, q_offset, kv_heads, groups, section = sizes
    D: gl.constexpr = k_mem.shape[4]
    HALF: gl.constexpr = D // 2
    DTYPE: gl.constexpr = k_mem.dtype
    STAGES: gl.constexpr = q_mem.shape[0]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    b, head, start, first, count, full = _whose(k_len, q_len, q_offset, section, kv_heads, CAUSAL)
    mine = start + WHO * KEYS
    unit = scale * LOG2E
    keys = k_mem.index(WHO).reshape([KEYS, D])
    values = v_mem.index(WHO).reshape([KEYS, D])
    dk = gl.zeros([KEYS, D], gl.float32, O)
    dv = gl.zeros([KEYS, D], gl.float32, O)
    s = gl.zeros([KEYS, ROWS], gl.float32, S)
    dp = gl.zeros([KEYS, ROWS], gl.float32, S)
    part = gl.zeros([ROWS, HALF], gl.float32, DQ)
    stage, phase = 0, 0
    h, tile = gl.to_tensor(0), first
    at = (b * kv_heads + head) * groups * (first + count) + first
    mbarrier.wait(kv_full, 0)
    for i in range(groups * count):
        q_tile = q_mem.index(stage).reshape([ROWS, D])
        d_tile = d_mem.index(stage).reshape([ROWS, D])
        mbarrier.wait(q_full.index(stage), phase)
        scores = warpgroup_mma(keys, q_tile.permute((1, 0)), s, use_acc=False, is_async=True)
        mbarrier.wait(d_full.index(stage), phase)
        product = warpgroup_mma(values, d_tile.permute((1, 0)), dp, use_acc=False, is_async=True)
        lse = lse_mem.index(stage).reshape([ROWS]).load(COLUMN)
        s = warpgroup_mma_wait(1, deps=[scores])
        if tile < full:
            s = _mask(s, tile * ROWS, mine, k_len, q_offset, CAUSAL)
        p = gl.exp2(s * unit - lse[None, :])
        delta = delta_mem.index(stage).reshape([ROWS]).load(COLUMN)
        dp = warpgroup_mma_wait(0, deps=[product])
        weights = gl.convert_layout(_halves(p, DTYPE), gl.DotOperandLayout(0, O, 2))
        ds = _halves(p * (dp - delta[None, :]), DTYPE)
        dv_next = warpgroup_mma(weights, d_tile, dv, is_async=True)
        mbarrier.wait(ds_empty, (i & 1) ^ 1)
        ds_mem.index(WHO).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_full)
        ds = gl.convert_layout(ds, gl.DotOperandLayout(0, O, 2))
        dk_next = warpgroup_mma(ds, q_tile, dk, is_async=True)
        mbarrier.wait(ds_full, i & 1)
        half = k_mem.index(0).reshape([KEYS, D]).slice(WHO * HALF, HALF, dim=1)
        part_next = warpgroup_mma(
            ds_mem.index(0).permute((1, 0)), half, part, use_acc=False, is_async=True
        )
        half = k_mem.index(1).reshape([KEYS, D]).slice(WHO * HALF, HALF, dim=1)
        part_next = warpgroup_mma(ds_mem.index(1).permute((1, 0)), half, part_next, is_async=True)
        dv, weights, dk, ds, part = warpgroup_mma_wait(
            0, deps=[dv_next, weights, dk_next, ds, part_next]
        )
        mbarrier.arrive(d_empty.index(stage))
        mbarrier.arrive(q_empty.index(stage))
        mbarrier.arrive(ds_empty)
        _add_up(part, dq + (at.to(gl.int64) * CONSUMERS + WHO) * (ROWS * HALF))
        h, tile, at = _next(h, tile, at, first, count, 1)
        stage, phase = next_stage(stage, phase, STAGES)
    out = v_mem.index(WHO)
    out.reshape([KEYS, D]).store(dv.to(DTYPE))
    fence_async_shared()
    tma.async_copy_shared_to_global(dv_desc, [b, head, mine, 0], out)
    tma.store_wait(0)
    out.reshape([KEYS, D]).store((dk * scale).to(DTYPE))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk_desc, [b, head, mine, 0], out)
    tma.store_wait(0)


@gluon.jit
def _describe(x, batch, heads, length, BLOCK: gl.constexpr, D: gl.constexpr):
    """The copy engine's description of `[batch, heads, length, D]`, read in blocks of rows."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [1, 1, BLOCK, D], x.ptr.dtype.element_ty
    )
    return tma.make_tensor_descriptor(
        x.ptr, [batch, heads, length, D], [x.batch, x.head, x.row, 1], [1, 1, BLOCK, D], LAYOUT
    )


@gluon.jit(do_not_specialize=["q_len", "k_len", "q_offset", "batch", "kv_heads", "groups",
                              "section"])  # fmt: skip
def backward_kernel(
    q, k, v, dout, dk, dv, stats, dq, scale, q_len, k_len, q_offset, batch, kv_heads, groups,
    section,
    CAUSAL: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK, dV of 128 keys and their part of dQ; q .. dv are Planes, stats `[B*H*tiles, 2, 64]`."""
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    heads = kv_heads * groups
    q_desc = _describe(q, batch, heads, q_len, ROWS, D)
    d_desc = _describe(dout, batch, heads, q_len, ROWS, D)
    k_desc = _describe(k, batch, kv_heads, k_len, KEYS, D)
    v_desc = _describe(v, batch, kv_heads, k_len, KEYS, D)
    dk_desc = _describe(dk, batch, kv_heads, k_len, KEYS, D)
    dv_desc = _describe(dv, batch, kv_heads, k_len, KEYS, D)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    stat_desc = tma.make_tensor_descriptor(
        stats, [batch * heads * gl.cdiv(q_len, ROWS) * 2, ROWS], [ROWS, 1], [1, ROWS], FLAT
    )
    k_mem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, 1, KEYS, D], k_desc.layout)
    v_mem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, 1, KEYS, D], v_desc.layout)
    q_mem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, ROWS, D], q_desc.layout)
    d_mem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, ROWS, D], d_desc.layout)
    lse_mem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], FLAT)
    delta_mem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], FLAT)
    SQUARE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], DTYPE)
    ds_mem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, KEYS, ROWS], SQUARE)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    d_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    d_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    ds_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    ds_empty = gl.allocate_shared_memory(gl.int64, [1], BAR)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(ds_full, count=CONSUMERS)
    mbarrier.init(ds_empty, count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
        mbarrier.init(d_full.index(i), count=1)
        mbarrier.init(d_empty.index(i), count=CONSUMERS)
    fence_async_shared()

    bars = (kv_full, q_full, q_empty, d_full, d_empty, ds_full, ds_empty)
    sizes = (q_len, k_len, q_offset, kv_heads, groups, section)
    gl.warp_specialize([
        (_consume, (
            dk_desc, dv_desc, dq, k_mem, v_mem, q_mem, d_mem, lse_mem, delta_mem, ds_mem, bars,
            sizes, scale, CAUSAL, 0,
        )),
        (_consume, (
            dk_desc, dv_desc, dq, k_mem, v_mem, q_mem, d_mem, lse_mem, delta_mem, ds_mem, bars,
            sizes, scale, CAUSAL, 1,
        )),
        (_produce, (
            q_desc, k_desc, v_desc, d_desc, stat_desc, k_mem, v_mem, q_mem, d_mem, lse_mem,
            delta_mem, bars, sizes, CAUSAL,
        )),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


@triton.jit(do_not_specialize=["q_len"])
def prepare_kernel(
    out, dout, lse, dlse, delta, stats, dq, q_len, heads, D: tl.constexpr, ROWS: tl.constexpr
):
    """delta = rowsum(dO * O) - dlse; lse in powers of two and delta, by tiles; dQ set to 0.

    out, dout are Planes; lse, dlse, delta `[B, H, Lq]`; stats `[B * H, tiles, 2, ROWS]`; dq
    `[B * H, tiles, ROWS * D]`.  Rows that see nothing, or do not exist, get +inf: their P is 0.
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)
    columns = tl.arange(0, ROWS)
    rows = tile * ROWS + columns
    dims = tl.arange(0, D)
    keep = rows < q_len
    o_at = addresses(out.ptr + b * out.batch + h * out.head, rows, out.row, dims)
    d_at = addresses(dout.ptr + b * dout.batch + h * dout.head, rows, dout.row, dims)
    o = load_tile(o_at, keep, dims, D, True).to(tl.float32)
    d = load_tile(d_at, keep, dims, D, True).to(tl.float32)
    at = (b * heads + h) * q_len + rows
    found = tl.sum(o * d, 1) - tl.load(dlse + at, mask=keep, other=0.0)
    tl.store(delta + at, found, mask=keep)
    whole = (b * heads + h) * tl.num_programs(1) + tile
    tl.store(stats + (whole * 2 + 1) * ROWS + columns, found)
    found = tl.load(lse + at, mask=keep, other=float("-inf"))
    found = tl.where(found == float("-inf"), float("inf"), found * LOG2_OF_E)
    tl.store(stats + whole * 2 * ROWS + columns, found)
    tl.store(dq + whole * (ROWS * D) + tl.arange(0, ROWS * D), tl.zeros([ROWS * D], tl.float32))


@triton.jit
def dq_place(row, dim, D: tl.constexpr):
    """Where in its tile of the buffer an element of dQ is: see `_add_up`."""
    col = dim % (D // 2)
    inside = (col // 8) * 512 + (row // 16) * 128 + (row % 8) * 16 + (col % 8) // 2 * 4
    return (dim // (D // 2)) * (32 * D) + inside + (row % 16) // 8 * 2 + col % 2


@triton.jit(do_not_specialize=["q_len"])
def convert_kernel(dq, out, scale, q_len, heads, D: tl.constexpr, ROWS: tl.constexpr):
    """dQ times scale, from the buffer into rows of the Plane `out`."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(1)
    inside = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    whole = (b * heads + h) * tl.num_programs(1) + tile
    found = tl.load(dq + whole * (ROWS * D) + dq_place(inside[:, None], dims[None, :], D))
    rows = tile * ROWS + inside
    at = addresses(out.ptr + b * out.batch + h * out.head, rows, out.row, dims)
    tl.store(at, (found * scale).to(out.ptr.dtype.element_ty), mask=(rows < q_len)[:, None])
