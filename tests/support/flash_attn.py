"""Attention as flash-attn documents it, from its formulas, in float64 and plain PyTorch.

It shares no code with the package.  Layouts are flash-attn's, one sequence at a time: queries
`[seqlen_q, heads, head_dim]`, keys `[seqlen_k, kv_heads, head_dim]`.  Query i of a sequence is at
position i + seqlen_k - seqlen_q; with a window (left, right) it sees the keys from position - left
to position + right.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.support.gpu import on_ampere
from tests.support.random_inputs import normal

DEVICES = ["cpu", pytest.param("cuda", marks=on_ampere)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Meaning:
    """The options of one call that change what is computed."""

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None

    @property
    def keywords(self) -> dict[str, object]:
        """The same as keyword arguments of flash-attn's functions."""
        return {
            "causal": self.causal,
            "window_size": self.window,
            "softcap": self.softcap,
            "softmax_scale": self.scale,
        }

    def sees(self, q_len: int, k_len: int, first: int = 0) -> Tensor:
        """Which keys each query sees, bool `[q_len, k_len]`; keys before `first` are padding."""
        left, right = self.window
        position = torch.arange(q_len)[:, None] + k_len - q_len
        key = torch.arange(k_len)[None]
        seen = (key >= first).expand(q_len, k_len)
        if self.causal:
            seen = seen & (key <= position)
        elif right >= 0:
            seen = seen & (key <= position + right)
        return seen & (key >= position - left) if left >= 0 else seen


def sequence(
    q: Tensor, k: Tensor, v: Tensor, meaning: Meaning, slopes: Tensor | None = None, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Output `[seqlen_q, heads, value_dim]` and lse `[heads, seqlen_q]` of one sequence."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    q_len, heads, dim = q.shape
    k_len = len(k)
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (meaning.scale or dim**-0.5)
    if meaning.softcap > 0:
        scores = meaning.softcap * torch.tanh(scores / meaning.softcap)
    if slopes is not None:
        distance = torch.arange(q_len)[:, None] + k_len - q_len - torch.arange(k_len)
        scores = scores - slopes.cpu().double()[:, None, None] * distance.abs()
    seen = meaning.sees(q_len, k_len, first)
    weights = scores.exp().where(seen, 0)  # the scores of tests are small
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("hqk,khd->qhd", weights / total.where(total > 0, 1), v)
    return out, total.squeeze(-1).log()


def batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meaning: Meaning,
    slopes: Tensor | None = None,
    lens: list[int] | None = None,
    firsts: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The same of batches: `[batch, seqlen_q, heads, value_dim]`, lse `[batch, heads, seqlen_q]`.

    Args:
        lens: keys of each row; firsts: the first key of each row.
    """
    rows = []
    for i in range(len(q)):
        length = k.shape[1] if lens is None else lens[i]
        own = slopes[i] if slopes is not None and slopes.ndim == 2 else slopes
        first = 0 if firsts is None else firsts[i]
        rows.append(sequence(q[i], k[i, :length], v[i, :length], meaning, own, first))
    out, lse = zip(*rows, strict=True)
    return torch.stack(out), torch.stack(lse)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: list[int], interleaved: bool) -> Tensor:
    """x `[seqlen, heads, head_dim]` with token i rotated to positions[i], channel by channel."""
    out, half = x.cpu().double().clone(), cos.shape[1]
    for i, at in enumerate(positions):
        for pair in range(half):
            one, other = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
            a, b = x[i, :, one].cpu().double(), x[i, :, other].cpu().double()
            c, s = float(cos[at, pair]), float(sin[at, pair])
            out[i, :, one], out[i, :, other] = a * c - b * s, a * s + b * c
    return out


def assert_near(found: Tensor, truth: Tensor, allowed: float | None = None) -> None:
    """Fail unless a result is as near to the truth as its dtype allows, infinite where it is."""
    allowed = TOLERANCE[found.dtype] if allowed is None else allowed
    found = found.detach().cpu().double()
    assert found.shape == truth.shape
    assert torch.equal(found.isinf(), truth.isinf())
    gap = (found.nan_to_num(neginf=0) - truth.detach().nan_to_num(neginf=0)).abs()
    assert gap.numel() == 0 or gap.max() <= allowed, f"off by {gap.max():.3g}"


def inputs(
    q_len: int,
    k_len: int,
    heads: int,
    kv_heads: int,
    *,
    rows: int = 2,
    dim: int = 16,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[rows, q_len, heads, dim]`, keys and values `[rows, k_len, kv_heads, dim]`."""
    q = normal(rows, q_len, heads, dim, device=device, dtype=dtype)
    k, v = (normal(rows, k_len, kv_heads, dim, device=device, dtype=dtype) for _ in range(2))
    return q, k, v


def packed(
    q_lens: list[int],
    k_lens: list[int],
    heads: int,
    kv_heads: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    dim: int = 16,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Packed queries, keys and values `[tokens, heads, dim]`, and both cumulative lengths."""
    q = normal(sum(q_lens), heads, dim, device=device, dtype=dtype)
    k, v = (normal(sum(k_lens), kv_heads, dim, device=device, dtype=dtype) for _ in range(2))
    return q, k, v, *(cumulative(lens, device) for lens in (q_lens, k_lens))


def cumulative(lens: list[int], device: str = "cpu") -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lens], device=device).cumsum(0).int()


def in_pages(x: Tensor, lens: list[int], size: int, spare: int = 2) -> tuple[Tensor, Tensor]:
    """Packed keys in pages, in an order of no meaning; (pages, block_table)."""
    counts = [-(-length // size) for length in lens]
    order = torch.randperm(sum(counts) + spare, device=x.device).int()
    pages = torch.full((len(order), size, *x.shape[1:]), torch.nan, device=x.device, dtype=x.dtype)
    table = torch.full((len(lens), max(counts) + 1), -1, dtype=torch.int32, device=x.device)
    used = 0
    for row, (part, count) in enumerate(zip(x.split(lens), counts, strict=True)):
        table[row, :count] = order[used : used + count]
        for at, token in enumerate(part):
            pages[table[row, at // size], at % size] = token
        used += count
    return pages, table
