"""How the Gluon kernel for codes reads memory: every lane what its registers shall hold.

A tensor here is `[warps, g 8, t 4, registers 4]`: what each lane 4 g + t of each warp holds in four
registers, a "quad".  Codes go from memory straight into the registers where the matrix units want
them.  Slot j of a lane is key (g // 2) * 2 SLOTS + 2 j + g % 2 of a step, and lane t owns the
values of tokens 2 SLOTS t onwards, so that neighbours in memory are asked for together.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attend import gluon_codes_ptx as ptx


@triton.constexpr_function
def quads(warps):
    """The layout of all tensors."""
    return gl.BlockedLayout([1, 1, 1, 4], [1, 8, 4, 1], [warps, 1, 1, 1], [3, 2, 1, 0])


@gluon.jit
def places(LENGTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Indices of each element of `[LENGTH, g 8, t 4, registers 4]`, ready to broadcast."""
    w: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    g: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    t: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT)))
    r: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    return (
        gl.arange(0, LENGTH, layout=w)[:, None, None, None],
        gl.arange(0, 8, layout=g)[None, :, None, None],
        gl.arange(0, 4, layout=t)[None, None, :, None],
        gl.arange(0, 4, layout=r)[None, None, None, :],
    )


@gluon.jit
def fetch(at, OFFSET: gl.constexpr, WIDTH: gl.constexpr, ONCE: gl.constexpr = False):
    """Four words at the addresses `at` + OFFSET bytes, WIDTH of them side by side."""
    return gl.inline_asm_elementwise(
        ptx.load(OFFSET, WIDTH, ONCE), ptx.constraints("r", "l"), [at], gl.int32, False, 4
    )


@gluon.jit
def ask_early(at, LEVEL: gl.constexpr):
    """Bring the line at the address of each lane into the cache."""
    return gl.inline_asm_elementwise(
        ptx.prefetch(LEVEL), ptx.constraints("r", "l"), [at], gl.int32, False, 4
    )


@gluon.jit
def fetch_codes(
    head, step, KIND: gl.constexpr, HALF: gl.constexpr, TILES: gl.constexpr, ASIDE: gl.constexpr
):
    """Codes of the tokens of a step: for each tile of 16 and each plane the words of a lane.

    ASIDE words of a head of 128 lie side by side: 4 of keys, whose slots are tokens; 2 of values,
    of tokens a and b, then of c and d.
    """
    ROW: gl.constexpr = HALF * ptx.planes(KIND)
    at = head + step.to(gl.int64) * (16 * TILES * ROW)
    tiles = ()
    for i in gl.static_range(TILES):
        words = ()
        for plane in gl.static_range(ptx.planes(KIND)):
            if HALF == 64:
                words += (fetch(at, 4 * i * ROW + plane * HALF, ASIDE, True),)
                words += (fetch(at, (4 * i + 2) * ROW + plane * HALF, ASIDE, True),)
            else:
                words += (fetch(at, 4 * i * ROW + plane * HALF, ASIDE // 2, True),)
        tiles += (words,)
    return tiles


@gluon.jit
def token_words(at, i: gl.constexpr, GROUPS: gl.constexpr):
    """Scales (or offsets) of the tokens of tiles i and i + 1, eight a lane."""
    words = ()
    for n in gl.static_range(GROUPS):
        words += (fetch(at, 8 * i * GROUPS + 16 * n, 4),)
    return words


@gluon.jit
def fetch_tokens(scale_at, offset_at, GROUPS: gl.constexpr, TILES: gl.constexpr):
    """(scales, offsets) of the tokens of a step, for each pair of tiles."""
    pairs = ()
    for i in gl.static_range(0, TILES, 2):
        pairs += ((token_words(scale_at, i, GROUPS), token_words(offset_at, i, GROUPS)),)
    return pairs


@gluon.jit
def fetch_channels(at, HALF: gl.constexpr):
    """Eight bytes a lane and quad for its channels: queries, scales or offsets, by halves."""
    words = ()
    for half in gl.static_range(2):
        for n in gl.static_range(HALF // 32):
            words += (fetch(at, 2 * (half * HALF + n * 8), 4),)
    return words


@gluon.jit
def address(plane, b, kv_head):
    """Where a head begins, as a number."""
    at = plane.ptr + b * plane.batch + kv_head.to(gl.int64) * plane.head
    return at.to(gl.int64)


@gluon.jit
def load_queries(at, BFLOAT: gl.constexpr, HALF: gl.constexpr):
    """The queries of row g in float16, of the channels that lane t meets in keys."""
    words = fetch_channels(at, HALF)
    queries = ()
    for n in gl.static_range(len(words)):
        word = words[n]
        if BFLOAT:
            word = gl.inline_asm_elementwise(
                ptx.to_half(), ptx.constraints("r", "r"), [word], gl.int32, True, 4
            )
        queries += (word,)
    return queries


@gluon.jit
def real_scales(tokens, token, k_len, GROUPS: gl.constexpr):
    """Scales and offsets, 0 for tokens that do not exist; `token` is the lane's first."""
    kept = ()
    for i in gl.static_range(len(tokens)):
        both = ()
        for part in gl.static_range(2):
            words = ()
            for n in gl.static_range(GROUPS):
                x = tokens[i][part][n]
                here = token + 8 * i + 4 * n
                if GROUPS == 2:
                    x = gl.where(here < k_len, x, 0)
                else:
                    x = gl.where(here + 1 < k_len, x, gl.where(here < k_len, x & 0xFFFF, 0))
                words += (x,)
            both += (words,)
        kept += (both,)
    return kept


@gluon.jit
def real_codes(words, token, k_len, HALF: gl.constexpr):
    """Codes of values, 0 for tokens that do not exist (fp8 codes there might be nan)."""
    kept = ()
    for i in gl.static_range(len(words)):
        tile = ()
        for n in gl.static_range(len(words[i])):
            here = token + 4 * i + (2 * (n % 2) if HALF == 64 else 0)
            tile += (gl.where(here < k_len, words[i][n], 0),)
        kept += (tile,)
    return kept
