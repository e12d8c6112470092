"""Forward attention for Hopper in Gluon: warps that fetch and warps that compute.

One program per multiprocessor walks over its tiles of queries, longest first.  A single warp asks
the copy engine for queries, keys and values and never computes; each consumer (four warps) owns 64
of the tile's queries and never fetches.  They meet at mbarriers: a stage of keys or values is full
when its bytes have arrived, and empty when every consumer has read it.

A consumer asks for the scores of the next tile before the values of this one are multiplied, so
that the matrix units always have work while it computes exponentials; and the consumers take turns
in asking (`TURNS`), so that one computes exponentials while the matrix units work for the other.
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

from saccade.ops.tiles import key_tiles

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-1e30)


@gluon.jit
def _work(k, tiles, section):
    """The k-th piece of work of this program: (batch * heads + head, tile of queries).

    Work is sorted by length, longest first, within sections of heads whose keys fit the L2 cache
    together; programs take it in snakes, so that every program gets about the same.
    """
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    place = gl.where(k % 2 == 0, place, programs - 1 - place)
    work = k * programs + place
    per_section = tiles * section
    inside = work % per_section
    head = (work // per_section) * section + inside % section
    return head, tiles - 1 - inside // section


@gluon.jit
def _amount(num_work):
    """How many pieces of work this program has."""
    programs = gl.num_programs(0)
    whole = num_work // programs
    place = gl.program_id(0)
    place = gl.where(whole % 2 == 0, place, programs - 1 - place)
    return whole + gl.where(place < num_work % programs, 1, 0)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring, and its phase, which flips with every round."""
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _plan(
    tile, q_len, k_len, q_offset, rules, CAUSAL: gl.constexpr, M: gl.constexpr, N: gl.constexpr
):
    """Key tiles of a tile of queries: (sinks, last, right edge, right edge + full, all)."""
    row = tile * M
    last_q = q_offset + gl.minimum(row + M, q_len) - 1
    num_sinks, first, full_from, full_to, last = key_tiles(
        q_offset + row, last_q, k_len, rules, CAUSAL, N
    )
    return num_sinks, last, last - full_to, last - full_from, last - first + num_sinks


@gluon.jit
def _key_tile(j, last, total, num_sinks):
    """Which tile of keys is visited j-th: from the last to the first, then the sinks."""
    return gl.where(j < total - num_sinks, last - 1 - j, total - 1 - j)


@gluon.jit
def _fetch(desc, b, h, start, mem, full, empty, at, STAGES: gl.constexpr):
    """Ask for a tile as soon as its stage is empty; the following stage."""
    stage, phase = at
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [b, h, start, 0], full.index(stage), mem.index(stage))
    return _next(stage, phase, STAGES)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, bars, sizes, rules,
    CAUSAL: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Fetch everything the consumers will read, in their order, as soon as there is room."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    q_len, k_len, q_offset, heads, groups, tiles, section, num_work = sizes
    Q_STAGES: gl.constexpr = q_full.shape[0]
    K_STAGES: gl.constexpr = k_mem.shape[0]
    V_STAGES: gl.constexpr = v_mem.shape[0]
    q_at = gl.to_tensor(0), gl.to_tensor(1)
    k_at = gl.to_tensor(0), gl.to_tensor(1)
    v_at = gl.to_tensor(0), gl.to_tensor(1)
    amount = _amount(num_work)
    for w in range(amount + 1):  # the last one is fetched as far as consumers look ahead
        at, tile = _work(gl.minimum(w, amount - 1), tiles, section)
        b = at // heads
        h = at % heads
        num_sinks, last, _right, _full, total = _plan(
            tile, q_len, k_len, q_offset, rules, CAUSAL, M, N
        )
        start = _key_tile(0, last, total, num_sinks) * N
        k_at = _fetch(k_desc, b, h // groups, start, k_mem, k_full, k_empty, k_at, K_STAGES)
        stage, phase = q_at
        mbarrier.wait(q_empty.index(stage), phase)
        mbarrier.expect(q_full.index(stage), CONSUMERS * q_desc.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                q_desc, [b, h, tile * M + c * ROWS, 0], q_full.index(stage),
                q_mem.index(stage * CONSUMERS + c),
            )  # fmt: skip
        q_at = _next(stage, phase, Q_STAGES)
        total = gl.where(w < amount, total, 0)
        for j in range(total):
            v_at = _fetch(v_desc, b, h // groups, start, v_mem, v_full, v_empty, v_at, V_STAGES)
            if j + 1 < total:
                start = _key_tile(j + 1, last, total, num_sinks) * N
                k_at = _fetch(k_desc, b, h // groups, start, k_mem, k_full, k_empty, k_at, K_STAGES)


@gluon.jit
def _mask(s, q_pos, start, k_len, rules, CAUSAL: gl.constexpr):
    """Scores of an edge tile, -inf where a query does not see a key."""
    LAYOUT: gl.constexpr = s.type.layout
    column = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    end = q_pos * 0 + k_len - start
    if CAUSAL:
        end = gl.minimum(end, q_pos + 1 - start)
    see = column < end[:, None]
    if rules.window is not None:
        near = column > (q_pos - rules.window - start)[:, None]
        if rules.sinks is not None:
            near = near | (column < rules.sinks - start)
        see = see & near
    return gl.where(see, s, float("-inf"))


@gluon.jit
def _softmax(s, m, l, unit):
    """Take a tile of scores into the running maximum and sum: (weights, m, l, shrink)."""
    m_new = gl.maximum(m, gl.max(s, 1))
    p = gl.exp2(s * unit - (m_new * unit)[:, None])
    shrink = gl.exp2((m - m_new) * unit)
    return p, m_new, l * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _operand(weights, DTYPE: gl.constexpr, O: gl.constexpr):
    """Weights in 16 bits, packed by twos, as the matrix units take them from registers."""
    if DTYPE == gl.bfloat16:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [weights], gl.bfloat16, True, 2
        )
    else:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [weights], gl.float16, True, 2
        )
    return gl.convert_layout(packed, gl.DotOperandLayout(0, O, 2))


@gluon.jit
def _step(
    state, q_tile, q_pos, start, k_mem, v_mem, bars, unit, k_len, rules, more,
    EDGE: gl.constexpr, CAUSAL: gl.constexpr, TURNS: gl.constexpr, CONSUMERS: gl.constexpr,
    WHO: gl.constexpr,
):  # fmt: skip
    """Ask for the scores of one tile and the product of the tile before, softmax while it runs.

    The state holds what the tile before left: weights that are to be multiplied with its values,
    by how much the accumulator shrinks first, and where the rings and the turns stand.
    """
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    acc, m, l, shrink, weights, k_at, v_at, turn = state
    k_stage, k_phase = k_at
    v_stage, v_phase = v_at
    N: gl.constexpr = k_mem.shape[3]
    D: gl.constexpr = k_mem.shape[4]
    O: gl.constexpr = acc.type.layout
    p = _operand(weights, v_mem.dtype, O)
    if TURNS:
        mbarrier.wait(turns.index(WHO), turn)
    keys = k_mem.index(k_stage).reshape([N, D])
    scores = warpgroup_mma(q_tile, keys.permute((1, 0)), weights, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
    values = v_mem.index(v_stage).reshape([N, D])
    product = warpgroup_mma(p, values, acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turns.index((WHO + 1) % CONSUMERS))
        turn ^= 1
    s = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(k_stage))
    if EDGE:
        s = _mask(s, q_pos, start, k_len, rules, CAUSAL)
    weights, m, l, shrink = _softmax(s, m, l, unit)
    # This wait also keeps the compiler from asking for the product before the softmax is done.
    k_at = _next(k_stage, k_phase, k_mem.shape[0])
    mbarrier.wait(k_full.index(k_at[0]), k_at[1], pred=more)
    acc, p = warpgroup_mma_wait(0, deps=[product, p])
    mbarrier.arrive(v_empty.index(v_stage))
    return acc, m, l, shrink, weights, k_at, _next(v_stage, v_phase, v_mem.shape[0]), turn


@gluon.jit
def _steps(
    state, begin, end, where, q_tile, q_pos, k_mem, v_mem, bars, unit, k_len, rules,
    EDGE: gl.constexpr, CAUSAL: gl.constexpr, TURNS: gl.constexpr, CONSUMERS: gl.constexpr,
    WHO: gl.constexpr,
):  # fmt: skip
    """Key tiles begin .. end-1 of one tile of queries."""
    last, total, num_sinks = where
    for j in range(begin, end):
        start = _key_tile(j, last, total, num_sinks) * k_mem.shape[3]
        state = _step(
            state, q_tile, q_pos, start, k_mem, v_mem, bars, unit, k_len, rules, True,
            EDGE, CAUSAL, TURNS, CONSUMERS, WHO,
        )  # fmt: skip
    return state


@gluon.jit
def _finish(acc, m, l, unit, sink_logits, h):
    """Output and lse of a tile of queries."""
    top = m * unit
    O: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    if sink_logits is not None:
        sink = gl.load(sink_logits + h) * LOG2E
        raised = gl.maximum(top, sink)
        shrink = gl.exp2(top - raised)
        l = l * shrink + gl.exp2(sink - raised)
        acc = acc * gl.convert_layout(shrink, O)[:, None]
        top = raised
    acc = acc * gl.convert_layout(1.0 / l, O)[:, None]
    return acc, (top + gl.log2(l)) * LN2


@gluon.jit
def _consume(
    out, o_desc, lse, sink_logits, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules, unit,
    CAUSAL: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr,
    TURNS: gl.constexpr, STAGED: gl.constexpr, CONSUMERS: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Attention of ROWS queries of every tile.

    The first scores of a tile of queries are asked for together with the last product of the tile
    before, so the matrix units do not run dry in between.
    """
    D: gl.constexpr = v_mem.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    Q_STAGES: gl.constexpr = q_mem.shape[0] // CONSUMERS
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    q_len, k_len, q_offset, heads, groups, tiles, section, num_work = sizes
    index = WHO * ROWS + gl.arange(0, ROWS, layout=ROW)
    amount = _amount(num_work)

    _first_at, first_tile = _work(0, tiles, section)
    num_sinks, last, _right, _full, total = _plan(
        first_tile, q_len, k_len, q_offset, rules, CAUSAL, M, N
    )
    q_stage, q_phase = gl.to_tensor(0), gl.to_tensor(0)
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    q_tile = q_mem.index(WHO).reshape([ROWS, D])
    keys = k_mem.index(0).reshape([N, D]).permute((1, 0))
    weights = gl.zeros([ROWS, N], gl.float32, S)
    scores = warpgroup_mma(q_tile, keys, weights, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0))
    start = _key_tile(0, last, total, num_sinks) * N
    s = _mask(s, q_offset + first_tile * M + index, start, k_len, rules, CAUSAL)
    m = gl.full([ROWS], LOWEST, gl.float32, ROW)
    l = gl.zeros([ROWS], gl.float32, ROW)
    weights, m, l, shrink = _softmax(s, m, l, unit)
    k_at = _next(gl.to_tensor(0), gl.to_tensor(0), k_mem.shape[0])
    v_at = gl.to_tensor(0), gl.to_tensor(0)
    turn = gl.to_tensor(1 if WHO == 0 else 0)
    mbarrier.wait(k_full.index(k_at[0]), k_at[1])
    for w in range(amount):
        # Recomputed, not carried: Triton 3.6 (loop-aware CSE) froze carried bounds of inner loops.
        at, tile = _work(w, tiles, section)
        num_sinks, last, right, full, total = _plan(
            tile, q_len, k_len, q_offset, rules, CAUSAL, M, N
        )
        acc = gl.zeros([ROWS, D], gl.float32, O)
        state = acc, m, l, shrink, weights, k_at, v_at, turn
        q_tile = q_mem.index(q_stage * CONSUMERS + WHO).reshape([ROWS, D])
        q_pos = q_offset + tile * M + index
        where = (last, total, num_sinks)
        if CAUSAL:
            state = _steps(
                state, 1, right, where, q_tile, q_pos, k_mem, v_mem, bars, unit, k_len, rules,
                True, CAUSAL, TURNS, CONSUMERS, WHO,
            )  # fmt: skip
        state = _steps(
            state, gl.maximum(right, 1), full, where, q_tile, q_pos, k_mem, v_mem, bars, unit,
            k_len, rules, False, CAUSAL, TURNS, CONSUMERS, WHO,
        )  # fmt: skip
        if rules.window is not None:
            state = _steps(
                state, gl.maximum(full, 1), total, where, q_tile, q_pos, k_mem, v_mem, bars, unit,
                k_len, rules, True, CAUSAL, TURNS, CONSUMERS, WHO,
            )  # fmt: skip
        acc, m, l, shrink, weights, k_at, v_at, turn = state

        done_m, done_l = m, l
        mbarrier.arrive(q_empty.index(q_stage))
        q_stage, q_phase = _next(q_stage, q_phase, Q_STAGES)
        _next_at, next_tile = _work(gl.minimum(w + 1, amount - 1), tiles, section)
        num_sinks, last, _right, _full, total = _plan(
            next_tile, q_len, k_len, q_offset, rules, CAUSAL, M, N
        )
        mbarrier.wait(q_full.index(q_stage), q_phase)
        m = gl.full([ROWS], LOWEST, gl.float32, ROW)
        l = gl.zeros([ROWS], gl.float32, ROW)
        state = acc, m, l, shrink, weights, k_at, v_at, turn
        q_tile = q_mem.index(q_stage * CONSUMERS + WHO).reshape([ROWS, D])
        acc, m, l, shrink, weights, k_at, v_at, turn = _step(
            state, q_tile, q_offset + next_tile * M + index,
            _key_tile(0, last, total, num_sinks) * N, k_mem, v_mem, bars, unit, k_len, rules,
            w + 1 < amount, True, CAUSAL, TURNS, CONSUMERS, WHO,
        )  # fmt: skip

        b = at // heads
        h = at % heads
        row = tile * M + WHO * ROWS
        real = tile * M + index < q_len
        result, row_lse = _finish(acc, done_m, done_l, unit, sink_logits, h)
        gl.store(lse + at.to(gl.int64) * q_len + tile * M + index, row_lse, mask=real)
        if STAGED:
            tma.store_wait(0)
            o_mem.index(WHO).reshape([ROWS, D]).store(result.to(v_mem.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(o_desc, [b, h, row, 0], o_mem.index(WHO))
        else:
            rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, O))
            columns = gl.arange(0, D, layout=gl.SliceLayout(0, O))
            first = out.ptr + b.to(gl.int64) * out.batch + h.to(gl.int64) * out.head
            places = first + rows.to(gl.int64)[:, None] * out.row + columns[None, :]
            gl.store(places, result.to(v_mem.dtype), mask=(rows < q_len)[:, None])
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


@gluon.jit(
    do_not_specialize=["q_len", "k_len", "q_offset", "batch", "heads", "groups", "tiles", "section", "num_work"]
)
def forward_kernel(
    q, k, v, out, lse, sink_logits, rules, scale, q_len, k_len, q_offset, batch, heads, groups,
    tiles, section, num_work,
    CAUSAL: gl.constexpr, D: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    CONSUMERS: gl.constexpr, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, TURNS: gl.constexpr, STAGED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v over visible keys; q, k, v, out are Planes, lse `[B, H, Lq]`."""
    ROWS: gl.constexpr = M // CONSUMERS
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    q_desc = _describe(q, batch, heads, q_len, ROWS, D)
    k_desc = _describe(k, batch, heads // groups, k_len, N, D)
    v_desc = _describe(v, batch, heads // groups, k_len, N, D)
    o_desc = _describe(out, batch, heads, q_len, ROWS, D)
    q_mem = gl.allocate_shared_memory(DTYPE, [Q_STAGES * CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_mem = gl.allocate_shared_memory(DTYPE, [K_STAGES, 1, 1, N, D], k_desc.layout)
    v_mem = gl.allocate_shared_memory(DTYPE, [V_STAGES, 1, 1, N, D], v_desc.layout)
    if STAGED:
        o_mem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, 1, ROWS, D], o_desc.layout)
    else:
        o_mem = q_mem
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BAR)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BAR)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
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
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_consume, (
                out, o_desc, lse, sink_logits, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules, unit,
                CAUSAL, M, N, ROWS, TURNS, STAGED, CONSUMERS, 0,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, bars, sizes, rules,
                CAUSAL, M, N, ROWS, CONSUMERS,
            )),
        ], [1], [24])  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (
                out, o_desc, lse, sink_logits, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules, unit,
                CAUSAL, M, N, ROWS, TURNS, STAGED, CONSUMERS, 0,
            )),
            (_consume, (
                out, o_desc, lse, sink_logits, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules, unit,
                CAUSAL, M, N, ROWS, TURNS, STAGED, CONSUMERS, 1,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, bars, sizes, rules,
                CAUSAL, M, N, ROWS, CONSUMERS,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                out, o_desc, lse, sink_logits, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules, unit,
                CAUSAL, M, N, ROWS, TURNS, STAGED, CONSUMERS, 0,
            )),
            (_consume, (
                out, o_desc, lse, sink_logits, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules, unit,
                CAUSAL, M, N, ROWS, TURNS, STAGED, CONSUMERS, 1,
            )),
            (_consume, (
                out, o_desc, lse, sink_logits, q_mem, k_mem, v_mem, o_mem, bars, sizes, rules, unit,
                CAUSAL, M, N, ROWS, TURNS, STAGED, CONSUMERS, 2,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, bars, sizes, rules,
                CAUSAL, M, N, ROWS, CONSUMERS,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
