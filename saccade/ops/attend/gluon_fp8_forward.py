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
def _stage(n, STAGES: gl.constexpr):
    """Where the n-th tile of keys, or of values, lies in its ring, and the phase of that round."""
    return n % STAGES, (n // STAGES) & 1


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, bars, sizes, rules,
    CAUSAL: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    ROWS: gl.constexpr, Q_STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Fetch everything the consumers will read, in their order, as soon as there is room."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _apart = bars
    q_len, k_len, q_offset, heads, groups, tiles, section, num_work = sizes
    STAGES: gl.constexpr = k_mem.shape[0]
    n = gl.to_tensor(0)
    for w in range(amount_of_work(num_work)):
        at, tile = piece_of_work(w, tiles, section)
        b = at // heads
        h = at % heads
        q_stage, q_phase = _stage(w, Q_STAGES)
        q_here = q_full.index(q_stage)
        mbarrier.wait(q_empty.index(q_stage), q_phase ^ 1)
        mbarrier.expect(q_here, CONSUMERS * q_desc.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                q_desc, [b, h, tile * M + c * ROWS, 0], q_here, q_mem.index(q_stage * CONSUMERS + c)
            )
        num_sinks, last, _right, _full, total = plan(
            tile, q_len, k_len, q_offset, rules, CAUSAL, M, N
        )
        for j in range(total):
            start = key_tile(j, last, total, num_sinks) * N
            stage, phase = _stage(n, STAGES)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [b, h // groups, start, 0], k_full.index(stage), k_mem.index(stage)
            )
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_desc, [b, h // groups, 0, start], v_full.index(stage), v_mem.index(stage)
            )
            n += 1


@gluon.jit
def _weigh(s, m, unit, BY_HAND: gl.constexpr):
    """A tile of scores against the running maximum: (packed weights, sums, m, shrink).

    Sums are those of each thread, `[ROWS, 4]`; they meet when the tile of queries is finished.
    """
    m_new = gl.maximum(m, gl.max(s, 1))
    shrink = gl.exp2((m - m_new) * unit)
    first, second, third, fourth = _by_fours(s * unit - (m_new * unit - OFFSET)[:, None])
    first = gl.exp2(first)
    second = gl.exp2(second)
    third = _exp2(third) if BY_HAND > 1 else gl.exp2(third)
    fourth = _exp2(fourth) if BY_HAND > 0 else gl.exp2(fourth)
    sums = gl.sum((first + second) + (third + fourth), 1)
    return _pack(first, second, third, fourth), sums, m_new, shrink


@gluon.jit
def _by_fours(x):
    """`[ROWS, N]` in four parts `[ROWS, N / 16, 4]`: keys 2c, 2c + 1, 8 + 2c, 9 + 2c of sixteen."""
    ROWS: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    even, odd = gl.split(x.reshape([ROWS, N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def _exp2(x):
    """2^x, off by 2e-3 at most, by multiply-adds alone.

    The units that compute exponentials are the busiest of all here, and weights keep three bits.
    Source: Shah et al. (FlashAttention-4), and Cody and Waite for the cut of x.
    """
    x = gl.maximum(x, -100.0)
    whole = x + 12582912.0  # 1.5 * 2^23: the integer next to x is in the low bits
    f = x - (whole - 12582912.0)
    power = (0.23842256 * f + 0.70343653) * f + 1.0004427
    bits = power.to(gl.int32, bitcast=True) + (whole.to(gl.int32, bitcast=True) << 23)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _pack(first, second, third, fourth):
    """Weights in fp8, four to a word: `[ROWS, N / 16, 4]`, each word from one thread's scores."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r",
        [first, second, third, fourth],
        gl.int32,
        True,
        1,
    )


@gluon.jit
def _operand(words, nothing, O: gl.constexpr):
    """Packed weights as the matrix units take them from registers; nothing moves.

    A word stands for its four weights, so it is named four times and read once.  `nothing` is 0,
    which the compiler does not know: a word that went straight to the matrix units would be written
    while the product of the tile before reads its register, and ptxas then serialises everything.
    """
    ROWS: gl.constexpr = words.shape[0]
    GROUPS: gl.constexpr = words.shape[1]
    words = words ^ nothing
    twice = gl.join(words, words)
    named = gl.join(twice, twice).reshape([ROWS, 16 * GROUPS])
    ordered = gl.convert_layout(named, gl.DotOperandLayout(0, O, 4))
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [ordered], gl.float8e4nv, True, 4
    )


@gluon.jit
def _steps(
    state, begin, end, where, q_tile, q_pos, k_mem, v_mem, bars, unit, k_len, rules,
    EDGE: gl.constexpr, CAUSAL: gl.constexpr, TWO_SUMS: gl.constexpr, BY_HAND: gl.constexpr,
):  # fmt: skip
    """Key tiles begin .. end-1: scores of tile j, then values of tile j-1, then softmax of j.

    The product of tile j-2 joins the sum while the matrix units have the scores of tile j to do.
    """
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty, _apart = bars
    last, total, num_sinks = where
    ROWS: gl.constexpr = q_tile.shape[0]
    N: gl.constexpr = k_mem.shape[3]
    STAGES: gl.constexpr = k_mem.shape[0]
    for j in range(begin, end):
        acc, product, smaller, m, l, shrink, words, n = state
        k_stage, _phase = _stage(n, STAGES)
        v_stage, v_phase = _stage(n - 1, STAGES)
        S: gl.constexpr = m.type.layout.parent
        O: gl.constexpr = acc.type.layout
        p = _operand(words, k_len >> 31, O)
        keys = k_mem.index(k_stage).reshape([N, k_mem.shape[4]])
        scores = gl.zeros([ROWS, N], gl.float32, S)
        scores = warpgroup_mma(q_tile, keys.permute((1, 0)), scores, use_acc=False, is_async=True)
        acc = _add(acc, product, smaller, TWO_SUMS)
        smaller = gl.convert_layout(shrink, gl.SliceLayout(1, O))
        product = _start(acc, smaller, TWO_SUMS)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        values = v_mem.index(v_stage).reshape([v_mem.shape[3], N]).permute((1, 0))
        product = warpgroup_mma(p, values, product, use_acc=not TWO_SUMS, is_async=True)
        s = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(k_stage))
        if EDGE:
            s = _mask(s, q_pos, key_tile(j, last, total, num_sinks) * N, k_len, rules, CAUSAL, S)
        words, sums, m, shrink = _weigh(s, m, unit, BY_HAND)
        l = l * gl.convert_layout(shrink, gl.SliceLayout(1, l.type.layout))[:, None] + sums
        # This wait keeps the compiler from asking for the product before the softmax is done.
        n += 1
        next_stage, next_phase = _stage(n, STAGES)
        mbarrier.wait(k_full.index(next_stage), next_phase, pred=j + 1 < total)
        product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(v_empty.index(v_stage))
        state = acc, product, smaller, m, l, shrink, words, n
    return state


@gluon.jit
def _add(acc, product, smaller, TWO_SUMS: gl.constexpr):
    """The running sum with the product of one tile more."""
    if TWO_SUMS:
        return acc * smaller[:, None] + product
    else:
        return product


@gluon.jit
def _start(acc, smaller, TWO_SUMS: gl.constexpr):
    """What a product begins with: nothing, or the running sum."""
    O: gl.constexpr = acc.type.layout
    if TWO_SUMS:
        return gl.zeros(acc.shape, gl.float32, O)
    else:
        return acc * smaller[:, None]


@gluon.jit
def _first(
    q_tile, q_pos, start, k_mem, n, bars, unit, k_len, rules, more,
    CAUSAL: gl.constexpr, BY_HAND: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """The first tile of keys: maximum, sums, shrink, packed weights."""
    _q_full, _q_empty, k_full, k_empty, _v_full, _v_empty, _apart = bars
    ROWS: gl.constexpr = q_tile.shape[0]
    N: gl.constexpr = k_mem.shape[3]
    m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S))
    k_stage, k_phase = _stage(n, k_mem.shape[0])
    mbarrier.wait(k_full.index(k_stage), k_phase)
    keys = k_mem.index(k_stage).reshape([N, k_mem.shape[4]])
    scores = gl.zeros([ROWS, N], gl.float32, S)
    scores = warpgroup_mma(q_tile, keys.permute((1, 0)), scores, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(k_stage))
    s = _mask(s, q_pos, start, k_len, rules, CAUSAL, S)
    words, l, m, shrink = _weigh(s, m, unit, BY_HAND)
    next_stage, next_phase = _stage(n + 1, k_mem.shape[0])
    mbarrier.wait(k_full.index(next_stage), next_phase, pred=more)
    return m, l, shrink, words


@gluon.jit
def _last(state, v_mem, bars, k_len, TWO_SUMS: gl.constexpr):
    """The products that are still to come: the whole sum."""
    _q_full, _q_empty, _k_full, _k_empty, v_full, v_empty, _apart = bars
    acc, product, smaller, _m, _l, shrink, words, n = state
    O: gl.constexpr = acc.type.layout
    v_stage, v_phase = _stage(n - 1, v_mem.shape[0])
    mbarrier.wait(v_full.index(v_stage), v_phase)
    p = _operand(words, k_len >> 31, O)
    acc = _add(acc, product, smaller, TWO_SUMS)
    smaller = gl.convert_layout(shrink, gl.SliceLayout(1, O))
    product = _start(acc, smaller, TWO_SUMS)
    values = v_mem.index(v_stage).reshape([v_mem.shape[3], v_mem.shape[4]]).permute((1, 0))
    product = warpgroup_mma(p, values, product, use_acc=not TWO_SUMS, is_async=True)
    product = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(v_empty.index(v_stage))
    return _add(acc, product, smaller, TWO_SUMS)


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
    Q_STAGES: gl.constexpr, TWO_SUMS: gl.constexpr, BY_HAND: gl.constexpr,
    CONSUMERS: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Attention of ROWS queries of every tile."""
    D: gl.constexpr = k_mem.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 32])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 32])
    q_full, q_empty, _k_full, _k_empty, _v_full, _v_empty, apart = bars
    q_len, k_len, q_offset, heads, groups, tiles, section, num_work = sizes
    index = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    n = gl.to_tensor(0)
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
        q_stage, q_phase = _stage(w, Q_STAGES)
        mbarrier.wait(q_full.index(q_stage), q_phase)
        q_tile = q_mem.index(q_stage * CONSUMERS + WHO).reshape([ROWS, D])
        if WHO > 0:
            mbarrier.wait(apart.index(q_stage * CONSUMERS + WHO), q_phase)
        start = key_tile(0, last, total, num_sinks) * N
        m, l, shrink, words = _first(
            q_tile,
            q_pos,
            start,
            k_mem,
            n,
            bars,
            unit,
            k_len,
            rules,
            total > 1,
            CAUSAL,
            BY_HAND,
            S,
        )
        if WHO + 1 < CONSUMERS:
            mbarrier.arrive(apart.index(q_stage * CONSUMERS + WHO + 1))
        where = (last, total, num_sinks)
        smaller = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, O))
        state = acc, acc, smaller, m, l, shrink, words, n + 1
        if CAUSAL:
            state = _steps(
                state, 1, right, where, q_tile, q_pos, k_mem, v_mem, bars, unit, k_len, rules,
                True, CAUSAL, TWO_SUMS, BY_HAND,
            )  # fmt: skip
        state = _steps(
            state, gl.maximum(right, 1), full, where, q_tile, q_pos, k_mem, v_mem, bars, unit,
            k_len, rules, False, CAUSAL, TWO_SUMS, BY_HAND,
        )  # fmt: skip
        if rules.window is not None:
            state = _steps(
                state, gl.maximum(full, 1), total, where, q_tile, q_pos, k_mem, v_mem, bars, unit,
                k_len, rules, True, CAUSAL, TWO_SUMS, BY_HAND,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(q_stage))
        _acc, _p, _s, m, l, _shrink, _words, n = state
        acc = _last(state, v_mem, bars, k_len, TWO_SUMS)
        l = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, S))
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
        "k_padded",
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
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, TWO_SUMS: gl.constexpr, BY_HAND: gl.constexpr,
    REGISTERS: gl.constexpr,
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
    q_mem = gl.allocate_shared_memory(CODE, [Q_STAGES * CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_mem = gl.allocate_shared_memory(CODE, [STAGES, 1, 1, N, D], k_desc.layout)
    v_mem = gl.allocate_shared_memory(CODE, [STAGES, 1, 1, D, N], v_desc.layout)
    o_mem = gl.allocate_shared_memory(
        out.ptr.dtype.element_ty, [CONSUMERS, 1, 1, ROWS, D], o_desc.layout
    )
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    apart = gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], BAR)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(Q_STAGES * CONSUMERS):
        mbarrier.init(apart.index(i), count=1)
    fence_async_shared()

    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, apart)
    sizes = (q_len, k_len, q_offset, heads, groups, tiles, section, num_work)
    unit = scale * LOG2E
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (
                o_desc, lse, sink_logits, scales, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules,
                unit, CAUSAL, M, N, ROWS, Q_STAGES, TWO_SUMS, BY_HAND, CONSUMERS, 0,
            )),
            (_consume, (
                o_desc, lse, sink_logits, scales, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules,
                unit, CAUSAL, M, N, ROWS, Q_STAGES, TWO_SUMS, BY_HAND, CONSUMERS, 1,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, bars, sizes, rules,
                CAUSAL, M, N, ROWS, Q_STAGES, CONSUMERS,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                o_desc, lse, sink_logits, scales, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules,
                unit, CAUSAL, M, N, ROWS, Q_STAGES, TWO_SUMS, BY_HAND, CONSUMERS, 0,
            )),
            (_consume, (
                o_desc, lse, sink_logits, scales, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules,
                unit, CAUSAL, M, N, ROWS, Q_STAGES, TWO_SUMS, BY_HAND, CONSUMERS, 1,
            )),
            (_consume, (
                o_desc, lse, sink_logits, scales, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules,
                unit, CAUSAL, M, N, ROWS, Q_STAGES, TWO_SUMS, BY_HAND, CONSUMERS, 2,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, bars, sizes, rules,
                CAUSAL, M, N, ROWS, Q_STAGES, CONSUMERS,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
