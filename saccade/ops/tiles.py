"""Device functions that the Triton kernels share: ranges of tiles, visibility, scores, softmax.

Records of pointers and numbers travel into kernels as named tuples; a field that is None is known
at compile time, so a kernel without a window, bias or padding holds no trace of them.

Weights are computed as `exp2(score * unit - max * unit)`: one multiply-add and one exp2 an element.
Without softcap and bias a score is the raw product q.k and `unit` carries scale * log2(e); with
them, scores are in powers of two already and `unit` is 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A first running maximum below every score, yet finite: a difference of two of them is 0, not nan.
LOWEST = tl.constexpr(-1.0e30)


class Plane(NamedTuple):
    """A tensor `[batch, heads, rows, dim]` with unit last stride: pointer and strides."""

    ptr: Any
    batch: Any
    head: Any
    row: Any


class Rules(NamedTuple):
    """Who sees whom, beyond causality; every field may be None.

    Attributes:
        window, sinks: as in Mask.
        padding: bool `[B, Lk]`, True for real keys; padding_row: its row stride.
        foreign: bool mask `[B, H, Lq, Lk]`; allowed: selection `[B, Hkv, q blocks, k blocks]` of
            q_block x k_block; each with its strides.
    """

    window: Any = None
    sinks: Any = None
    padding: Any = None
    padding_row: Any = None
    foreign: Any = None
    foreign_batch: Any = None
    foreign_head: Any = None
    foreign_row: Any = None
    allowed: Any = None
    allowed_batch: Any = None
    allowed_head: Any = None
    allowed_row: Any = None
    q_block: Any = None
    k_block: Any = None


class Terms(NamedTuple):
    """What turns q.k into a score: `scale` (times log2(e) if raw), softcap, ALiBi slopes, sinks.

    Attributes:
        slopes: float32 `[B, H]` or None; slopes_batch: its batch stride.
        sinks: float32 `[H]` learned logits or None.
    """

    scale: Any
    softcap: Any = None
    slopes: Any = None
    slopes_batch: Any = None
    sinks: Any = None


class Bounds(NamedTuple):
    """Where rows begin and end, for what differs over the batch; every field may be None.

    Attributes:
        offsets: int64 `[B]`, position of each row's first query.
        lengths: int32 or int64 `[B, Hkv]` (strides lengths_batch, lengths_head), keys of each row.
        cu_q, cu_k: cumulative lengths of packed documents.
        document: int32 `[tiles]`, the document a tile lies in, -1 for none; first_tile: int32
            `[documents]`, the first tile of each.
        origin: int64 `[1]`, the position of key 0; offsets and lengths count from it afterwards.
    """

    offsets: Any = None
    lengths: Any = None
    lengths_batch: Any = None
    lengths_head: Any = None
    cu_q: Any = None
    cu_k: Any = None
    document: Any = None
    first_tile: Any = None
    origin: Any = None


class Visits(NamedTuple):
    """Tiles to visit where a BlockSelection decides: the full ones first, then those with holes.

    Attributes:
        tiles: int32 `[B | 1, Hkv | 1, rows, columns]`; counts: int32 `[B | 1, Hkv | 1, rows, 2]`,
            how many are full and how many are to be visited at all.
    """

    tiles: Any = None
    counts: Any = None
    batch: Any = None
    head: Any = None
    row: Any = None


@triton.jit
def extent(bounds, b, kv_head, tile, q_len, k_len, q_offset):
    """Which rows a tile belongs to: (first query, first key, q_len, k_len, offset, tile in row)."""
    q_first = tl.cast(0, tl.int64)
    k_first = tl.cast(0, tl.int64)
    if bounds.document is not None:
        document = tl.load(bounds.document + tile)
        known = document >= 0
        at = tl.maximum(document, 0)
        q_first = tl.load(bounds.cu_q + at).to(tl.int64)
        k_first = tl.load(bounds.cu_k + at).to(tl.int64)
        q_len = tl.where(known, tl.load(bounds.cu_q + at + 1) - q_first, 0).to(tl.int32)
        k_len = (tl.load(bounds.cu_k + at + 1) - k_first).to(tl.int32)
        tile = tile - tl.load(bounds.first_tile + at)
        q_offset = k_len - q_len
    if bounds.offsets is not None:
        q_offset = tl.load(bounds.offsets + b).to(tl.int32)
    if bounds.lengths is not None:
        at = b * bounds.lengths_batch + kv_head * bounds.lengths_head
        k_len = tl.minimum(k_len, tl.load(bounds.lengths + at).to(tl.int32))
    if bounds.origin is not None:
        origin = tl.load(bounds.origin).to(tl.int32)
        k_len = k_len - origin
        q_offset = q_offset - origin
    return q_first, k_first, q_len, k_len, q_offset, tile


@triton.jit
def key_tiles(first_q, last_q, k_len, rules, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """Key tiles that queries see: (sink tiles, first, full from, full to, stop).

    Tiles [0, sinks) and [first, stop) are visited; every query sees all of [full from, full to).
    """
    stop = k_len
    full_stop = k_len
    if CAUSAL:
        stop = tl.minimum(k_len, last_q + 1)
        full_stop = tl.minimum(k_len, first_q + 1)
    stop = tl.maximum(stop, 0)
    first = 0
    full_first = 0
    num_sinks = 0
    if rules.window is not None:
        first = tl.minimum(tl.maximum(first_q - rules.window + 1, 0), stop) // BLOCK
        full_first = tl.maximum(last_q - rules.window + 1, 0)
        if rules.sinks is not None:
            num_sinks = tl.minimum(tl.cdiv(tl.minimum(rules.sinks, stop), BLOCK), first)
    last = tl.cdiv(stop, BLOCK)
    full_to = tl.maximum(full_stop, 0) // BLOCK
    if (rules.padding is not None) or (rules.foreign is not None):
        full_to = 0
    full_from = tl.minimum(tl.maximum(tl.cdiv(full_first, BLOCK), first), last)
    full_to = tl.minimum(tl.maximum(full_to, full_from), last)
    return num_sinks, first, full_from, full_to, last


@triton.jit
def query_tiles(first_k, last_k, q_len, q_offset, rules, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """Query tiles that see keys first_k .. last_k: (first, full from, full to, stop)."""
    first = 0
    full_first = 0
    stop = q_len
    full_stop = q_len
    if CAUSAL:
        first = tl.maximum(first_k - q_offset, 0)
        full_first = tl.maximum(last_k - q_offset, 0)
    if rules.window is not None:
        reach = tl.minimum(tl.maximum(last_k + rules.window - q_offset, 0), q_len)
        full_stop = tl.minimum(tl.maximum(first_k + rules.window - q_offset, 0), q_len)
        if rules.sinks is not None:
            reach = tl.where(first_k < rules.sinks, q_len, reach)
            full_stop = tl.where(last_k < rules.sinks, q_len, full_stop)
        stop = reach
    first = tl.minimum(first, stop) // BLOCK
    last = tl.cdiv(stop, BLOCK)
    full_to = full_stop // BLOCK
    if (rules.padding is not None) or (rules.foreign is not None):
        full_to = 0
    full_from = tl.minimum(tl.maximum(tl.cdiv(full_first, BLOCK), first), last)
    full_to = tl.minimum(tl.maximum(full_to, full_from), last)
    return first, full_from, full_to, last


@triton.jit
def tile_with_holes(i, num_sinks, first, full_from, full_to):
    """The i-th of the visited key tiles that are not full: sink tiles, left edge, right edge."""
    tile = i - num_sinks + first
    tile = tl.where(tile >= full_from, tile + full_to - full_from, tile)
    return tl.where(i < num_sinks, i, tile)


@triton.jit
def visit_list(visits, b, kv_head, row):
    """Where a row of tiles has its list: (pointer, full tiles, tiles in all)."""
    at = b * visits.batch + kv_head * visits.head + row.to(tl.int64) * visits.row
    count = visits.counts + 2 * (at // visits.row)
    return visits.tiles + at, tl.load(count), tl.load(count + 1)


@triton.jit
def addresses(ptr, rows, row_stride, dims):
    """Pointers to the elements of a tile, `rows` counted from `ptr`; 64-bit throughout."""
    return ptr + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]


@triton.jit
def load_tile(at, keep, dims, DIM: tl.constexpr, MASKED: tl.constexpr):
    """A tile of rows; rows outside `keep` (where MASKED) and padded dimensions are 0, unread."""
    if MASKED:
        return tl.load(at, mask=keep[:, None] & (dims < DIM)[None, :], other=0.0)
    if DIM != dims.shape[0]:
        return tl.load(at, mask=(dims < DIM)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def real_keys(rules, b, k_pos, k_len):
    """Keys that exist: inside the row, and not padding.  The rest is never read."""
    real = (k_pos >= 0) & (k_pos < k_len)
    if rules.padding is not None:
        seen = tl.load(rules.padding + b * rules.padding_row + k_pos, mask=real, other=0)
        real = real & (seen != 0)
    return real


@triton.jit
def visible(rules, b, h, kv_head, q_index, q_pos, k_pos, real, q_real, CAUSAL: tl.constexpr):
    """Who sees whom in one tile: `q_index`, `q_pos`, `q_real` are columns, `k_pos`, `real` rows.

    `h` is the query head, a number or a column.
    """
    see = real & q_real
    distance = q_pos - k_pos
    if CAUSAL:
        see = see & (distance >= 0)
    if rules.window is not None:
        near = distance < rules.window
        if rules.sinks is not None:
            near = near | (k_pos < rules.sinks)
        see = see & near
    if rules.allowed is not None:
        row = rules.allowed + b * rules.allowed_batch + kv_head * rules.allowed_head
        row += (q_index // rules.q_block).to(tl.int64) * rules.allowed_row
        see = see & (tl.load(row + k_pos // rules.k_block, mask=see, other=0) != 0)
    if rules.foreign is not None:
        row = rules.foreign + b * rules.foreign_batch + h * rules.foreign_head
        row += q_index.to(tl.int64) * rules.foreign_row
        see = see & (tl.load(row + k_pos, mask=see, other=0) != 0)
    return see


@triton.jit
def scores_of(qk, terms, slope, q_pos, k_pos, RAW: tl.constexpr):
    """Scores of one tile from the products q.k, in the units of the module's first lines."""
    if RAW:
        return qk
    s = qk * (terms.scale * LOG2E)
    if terms.softcap is not None:
        cap = terms.softcap * LOG2E
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which neither overflows nor needs a library.
        s = cap * (1 - 2 / (tl.exp2(s * (2 * LOG2E / cap)) + 1))
    if terms.slopes is not None:
        s = s - slope * LOG2E * tl.abs(q_pos - k_pos).to(tl.float32)
    return s


@triton.jit
def softcap_slope(qk, terms):
    """Derivative of the softcap at the products q.k: 1 - tanh(x)^2."""
    t = 1 - 2 / (tl.exp2(qk * (terms.scale * 2 * LOG2E / terms.softcap)) + 1)
    return 1 - t * t


@triton.jit
def unit_of(terms, RAW: tl.constexpr):
    """Factor from scores to powers of two."""
    return terms.scale * LOG2E if RAW else 1.0


@triton.jit
def online_softmax(m, l, s, unit):
    """Take a tile of scores into the running maximum and sum: (m, l, weights, shrink)."""
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s * unit - (m_new * unit)[:, None])
    shrink = tl.exp2((m - m_new) * unit)
    return m_new, l * shrink + tl.sum(p, 1), p, shrink


@triton.jit
def finish(m, l, acc, unit, sink):
    """(output, lse) of a row of tiles; `sink` is the learned logit or None."""
    # Where nothing was seen, m * unit is huge; two roundings of it must never be subtracted.
    top = tl.where(l == 0, LOWEST, m * unit)
    if sink is not None:
        raised = tl.maximum(top, sink * LOG2E)
        shrink = tl.exp2(top - raised)
        l = l * shrink + tl.exp2(sink * LOG2E - raised)
        acc = acc * shrink[:, None]
        top = raised
    empty = l == 0
    safe = tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(safe)) * LN2)
    return acc / safe[:, None], lse
