"""Forward attention over fp8 queries, keys and values for Hopper, in Gluon.

The schedule is that of `gluon_forward`: one warp fetches, consumers of 64 queries each compute, and
the consumers take turns in asking the matrix units.  What eight bits change:

- The matrix units read fp8 operands along the summed dimension only.  Queries and keys lie so; of
  the values a transposed copy is made first (`transpose_kernel`), O(length) beside O(length^2).
- A thread has the scores of keys 2c, 2c+1, 8+2c, 8+2c+1 of every sixteen and must hand the weights
  of four neighbours to the second product.  Sums have no order: the transposed values keep each
  sixteen keys in the order 0 1 8 9  2 3 10 11  4 5 12 13  6 7 14 15, and no weight has to move.
- Weights are exp2(s - max + 8): e4m3 reaches from 2^-9 to 448, so small weights stay numbers.
- The matrix units sum fp8 products with about 14 bits.  Each tile's product is a sum of its own,
  added to the running one in float32 (`TWO_SUMS`), so errors do not grow with the length.

Sources: Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608); DeepSeek-V3, 2024 (arXiv
2412.19437), section 3.3.2, on the sums.
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

from saccade.ops.attend.gluon_forward import LN2, LOG2E, LOWEST, _mask
from saccade.ops.attend.gluon_schedule import (
    amount_of_work,
    key_tile,
    next_stage,
    piece_of_work,
    plan,
)

OFFSET = gl.constexpr(8.0)  # the largest weight is 2^8; e4m3 reaches 448
GROUP = 16  # keys whose order the transposed values change among themselves


@triton.jit
def transpose_kernel(
    v, v_batch, v_head, v_row, out, heads, length, padded,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values `[B, H, length, D]` as `[B, H, D, padded]`, keys of a group reordered, 0 at the end.

    Args:
        v: codes as bytes; out: contiguous bytes.
        padded: length rounded up to whole groups.
    """
    at = tl.program_id(1)
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Slot 4c + 2i + e of a group holds key 8i + 2c + e.
    keys = (slots & -16) + ((slots & 2) << 2) + ((slots >> 1) & 6) + (slots & 1)
    dims = tl.arange(0, D)
    rows = v + (at // heads).to(tl.int64) * v_batch + (at % heads).to(tl.int64) * v_head
    rows += keys.to(tl.int64)[:, None] * v_row + dims[None, :]
    codes = tl.load(rows, mask=(keys < length)[:, None], other=0)
    columns = out + (at.to(tl.int64) * D + dims)[:, None] * padded + slots[None, :]
    tl.store(columns, tl.trans(codes), mask=(slots < padded)[None, :])


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, bars, sizes, rules,
    CAUSAL: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    ROWS: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Fetch everything the consumers will read, in their order, as soon as there is room."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turns = bars
    q_len, k_len, q_offset, heads, groups, tiles, section, num_work = sizes
    K_STAGES: gl.constexpr = k_mem.shape[0]
    V_STAGES: gl.constexpr = v_mem.shape[0]
    k_stage, k_phase, v_stage, v_phase, q_phase = 0, 1, 0, 1, 1
    for w in range(amount_of_work(num_work)):
        at, tile = piece_of_work(w, tiles, section)
        b = at // heads
        h = at % heads
        mbarrier.wait(q_empty, q_phase)
        mbarrier.expect(q_full, CONSUMERS * q_desc.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                q_desc, [b, h, tile * M + c * ROWS, 0], q_full, q_mem.index(c)
            )
        q_phase ^= 1
        num_sinks, last, _right, _full, total = plan(
            tile, q_len, k_len, q_offset, rules, CAUSAL, M, N
        )
        for j in range(total):
            start = key_tile(j, last, total, num_sinks) * N
            mbarrier.wait(k_empty.index(k_stage), k_phase)
            mbarrier.expect(k_full.index(k_stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [b, h // groups, start, 0], k_full.index(k_stage), k_mem.index(k_stage)
            )
            k_stage, k_phase = next_stage(k_stage, k_phase, K_STAGES)
            mbarrier.wait(v_empty.index(v_stage), v_phase)
            mbarrier.expect(v_full.index(v_stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_desc, [b, h // groups, 0, start], v_full.index(v_stage), v_mem.index(v_stage)
            )
            v_stage, v_phase = next_stage(v_stage, v_phase, V_STAGES)


@gluon.jit
def _softmax(s, m, l, unit):
    """Take a tile of scores into the running maximum and sum: (weights, m, l, shrink)."""
    m_new = gl.maximum(m, gl.max(s, 1))
    p = gl.exp2(s * unit - (m_new * unit - OFFSET)[:, None])
    shrink = gl.exp2((m - m_new) * unit)
    return p, m_new, l * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _operand(weights, O: gl.constexpr):
    """Weights in fp8 as the matrix units take them from registers, by fours, none moved."""
    ROWS: gl.constexpr = weights.shape[0]
    N: gl.constexpr = weights.shape[1]
    fours = weights.reshape([ROWS, N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, N])
    ordered = gl.convert_layout(fours, gl.DotOperandLayout(0, O, 4))
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r",
        [ordered],
        gl.float8e4nv,
        True,
        4,
    )


@gluon.jit
def _steps(
    state, begin, end, where, q_tile, q_pos, k_mem, v_mem, bars, unit, k_len, rules,
    EDGE: gl.constexpr, CAUSAL: gl.constexpr, TURNS: gl.constexpr, TWO_SUMS: gl.constexpr,
    CONSUMERS: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Key tiles begin .. end-1: scores of tile j, then values of tile j-1, then softmax of j."""
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    last, total, num_sinks = where
    N: gl.constexpr = k_mem.shape[3]
    K_STAGES: gl.constexpr = k_mem.shape[0]
    V_STAGES: gl.constexpr = v_mem.shape[0]
    for j in range(begin, end):
        acc, m, l, shrink, weights, k_at, v_at, turn = state
        k_stage, k_phase = k_at
        v_stage, v_phase = v_at
        S: gl.constexpr = weights.type.layout
        O: gl.constexpr = acc.type.layout
        p = _operand(weights, O)
        if TURNS:
            mbarrier.wait(turns.index(WHO), turn)
        keys = k_mem.index(k_stage).reshape([N, k_mem.shape[4]])
        scores = warpgroup_mma(q_tile, keys.permute((1, 0)), weights, use_acc=False, is_async=True)
        smaller = gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
        if TWO_SUMS:
            product = gl.zeros(acc.shape, gl.float32, O)
        else:
            product = acc * smaller
        mbarrier.wait(v_full.index(v_stage), v_phase)
        values = v_mem.index(v_stage).reshape([v_mem.shape[3], N]).permute((1, 0))
        product = warpgroup_mma(p, values, product, use_acc=not TWO_SUMS, is_async=True)
        if TURNS:
            mbarrier.arrive(turns.index((WHO + 1) % CONSUMERS))
            turn ^= 1
        s = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(k_stage))
        if EDGE:
            s = _mask(s, q_pos, key_tile(j, last, total, num_sinks) * N, k_len, rules, CAUSAL, S)
        weights, m, l, shrink = _softmax(s, m, l, unit)
        # This wait keeps the compiler from asking for the product before the softmax is done.
        k_at = next_stage(k_stage, k_phase, K_STAGES)
        mbarrier.wait(k_full.index(k_at[0]), k_at[1], pred=j + 1 < total)
        product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(v_empty.index(v_stage))
        if TWO_SUMS:
            acc = acc * smaller + product
        else:
            acc = product
        v_at = next_stage(v_stage, v_phase, V_STAGES)
        state = acc, m, l, shrink, weights, k_at, v_at, turn
    return state


@gluon.jit
def _first(
    q_tile, q_pos, start, weights, k_mem, k_at, bars, unit, k_len, rules, more,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """The first tile of keys: maximum, sum, shrink, weights, next stage."""
    _q_full, _q_empty, k_full, k_empty, _v_full, _v_empty, _turns = bars
    ROWS: gl.constexpr = q_tile.shape[0]
    S: gl.constexpr = weights.type.layout
    m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
    k_stage, k_phase = k_at
    mbarrier.wait(k_full.index(k_stage), k_phase)
    keys = k_mem.index(k_stage).reshape([k_mem.shape[3], k_mem.shape[4]])
    scores = warpgroup_mma(q_tile, keys.permute((1, 0)), weights, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(k_stage))
    s = _mask(s, q_pos, start, k_len, rules, CAUSAL, S)
    weights, m, l, shrink = _softmax(s, m, l, unit)
    k_at = next_stage(k_stage, k_phase, k_mem.shape[0])
    mbarrier.wait(k_full.index(k_at[0]), k_at[1], pred=more)
    return m, l, shrink, weights, k_at


@gluon.jit
def _last(acc, shrink, weights, v_mem, v_at, bars):
    """The product with the last tile of values, and the next stage."""
    _q_full, _q_empty, _k_full, _k_empty, v_full, v_empty, _turns = bars
    O: gl.constexpr = acc.type.layout
    v_stage, v_phase = v_at
    mbarrier.wait(v_full.index(v_stage), v_phase)
    p = _operand(weights, O)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
    values = v_mem.index(v_stage).reshape([v_mem.shape[3], v_mem.shape[4]]).permute((1, 0))
    product = warpgroup_mma(p, values, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(v_empty.index(v_stage))
    return acc, next_stage(v_stage, v_phase, v_mem.shape[0])


@gluon.jit
def _finish(acc, m, l, unit, v_scale, sink_logits, h):
    """Output and lse of a tile of queries."""
    ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    top = m * unit - OFFSET
    if sink_logits is not None:
        sink = gl.load(sink_logits + h) * LOG2E
        raised = gl.maximum(top, sink)
        shrink = gl.exp2(top - raised)
        l = l * shrink + gl.exp2(sink - raised)
        acc = acc * gl.convert_layout(shrink, ROW)[:, None]
        top = raised
    acc = acc * gl.convert_layout(v_scale / l, ROW)[:, None]
    return acc, (top + gl.log2(l)) * LN2


@gluon.jit
def _unit(scales, scale, b, h, heads, groups):
    """Powers of two a raw score is worth; nan where a scale is negative (a maximum would err)."""
    q_scale, k_scale, _v_scale = scales
    kv_heads = heads // groups
    unit = gl.load(q_scale + b * heads + h) * gl.load(k_scale + b * kv_heads + h // groups)
    return gl.where(unit >= 0, gl.maximum(unit * scale, 1e-30), float("nan"))


@gluon.jit
def _consume(
    o_desc, lse, sink_logits, scales, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules, scale,
    CAUSAL: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr,
    TURNS: gl.constexpr, TWO_SUMS: gl.constexpr, CONSUMERS: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Attention of ROWS queries of every tile."""
    D: gl.constexpr = k_mem.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 32])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 32])
    q_full, q_empty, _k_full, _k_empty, _v_full, _v_empty, _turns = bars
    q_len, k_len, q_offset, heads, groups, tiles, section, num_work = sizes
    q_tile = q_mem.index(WHO).reshape([ROWS, D])
    weights = gl.zeros([ROWS, N], gl.float32, S)
    index = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    q_phase = 0
    k_at = gl.to_tensor(0), gl.to_tensor(0)
    v_at = gl.to_tensor(0), gl.to_tensor(0)
    turn = gl.to_tensor(1 if WHO == 0 else 0)
    for w in range(amount_of_work(num_work)):
        at, tile = piece_of_work(w, tiles, section)
        b = at // heads
        h = at % heads
        unit = _unit(scales, scale, b, h, heads, groups)
        row = tile * M + WHO * ROWS
        q_pos = q_offset + row + index
        num_sinks, last, right, full, total = plan(
            tile, q_len, k_len, q_offset, rules, CAUSAL, M, N
        )
        acc = gl.zeros([ROWS, D], gl.float32, O)
        mbarrier.wait(q_full, q_phase)
        q_phase ^= 1
        start = key_tile(0, last, total, num_sinks) * N
        m, l, shrink, weights, k_at = _first(
            q_tile, q_pos, start, weights, k_mem, k_at, bars, unit, k_len, rules, total > 1, CAUSAL
        )
        where = (last, total, num_sinks)
        state = acc, m, l, shrink, weights, k_at, v_at, turn
        if CAUSAL:
            state = _steps(
                state, 1, right, where, q_tile, q_pos, k_mem, v_mem, bars, unit, k_len, rules,
                True, CAUSAL, TURNS, TWO_SUMS, CONSUMERS, WHO,
            )  # fmt: skip
        state = _steps(
            state, gl.maximum(right, 1), full, where, q_tile, q_pos, k_mem, v_mem, bars, unit,
            k_len, rules, False, CAUSAL, TURNS, TWO_SUMS, CONSUMERS, WHO,
        )  # fmt: skip
        if rules.window is not None:
            state = _steps(
                state, gl.maximum(full, 1), total, where, q_tile, q_pos, k_mem, v_mem, bars, unit,
                k_len, rules, True, CAUSAL, TURNS, TWO_SUMS, CONSUMERS, WHO,
            )  # fmt: skip
        acc, m, l, shrink, weights, k_at, v_at, turn = state
        mbarrier.arrive(q_empty)
        acc, v_at = _last(acc, shrink, weights, v_mem, v_at, bars)
        v_scale = gl.load(scales[2] + b * (heads // groups) + h // groups)
        acc, row_lse = _finish(acc, m, l, unit, v_scale, sink_logits, h)
        lse_at = lse + at.to(gl.int64) * q_len + row + index
        gl.store(lse_at, row_lse, mask=row + index < q_len)
        tma.store_wait(0)  # of the tile before
        o_mem.index(WHO).reshape([ROWS, D]).store(acc.to(o_mem.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [b, h, row, 0], o_mem.index(WHO))
    tma.store_wait(0)


@gluon.jit
def _describe(x, batch, heads, rows, width, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """The copy engine's description of `[batch, heads, rows, width]`, moved as ROWS x WIDTH."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [1, 1, ROWS, WIDTH], x.ptr.dtype.element_ty
    )
    return tma.make_tensor_descriptor(
        x.ptr, [batch, heads, rows, width], [x.batch, x.head, x.row, 1], [1, 1, ROWS, WIDTH], LAYOUT
    )


@gluon.jit(
    do_not_specialize=[
        "q_len",
        "k_len",
        "q_offset",
        "batch",
        "heads",
        "groups",
        "tiles",
        "section",
        "num_work",
    ]
)
def forward_kernel(
    q, k, v, out, lse, sink_logits, scales, rules, scale, q_len, k_len, k_padded, q_offset, batch,
    heads, groups, tiles, section, num_work,
    CAUSAL: gl.constexpr, D: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    CONSUMERS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    TURNS: gl.constexpr, TWO_SUMS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v over visible keys; q, k, v, out are Planes, lse `[B, H, Lq]`.

    v is what `transpose_kernel` makes; scales are float32 of q `[B, H]`, k and v `[B, Hkv]`.
    """
    ROWS: gl.constexpr = M // CONSUMERS
    CODE: gl.constexpr = q.ptr.dtype.element_ty
    q_desc = _describe(q, batch, heads, q_len, D, ROWS, D)
    k_desc = _describe(k, batch, heads // groups, k_len, D, N, D)
    v_desc = _describe(v, batch, heads // groups, D, k_padded, D, N)
    o_desc = _describe(out, batch, heads, q_len, D, ROWS, D)
    q_mem = gl.allocate_shared_memory(CODE, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_mem = gl.allocate_shared_memory(CODE, [K_STAGES, 1, 1, N, D], k_desc.layout)
    v_mem = gl.allocate_shared_memory(CODE, [V_STAGES, 1, 1, D, N], v_desc.layout)
    o_mem = gl.allocate_shared_memory(
        out.ptr.dtype.element_ty, [CONSUMERS, 1, 1, ROWS, D], o_desc.layout
    )
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BAR)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BAR)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()

    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    sizes = (q_len, k_len, q_offset, heads, groups, tiles, section, num_work)
    unit = scale * LOG2E
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (
                o_desc, lse, sink_logits, scales, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules,
                unit, CAUSAL, M, N, ROWS, TURNS, TWO_SUMS, CONSUMERS, 0,
            )),
            (_consume, (
                o_desc, lse, sink_logits, scales, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules,
                unit, CAUSAL, M, N, ROWS, TURNS, TWO_SUMS, CONSUMERS, 1,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, bars, sizes, rules,
                CAUSAL, M, N, ROWS, CONSUMERS,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                o_desc, lse, sink_logits, scales, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules,
                unit, CAUSAL, M, N, ROWS, TURNS, TWO_SUMS, CONSUMERS, 0,
            )),
            (_consume, (
                o_desc, lse, sink_logits, scales, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules,
                unit, CAUSAL, M, N, ROWS, TURNS, TWO_SUMS, CONSUMERS, 1,
            )),
            (_consume, (
                o_desc, lse, sink_logits, scales, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules,
                unit, CAUSAL, M, N, ROWS, TURNS, TWO_SUMS, CONSUMERS, 2,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, bars, sizes, rules,
                CAUSAL, M, N, ROWS, CONSUMERS,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
