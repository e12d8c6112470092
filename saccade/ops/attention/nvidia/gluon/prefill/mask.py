"""Masks of the prefill kernels: causal, sequence ends, sliding window and attention sinks."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def unmasked_range(first_q_pos, k_len, mask_args, CAUSAL: gl.constexpr, ROWS: gl.constexpr):
    """Keys visible to all queries first_q_pos .. first_q_pos + ROWS - 1: (first, end)."""
    begin = 0
    if mask_args.window is not None:
        begin = first_q_pos + ROWS - mask_args.window
    end = k_len
    if CAUSAL:
        end = gl.minimum(end, first_q_pos + 1)
    return begin, end


@gluon.jit
def key_positions(starts, BLOCK_N: gl.constexpr, PARTS: gl.constexpr, LAYOUT: gl.constexpr):
    """Positions `[1, BLOCK_N]` of the keys of a tile whose parts begin at `starts`."""
    WIDTH: gl.constexpr = BLOCK_N // PARTS
    index = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    k_pos = starts[0] + index
    for i in gl.static_range(1, PARTS):
        k_pos = gl.where(index < i * WIDTH, k_pos, starts[i] - i * WIDTH + index)
    return k_pos


@gluon.jit
def mask_right(s, q_pos, k_pos, k_len, CAUSAL: gl.constexpr):
    """Scores of a tile of keys with -inf past the last key visible to a query."""
    last = k_len - 1
    if CAUSAL:
        last = gl.minimum(q_pos, last)[:, None]
    return gl.where(k_pos <= last, s, float("-inf"))


@gluon.jit
def mask_left(s, q_pos, k_pos, mask_args):
    """Scores of a tile of keys with -inf before the window, attention sinks excepted."""
    visible = k_pos > (q_pos - mask_args.window)[:, None]
    if mask_args.sinks is not None:
        visible = visible | (k_pos < mask_args.sinks)
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def apply_mask(s, q_pos, k_start, k_len, mask_args, CAUSAL: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores of a tile of keys with -inf where a key is not visible to a query."""
    k_pos = key_positions((k_start,), s.shape[1], 1, LAYOUT)
    s = mask_right(s, q_pos, k_pos, k_len, CAUSAL)
    if mask_args.window is not None:
        s = mask_left(s, q_pos, k_pos, mask_args)
    return s
