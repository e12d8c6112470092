"""Attention over fp8 on one GPU, beside the same problem in bfloat16: a case of gpu_attention.py.

The time of fp8 holds the transposition of the values, and not the making of codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.bench.gpu import random, seconds
from saccade.core import Mask, PerHeadFP8, quantize_fp8_per_head
from saccade.ops import attention

ROWS, HEADS = 64, 4  # last queries and first heads that are compared


def numbers(x: PerHeadFP8, heads: int, rows: int | None = None) -> Tensor:
    """What some codes stand for, in float64."""
    qdata = x.qdata[:, :heads] if rows is None else x.qdata[:, :heads, -rows:]
    return qdata.double() * x.scale[:, :heads, None, None].double()


def rounded(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention in float64 but for weights of 2^8 at most in fp8: what no kernel can undercut."""
    scores = q @ k.mT * q.shape[3] ** -0.5
    if causal:
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        scores = scores.masked_fill(later, -torch.inf)
    weights = 256 * (scores - scores.amax(-1, keepdim=True)).exp()
    return weights.float().to(torch.float8_e4m3fn).double() @ v / weights.sum(-1, keepdim=True)


def relative(ours: Tensor, truth: Tensor) -> float:
    """||ours - truth|| / ||truth||."""
    return ((ours.double() - truth).norm() / truth.norm()).item()


def fp8_case(length: int, dim: int, *, causal: bool = True) -> dict[str, Any]:
    """One row: TFLOP/s on visible pairs of fp8, bf16 (Gluon) and cuDNN, and the error of fp8.

    Raises:
        RuntimeError: fp8 errs more than half as much again as rounded weights must.
    """
    heads, kv_heads = 32, 8
    q, k, v = (random(1, h, length, dim) for h in (heads, kv_heads, kv_heads))
    scaled = [quantize_fp8_per_head(x) for x in (q, k, v)]

    def ours() -> Tensor:
        return attention(*scaled, causal=causal, backend="gluon_fp8")  # type: ignore[return-value]

    wide = [numbers(scaled[0], HEADS, ROWS), *(numbers(x, 1) for x in scaled[1:])]
    truth = attention(*wide, causal=causal, backend="reference")
    assert isinstance(truth, Tensor)
    error = relative(ours()[:, :HEADS, -ROWS:], truth)
    least = relative(rounded(wide[0], wide[1], wide[2], causal), truth)
    if not error < 1.5 * least:
        raise RuntimeError(f"fp8 {length} {dim}: relative error {error:.2e}, {least:.2e} at best.")
    work = 4 * heads * dim * Mask(causal=causal).num_pairs(length, length) / 1e12
    row = {
        "case": "fp8", "length": length, "dim": dim, "causal": causal, "error": error,
        "error_of_rounded_weights": least, "gluon_fp8": work / seconds(ours),
        "gluon": work / seconds(lambda: attention(q, k, v, causal=causal, backend="gluon")),
    }  # fmt: skip
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        took = seconds(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        )
    return row | {"cudnn": work / took}
