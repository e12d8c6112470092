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

from saccade.ops.attention.nvidia.gluon.prefill.mask import hide_left, hide_right, seen_by_all
from saccade.ops.attention.nvidia.gluon.prefill.producer import describe, produce
from saccade.ops.attention.nvidia.gluon.prefill.seqlen_info import clear_tail, rows_of_tile
from saccade.ops.attention.nvidia.gluon.prefill.tile_scheduler import (
    amount_of_work,
    key_tile,
    next_stage,
    piece_of_work,
    plan,
)

LOG2E = gl.constexpr(1.4426950408889634)
LN2, LOWEST = gl.constexpr(0.6931471805599453), gl.constexpr(-1e30)


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
def _steps(
    state, begin, end, total, edges, where, q_tile, q_pos, k_mem, v_mem, bars, unit, num_keys,
    mask_args, block_lists, EDGE: gl.constexpr, CAUSAL: gl.constexpr, TURNS: gl.constexpr,
    CONSUMERS: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Key tiles begin .. end-1: scores of tile j, then values of tile j-1, then softmax of j."""
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    N: gl.constexpr = k_mem.shape[3]
    D: gl.constexpr = k_mem.shape[4]
    K_STAGES: gl.constexpr = k_mem.shape[0]
    V_STAGES: gl.constexpr = v_mem.shape[0]
    for j in range(begin, end):
        acc, m, l, shrink, weights, k_at, v_at, turn = state
        k_stage, k_phase = k_at
        v_stage, v_phase = v_at
        S: gl.constexpr = weights.type.layout
        O: gl.constexpr = acc.type.layout
        p = _operand(weights, v_mem.dtype, O)
        if TURNS:
            mbarrier.wait(turns.index(WHO), turn)
        keys = k_mem.index(k_stage).reshape([N, D])
        scores = warpgroup_mma(q_tile, keys.permute((1, 0)), weights, use_acc=False, is_async=True)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
        mbarrier.wait(v_full.index(v_stage), v_phase)
        values = v_mem.index(v_stage).reshape([N, v_mem.shape[4]])
        product = warpgroup_mma(p, values, acc, is_async=True)
        if TURNS:
            mbarrier.arrive(turns.index((WHO + 1) % CONSUMERS))
            turn ^= 1
        s = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(k_stage))
        start = key_tile(j, where, block_lists) * N
        # Windows have edges on both sides and few whole tiles between: one loop for all of them.
        right = EDGE
        if mask_args.window is not None:
            right = start + N > edges[1]
            if start < edges[0]:
                s = hide_left(s, q_pos, start, mask_args, S)
        if right:
            s = hide_right(s, q_pos, start, num_keys, CAUSAL, S)
        weights, m, l, shrink = _softmax(s, m, l, unit)
        # This wait keeps the compiler from asking for the product before the softmax is done.
        k_at = next_stage(k_stage, k_phase, K_STAGES)
        mbarrier.wait(k_full.index(k_at[0]), k_at[1], pred=j + 1 < total)
        acc, p = warpgroup_mma_wait(0, deps=[product, p])
        mbarrier.arrive(v_empty.index(v_stage))
        v_at = next_stage(v_stage, v_phase, V_STAGES)
        state = acc, m, l, shrink, weights, k_at, v_at, turn
    return state


@gluon.jit
def _first(
    q_tile, q_pos, start, weights, k_mem, k_at, bars, unit, num_keys, mask_args, more, left,
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
    s = hide_right(s, q_pos, start, num_keys, CAUSAL, S)
    if mask_args.window is not None:
        if left:
            s = hide_left(s, q_pos, start, mask_args, S)
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
    p = _operand(weights, v_mem.dtype, O)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
    values = v_mem.index(v_stage).reshape([v_mem.shape[3], v_mem.shape[4]])
    product = warpgroup_mma(p, values, acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[product, p])
    mbarrier.arrive(v_empty.index(v_stage))
    return acc, next_stage(v_stage, v_phase, v_mem.shape[0])


@gluon.jit
def _finish(acc, m, l, unit, sink_logits, h):
    """Output and lse of a tile of queries."""
    ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    top = m * unit
    if sink_logits is not None:
        sink = gl.load(sink_logits + h) * LOG2E
        raised = gl.maximum(top, sink)
        shrink = gl.exp2(top - raised)
        l = l * shrink + gl.exp2(sink - raised)
        acc = acc * gl.convert_layout(shrink, ROW)[:, None]
        top = raised
    empty = l == 0.0
    safe = gl.where(empty, 1.0, l)
    acc = acc * gl.convert_layout(1.0 / safe, ROW)[:, None]
    return acc, gl.where(empty, float("-inf"), (top + gl.log2(safe)) * LN2)


@gluon.jit
def _store(o_desc, memory, acc, place):
    """Hand a whole tile of results to the copy engine, which leaves out rows past the end."""
    memory.reshape([acc.shape[0], acc.shape[1]]).store(acc.to(o_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [place[0], place[1], place[2], 0], memory)


@gluon.jit
def _store_part(out, acc, place, count):
    """The first `count` rows of a tile, straight from registers."""
    b, h, row = place
    O: gl.constexpr = acc.type.layout
    rows = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, O))[:, None]
    dims = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, O))[None, :]
    start = out.ptr + b.to(gl.int64) * out.batch + h.to(gl.int64) * out.head
    at = start + (row + rows).to(gl.int64) * out.row + dims
    gl.store(at, acc.to(out.ptr.dtype.element_ty), mask=rows < count)


@gluon.jit
def _consume(
    given, CAUSAL: gl.constexpr, M: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr,
    TURNS: gl.constexpr, DIRECT_OUT: gl.constexpr, CONSUMERS: gl.constexpr, TAILS: gl.constexpr,
    WHO: gl.constexpr,
):  # fmt: skip
    """Attention of ROWS queries of every tile."""
    out, o_desc, lse, sink_logits, own, memory, sizes, mask_args, block_lists, row_extents, unit = (
        given
    )
    o_mem, cleared = own
    q_mem, k_mem, v_mem, bars = memory
    D: gl.constexpr = v_mem.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    q_full, q_empty, _k_full, _k_empty, v_full, _v_empty, _turns = bars
    all_q, all_k, offset, heads, groups, tiles, section, num_work = sizes
    Q_STAGES: gl.constexpr = q_mem.shape[0] // CONSUMERS
    weights = gl.zeros([ROWS, N], gl.float32, S)
    index = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    q_at = gl.to_tensor(0), gl.to_tensor(0)
    k_at = gl.to_tensor(0), gl.to_tensor(0)
    v_at = gl.to_tensor(0), gl.to_tensor(0)
    turn = gl.to_tensor(1 if WHO == 0 else 0)
    done = gl.to_tensor(0)  # which tails are cleared
    for w in range(amount_of_work(num_work)):
        at, tile = piece_of_work(w, tiles, section, num_work)
        q_first, _k_first, q_len, k_len, q_offset, tile = rows_of_tile(
            row_extents, at // heads, tile, all_q, all_k, offset
        )
        row = tile * M + WHO * ROWS
        q_pos = q_offset + row + index
        where, right, within, total, num_keys = plan(
            tile, q_len, k_len, q_offset, mask_args, block_lists, at // heads, at % heads // groups,
            CAUSAL, M, N,
        )  # fmt: skip
        acc = gl.zeros([ROWS, D], gl.float32, O)
        q_stage, q_phase = q_at
        mbarrier.wait(q_full.index(q_stage), q_phase)
        q_tile = q_mem.index(q_stage * CONSUMERS + WHO).reshape([ROWS, D])
        edges = seen_by_all(q_offset + row, num_keys, mask_args, CAUSAL, ROWS)
        start = key_tile(0, where, block_lists) * N
        m, l, shrink, weights, k_at = _first(
            q_tile, q_pos, start, weights, k_mem, k_at, bars, unit, num_keys, mask_args, total > 1,
            start < edges[0], CAUSAL,
        )  # fmt: skip
        if TAILS:
            done = clear_tail(v_mem, v_at, v_full, cleared, done, num_keys - start, WHO)
        state = acc, m, l, shrink, weights, k_at, v_at, turn
        begin = gl.maximum(right, 1)
        end = within
        if mask_args.window is not None:
            begin = 1
            end = total
        elif CAUSAL or block_lists.tiles is not None:
            state = _steps(
                state, 1, right, total, edges, where, q_tile, q_pos, k_mem, v_mem, bars, unit,
                num_keys, mask_args, block_lists, True, CAUSAL, TURNS, CONSUMERS, WHO,
            )  # fmt: skip
        state = _steps(
            state, begin, end, total, edges, where, q_tile, q_pos, k_mem, v_mem, bars, unit,
            num_keys, mask_args, block_lists, False, CAUSAL, TURNS, CONSUMERS, WHO,
        )  # fmt: skip
        acc, m, l, shrink, weights, k_at, v_at, turn = state
        mbarrier.arrive(q_empty.index(q_stage))
        acc, v_at = _last(acc, shrink, weights, v_mem, v_at, bars)
        acc, row_lse = _finish(acc, m, l, unit, sink_logits, at % heads)
        lse_at = lse + at.to(gl.int64) * all_q + q_first + row + index
        gl.store(lse_at, row_lse, mask=row + index < q_len)
        place = at // heads, at % heads, q_first + row
        if DIRECT_OUT:
            _store_part(out, acc, place, q_len - row)
        else:
            tma.store_wait(0)  # of the tile before
            if row_extents.documents is None or row + ROWS <= q_len:
                _store(o_desc, o_mem.index(WHO), acc, place)
            else:
                _store_part(out, acc, place, q_len - row)
        q_at = next_stage(q_stage, q_phase, Q_STAGES)
    tma.store_wait(0)


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
        "pages",
    ]
)
def forward_kernel(
    q, k, v, out, lse, sink_logits, mask_args, block_lists, row_extents, scale, q_len, k_len, q_offset, batch,
    heads, groups, tiles, section, num_work, pages,
    CAUSAL: gl.constexpr, D: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    CONSUMERS: gl.constexpr, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    TURNS: gl.constexpr, DIRECT_OUT: gl.constexpr, REGISTERS: gl.constexpr,
    TAILS: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v over visible keys; q, k, v, out are Planes, lse `[B, H, Lq]`.

    TAILS: rows may end where their storage goes on.  PAGE: slots of a page, k and v being a pool of
    `pages` of them, or None.
    """
    ROWS: gl.constexpr = M // CONSUMERS
    FETCH: gl.constexpr = 504 - CONSUMERS * REGISTERS  # registers of the warp that fetches
    DTYPE: gl.constexpr = q.ptr.dtype.element_ty
    q_desc = describe(q, batch, heads, q_len, ROWS, D)
    if PAGE is None:
        k_desc = describe(k, batch, heads // groups, k_len, N, D)
        v_desc = describe(v, batch, heads // groups, k_len, N, D)
    else:
        BOX: gl.constexpr = min(PAGE, N)
        k_desc = describe(k, pages, heads // groups, PAGE, BOX, D)
        v_desc = describe(v, pages, heads // groups, PAGE, BOX, D)
    o_desc = describe(out, batch, heads, q_len, ROWS, D)
    q_mem = gl.allocate_shared_memory(DTYPE, [Q_STAGES * CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_mem = gl.allocate_shared_memory(DTYPE, [K_STAGES, 1, 1, N, D], k_desc.layout)
    v_mem = gl.allocate_shared_memory(DTYPE, [V_STAGES, 1, 1, N, D], v_desc.layout)
    if DIRECT_OUT:
        o_mem = q_mem  # never written
    else:
        o_mem = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, 1, ROWS, D], o_desc.layout)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BAR)
    cleared = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BAR)  # where TAILS
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
        mbarrier.init(cleared.index(i), count=1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()

    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    sizes = (q_len, k_len, q_offset, heads, groups, tiles, section, num_work)
    unit = scale * LOG2E
    memory = (q_mem, k_mem, v_mem, bars)
    asked = (q_desc, k_desc, v_desc, memory, sizes, mask_args, block_lists, row_extents)
    own = (o_mem, cleared)  # of the consumers
    given = (
        out,
        o_desc,
        lse,
        sink_logits,
        own,
        memory,
        sizes,
        mask_args,
        block_lists,
        row_extents,
        unit,
    )
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (given, CAUSAL, M, N, ROWS, TURNS, DIRECT_OUT, CONSUMERS, TAILS, 0)),
            (_consume, (given, CAUSAL, M, N, ROWS, TURNS, DIRECT_OUT, CONSUMERS, TAILS, 1)),
            (produce, (asked, CAUSAL, M, N, ROWS, CONSUMERS, PAGE)),
        ], [4, 1], [REGISTERS, FETCH])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (given, CAUSAL, M, N, ROWS, TURNS, DIRECT_OUT, CONSUMERS, TAILS, 0)),
            (_consume, (given, CAUSAL, M, N, ROWS, TURNS, DIRECT_OUT, CONSUMERS, TAILS, 1)),
            (_consume, (given, CAUSAL, M, N, ROWS, TURNS, DIRECT_OUT, CONSUMERS, TAILS, 2)),
            (produce, (asked, CAUSAL, M, N, ROWS, CONSUMERS, PAGE)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, FETCH])  # fmt: skip
