"""Costs: the seconds that the parts of one decoder layer take, measured on random matrices.

What is timed has the shapes of the model: products of a chunk and of a single row, and attention
over a real cache, whose seconds grow linearly with the keys.  So a plan needs no weights, and one
layer stands for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Mask
from saccade.ops import attend, make_call
from saccade.runtime.layers import backend_of, layer_cache, narrowed_window
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.plan_blueprint import Blueprint

_MOST_NUMBERS: Final = 1 << 24
"""Numbers of a matrix that is timed; larger ones are cut, and take as much longer."""
_CACHE_FREE: Final = 96 * 2**20
"""Bytes that are read once each, so that no processor cache holds them."""
_MOST_FLOPS: Final = 4e9
_NEAR, _KEYS = 128, 2048
_ROUNDS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds.

    Attributes:
        flop: a floating-point operation of a product with a chunk of rows.
        byte: a byte of weights in products with a single row.
        op: a small operation of PyTorch, which is what calling it costs.
        elementwise: a byte that norms and activations read or write.
    """

    flop: float
    byte: float
    op: float
    elementwise: float

    def sums(self) -> tuple[float, ...]:
        """What two measurements have to agree on."""
        return self.flop, self.byte, self.op, self.elementwise

    def faster(self, other: Costs) -> Costs:
        """The faster of two measurements of each: what slows one down is another program."""
        return Costs(
            flop=min(self.flop, other.flop), byte=min(self.byte, other.byte),
            op=min(self.op, other.op), elementwise=min(self.elementwise, other.elementwise),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCosts:
    """Seconds of one layer's attention, storing the new keys included.

    Attributes:
        chunk, chunk_key: of a chunk that attends to itself, and more for each earlier key.
        step, step_key: of a single query, and more for each key.
    """

    chunk: float
    chunk_key: float
    step: float
    step_key: float

    def sums(self) -> tuple[float, ...]:
        """What two measurements have to agree on; what a key takes alone is a small difference."""
        return self.chunk + _KEYS * self.chunk_key, self.step + _KEYS * self.step_key

    def faster(self, other: AttentionCosts) -> AttentionCosts:
        """The faster of two measurements of a chunk, and of a step."""
        (chunk, step), (chunks, steps) = self.sums(), other.sums()
        reading = self if chunk <= chunks else other
        writing = self if step <= steps else other
        return AttentionCosts(
            chunk=reading.chunk, chunk_key=reading.chunk_key,
            step=writing.step, step_key=writing.step_key,
        )  # fmt: skip


@torch.inference_mode()
def measured_costs(blueprint: Blueprint, rows: int) -> Costs:
    """Costs on this CPU, for chunks of `rows` rows."""
    facts, dtype = blueprint.facts, blueprint.facts.dtype
    hidden, inner = blueprint.hidden, blueprint.inner
    queries = facts.num_heads * facts.head_dim
    shapes = [_cut(*shape) for shape in ((queries, hidden), (inner, hidden), (hidden, inner))]
    flops = sum(2 * rows * out * into for out, into in shapes)
    rows = max(1, min(rows, int(rows * _MOST_FLOPS / flops)))
    weights = [_random(*shape, dtype=dtype) for shape in shapes]
    inputs = [_random(rows, into, dtype=dtype) for _, into in shapes]
    products = _best(lambda: [F.linear(x, w) for x, w in zip(inputs, weights, strict=True)])
    flops = sum(2 * rows * out * into for out, into in shapes)
    x, small = _random(rows, inner, dtype=dtype), _random(1, 8, dtype=dtype)
    moved = 3 * x.nbytes
    return Costs(
        flop=products / flops,
        byte=_row_seconds(shapes[1], dtype),
        op=_best(lambda: [small + small for _ in range(200)]) / 200,
        elementwise=_best(lambda: x * x) / moved,
    )


def _row_seconds(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Seconds a byte of products with one row, each with a matrix that no cache holds."""
    size = shape[0] * shape[1] * dtype.itemsize
    matrices = _random(max(2, _CACHE_FREE // size), *shape, dtype=dtype)
    x = _random(1, shape[1], dtype=dtype)
    return _best(lambda: [F.linear(x, w) for w in matrices], rounds=2) / matrices.nbytes


@torch.inference_mode()
def measured_attention(facts: ModelFacts, params: ContextParams, tokens: int) -> AttentionCosts:
    """Costs of attention on this CPU under these options, for a context of `tokens` tokens.

    Args:
        facts: of one layer.
    """
    share = _share(facts)
    facts = _with_heads(facts, share)
    chunk, own = min(params.n_batch, tokens), facts.windows[0]
    cache: Any = layer_cache(own, params)
    window, sinks = narrowed_window(own, params)
    mask = Mask(window=window or own, sinks=sinks)

    def read(count: int) -> None:
        k, v = (_random(1, facts.num_kv_heads, count, width, dtype=facts.dtype)
                for width in (facts.head_dim, facts.value_dim or facts.head_dim))  # fmt: skip
        q = _random(1, facts.num_heads, count, facts.head_dim, dtype=facts.dtype)
        begin = time.perf_counter()
        view = cache.append(k, v)
        call = make_call(q, view, mask=mask, q_offset=view.shape[2] - count)
        attend(call, backend=backend_of(params))
        taken.append(time.perf_counter() - begin)

    def best(count: int, behind: int) -> float:
        cache.reset()
        if behind:
            k = _random(1, facts.num_kv_heads, behind, facts.head_dim, dtype=facts.dtype)
            cache.append(k, k)
        taken.clear()
        for _ in range(_ROUNDS):
            read(count)
        return min(taken) / share

    taken: list[float] = []
    best(1, _NEAR)
    itself, beyond = best(chunk, 0), best(chunk, _KEYS) if tokens > chunk else 0.0
    near, far = best(1, _NEAR), best(1, _KEYS)
    step_key = max(0.0, far - near) / (_KEYS - _NEAR)
    return AttentionCosts(
        chunk=itself,
        chunk_key=max(0.0, beyond - itself) / _KEYS,
        step=max(near - _NEAR * step_key, near / 4),
        step_key=step_key,
    )


def _share(facts: ModelFacts) -> float:
    """The part of the KV heads that is timed: all of them, or fewer of a large model."""
    flops = 4 * facts.num_heads * facts.head_dim * 512 * _KEYS
    least = min(facts.num_kv_heads, torch.get_num_threads())
    kept = max(least, int(facts.num_kv_heads * min(1.0, _MOST_FLOPS / flops)))
    return kept / facts.num_kv_heads


def _with_heads(facts: ModelFacts, share: float) -> ModelFacts:
    kept = round(facts.num_kv_heads * share)
    group = max(1, facts.num_heads // facts.num_kv_heads)
    return replace(facts, num_kv_heads=kept, num_heads=kept * group)


def _cut(out: int, into: int) -> tuple[int, int]:
    """A matrix of at most _MOST_NUMBERS numbers, as wide as before if it can be."""
    return max(1, min(out, _MOST_NUMBERS // into)), into


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    """Numbers that are no zeros; written, so that memory is really there."""
    return torch.full(shape, 0.01, dtype=dtype)


def _best(call: Callable[[], object], rounds: int = _ROUNDS) -> float:
    call()
    taken: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)
