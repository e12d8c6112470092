"""Decoding over dense or paged keys of 16 bits on Hopper: each warp has keys of its own.

A program is a few warps that take sixteen keys at a time in turn.  A warp fills a ring in its part
of shared memory by asynchronous copies, several tiles ahead, and meets the others only at the end,
so nothing stands between memory and the copies.  Page numbers are read two tiles before the copies
that need them.  Keys and values are the left sides of both products,

    scores [keys, rows]      = keys @ q
    output [channels, rows] += values @ p

whose eight columns are a tile of query rows (heads of a group times queries); two tiles share the
keys that a warp has read.  Which thread holds what: see registers.py; weights change sides by
transpositions of 8 x 8 in registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.decode.smem import (
    ask_for_rows,
    dynamic_memory,
    get_at,
    get_number,
    left_sides,
    put_at,
    put_number,
)
from saccade.ops.attention.nvidia.gluon.ptx import (
    close_copies,
    ended,
    load_words,
    max_over_rows,
    meet,
    multiply,
    pair,
    sum_over_rows,
    transposed,
    wait_copies,
)
from saccade.ops.gpu.triton_lang import LOG2E, LOWEST, key_tiles, pdl_begin, split_range

ROWS = gl.constexpr(8)  # query rows of a tile: the columns of a product
KEYS = gl.constexpr(16)  # of a warp's tile


@gluon.jit
def load_queries(address, D: gl.constexpr):
    """Right sides of the first product: a query row's channels 2t, 2t + 1 of every eight."""
    found = load_words(address, 0, 1)
    for i in gl.static_range(1, D // 8):
        found = found + load_words(address, 16 * i, 1)
    return found


@gluon.jit
def length_of(seqlen_info, b, kv_head, k_len):
    """How many keys a row has."""
    if seqlen_info.kv_lens is not None:
        at = b * seqlen_info.kv_lens_batch + kv_head * seqlen_info.kv_lens_head
        k_len = gl.minimum(k_len, gl.load(seqlen_info.kv_lens + at).to(gl.int32))
    return k_len


@gluon.jit
def first_key(i, num_sinks, first, own, BLOCK: gl.constexpr):
    """Position of the first key that a thread's warp takes in step i."""
    return gl.where(i < num_sinks, i, i - num_sinks + first) * BLOCK + own


@gluon.jit
def page_of(pages, row, at, stop, PAGE: gl.constexpr):
    """Number of the page of the keys from `at` on; 0 where there are none."""
    found = at
    if PAGE != 0:
        found = gl.load(row + at // PAGE, mask=at < stop, other=0)
    return found


@gluon.jit
def ask(place, k_from, v_from, pages, page, at, row, stop, D: gl.constexpr, PAGE: gl.constexpr,
        K_STEP: gl.constexpr, V_STEP: gl.constexpr):  # fmt: skip
    """One group of copies: keys and values from position `at` on, 0 from `stop` on."""
    if PAGE == 0:
        k_at = k_from + at.to(gl.int64) * K_STEP
        v_at = v_from + at.to(gl.int64) * V_STEP
    else:
        inside = (at % PAGE).to(gl.int64)
        k_at = k_from + page.to(gl.int64) * pages.k_page * 2 + inside * K_STEP
        v_at = v_from + page.to(gl.int64) * pages.v_page * 2 + inside * V_STEP
    there = stop - at - row
    ask_for_rows(place, k_at, there, D, K_STEP)
    ask_for_rows(place + KEYS * (2 * D), v_at, there, D, V_STEP)
    close_copies(place)


@gluon.jit
def scores_of_keys(keys, q, D: gl.constexpr, KIND: gl.constexpr):
    """Keys @ q: keys g (two numbers) and g + 8 of query rows 2t and 2t + 1."""
    zero = gl.full(q[0].shape, 0.0, gl.float32, q[0].type.layout)
    even = (zero, zero, zero, zero)
    odd = even
    for j in gl.static_range(D // 32):
        even = multiply(keys[2 * j], (q[4 * j], q[4 * j + 1]), even, KIND)
        odd = multiply(keys[2 * j + 1], (q[4 * j + 2], q[4 * j + 3]), odd, KIND)
    return even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]


@gluon.jit
def see(s, k_pos, q_pos, k_len, mask_args, CAUSAL: gl.constexpr):
    """A score, -inf where its row does not see its key."""
    seen = k_pos < k_len
    if CAUSAL:
        seen = seen & (k_pos <= q_pos)
    if mask_args.window is not None:
        near = q_pos - k_pos < mask_args.window
        if mask_args.sinks is not None:
            near = near | (k_pos < mask_args.sinks)
        seen = seen & near
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def weigh(low, high, top, unit):
    """(new maximum, what the old sums shrink by, weights of two keys) of a query row."""
    most = gl.maximum(top, max_over_rows(gl.maximum(low, high)))
    base = most * unit
    return (
        most,
        gl.exp2((top - most) * unit),
        gl.exp2(low * unit - base),
        gl.exp2(high * unit - base),
    )


@gluon.jit
def take(state, keys, values, q, k_pos, places, full, k_len, unit, mask_args, D: gl.constexpr,
         KIND: gl.constexpr, CAUSAL: gl.constexpr):  # fmt: skip
    """A tile's (maxima, sums of weights, output) of rows 2t, 2t + 1 with sixteen more keys."""
    m0, m1, l0, l1, acc = state
    s0, s1, s2, s3 = scores_of_keys(keys, q, D, KIND)
    if not full:
        s0 = see(s0, k_pos, places[0], k_len, mask_args, CAUSAL)
        s1 = see(s1, k_pos, places[1], k_len, mask_args, CAUSAL)
        s2 = see(s2, k_pos + 8, places[0], k_len, mask_args, CAUSAL)
        s3 = see(s3, k_pos + 8, places[1], k_len, mask_args, CAUSAL)
    m0, shrink0, s0, s2 = weigh(s0, s2, m0, unit)
    m1, shrink1, s1, s3 = weigh(s1, s3, m1, unit)
    l0, l1 = l0 * shrink0 + s0 + s2, l1 * shrink1 + s1 + s3
    p = (transposed(pair(s0, s1, KIND)), transposed(pair(s2, s3, KIND)))
    taken = ()
    for j in gl.static_range(D // 16):
        c0, c1, c2, c3 = acc[j]
        kept = (c0 * shrink0, c1 * shrink1, c2 * shrink0, c3 * shrink1)
        taken += (multiply(values[j], p, kept, KIND),)
    return m0, m1, l0, l1, taken


@gluon.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def decode_kernel(
    q, k, v, out, lse, pages, seqlen_info, mask_args, sink_logits, scale,
    q_len, k_len, q_offset, out_split, lse_split,
    KV_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, K_STEP: gl.constexpr,
    V_STEP: gl.constexpr, PAGE: gl.constexpr, LONGEST: gl.constexpr, CAUSAL: gl.constexpr,
    WARPS: gl.constexpr, STAGES: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """(out, lse) of one split.

    Args:
        K_STEP, V_STEP: bytes from row to row.  PAGE: 0 if keys are dense.
        LONGEST: one row has as many keys as the host says.
        HELD: a power of two of query rows, at least those that are.
    """
    L: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    KIND: gl.constexpr = "bf16" if q.ptr.dtype.element_ty == gl.bfloat16 else "f16"
    BLOCK: gl.constexpr = KEYS * WARPS
    STAGE: gl.constexpr = KEYS * D * 4
    TILES: gl.constexpr = (HELD + ROWS - 1) // ROWS
    # The host knows which keys there are: those of all rows, or (pages) of the longest.
    KNOWN: gl.constexpr = (seqlen_info.q_offsets is None) and (
        (seqlen_info.kv_lens is None) or ((PAGE != 0) and (mask_args.window is None) and LONGEST)
    )
    thread = gl.arange(0, 32 * WARPS, layout=L)
    lane, own = thread % 32, thread // 32 * KEYS
    g, t = lane // 4, lane % 4
    split, splits = gl.program_id(0), gl.num_programs(0)
    b = (gl.program_id(1) // KV_HEADS).to(gl.int64)
    kv_head = gl.program_id(1) % KV_HEADS
    if not KNOWN:
        pdl_begin(True)
        if seqlen_info.q_offsets is not None:
            q_offset = gl.load(seqlen_info.q_offsets + b).to(gl.int32)
        k_len = length_of(seqlen_info, b, kv_head, k_len)

    first_q, last_q = q_offset, q_offset + q_len - 1
    num_sinks, first, full_from, full_to, last = key_tiles(
        first_q, last_q, k_len, mask_args, CAUSAL, BLOCK
    )
    begin, end = split_range(split, splits, first, last, num_sinks)

    memory = dynamic_memory(thread, q_len < 0, STAGE * STAGES // 128)
    row, piece, put = put_at(lane, D)
    put_place = memory + own // KEYS * (STAGE * STAGES) + put
    get_keys, get_values = get_at(lane, D)
    k_place = memory + own // KEYS * (STAGE * STAGES) + get_keys
    v_place = memory + own // KEYS * (STAGE * STAGES) + STAGE // 2 + get_values
    k_from = k.ptr.to(gl.int64) + (b * k.batch + kv_head.to(gl.int64) * k.head) * 2
    v_from = v.ptr.to(gl.int64) + (b * v.batch + kv_head.to(gl.int64) * v.head) * 2
    k_from += row * K_STEP + piece
    v_from += row * V_STEP + piece
    numbers = pages.table
    if PAGE != 0:
        numbers += b * pages.batch + kv_head * pages.head
    if KNOWN:  # what comes before overlaps with the end of the kernel before
        pdl_begin(True)

    coming = ()
    for i in gl.static_range(STAGES + 2):
        at = first_key(begin + i, num_sinks, first, own, BLOCK)
        stop = gl.where(begin + i < end, k_len, 0)
        coming += (page_of(pages, numbers, at, stop, PAGE),)
    meet(thread)  # keeps all these loads before the copies, or each would wait for its own
    if (
        KNOWN and seqlen_info.kv_lens is not None
    ):  # shared by the longest row, so that pages come early
        k_len = length_of(seqlen_info, b, kv_head, k_len)
        end, full_to = gl.minimum(end, gl.cdiv(k_len, BLOCK)), gl.minimum(full_to, k_len // BLOCK)
    for i in gl.static_range(STAGES):
        at = first_key(begin + i, num_sinks, first, own, BLOCK)
        stop = gl.where(begin + i < end, k_len, 0)
        ask(put_place + i * STAGE, k_from, v_from, pages, coming[i], at, row, stop, D, PAGE,
            K_STEP, V_STEP)  # fmt: skip
    page, then = coming[STAGES], coming[STAGES + 1]

    unit = scale * LOG2E
    zero = gl.full([32 * WARPS], 0.0, gl.float32, L)
    nothing = ((zero, zero, zero, zero),) * (D // 16)
    queries, places, states = (), (), ()
    for c in gl.static_range(TILES):
        q_row = gl.minimum(c * ROWS + g, q_len * GROUPS - 1)
        q_at = (q_row % GROUPS + kv_head * GROUPS).to(gl.int64) * q.head
        q_at += (q_row // GROUPS).to(gl.int64) * q.row + b * q.batch
        queries += (load_queries(q.ptr.to(gl.int64) + q_at * 2 + t * 4, D),)
        q_row = c * ROWS + 2 * t
        places += ((q_row // GROUPS + q_offset, (q_row + 1) // GROUPS + q_offset),)
        states += ((zero + LOWEST, zero + LOWEST, zero, zero, nothing),)
    stage = 0
    for i in range(begin, end):
        wait_copies(thread, STAGES - 1)
        keys = left_sides(k_place + stage, D, False)
        values = left_sides(v_place + stage, D, True)
        meet(thread)
        later = i + STAGES
        at = first_key(later, num_sinks, first, own, BLOCK)
        stop = gl.where(later < end, k_len, 0)
        ask(put_place + stage, k_from, v_from, pages, page, at, row, stop, D, PAGE, K_STEP,
            V_STEP)  # fmt: skip
        at = first_key(later + 2, num_sinks, first, own, BLOCK)
        page, then = then, page_of(pages, numbers, at, gl.where(later + 2 < end, k_len, 0), PAGE)

        visited = i - num_sinks + first
        full = (i >= num_sinks) & (visited >= full_from) & (visited < full_to)
        at = first_key(i, num_sinks, first, own, BLOCK) + g
        taken = ()
        for c in gl.static_range(TILES):
            taken += (take(states[c], keys, values, queries[c], at, places[c], full, k_len, unit,
                           mask_args, D, KIND, CAUSAL),)  # fmt: skip
        states = taken
        stage = gl.where(stage == (STAGES - 1) * STAGE, 0, stage + STAGE)
    wait_copies(thread, 0)
    gl.thread_barrier()  # no warp reads its ring any more
    for c in gl.static_range(TILES):
        put_tile(memory, states[c], thread, c, D, TILES)
    gl.thread_barrier()
    store(memory, out, lse, sink_logits, unit, split, out_split, lse_split, b, kv_head,
          q_len, thread, KV_HEADS, GROUPS, D, WARPS, HELD)  # fmt: skip


@gluon.jit
def put_tile(memory, state, thread, TILE: gl.constexpr, D: gl.constexpr, TILES: gl.constexpr):
    """Lay a warp's tile into its part of shared memory: rows of D numbers, maxima, sums."""
    LINE: gl.constexpr = (D + 4) * 4
    TOPS: gl.constexpr = ROWS * TILES * LINE
    m0, m1, l0, l1, acc = state
    lane = thread % 32
    g, t = lane // 4, lane % 4
    part = memory + thread // 32 * ((LINE + 8) * ROWS * TILES)
    place = part + (TILE * ROWS + 2 * t) * LINE + g * 4
    for j in gl.static_range(D // 16):
        for e in gl.static_range(4):
            put_number(place, acc[j][e], (16 * j + e // 2 * 8) * 4 + e % 2 * LINE)
    place = part + (TILE * ROWS + 2 * t) * 4
    put_number(place, m0, TOPS)
    put_number(place, m1, TOPS + 4)
    put_number(place, sum_over_rows(l0), TOPS + 4 * ROWS * TILES)
    put_number(place, sum_over_rows(l1), TOPS + 4 * ROWS * TILES + 4)


@gluon.jit
def joined(memory, row, channel, unit, D: gl.constexpr, WARPS: gl.constexpr,
           TILES: gl.constexpr):  # fmt: skip
    """(maximum, sum of weights, output in four quarters of a row) of all warps together."""
    LINE: gl.constexpr = (D + 4) * 4
    TOPS: gl.constexpr = ROWS * TILES * LINE
    PART: gl.constexpr = (LINE + 8) * ROWS * TILES
    most = get_number(memory + row * 4, TOPS)
    for w in gl.static_range(1, WARPS):
        most = gl.maximum(most, get_number(memory + row * 4, w * PART + TOPS))
    l = most * 0.0
    sums = (l, l, l, l)
    for w in gl.static_range(WARPS):
        shrink = gl.exp2((get_number(memory + row * 4, w * PART + TOPS) - most) * unit)
        l += get_number(memory + row * 4, w * PART + TOPS + 4 * ROWS * TILES) * shrink
        more = ()
        for c in gl.static_range(4):
            found = get_number(memory + row * LINE + channel * 4, w * PART + c * D)
            more += (sums[c] + found * shrink,)
        sums = more
    return most, l, sums


@gluon.jit
def store(memory, out, lse, sink_logits, unit, split, out_split, lse_split, b, kv_head,
          q_len, thread, KV_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr,
          WARPS: gl.constexpr, HELD: gl.constexpr):  # fmt: skip
    """Join the warps and write output and lse, every fourth of a row's channels a thread."""
    EACH: gl.constexpr = D // 4
    TILES: gl.constexpr = (HELD + ROWS - 1) // ROWS
    TURNS: gl.constexpr = (HELD * EACH + 32 * WARPS - 1) // (32 * WARPS)
    for turn in gl.static_range(TURNS):
        item = thread + turn * (32 * WARPS)
        row, channel = gl.minimum(item // EACH, HELD - 1), item % EACH
        most, l, sums = joined(memory, row, channel, unit, D, WARPS, TILES)
        index = row // GROUPS
        h = kv_head * GROUPS + row % GROUPS
        keep = (item < HELD * EACH) & (index < q_len)
        # Where nothing was seen, most * unit is huge; two roundings must never be subtracted.
        top = gl.where(l == 0, LOWEST, most * unit)
        found, shrink, safe = ended(top, l, sink_logits, h, keep & (split == 0))
        at = lse + split.to(gl.int64) * lse_split + (b * KV_HEADS * GROUPS + h) * q_len + index
        gl.store(at, found, mask=keep & (channel == 0))
        at = out.ptr + split.to(gl.int64) * out_split + b * out.batch + channel
        at += h.to(gl.int64) * out.head + index.to(gl.int64) * out.row
        for c in gl.static_range(4):
            number = (sums[c] * (shrink / safe)).to(out.ptr.dtype.element_ty)
            gl.store(at + c * EACH, number, mask=keep)
