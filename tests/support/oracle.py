"""Attention from its formulas, one query and one key at a time, in numpy and float64.

It shares no code with the package: the float64 `reference`, against which every backend is tested,
is tested against it.  For a query at position p and a key at position j

    score = scale * q.k,   softcap * tanh(score / softcap),   - slope * |p - j|
    out   = sum(exp(score) * v) / sum(exp(score)),   lse = log(sum(exp(score)))

over the keys that the query attends to; a learned sink adds exp(sink_logit) to the sum without a
value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # numpy's arrays of any shape and number


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention problem as arrays; the fields mean what those of `saccade.attention` mean."""

    q: Array
    k: Array
    v: Array
    causal: bool = True
    window: int | None = None
    sinks: int = 0
    scale: float | None = None
    softcap: float | None = None
    sink_logits: Array | None = None
    alibi_slopes: Array | None = None
    key_padding: Array | None = None
    kv_lens: Array | None = None
    cu_seqlens: tuple[Array, Array] | None = None
    allowed: Array | None = None
    q_block: int = 1
    k_block: int = 1
    attn_mask: Array | None = None
    q_offset: Any = None

    def position(self, batch: int, query: int) -> int:
        """Position of a query: queries sit at the end of the keys of their row, or sequence."""
        if self.cu_seqlens is not None:
            (q0, q1), (k0, k1) = self.sequence(query)
            return query - q0 + (k1 - k0) - (q1 - q0)
        if self.q_offset is not None:
            return query + int(np.broadcast_to(self.q_offset, (len(self.q),))[batch])
        end = self.k.shape[2] if self.kv_lens is None else int(self.kv_lens[batch])
        return query + end - self.q.shape[2]

    def sequence(self, query: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where the packed sequence of a query begins and ends: among queries, and among keys."""
        assert self.cu_seqlens is not None
        cu_q, cu_k = ([int(n) for n in cu] for cu in self.cu_seqlens)
        n = max(i for i, start in enumerate(cu_q[:-1]) if start <= query < cu_q[i + 1])
        return (cu_q[n], cu_q[n + 1]), (cu_k[n], cu_k[n + 1])

    def keys(self, query: int) -> Iterator[tuple[int, int]]:
        """(index, position) of the keys that share a sequence with a query."""
        first, stop = (0, self.k.shape[2])
        if self.cu_seqlens is not None:
            first, stop = self.sequence(query)[1]
        return ((index, index - first) for index in range(first, stop))

    def sees(self, batch: int, head: int, query: int, key: int, distance: int, at: int) -> bool:
        """Whether a query attends to a key `distance` positions before it, at position `at`."""
        if self.causal and distance < 0:
            return False
        if self.window is not None and distance >= self.window and at >= self.sinks:
            return False
        if self.key_padding is not None and not self.key_padding[batch][key]:
            return False
        if self.kv_lens is not None and key >= self.kv_lens[batch]:
            return False
        if self.attn_mask is not None and not _of(self.attn_mask, batch, head)[query][key]:
            return False
        if self.allowed is None:
            return True
        grid = _of(self.allowed, batch, head // self.groups)
        return bool(grid[query // self.q_block][key // self.k_block])

    @property
    def groups(self) -> int:
        """Query heads that share a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def score(self, batch: int, head: int, query: int, key: int, distance: int) -> float:
        """What is exponentiated for a pair."""
        scale = self.q.shape[3] ** -0.5 if self.scale is None else self.scale
        score = scale * float(self.q[batch, head, query] @ self.k[batch, head // self.groups, key])
        if self.softcap is not None:
            score = self.softcap * math.tanh(score / self.softcap)
        if self.alibi_slopes is not None:
            slope = np.broadcast_to(self.alibi_slopes, self.q.shape[:2])[batch, head]
            score -= float(slope) * abs(distance)
        return score


def attention(problem: Problem) -> tuple[Array, Array]:
    """Output `[B, H, Lq, Dv]` and lse `[B, H, Lq]`; rows without keys are 0 and -inf."""
    batch, heads, q_len, _ = problem.q.shape
    out = np.zeros((batch, heads, q_len, problem.v.shape[3]))
    lse = np.full((batch, heads, q_len), -np.inf)
    for row in np.ndindex(batch, heads, q_len):
        out[row], lse[row] = _row(problem, *row)
    return out, lse


def _row(problem: Problem, batch: int, head: int, query: int) -> tuple[Array, float]:
    """Output and lse of one query of one head."""
    position = problem.position(batch, query)
    total, out = 0.0, np.zeros(problem.v.shape[3])
    if problem.sink_logits is not None:
        total = math.exp(problem.sink_logits[head])
    for key, at in problem.keys(query):
        distance = position - at
        if problem.sees(batch, head, query, key, distance, at):
            weight = math.exp(problem.score(batch, head, query, key, distance))
            total += weight
            out = out + weight * problem.v[batch, head // problem.groups, key]
    return (out / total, math.log(total)) if total else (out, -math.inf)


def _of(grid: Array, batch: int, head: int) -> Array:
    """A row and head of a grid whose first two dimensions may be 1."""
    return grid[min(batch, len(grid) - 1)][min(head, grid.shape[1] - 1)]
