"""Rotation of queries and keys: tables of cos and sin, and the rotation itself.

A head of D dimensions has R / 2 pairs that are rotated and D - R dimensions that stay.  There are
two layouts of the pairs: halves ("neox": i with i + R/2; Llama, Qwen, gpt-oss) and neighbours
("gptj": 2i with 2i + 1; GPT-J, DeepSeek).  They are not interchangeable; the checkpoint decides.

    angle = position * inv_freq[i]
    (a, b) -> (a cos - b sin, b cos + a sin)

Angles are made in float64 and only cos and sin are cast: a float32 angle near position 1,000,000
is good to 0.06 rad, a float32 cosine to 6e-8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTables(NamedTuple):
    """cos and sin of every (position, pair), times the magnitude of the scaling rule."""

    cos: Tensor  # [..., L, R/2]
    sin: Tensor  # [..., L, R/2]


def tables(
    inv_freq: Tensor,
    positions: Tensor,
    attention_factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> RotaryTables:
    """cos and sin [..., L, R/2] for integer positions [..., L], computed in float64, then cast.

    Args:
        inv_freq: float64 [R/2], radians per position, from `inverse_frequencies`.
        positions: absolute token indices, [L] or [B, L]; their device is that of the tables.
        attention_factor: multiplies both tables (the rule's magnitude).
        dtype: of the tables.  Keep float32 for half-precision heads: `apply` then rounds once.

    Raises:
        ValueError: inv_freq not float64 [R/2], or positions not integers.
    """
    if inv_freq.dtype != torch.float64 or inv_freq.dim() != 1:
        raise ValueError(
            "inv_freq must be float64 of shape [rotary_dim / 2], got "
            f"{_name(inv_freq.dtype)} {list(inv_freq.shape)}. Use inverse_frequencies(...); a "
            "float32 frequency is off by 0.06 rad at position 1,000,000."
        )
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(
            f"positions must be integers, got {_name(positions.dtype)}. "
            "They are absolute token indices: use torch.arange or .long()."
        )
    angles = positions.double()[..., None] * inv_freq.to(positions.device)  # [..., L, R/2]
    # In place where possible: at a million positions each float64 table is half a gigabyte.
    cos = angles.cos().mul_(attention_factor).to(dtype)
    sin = angles.sin_().mul_(attention_factor).to(dtype)
    return RotaryTables(cos, sin)


def apply(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x [B, H, L, D] with its first R dimensions rotated; same shape and dtype, differentiable.

    RoPE, https://arxiv.org/abs/2104.09864.  Computed in the wider type of x and the tables and
    rounded once, so bfloat16 heads with float32 tables lose nothing on the way.

    Args:
        x: queries or keys, any number of heads.
        cos: [L, R/2], or [B, L, R/2] for positions that differ between rows; R at most D.
        sin: as cos.
        interleaved: pairs are neighbours ("gptj") instead of halves ("neox").

    Raises:
        ValueError: shapes that do not fit, or an x without a floating point.
    """
    _check_apply(x, cos, sin)
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # [B, 1, L, R/2]
    rotary_dim = 2 * cos.shape[-1]
    pairs, unrotated = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = pairs[..., 0::2], pairs[..., 1::2]  # [B, H, L, R/2] each
    else:
        a, b = pairs.chunk(2, dim=-1)  # [B, H, L, R/2] each
    rotated = ((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype))
    if interleaved:
        return torch.cat((torch.stack(rotated, dim=-1).flatten(-2), unrotated), dim=-1)
    return torch.cat((*rotated, unrotated), dim=-1)  # [B, H, L, D]


def _check_apply(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            "x must be a floating-point tensor of shape [batch, heads, length, head_dim], got "
            f"{_name(x.dtype)} {list(x.shape)}. Rotate before quantizing."
        )
    if cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must have one shape, got {list(cos.shape)} and {list(sin.shape)}. "
            "Take both from one call of tables(...)."
        )
    batch, _, length, head_dim = x.shape
    fits = cos.dim() == 2 or (cos.dim() == 3 and cos.shape[0] in (1, batch))
    if not fits or cos.shape[-2] != length:
        raise ValueError(
            f"cos and sin must have shape [{length}, R/2] or [{batch}, {length}, R/2] for x of "
            f"shape {list(x.shape)}, got {list(cos.shape)}. Make the tables for the positions of x."
        )
    if 2 * cos.shape[-1] > head_dim:
        raise ValueError(
            f"cos and sin rotate {2 * cos.shape[-1]} dimensions, but x has head_dim {head_dim}. "
            "The tables hold one column per pair (rotary_dim / 2), not one per dimension."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
