"""Gradients of attention for Hopper in Gluon: five products a tile, dQ added up by atomics.

One program owns 128 keys of a KV head and walks over the queries of its group that see them.  One
warp asks the copy engine for K and V once and for tiles of 64 queries: Q, dO, and a row's lse and
delta.  Each of two consumers (four warps) owns 64 of the keys.  Per tile it computes

    S^T = K Q^T      P^T = exp2(S^T - lse)      dP^T = V dO^T      dS^T = P^T * (dP^T - delta)

with keys as rows, so that P^T and dS^T leave the matrix units in the registers from which they go
back: dV += P^T dO and dK += dS^T Q.  dS^T also goes to shared memory, where both consumers meet to
compute dQ = dS K of the tile before, each for half of the head's dimensions.  dQ belongs to no
program: it is added to a float32 buffer in the order of the registers (`add_up`), four numbers a
request, and `backward_rows` brings it into rows.  These additions come in no fixed order:
two runs differ in the last bits of dQ.
Source: Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from saccade.ops.attention.nvidia.gluon.backward.reduction import add_up
from saccade.ops.attention.nvidia.gluon.prefill.tile_scheduler import next_stage
from saccade.ops.gpu.triton_lang import query_tiles

LOG2E, LOWEST = gl.constexpr(1.4426950408889634), gl.constexpr(-1e30)
ROWS, KEYS, CONSUMERS = gl.constexpr(64), gl.constexpr(64), gl.constexpr(2)


@gluon.jit
def _whose(sizes, mask_args, CAUSAL: gl.constexpr):
    """What this program works on: batch, share, first key, and tiles of queries.

    Of these the first, how many, and the range [full from, full to) that needs no mask.
    Keys that most queries see come first, within sections of shares whose queries and gradients fit
    the L2 cache together.
    """
    q_len, k_len, q_offset, shares, _groups, _splits, section = sizes
    per_section = gl.cdiv(k_len, CONSUMERS * KEYS) * section
    inside = gl.program_id(0) % per_section
    share = (gl.program_id(0) // per_section) * section + inside % section
    start = (inside // section) * (CONSUMERS * KEYS)
    stop = start + CONSUMERS * KEYS
    first, full_from, full_to, last = query_tiles(
        start, gl.minimum(stop, k_len) - 1, q_len, q_offset, mask_args, CAUSAL, ROWS
    )
    full_from = gl.where(stop > k_len, last, full_from)
    return share // shares, share % shares, start, first, last - first, full_from, full_to


@gluon.jit
def _next(h, tile, row, first, count, others, STEP: gl.constexpr):
    """The next tile of queries: head, tile in it, and its place among all tiles."""
    tile += 1
    wrapped = tile == first + count
    row += gl.where(wrapped, 1 + others, 1) * STEP
    return gl.where(wrapped, h + 1, h), gl.where(wrapped, first, tile), row


@gluon.jit
def _buffer_of(i):
    """Where dS of the i-th tile lies, and the phase of its barrier.

    Nobody has to be asked whether a buffer is free: a consumer stores tile i after it waited for
    tile i - 1 of the other, who by then was done with dQ of tile i - 3.
    """
    return i & 3, (i >> 2) & 1


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, d_desc, stat_desc, k_mem, v_mem, q_mem, d_mem, lse_mem, delta_mem,
    bars, sizes, mask_args, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Fetch K and V, then every tile of queries, in the order of the consumers.

    A tile's memory is free when both have stored dS of the next one.
    """
    kv_full, q_full, d_full, ds_full = bars
    STAGES: gl.constexpr = q_mem.shape[0]
    q_len, _k_len, _q_offset, shares, groups, splits, _section = sizes
    b, share, start, first, count, _full_from, _full_to = _whose(sizes, mask_args, CAUSAL)
    head, tiles = share // splits, gl.cdiv(q_len, ROWS)
    mbarrier.expect(kv_full, CONSUMERS * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for c in gl.static_range(CONSUMERS):
        at = start + c * KEYS
        tma.async_copy_global_to_shared(k_desc, [b, head, at, 0], kv_full, k_mem.index(c))
        tma.async_copy_global_to_shared(v_desc, [b, head, at, 0], kv_full, v_mem.index(c))
    h, tile, stage = share * groups, first, 0
    row = ((b * shares * groups + h) * tiles + first) * 2
    for i in range(groups * count):
        buffer, phase = _buffer_of(i - STAGES + 1)
        mbarrier.wait(ds_full.index(buffer), phase, pred=i >= STAGES)
        full = q_full.index(stage)
        mbarrier.expect(full, q_desc.block_type.nbytes + stat_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(stat_desc, [row, 0], full, lse_mem.index(stage))
        tma.async_copy_global_to_shared(q_desc, [b, h, tile * ROWS, 0], full, q_mem.index(stage))
        full = d_full.index(stage)
        mbarrier.expect(full, d_desc.block_type.nbytes + stat_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(stat_desc, [row + 1, 0], full, delta_mem.index(stage))
        tma.async_copy_global_to_shared(d_desc, [b, h, tile * ROWS, 0], full, d_mem.index(stage))
        h, tile, row = _next(h, tile, row, first, count, tiles - count, 2)
        stage, _phase = next_stage(stage, 0, STAGES)


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
def _whole(x):
    """16 bits in float32, two at a time, so that they stay packed until they are used."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [x], gl.float32, True, 2
        )
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .f16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
            "=&r,=r,r", [x], gl.float32, True, 2,
        )  # fmt: skip


@gluon.jit
def _masked(
    tile, full_from, full_to, start, k_len, q_offset, mask_args, CAUSAL: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """What scores [keys, queries] are added to: 0, or LOWEST where a query does not see a key."""
    mask = gl.zeros([KEYS, ROWS], gl.float32, LAYOUT)
    edge = tile < full_from
    if mask_args.window is not None:
        edge = edge | (tile >= full_to)
    if edge:
        k_pos = start + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
        column = gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
        q_pos = q_offset + tile * ROWS + column
        hidden = k_pos >= k_len
        if CAUSAL:
            hidden = hidden | (k_pos > q_pos)
        if mask_args.window is not None:
            far = q_pos - k_pos >= mask_args.window
            if mask_args.sinks is not None:
                far = far & (k_pos >= mask_args.sinks)
            hidden = hidden | far
        mask = gl.where(hidden, LOWEST, mask)
    return mask


@gluon.jit
def _ask_for_queries(ds_mem, buffer, k_mem, part, never, WHO: gl.constexpr):
    """Ask for half of the dimensions of dQ = dS K of a tile."""
    D: gl.constexpr = k_mem.shape[4]
    HALF: gl.constexpr = D // 2
    for c in gl.static_range(CONSUMERS):
        part = warpgroup_mma(
            ds_mem.index(buffer * CONSUMERS + c).permute((1, 0)),
            k_mem.index(c + never).reshape([KEYS, D]).slice(WHO * HALF, HALF, dim=1),
            part,
            use_acc=c > 0,
            is_async=True,
        )
    return part


@gluon.jit
def _weights(scores, lse, unit):
    """P^T from scores."""
    x = scores * unit - lse[None, :]
    # Not pure, so that the compiler does not move exponentials behind the waits that follow.
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], gl.float32, False, 1
    )


@gluon.jit
def _consume(
    dk, dv, dq, k_mem, v_mem, q_mem, d_mem, lse_mem, delta_mem, ds_mem, bars, sizes, mask_args, scale,
    CAUSAL: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys, and half of the dimensions of what 128 keys give to dQ.

    The matrix units compute dV of a tile and the scores of the next one during dS, and dQ of the
    tile before and dK during the exponentials of the next one.
    """
    kv_full, q_full, d_full, ds_full = bars
    q_len, k_len, q_offset, shares, groups, _splits, _section = sizes
    D: gl.constexpr = k_mem.shape[4]
    HALF: gl.constexpr = D // 2
    DTYPE: gl.constexpr = k_mem.dtype
    STAGES: gl.constexpr = q_mem.shape[0]
    LATER: gl.constexpr = D == 64  # dQ is added during the next step, where registers allow
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    b, share, start, first, count, full_from, full_to = _whose(sizes, mask_args, CAUSAL)
    others = gl.cdiv(q_len, ROWS) - count
    mine = start + WHO * KEYS
    unit = scale * LOG2E
    keys = k_mem.index(WHO).reshape([KEYS, D])
    values = v_mem.index(WHO).reshape([KEYS, D])
    k_grad = gl.zeros([KEYS, D], gl.float32, O)
    v_grad = gl.zeros([KEYS, D], gl.float32, O)
    dp = gl.zeros([KEYS, ROWS], gl.float32, S)
    part = gl.zeros([ROWS, HALF], gl.float32, DQ)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    tile = first
    at = (b * shares + share) * groups * (count + others) + first
    total = groups * count
    # What the first steps add goes to a spare tile before all others.
    due, before = gl.to_tensor(-1), gl.to_tensor(-1)
    mbarrier.wait(kv_full, 0)

    mask = _masked(tile, full_from, full_to, mine, k_len, q_offset, mask_args, CAUSAL, S)
    mbarrier.wait(q_full.index(0), 0, pred=total > 0)
    q_tile = q_mem.index(0).reshape([ROWS, D])
    scores = warpgroup_mma(keys, q_tile.permute((1, 0)), mask, is_async=True)
    lse = lse_mem.index(0).reshape([ROWS]).load(COLUMN)
    s = warpgroup_mma_wait(0, deps=[scores])
    p = _weights(s, lse, unit)
    mbarrier.wait(d_full.index(0), 0, pred=total > 0)
    for i in range(total):
        _h, tile, following = _next(0, tile, at, first, count, others, 1)
        q_tile = q_mem.index(stage).reshape([ROWS, D])
        d_tile = d_mem.index(stage).reshape([ROWS, D])
        weights = _halves(p, DTYPE)
        # 0, which the compiler does not know: else it keeps descriptions of K, V in registers.
        never = i >> 30
        values = v_mem.index(WHO + never).reshape([KEYS, D])
        if not LATER:
            mask = _masked(tile, full_from, full_to, mine, k_len, q_offset, mask_args, CAUSAL, S)
        product = warpgroup_mma(values, d_tile.permute((1, 0)), dp, use_acc=False, is_async=True)
        operand = gl.convert_layout(weights, gl.DotOperandLayout(0, O, 2))
        v_next = warpgroup_mma(operand, d_tile, v_grad, is_async=True)
        if LATER:
            add_up(part, dq + (due.to(gl.int64) * CONSUMERS + WHO) * (ROWS * HALF))
            mask = _masked(tile, full_from, full_to, mine, k_len, q_offset, mask_args, CAUSAL, S)
        # Scores of the next tile, which after the last one are those of old memory and unused.
        delta = delta_mem.index(stage).reshape([ROWS]).load(COLUMN)
        stage, phase = next_stage(stage, phase, STAGES)
        mbarrier.wait(q_full.index(stage), phase, pred=i + 1 < total)
        dp = warpgroup_mma_wait(1, deps=[product])
        next_tile = q_mem.index(stage).reshape([ROWS, D])
        keys = k_mem.index(WHO + never).reshape([KEYS, D])
        scores = warpgroup_mma(keys, next_tile.permute((1, 0)), mask, is_async=True)
        buffer, ds_phase = _buffer_of(i - 1)
        mbarrier.wait(ds_full.index(buffer), ds_phase, pred=i > 0)
        ds = _whole(weights) * (dp - delta[None, :])
        now, _phase = _buffer_of(i)
        own = ds_mem.index(now * CONSUMERS + WHO)
        own.store(_halves(ds, DTYPE))
        fence_async_shared()
        mbarrier.arrive(ds_full.index(now))
        part_next = _ask_for_queries(ds_mem, buffer, k_mem, part, never, WHO)
        k_next = warpgroup_mma(own, q_tile, k_grad, is_async=True)
        lse = lse_mem.index(stage).reshape([ROWS]).load(COLUMN)
        v_grad, operand, s = warpgroup_mma_wait(3, deps=[v_next, operand, scores])
        p = _weights(s, lse, unit)
        # This wait keeps the compiler from awaiting dQ before the exponentials are done.
        mbarrier.wait(d_full.index(stage), phase, pred=i + 1 < total)
        if LATER:
            part, k_grad = warpgroup_mma_wait(0, deps=[part_next, k_next])
        else:
            part = warpgroup_mma_wait(1, deps=[part_next])
            add_up(part, dq + (before.to(gl.int64) * CONSUMERS + WHO) * (ROWS * HALF))
            # Completed long ago; keeps the compiler from awaiting dK before it adds.
            mbarrier.wait(kv_full, 0)
            k_grad = warpgroup_mma_wait(0, deps=[k_next])
        due, before, at = before, at, following
    if LATER:
        add_up(part, dq + (due.to(gl.int64) * CONSUMERS + WHO) * (ROWS * HALF))
    buffer, phase = _buffer_of(total - 1)
    mbarrier.wait(ds_full.index(buffer), phase, pred=total > 0)
    part = warpgroup_mma_wait(0, deps=[_ask_for_queries(ds_mem, buffer, k_mem, part, 0, WHO)])
    add_up(part, dq + (before.to(gl.int64) * CONSUMERS + WHO) * (ROWS * HALF))
    _store(dk, b, share, mine, k_len, k_grad * scale)
    _store(dv, b, share, mine, k_len, v_grad)


@gluon.jit
def _store(out, b, head, start, k_len, grad):
    """Rows of the gradient of keys or values."""
    G: gl.constexpr = grad.type.layout
    row = start + gl.arange(0, KEYS, layout=gl.SliceLayout(1, G))
    dims = gl.arange(0, grad.shape[1], layout=gl.SliceLayout(0, G))
    base = out.ptr + b.to(gl.int64) * out.batch + head.to(gl.int64) * out.head
    at = base + (row.to(gl.int64) * out.row)[:, None] + dims[None, :]
    gl.store(at, grad.to(out.ptr.dtype.element_ty), mask=(row < k_len)[:, None])


@gluon.jit
def _describe(x, batch, heads, length, BLOCK: gl.constexpr, D: gl.constexpr, SWIZZLE: gl.constexpr):
    """The copy engine's description of `[batch, heads, length, D]`, read in blocks of rows."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=SWIZZLE, element_bitwidth=16, rank=4
    )
    return tma.make_tensor_descriptor(
        x.ptr, [batch, heads, length, D], [x.batch, x.head, x.row, 1], [1, 1, BLOCK, D], LAYOUT
    )


@gluon.jit(do_not_specialize=["q_len", "k_len", "q_offset", "batch", "shares", "groups", "splits",
                              "section"])  # fmt: skip
def backward_kernel(
    q, k, v, dout, dk, dv, stats, dq, mask_args, scale, q_len, k_len, q_offset, batch, shares, groups,
    splits, section,
    CAUSAL: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK, dV of 128 keys and their part of dQ.

    q .. dv are Planes.  Each of `shares` owns `groups` query heads and has gradients of its own:
    dk, dv `[B, shares, Lk, D]`; `splits` shares read the same KV head.  stats `[B * H * tiles, 2,
    64]`.
    """
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    heads = shares * groups
    q_desc = _describe(q, batch, heads, q_len, ROWS, D, 128)
    d_desc = _describe(dout, batch, heads, q_len, ROWS, D, 128)
    # Half of the columns of K, of D bytes, are an operand of dQ: it is swizzled in as many.
    k_desc = _describe(k, batch, shares // splits, k_len, KEYS, D, D)
    v_desc = _describe(v, batch, shares // splits, k_len, KEYS, D, 128)
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
    ds_mem = gl.allocate_shared_memory(DTYPE, [4 * CONSUMERS, KEYS, ROWS], SQUARE)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    d_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    ds_full = gl.allocate_shared_memory(gl.int64, [4, 1], BAR)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(4):
        mbarrier.init(ds_full.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(d_full.index(i), count=1)
    fence_async_shared()

    bars = (kv_full, q_full, d_full, ds_full)
    sizes = (q_len, k_len, q_offset, shares, groups, splits, section)
    gl.warp_specialize([
        (_consume, (
            dk, dv, dq, k_mem, v_mem, q_mem, d_mem, lse_mem, delta_mem, ds_mem, bars, sizes,
            mask_args, scale, CAUSAL, 0,
        )),
        (_consume, (
            dk, dv, dq, k_mem, v_mem, q_mem, d_mem, lse_mem, delta_mem, ds_mem, bars, sizes,
            mask_args, scale, CAUSAL, 1,
        )),
        (_produce, (
            q_desc, k_desc, v_desc, d_desc, stat_desc, k_mem, v_mem, q_mem, d_mem, lse_mem,
            delta_mem, bars, sizes, mask_args, CAUSAL,
        )),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
