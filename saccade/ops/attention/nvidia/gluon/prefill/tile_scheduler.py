"""Who does what, when, in the Gluon kernel: pieces of work, tiles of keys, rings of stages."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.gpu.triton_lang import block_list_at, key_tiles


@gluon.jit
def piece_of_work(k, tiles, section, num_work):
    """The k-th piece of work of this program: (batch * heads + head, tile of queries).

    Work is sorted by length within sections of heads whose keys fit the L2 cache together: longest
    first in the section that comes last, shortest first in the one before it, and so on in turn.
    Lengths then never jump, and programs, which take work in snakes, all get about the same.
    """
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    place = gl.where(k % 2 == 0, place, programs - 1 - place)
    still = num_work - 1 - (k * programs + place)  # pieces that come after it
    per_section = tiles * section
    number = still // per_section
    inside = still % per_section
    tile = inside // section
    tile = gl.where(number % 2 == 0, tile, tiles - 1 - tile)
    return number * section + inside % section, tile


@gluon.jit
def amount_of_work(num_work):
    """How many pieces of work this program has."""
    programs = gl.num_programs(0)
    whole = num_work // programs
    place = gl.program_id(0)
    place = gl.where(whole % 2 == 0, place, programs - 1 - place)
    return whole + gl.where(place < num_work % programs, 1, 0)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring, and its phase, which flips with every round."""
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def plan(
    tile, q_len, k_len, q_offset, mask_args, block_lists, b, kv_head,
    CAUSAL: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Key tiles of a tile of queries: (where they are, right edge, right edge + full, all, keys).

    They are visited from right to left, then the sinks; or as a list says, the ones with holes
    first.  A tile of queries that sees nothing visits one tile, and all of its keys are hidden.
    """
    if block_lists.tiles is not None:
        visited, full, total = block_list_at(block_lists, b.to(gl.int64), kv_head, tile)
        right = total - full
        within = total
        where = visited, full, right
    else:
        row = tile * M
        last_q = q_offset + gl.minimum(row + M, q_len) - 1
        num_sinks, first, full_from, full_to, last = key_tiles(
            q_offset + row, last_q, k_len, mask_args, CAUSAL, N
        )
        right = last - full_to
        within = last - full_from
        total = last - first + num_sinks
        where = last, total, num_sinks
    keys = gl.where(total > 0, k_len, 0)
    return where, right, within, gl.maximum(total, 1), keys


@gluon.jit
def key_tile(j, where, block_lists):
    """Which tile of keys is visited j-th."""
    if block_lists.tiles is not None:
        visited, full, edges = where
        tile = gl.load(visited + gl.where(j < edges, full + j, j - edges))
    else:
        last, total, num_sinks = where
        tile = gl.where(j < total - num_sinks, last - 1 - j, total - 1 - j)
        tile = gl.maximum(tile, 0)
    return tile
