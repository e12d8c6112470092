"""Mean and covariance of the queries of a layer before RoPE, collected while a prompt is read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.compress.observation import ExpectedQueries, ObservedQueries
from saccade.compress.policy import SINKS

Rotate = Callable[[Tensor, int | Tensor], Tensor]
"""Moves keys `[B, H, L, D]` by positions, an int or `[L]` or `[B, L]`; see `saccade.rope`."""


def with_statistics(
    older: ObservedQueries | None,
    newer: ObservedQueries,
    q: Tensor,
    positions: Tensor,
    rotate: Rotate,
) -> ObservedQueries:
    """`newer` with the statistics of all queries up to it.

    Args:
        q: the new queries `[B, H, t, D]`, after RoPE.
        positions: of them, int64 `[B | 1, t]`, below 0 for padding.  Those of the first tokens are
            left out: they are unlike all others.
        rotate: moves queries to other positions.
    """
    batch, length = q.shape[0], q.shape[2]
    positions = positions.expand(batch, length)
    real = (positions >= SINKS)[:, None, :, None].float()  # [B, 1, t, 1]
    plain = rotate(q.float(), -positions.clamp_min(0))
    count = real.sum((1, 2, 3))
    per_row = count.clamp_min(1)[:, None, None]
    mean = (real.mT @ plain)[:, :, 0] / per_row
    centered = plain.sub_(mean[:, :, None]).mul_(real)
    scatter = centered.mT @ centered
    if older is not None and older.counted is not None:
        assert older.mean is not None and older.scatter is not None
        count, mean, scatter = _merged(
            (older.counted, older.mean, older.scatter), (count, mean, scatter)
        )
    return newer._replace(counted=count, mean=mean, scatter=scatter)


Moments = tuple[Tensor, Tensor, Tensor]


def _merged(a: Moments, b: Moments) -> Moments:
    """Count, mean and scatter of two sets together (Chan, Golub and LeVeque, 1979)."""
    count = a[0] + b[0]
    share = (b[0] / count.clamp_min(1))[:, None, None]
    gap = b[1] - a[1]
    mean = a[1] + gap * share
    between = (a[0][:, None, None] * share)[..., None] * gap[..., None] * gap[..., None, :]
    return count, mean, a[2] + b[2] + between


def expected_queries(
    queries: ObservedQueries, rotate: Rotate, first: int, future: int
) -> ExpectedQueries:
    """The queries to come at positions `first` to `first + future - 1`, on average.

    Args:
        queries: with statistics.
    """
    assert queries.mean is not None and queries.counted is not None and queries.scatter is not None
    width = queries.mean.shape[-1]
    basis = torch.eye(width, device=queries.mean.device)[None, :, None]
    total = _sum_of_rotations(rotate, basis, future)
    rotation = rotate(total, first)[0, :, 0] / future  # row i: where the unit vector i goes
    per_row = queries.counted.clamp_min(1)[:, None, None, None]
    covariance = rotation.T @ (queries.scatter / per_row) @ rotation
    return ExpectedQueries(queries.mean @ rotation, covariance)


def _sum_of_rotations(rotate: Rotate, x: Tensor, count: int) -> Tensor:
    """The sum of `x` moved by 0 to `count - 1` positions; rotations add, so halves are moved."""
    if count == 1:
        return x
    half = _sum_of_rotations(rotate, x, count // 2)
    total = half + rotate(half, count // 2)
    return total + rotate(x, count - 1) if count % 2 else total
