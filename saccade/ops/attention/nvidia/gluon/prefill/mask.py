"""Tiles of keys that some queries see in part: what of them is hidden, and which they are."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def seen_by_all(first_q, k_len, mask_args, CAUSAL: gl.constexpr, ROWS: gl.constexpr):
    """Keys that queries first_q .. first_q + ROWS - 1 all see: (first, one past the last)."""
    begin = 0
    if mask_args.window is not None:
        begin = first_q + ROWS - mask_args.window
    end = k_len
    if CAUSAL:
        end = gl.minimum(end, first_q + 1)
    return begin, end


@gluon.jit
def hide_right(s, q_pos, start, k_len, CAUSAL: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores of a tile of keys, -inf past the last key that a query sees: one limit a row."""
    k_pos = start + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    last = k_len - 1
    if CAUSAL:
        last = gl.minimum(q_pos, last)[:, None]
    return gl.where(k_pos <= last, s, float("-inf"))


@gluon.jit
def hide_left(s, q_pos, start, mask_args, LAYOUT: gl.constexpr):
    """Scores of a tile of keys, -inf before the window, unless a key is a sink."""
    k_pos = start + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    near = k_pos > (q_pos - mask_args.window)[:, None]
    if mask_args.sinks is not None:
        near = near | (k_pos < mask_args.sinks)
    return gl.where(near, s, float("-inf"))


@gluon.jit
def hide(s, q_pos, start, k_len, mask_args, CAUSAL: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores of a tile of keys, -inf where a query does not see a key."""
    s = hide_right(s, q_pos, start, k_len, CAUSAL, LAYOUT)
    if mask_args.window is not None:
        s = hide_left(s, q_pos, start, mask_args, LAYOUT)
    return s
