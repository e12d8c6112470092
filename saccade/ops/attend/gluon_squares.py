"""Gradients for Hopper with heads of 64, windows and sinks: dQ added up in squares of 64 x 64.

`gluon_backward.py` has those of heads of 128; this kernel computes them too, but the two were never
timed in one run.

One program owns 128 keys of one KV head and walks over the queries of its group that see them.  A
single warp asks the copy engine for K and V once and then for Q, dO and what each row contributes;
two consumers (four warps each) own 64 of the keys.  Scores are computed with keys as rows,

    S^T = K Q^T      dP^T = V dO^T      dS^T = P^T * (dP^T - delta)

so that P^T and dS^T come out of the matrix units in the registers from which the next products

    dV += P^T dO     dK += dS^T Q

take them.  dQ = dS K needs the dS of all 128 keys: both consumers leave theirs in shared memory,
and each multiplies half of the result, one step later, so that nobody waits for the other.  dQ is
added up in float32 in global memory, in whatever order programs arrive: equal runs differ in the
last bits.  `triton_backward.py` is the deterministic way, which needs seven products.

Source: Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608), section on the backward pass.
"""

from __future__ import annotations

import triton
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
from saccade.ops.tiles import query_tiles

LOG2E = gl.constexpr(1.4426950408889634)
PART = gl.constexpr(64)  # dQ is multiplied in squares of 64 queries x 64 dimensions


@gluon.jit
def _owned(section, tiles, heads, groups, splits):
    """What this program owns: (batch, its first query head, KV head, share of the group, tile).

    Keys that most queries see come first, within sections of KV heads whose queries and gradients
    fit the L2 cache together.
    """
    shares = heads // groups
    per_section = tiles * section
    inside = gl.program_id(0) % per_section
    at = (gl.program_id(0) // per_section) * section + inside % section
    share = at % shares
    return at // shares, share * groups, share // splits, share, inside // section


@gluon.jit
def _span(
    tile, q_len, k_len, q_offset, rules, CAUSAL: gl.constexpr, M: gl.constexpr, N: gl.constexpr
):
    """Tiles of queries that see a tile of keys: (first, full from, full to, stop)."""
    start = tile * N
    first, full_from, full_to, last = query_tiles(
        start, gl.minimum(start + N, k_len) - 1, q_len, q_offset, rules, CAUSAL, M
    )
    if start + N > k_len:  # the row ends in this tile
        full_to = full_from
    return first, full_from, full_to, last


@gluon.jit
def _produce(
    q_desc, d_desc, k_desc, v_desc, row_desc, memory, bars, sizes, owned, span, M: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """Fetch keys and values once, then queries and dO in the order the consumers read them."""
    q_mem, d_mem, k_mem, v_mem, row_mem, _ds_mem = memory
    kv_full, q_full, d_full, empty, _ds_full = bars
    _q_len, _k_len, _q_offset, _batch, heads, groups, q_tiles = sizes
    b, first_head, kv_head, _share, tile = owned
    first, _full_from, _full_to, last = span
    STAGES: gl.constexpr = q_mem.shape[0]
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [b, kv_head, tile * N, 0], kv_full, k_mem)
    tma.async_copy_global_to_shared(v_desc, [b, kv_head, tile * N, 0], kv_full, v_mem)
    stage, phase, t, h = 0, 1, first, first_head
    for _ in range((last - first) * groups):
        mbarrier.wait(empty.index(stage), phase)
        bar = q_full.index(stage)
        mbarrier.expect(bar, q_desc.block_type.nbytes + row_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [b, h, t * M, 0], bar, q_mem.index(stage))
        at = ((b * heads + h) * q_tiles + t) * 2
        tma.async_copy_global_to_shared(row_desc, [at, 0], bar, row_mem.index(stage))
        bar = d_full.index(stage)
        mbarrier.expect(bar, d_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(d_desc, [b, h, t * M, 0], bar, d_mem.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
        t += 1
        h = gl.where(t == last, h + 1, h)
        t = gl.where(t == last, first, t)


@gluon.jit
def _mask(p, row, start, q_offset, k_len, rules, CAUSAL: gl.constexpr, S: gl.constexpr):
    """P^T of an edge tile, 0 where a query does not see a key."""
    k_pos = (start + gl.arange(0, p.shape[0], layout=gl.SliceLayout(1, S)))[:, None]
    q_pos = (q_offset + row + gl.arange(0, p.shape[1], layout=gl.SliceLayout(0, S)))[None, :]
    see = k_pos < k_len
    if CAUSAL:
        see = see & (k_pos <= q_pos)
    if rules.window is not None:
        near = q_pos - k_pos < rules.window
        if rules.sinks is not None:
            near = near | (k_pos < rules.sinks)
        see = see & near
    return gl.where(see, p, 0.0)


@gluon.jit
def _packed(x, DTYPE: gl.constexpr):
    """x in 16 bits, packed by twos."""
    if DTYPE == gl.bfloat16:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.bfloat16, True, 2
        )
    else:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.float16, True, 2
        )
    return packed


@triton.jit
def place_in_part(row, col):
    """Where an element of a 64 x 64 square of dQ lies in its 4096 numbers of scratch memory.

    It is the order in which threads hold it: four numbers a thread (two columns of rows r and
    r + 8), 32 threads a warp, four warps of 16 rows, eight groups of columns; so that one addition
    of a warp covers 512 bytes in a row.
    """
    rows = (row // 16) * 128 + (row % 8) * 16 + ((row % 16) // 8) * 2
    return rows + (col // 8) * 512 + ((col % 8) // 2) * 4 + col % 2


@gluon.jit
def _add(dq, part, wanted, GUARDED: gl.constexpr):
    """Add a square to its scratch memory, four numbers at a time; GUARDED: only where `wanted`.

    The guard costs branches, and yet ptxas keeps fewer addresses in memory with it at D 128; with
    it at D 64 ptxas crashes, and the first square goes to a tile behind all others instead.
    """
    R: gl.constexpr = dq.type.layout
    row = gl.arange(0, PART, layout=gl.SliceLayout(1, R))[:, None]
    col = gl.arange(0, PART, layout=gl.SliceLayout(0, R))[None, :]
    at = (part + place_in_part(row, col)).to(gl.int64)
    if GUARDED:
        gl.inline_asm_elementwise(
            """{
            .reg .pred wanted;
            setp.ne.s32 wanted, $12, 0;
            @wanted red.global.relaxed.gpu.add.v4.f32 [$4], {$8, $9, $10, $11};
            mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
            }""",
            "=r,=r,=r,=r,l,l,l,l,f,f,f,f,r,r,r,r",
            [at, dq, wanted.to(gl.int32)],
            gl.int32,
            False,
            4,
        )
    else:
        gl.inline_asm_elementwise(
            """
            red.global.relaxed.gpu.add.v4.f32 [$4], {$8, $9, $10, $11};
            mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
            """,
            "=r,=r,=r,=r,l,l,l,l,f,f,f,f",
            [at, dq],
            gl.int32,
            False,
            4,
        )


@gluon.jit
def _square(ds_mem, k_mem, buffer, nothing, WHO: gl.constexpr):
    """Ask for this consumer's square of dQ = dS K: half of the columns, or half of the queries."""
    ds = ds_mem.index(buffer)
    if ds.shape[1] == PART:
        keys = k_mem.slice(WHO * PART, PART, dim=1)
    else:
        ds = ds.slice(WHO * PART, PART, dim=1)
        keys = k_mem
    return warpgroup_mma(ds.permute((1, 0)), keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def _consume(
    dk, dv, dq, memory, bars, sizes, owned, span, rules, scale,
    CAUSAL: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    EARLY: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys, and this consumer's squares of dQ."""
    q_mem, d_mem, k_mem, v_mem, row_mem, ds_mem = memory
    kv_full, q_full, d_full, empty, ds_full = bars
    _q_len, k_len, q_offset, batch, heads, groups, q_tiles = sizes
    b, first_head, _kv_head, share, tile = owned
    first, full_from, full_to, last = span
    ROWS: gl.constexpr = N // 2
    DTYPE: gl.constexpr = q_mem.dtype
    STAGES: gl.constexpr = q_mem.shape[0]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    G: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    GUARDED: gl.constexpr = M == PART
    A: gl.constexpr = gl.DotOperandLayout(0, G, 2)
    keys = k_mem.reshape([N, D])
    own_keys = keys.slice(WHO * ROWS, ROWS, dim=0)
    own_values = v_mem.reshape([N, D]).slice(WHO * ROWS, ROWS, dim=0)
    start = tile * N + WHO * ROWS
    unit = scale * LOG2E
    nothing = gl.zeros([ROWS, PART], gl.float32, S)
    k_grad = gl.zeros([ROWS, D], gl.float32, G)
    v_grad = gl.zeros([ROWS, D], gl.float32, G)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    t, h = first, first_head
    part_before = gl.to_tensor(0) if GUARDED else batch * heads * q_tiles
    total = (last - first) * groups
    mbarrier.wait(kv_full, 0)
    for step in range(total):
        mbarrier.wait(q_full.index(stage), phase)
        q_tile, d_tile = q_mem.index(stage).reshape([M, D]), d_mem.index(stage).reshape([M, D])
        edge = (t < full_from) | (t >= full_to)
        before = (step + 1) % 2
        for c in gl.static_range(M // PART):
            q_part = q_tile.slice(c * PART, PART, dim=0)
            d_part = d_tile.slice(c * PART, PART, dim=0)
            rows = row_mem.index(stage).slice(c * PART, PART, dim=1)
            scores = warpgroup_mma(
                own_keys, q_part.permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            if c == 0:
                mbarrier.wait(d_full.index(stage), phase)
            products = warpgroup_mma(
                own_values, d_part.permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            if c == 0:
                s = warpgroup_mma_wait(1, deps=[scores])
            else:  # what the half before multiplied stays in its registers until now
                s, p16, ds16 = warpgroup_mma_wait(1, deps=[scores, p16, ds16])  # noqa: F821
            p = gl.exp2(s * unit - rows.slice(0, 1, dim=0).load(S))
            if edge:
                p = _mask(p, t * M + c * PART, start, q_offset, k_len, rules, CAUSAL, S)
            p16 = gl.convert_layout(_packed(p, DTYPE), A)
            if EARLY:
                v_grad = warpgroup_mma(p16, d_part, v_grad, is_async=True)
            if c == 0:  # dS of the step before is complete; this also keeps the next wait here
                mbarrier.wait(ds_full.index(before), ((step + 1) // 2 + 1) % 2, pred=step > 0)
            dp = warpgroup_mma_wait(1 if EARLY else 0, deps=[products])
            ds = _packed(p * (dp - rows.slice(1, 1, dim=0).load(S)), DTYPE)
            ds16 = gl.convert_layout(ds, A)
            if not EARLY:
                v_grad = warpgroup_mma(p16, d_part, v_grad, is_async=True)
            if c == M // PART - 1:
                square = _square(ds_mem, keys, before, nothing, WHO)
            k_grad = warpgroup_mma(ds16, q_part, k_grad, is_async=True)
            own = ds_mem.index(step % 2).slice(WHO * ROWS, ROWS, dim=0)
            own.slice(c * PART, PART, dim=1).store(ds)
        fence_async_shared()
        square, p16 = warpgroup_mma_wait(1, deps=[square, p16])
        mbarrier.arrive(ds_full.index(step % 2))  # also says: the square before is multiplied
        _add(square, dq + part_before.to(gl.int64) * (M * D) + WHO * PART * PART, step > 0, GUARDED)
        k_grad, v_grad, ds16 = warpgroup_mma_wait(0, deps=[k_grad, v_grad, ds16])
        mbarrier.arrive(empty.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
        part_before = (b * heads + h) * q_tiles + t
        t += 1
        h = gl.where(t == last, h + 1, h)
        t = gl.where(t == last, first, t)
    mbarrier.wait(ds_full.index((total + 1) % 2), ((total + 1) // 2 + 1) % 2, pred=total > 0)
    square = _square(ds_mem, keys, (total + 1) % 2, nothing, WHO)
    square = warpgroup_mma_wait(0, deps=[square])
    _add(square, dq + part_before.to(gl.int64) * (M * D) + WHO * PART * PART, total > 0, GUARDED)
    _store(dk, b, share, start, k_len, k_grad * scale)
    _store(dv, b, share, start, k_len, v_grad)


@gluon.jit
def _store(out, b, share, start, k_len, grad):
    """Rows of a gradient to `[B, shares, Lk, D]`."""
    G: gl.constexpr = grad.type.layout
    row = start + gl.arange(0, grad.shape[0], layout=gl.SliceLayout(1, G))
    col = gl.arange(0, grad.shape[1], layout=gl.SliceLayout(0, G))
    base = out.ptr + b.to(gl.int64) * out.batch + share.to(gl.int64) * out.head
    at = base + (row.to(gl.int64) * out.row)[:, None] + col[None, :]
    gl.store(at, grad.to(out.ptr.dtype.element_ty), mask=(row < k_len)[:, None])


@gluon.jit
def _describe(x, batch, heads, length, BLOCK: gl.constexpr, D: gl.constexpr):
    """The copy engine's description of `[batch, heads, length, D]`, read in blocks of rows."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [1, 1, BLOCK, D], x.ptr.dtype.element_ty
    )
    return tma.make_tensor_descriptor(
        x.ptr, [batch, heads, length, D], [x.batch, x.head, x.row, 1], [1, 1, BLOCK, D], LAYOUT
    )


@gluon.jit(
    do_not_specialize=[
        "q_len",
        "k_len",
        "q_offset",
        "batch",
        "heads",
        "groups",
        "splits",
        "q_tiles",
        "k_tiles",
        "section",
    ]
)
def squares_kernel(
    q, k, v, dout, dk, dv, dq, rows, rules, scale, q_len, k_len, q_offset, batch, heads, groups,
    splits, q_tiles, k_tiles, section,
    CAUSAL: gl.constexpr, D: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr, EARLY: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK, dV of a tile of keys and what it adds to dQ / scale.

    q, k, v, dout are Planes; dk, dv Planes `[B, heads / groups, Lk, D]`, one head for each share of
    `groups` query heads (`splits` shares read the same KV head); dq float32 in squares (see
    `place_in_part`); rows float32 `[B * H * q_tiles, 2, M]`, lse in powers of two and delta.
    """
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    q_desc = _describe(q, batch, heads, q_len, M, D)
    d_desc = _describe(dout, batch, heads, q_len, M, D)
    k_desc = _describe(k, batch, heads // (groups * splits), k_len, N, D)
    v_desc = _describe(v, batch, heads // (groups * splits), k_len, N, D)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    row_desc = tma.make_tensor_descriptor(
        rows, [batch * heads * q_tiles * 2, M], [M, 1], [2, M], FLAT
    )
    SQUARES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, M], DTYPE)
    q_mem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, M, D], q_desc.layout)
    d_mem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, M, D], d_desc.layout)
    k_mem = gl.allocate_shared_memory(DTYPE, [1, 1, N, D], k_desc.layout)
    v_mem = gl.allocate_shared_memory(DTYPE, [1, 1, N, D], v_desc.layout)
    row_mem = gl.allocate_shared_memory(gl.float32, [STAGES, 2, M], FLAT)
    ds_mem = gl.allocate_shared_memory(DTYPE, [2, N, M], SQUARES)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    d_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(d_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
    fence_async_shared()

    memory = (q_mem, d_mem, k_mem, v_mem, row_mem, ds_mem)
    bars = (kv_full, q_full, d_full, empty, ds_full)
    sizes = (q_len, k_len, q_offset, batch, heads, groups, q_tiles)
    owned = _owned(section, k_tiles, heads, groups, splits)
    span = _span(owned[4], q_len, k_len, q_offset, rules, CAUSAL, M, N)
    gl.warp_specialize([
        (_consume, (
            dk, dv, dq, memory, bars, sizes, owned, span, rules, scale, CAUSAL, M, N, D, EARLY, 0,
        )),
        (_consume, (
            dk, dv, dq, memory, bars, sizes, owned, span, rules, scale, CAUSAL, M, N, D, EARLY, 1,
        )),
        (_produce, (
            q_desc, d_desc, k_desc, v_desc, row_desc, memory, bars, sizes, owned, span, M, N,
        )),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
