"""The tile scheduler: work tiles of a CTA, and the tiles of keys that each of them reads."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.gpu.triton_lang import block_list_at, key_tiles

PAST_ALL_KEYS = gl.constexpr(1 << 30)


@gluon.jit
def work_tile(i, num_q_tiles, heads_per_section, num_work_tiles):
    """The i-th work tile of this CTA: (batch * heads + head, tile of queries).

    Heads whose K and V fit the L2 cache together are one section.  Within the last section tiles
    are sorted with the most keys first, in the one before it with the fewest first, and so on
    alternately, so that lengths never jump.  CTAs take tiles in serpentine order, which balances
    the keys that each of them reads.
    """
    num_ctas = gl.num_programs(0)
    cta = gl.program_id(0)
    cta = gl.where(i % 2 == 0, cta, num_ctas - 1 - cta)
    remaining = num_work_tiles - 1 - (i * num_ctas + cta)  # work tiles that come after it
    per_section = num_q_tiles * heads_per_section
    section = remaining // per_section
    inside = remaining % per_section
    tile = inside // heads_per_section
    tile = gl.where(section % 2 == 0, tile, num_q_tiles - 1 - tile)
    return section * heads_per_section + inside % heads_per_section, tile


@gluon.jit
def work_of(i, sizes, PACK: gl.constexpr, SPLIT_KV: gl.constexpr):
    """The i-th work tile of this CTA: (row of the batch, its first head, tile, split of the keys).

    Args:
        PACK: heads of one KV head whose queries a tile holds.
    """
    _q, _k, _offset, heads, _groups, num_q_tiles, heads_per_section, num_work_tiles, splits = sizes
    bh, tile = work_tile(i, num_q_tiles, heads_per_section, num_work_tiles)
    split = 0
    if SPLIT_KV:
        split = tile % splits
        tile = tile // splits
    return bh // (heads // PACK), bh % (heads // PACK) * PACK, tile, split


@gluon.jit
def work_tile_count(num_work_tiles):
    """How many work tiles this CTA computes."""
    num_ctas = gl.num_programs(0)
    rounds = num_work_tiles // num_ctas
    cta = gl.program_id(0)
    cta = gl.where(rounds % 2 == 0, cta, num_ctas - 1 - cta)
    return rounds + gl.where(cta < num_work_tiles % num_ctas, 1, 0)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next pipeline stage, and its mbarrier phase, which flips whenever the stages wrap."""
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def kv_tile_plan(
    tile, q_len, k_len, q_offset, mask_args, block_lists, b, kv_head,
    CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PARTS: gl.constexpr = 1,
):  # fmt: skip
    """Tiles of keys that a tile of queries reads: (plan, right_end, full_end, num_tiles, num_keys).

    They are read from right to left, then those of the attention sinks; with a block list, the
    partly visible ones first.  Tiles 0 .. right_end - 1 need a mask on the right, and tiles
    right_end .. full_end - 1 need none.  A tile of queries without any visible key still reads one
    tile, with num_keys = 0, so that all of it is masked.

    Args:
        PARTS: listed blocks that a tile of keys holds side by side.  Where they do not come out
            even, the first tile begins with gaps; it needs a mask then.
    """
    if block_lists.tiles is not None:
        listed, full, count = block_list_at(block_lists, b.to(gl.int64), kv_head, tile)
        gaps = (PARTS - count % PARTS) % PARTS
        partial = count - full
        right_end = (gaps + partial + PARTS - 1) // PARTS
        num_tiles = (gaps + count) // PARTS
        full_end = num_tiles
        plan = listed, full, partial, gaps
    else:
        row = tile * BLOCK_M
        last_q = q_offset + gl.minimum(row + BLOCK_M, q_len) - 1
        num_sinks, first, full_from, full_to, last = key_tiles(
            q_offset + row, last_q, k_len, mask_args, CAUSAL, BLOCK_N
        )
        right_end = last - full_to
        full_end = last - full_from
        num_tiles = last - first + num_sinks
        plan = last, num_tiles, num_sinks, 0
    num_keys = gl.where(num_tiles > 0, k_len, 0)
    return plan, right_end, full_end, gl.maximum(num_tiles, 1), num_keys


@gluon.jit
def split_of_plan(found, split, splits):
    """What `kv_tile_plan` found, for one split of the tiles of keys: a run of them, maybe empty."""
    plan, right_end, full_end, num_tiles, num_keys = found
    last, all_tiles, num_sinks, _begin = plan
    begin = num_tiles * split // splits
    count = num_tiles * (split + 1) // splits - begin
    right_end = gl.minimum(gl.maximum(right_end - begin, 0), count)
    full_end = gl.minimum(gl.maximum(full_end - begin, 0), count)
    num_keys = gl.where(count > 0, num_keys, 0)
    plan = last, all_tiles, num_sinks, begin
    return plan, right_end, full_end, gl.maximum(count, 1), num_keys


@gluon.jit
def kv_tile(j, plan, block_lists):
    """Index of the tile of keys that is read j-th."""
    if block_lists.tiles is not None:
        listed, full, partial, _gaps = plan
        tile = gl.load(listed + gl.where(j < partial, full + j, j - partial))
    else:
        last, num_tiles, num_sinks, begin = plan
        j += begin
        tile = gl.where(j < num_tiles - num_sinks, last - 1 - j, num_tiles - 1 - j)
        tile = gl.maximum(tile, 0)
    return tile


@gluon.jit
def kv_starts(j, plan, block_lists, BLOCK_N: gl.constexpr, PARTS: gl.constexpr):
    """First keys of the parts of the tile of keys that is read j-th; of a gap PAST_ALL_KEYS."""
    if PARTS == 1:
        starts = (kv_tile(j, plan, block_lists) * BLOCK_N,)
    else:
        WIDTH: gl.constexpr = BLOCK_N // PARTS
        listed, full, partial, gaps = plan
        starts = ()
        for i in gl.static_range(PARTS):
            n = j * PARTS + i - gaps
            at = listed + gl.where(n < partial, full + n, n - partial)
            real = (n >= 0) & (n < full + partial)
            starts += (gl.load(at, mask=real, other=PAST_ALL_KEYS // WIDTH) * WIDTH,)
    return starts
