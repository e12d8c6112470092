"""What patterns would do to a model's own attention, measured while it reads a text densely."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from saccade.core import BlockSelection, KVView, Mask
from saccade.core.kv import dense
from saccade.ops import attend, make_call
from saccade.ops.kv_write.hadamard import hadamard_transform
from saccade.ops.selection import summarize
from saccade.sparse.pattern import RulePattern

Phase = Literal["prefill", "decode"]


@dataclass(slots=True)
class Measured:
    """A pattern at one length and phase, summed over the layers that were measured.

    Attributes:
        recall: share of the dense attention's weight that falls on the keys that are read.
        seconds: of selecting and attending; dense_seconds: of the dense call.
        layers: how many.
    """

    recall: float = 0.0
    seconds: float = 0.0
    dense_seconds: float = 0.0
    layers: int = 0

    @property
    def mean_recall(self) -> float:
        """Of all measured layers."""
        return self.recall / self.layers

    @property
    def ratio(self) -> float:
        """Time of the pattern by the time of dense attention."""
        return self.seconds / self.dense_seconds


@dataclass(slots=True)
class Probe:
    """A pattern that selects everything, and measures what others would read, lose and take.

    A chunk of queries is measured as it is ("prefill"), and its last query alone ("decode").  The
    recall of a selection is exp(LSE over the selected keys - LSE over all), a mean over queries and
    heads: exactly the share of the softmax weights that it keeps.

    Attributes:
        candidates: name -> pattern.
        every: how many layers there are for one that is measured.
        listening: whether calls are measured, see `listen`.
        found: (candidate, phase, number of keys) -> what was measured.
    """

    candidates: Mapping[str, RulePattern]
    every: int = 1
    listening: bool = False
    found: dict[tuple[str, Phase, int], Measured] = field(
        default_factory=dict[tuple[str, Phase, int], Measured]
    )
    _calls: int = 0

    def listen(self, listening: bool) -> None:
        """Measure the layers of the next pass of the model, or none."""
        self.listening, self._calls = listening, 0

    def select(self, q: Tensor, kv: KVView, q_offset: int) -> BlockSelection:
        """See Pattern."""
        self._calls += 1
        if self.listening and self._calls % self.every == 0:
            self._measure("decode", q[:, :, -1:].contiguous(), kv, q_offset + q.shape[2] - 1)
            if q.shape[2] > 1:
                self._measure("prefill", q, kv, q_offset)
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
        return BlockSelection(allowed=allowed, q_block=q.shape[2], k_block=kv.shape[2])

    def _measure(self, phase: Phase, q: Tensor, kv: KVView, q_offset: int) -> None:
        keys, rows = kv.shape[2], dict[tuple[str, int], Tensor]()
        whole = make_call(q, kv, mask=Mask(), q_offset=q_offset)
        dense_seconds, dense_lse = _timed(lambda: attend(whole).lse, q.device)
        for name, pattern in self.candidates.items():
            rule = pattern.rule
            kind = rule.summary, rule.k_block
            if rule.summary != "none" and kind not in rows:
                rows[kind] = summarize(_given(kv), rule.k_block, rule.summary)

            row = rows.get(kind)
            sparse = partial(_sparse_lse, pattern, q, kv, q_offset, row)
            seconds, lse = _timed(sparse, q.device)
            at = self.found.setdefault((name, phase, keys), Measured())
            at.recall += float((lse - dense_lse).exp().clamp_max(1).mean())
            at.seconds, at.dense_seconds = at.seconds + seconds, at.dense_seconds + dense_seconds
            at.layers += 1


def _sparse_lse(
    pattern: RulePattern, q: Tensor, kv: KVView, q_offset: int, rows: Tensor | None
) -> Tensor:
    blocks = pattern.select(q, kv, q_offset, rows)
    return attend(make_call(q, kv, mask=Mask(), q_offset=q_offset, blocks=blocks)).lse


def _given(kv: KVView) -> Tensor:
    k = dense(kv).k
    return hadamard_transform(k) if kv.hadamard else k


def _timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """The better time of two calls, in seconds, and the result."""
    times, found = list[float](), None
    for _ in range(2):
        _wait(device)
        begin = time.perf_counter()
        found = work()
        _wait(device)
        times.append(time.perf_counter() - begin)
    assert found is not None
    return min(times), found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
