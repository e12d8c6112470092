"""Forward attention over fp8 queries, keys and values for Hopper, in Gluon.

The building is that of `forward.py`: one warp fetches, two consumers of 64 queries compute.
What eight bits change is said in `gluon_fp8_weights`, and here:

- The matrix units sum fp8 products in fewer than 14 bits.  Over 65536 values of one sign such a sum
  loses half of itself.  So the product of every tile is a sum of its own, and joins the running one
  in float32, while the matrix units have the scores of the next tile to do.
- Taking turns at the matrix units costs more than it gives; the consumers find their own.
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

from saccade.ops.attention.nvidia.gluon.fp8.softmax import OFFSET, operand, weigh
from saccade.ops.attention.nvidia.gluon.prefill.kernel import LN2, LOG2E, LOWEST
from saccade.ops.attention.nvidia.gluon.prefill.mask import hide
from saccade.ops.attention.nvidia.gluon.prefill.tile_scheduler import (
    amount_of_work,
    key_tile,
    piece_of_work,
    plan,
)

CONSUMERS, ROWS = gl.constexpr(2), gl.constexpr(64)  # warpgroups that compute, queries of each
M, N = gl.constexpr(128), gl.constexpr(128)  # queries and keys of a tile


@gluon.jit
def _stage(n, STAGES: gl.constexpr):
    """Where the n-th tile lies in its ring, and the phase of that round."""
    return n % STAGES, (n // STAGES) & 1


@gluon.jit
def _produce(asked, CAUSAL: gl.constexpr):
    """Fetch everything the consumers will read, in their order, as soon as there is room."""
    q_desc, k_desc, v_desc, memory, sizes, mask_args, block_lists = asked
    q_mem, k_mem, v_mem, bars = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    q_len, k_len, q_offset, heads, groups, tiles, section, num_work = sizes
    STAGES: gl.constexpr = k_mem.shape[0]
    Q_STAGES: gl.constexpr = q_mem.shape[0] // CONSUMERS
    n = gl.to_tensor(0)
    for w in range(amount_of_work(num_work)):
        at, tile = piece_of_work(w, tiles, section, num_work)
        b = at // heads
        h = at % heads
        stage, phase = _stage(w, Q_STAGES)
        arrived = q_full.index(stage)
        mbarrier.wait(q_empty.index(stage), phase ^ 1)
        mbarrier.expect(arrived, CONSUMERS * q_desc.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                q_desc, [b, h, tile * M + c * ROWS, 0], arrived, q_mem.index(stage * CONSUMERS + c)
            )
        where, _right, _full, total, _num_keys = plan(
            tile, q_len, k_len, q_offset, mask_args, block_lists, b, h // groups, CAUSAL, M, N
        )
        for j in range(total):
            start = key_tile(j, where, block_lists) * N
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
def _steps(
    state, begin, end, total, where, q_tile, q_pos, memory, unit, k_len, mask_args, block_lists, nothing,
    EDGE: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Key tiles begin .. end-1: scores of tile j, then values of tile j-1, then softmax of j."""
    _q_mem, k_mem, v_mem, bars = memory
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty = bars
    STAGES: gl.constexpr = k_mem.shape[0]
    D: gl.constexpr = k_mem.shape[4]
    for j in range(begin, end):
        acc, product, smaller, m, l, shrink, words, n = state
        S: gl.constexpr = m.type.layout.parent
        O: gl.constexpr = acc.type.layout
        k_stage, _phase = _stage(n, STAGES)
        v_stage, v_phase = _stage(n - 1, STAGES)
        p = operand(words, nothing, O)
        keys = k_mem.index(k_stage).reshape([N, D]).permute((1, 0))
        scores = gl.zeros([ROWS, N], gl.float32, S)
        scores = warpgroup_mma(q_tile, keys, scores, use_acc=False, is_async=True)
        acc = acc * smaller[:, None] + product
        smaller = gl.convert_layout(shrink, gl.SliceLayout(1, O))
        mbarrier.wait(v_full.index(v_stage), v_phase)
        values = v_mem.index(v_stage).reshape([D, N]).permute((1, 0))
        product = gl.zeros([ROWS, D], gl.float32, O)
        product = warpgroup_mma(p, values, product, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(k_stage))
        if EDGE:
            s = hide(s, q_pos, key_tile(j, where, block_lists) * N, k_len, mask_args, CAUSAL, S)
        words, sums, m, shrink = weigh(s, m, unit)
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
def _first(
    q_tile, q_pos, start, memory, n, unit, k_len, mask_args, more,
    CAUSAL: gl.constexpr, S: gl.constexpr, O: gl.constexpr,
):  # fmt: skip
    """The state after the first tile of keys, whose values are still to come."""
    _q_mem, k_mem, _v_mem, bars = memory
    _q_full, _q_empty, k_full, k_empty, _v_full, _v_empty = bars
    STAGES: gl.constexpr = k_mem.shape[0]
    D: gl.constexpr = k_mem.shape[4]
    stage, phase = _stage(n, STAGES)
    mbarrier.wait(k_full.index(stage), phase)
    keys = k_mem.index(stage).reshape([N, D]).permute((1, 0))
    scores = gl.zeros([ROWS, N], gl.float32, S)
    scores = warpgroup_mma(q_tile, keys, scores, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(stage))
    s = hide(s, q_pos, start, k_len, mask_args, CAUSAL, S)
    m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S))
    words, l, m, shrink = weigh(s, m, unit)
    stage, phase = _stage(n + 1, STAGES)
    mbarrier.wait(k_full.index(stage), phase, pred=more)
    acc = gl.zeros([ROWS, D], gl.float32, O)
    smaller = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, O))
    return acc, acc, smaller, m, l, shrink, words, n + 1


@gluon.jit
def _last(state, memory, nothing):
    """The whole sum: the product that is there, and that of the last tile of values."""
    _q_mem, _k_mem, v_mem, bars = memory
    _q_full, _q_empty, _k_full, _k_empty, v_full, v_empty = bars
    acc, product, smaller, _m, _l, shrink, words, n = state
    O: gl.constexpr = acc.type.layout
    D: gl.constexpr = v_mem.shape[3]
    stage, phase = _stage(n - 1, v_mem.shape[0])
    mbarrier.wait(v_full.index(stage), phase)
    p = operand(words, nothing, O)
    acc = acc * smaller[:, None] + product
    values = v_mem.index(stage).reshape([D, N]).permute((1, 0))
    product = gl.zeros([ROWS, D], gl.float32, O)
    product = warpgroup_mma(p, values, product, use_acc=False, is_async=True)
    product = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(v_empty.index(stage))
    return acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None] + product


@gluon.jit
def _finish(acc, m, l, unit, v_scale, sink_logits, h):
    """Output and lse of a tile of queries, each of which has seen a key."""
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
    """Powers of two a raw score is worth; nan where it is negative, since a maximum would err."""
    q_scale, k_scale, _v_scale = scales
    unit = gl.load(q_scale + b * heads + h) * scale
    unit *= gl.load(k_scale + b * (heads // groups) + h // groups)
    return gl.where(unit >= 0, gl.maximum(unit, 1e-30), float("nan"))


@gluon.jit
def _consume(given, CAUSAL: gl.constexpr, WHO: gl.constexpr):
    """Attention of ROWS queries of every tile."""
    o_desc, lse, sink_logits, scales, o_mem, memory, sizes, mask_args, block_lists, scale = given
    q_mem, k_mem, _v_mem, bars = memory
    q_full, q_empty, _k_full, _k_empty, _v_full, _v_empty = bars
    q_len, k_len, q_offset, heads, groups, tiles, section, num_work = sizes
    D: gl.constexpr = k_mem.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 32])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 32])
    Q_STAGES: gl.constexpr = q_mem.shape[0] // CONSUMERS
    index = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    nothing = k_len >> 31
    n = gl.to_tensor(0)
    for w in range(amount_of_work(num_work)):
        at, tile = piece_of_work(w, tiles, section, num_work)
        b = at // heads
        h = at % heads
        unit = _unit(scales, scale, b, h, heads, groups)
        row = tile * M + WHO * ROWS
        q_pos = q_offset + row + index
        where, right, full, total, _num_keys = plan(
            tile, q_len, k_len, q_offset, mask_args, block_lists, b, h // groups, CAUSAL, M, N
        )
        stage, phase = _stage(w, Q_STAGES)
        mbarrier.wait(q_full.index(stage), phase)
        q_tile = q_mem.index(stage * CONSUMERS + WHO).reshape([ROWS, D])
        start = key_tile(0, where, block_lists) * N
        state = _first(
            q_tile, q_pos, start, memory, n, unit, k_len, mask_args, total > 1, CAUSAL, S, O
        )
        if CAUSAL:
            state = _steps(
                state, 1, right, total, where, q_tile, q_pos, memory, unit, k_len, mask_args,
                block_lists, nothing, True, CAUSAL,
            )  # fmt: skip
        state = _steps(
            state, gl.maximum(right, 1), full, total, where, q_tile, q_pos, memory, unit, k_len,
            mask_args, block_lists, nothing, False, CAUSAL,
        )  # fmt: skip
        if mask_args.window is not None:
            state = _steps(
                state, gl.maximum(full, 1), total, total, where, q_tile, q_pos, memory, unit,
                k_len, mask_args, block_lists, nothing, True, CAUSAL,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(stage))
        _acc, _product, _smaller, m, l, _shrink, _words, n = state
        acc = _last(state, memory, nothing)
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
def _describe(x, batch, heads, rows, width, HIGH: gl.constexpr, WIDE: gl.constexpr):
    """The copy engine's description of `[batch, heads, rows, width]`, moved as HIGH x WIDE."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [1, 1, HIGH, WIDE], x.ptr.dtype.element_ty
    )
    return tma.make_tensor_descriptor(
        x.ptr, [batch, heads, rows, width], [x.batch, x.head, x.row, 1], [1, 1, HIGH, WIDE], LAYOUT
    )


@gluon.jit
def _ring(STAGES: gl.constexpr, READERS: gl.constexpr):
    """Barriers of a ring: full when bytes have arrived, empty when every reader has read."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


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
    q, k, v, out, lse, sink_logits, scales, mask_args, block_lists, scale, q_len, k_len, k_padded, q_offset,
    batch, heads, groups, tiles, section, num_work,
    CAUSAL: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v over visible keys; q, k, v, out are Planes, lse `[B, H, Lq]`.

    v is what `transpose_kernel` makes; scales are float32 of q `[B, H]`, k and v `[B, Hkv]`.
    """
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
    q_full, q_empty = _ring(Q_STAGES, CONSUMERS)
    k_full, k_empty = _ring(STAGES, CONSUMERS)
    v_full, v_empty = _ring(STAGES, CONSUMERS)
    fence_async_shared()

    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (q_len, k_len, q_offset, heads, groups, tiles, section, num_work)
    memory = (q_mem, k_mem, v_mem, bars)
    unit = scale * LOG2E
    asked = (q_desc, k_desc, v_desc, memory, sizes, mask_args, block_lists)
    given = (o_desc, lse, sink_logits, scales, o_mem, memory, sizes, mask_args, block_lists, unit)
    gl.warp_specialize([
        (_consume, (given, CAUSAL, 0)),
        (_consume, (given, CAUSAL, 1)),
        (_produce, (asked, CAUSAL)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
