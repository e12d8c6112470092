"""Costs: the seconds that the parts of one decoder layer take, measured on random matrices.

What is timed has the shapes of the model: products of a chunk and of a single row, and attention
over a real cache, whose seconds grow linearly with the keys.  So a plan needs no weights, and one
layer stands for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Mask
from saccade.ops import attend, make_call
from saccade.ops.linear import PackedWeight, linear, pack
from saccade.runtime.layers import backend_of, layer_cache, narrowed_window
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.plan_blueprint import Blueprint
from saccade.runtime.weights import Form, Stored

_MOST_NUMBERS: Final = 1 << 24
"""Numbers of a matrix that is timed; larger ones are cut, and take as much longer."""
_CACHE_FREE: Final = 96 * 2**20
"""Bytes that are read once each, so that no processor cache holds them."""
_MOST_FLOPS: Final = 4e9
_WIDENED: Final = 2**18
"""Numbers of a matrix of another dtype that are converted at once."""
_NEAR, _KEYS = 128, 2048
_ROUNDS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds.

    Attributes:
        flop: a floating-point operation of the layers' products with a chunk of rows.
        weight: a number of the layers' weights in products with a single row.
        head: a number of the output matrix in a product with a single row.
        op: a small operation of PyTorch, which is what calling it costs.
        elementwise: a byte that norms and activations read or write.
    """

    flop: float
    weight: float
    head: float
    op: float
    elementwise: float

    def sums(self) -> tuple[float, ...]:
        """What two measurements have to agree on."""
        return self.flop, self.weight, self.head, self.op, self.elementwise

    def faster(self, other: Costs) -> Costs:
        """The faster of two measurements of each: what slows one down is another program."""
        return Costs(
            flop=min(self.flop, other.flop), weight=min(self.weight, other.weight),
            head=min(self.head, other.head), op=min(self.op, other.op),
            elementwise=min(self.elementwise, other.elementwise),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCosts:
    """Seconds of one layer's attention, storing the new keys included.

    Attributes:
        chunk, chunk_key: of a chunk that attends to itself, and more for each earlier key.
        step, step_key: of a single query, and more for each key; calling it is left out.
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
    """Costs on this CPU, for chunks of `rows` rows, with weights that lie as the model's do."""
    dtype, inner = blueprint.facts.dtype, blueprint.inner
    read, head = blueprint.read_in(), blueprint.head_in()
    single = {form: row_seconds(form, (inner, blueprint.hidden), dtype) for form in {*read, head}}
    x, small = _random(rows, inner, dtype=dtype), _random(1, 8, dtype=dtype)
    moved = 3 * x.nbytes
    return Costs(
        flop=_mean({form: _flop_seconds(blueprint, form, rows) for form in read}, read),
        weight=_mean(single, read),
        head=single[head],
        op=_best(lambda: [small + small for _ in range(200)]) / 200,
        elementwise=_best(lambda: x * x) / moved,
    )


def _mean(seconds: Mapping[Stored, float], numbers: Mapping[Stored, int]) -> float:
    """Seconds of a number of weights, over all forms that they lie in."""
    return sum(seconds[form] * count for form, count in numbers.items()) / sum(numbers.values())


def _flop_seconds(blueprint: Blueprint, form: Stored, rows: int) -> float:
    """Seconds a floating-point operation of a layer's products with a chunk of rows."""
    facts, dtype = blueprint.facts, blueprint.facts.dtype
    hidden, inner = blueprint.hidden, blueprint.inner
    queries = facts.num_heads * facts.head_dim
    shapes = [(queries, hidden), (inner, hidden), (hidden, inner)]
    flops = sum(2 * rows * out * into for out, into in shapes)
    # Narrower, and not with fewer rows: what unpacking takes is shared by all rows of a chunk.
    share = min(1.0, _MOST_FLOPS / flops)
    shapes = [_cut(max(16, int(out * share)), into) for out, into in shapes]
    layers = [TimedWeight(form, *shape, dtype) for shape in shapes]
    inputs = [_random(rows, layer.width, dtype=dtype) for layer in layers]
    products = _best(lambda: [w.product(x) for w, x in zip(layers, inputs, strict=True)])
    return products / sum(2 * rows * out * into for out, into in shapes)


def row_seconds(form: Stored, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Seconds a number of products with one row, each with a matrix that no cache holds.

    What calling a product takes is left out: `Calls` has it.
    """
    first = TimedWeight(form, *_cut(*shape), dtype)
    matrices = [first, *(first.copy() for _ in range(max(1, _CACHE_FREE // first.n_bytes)))]
    x = _random(1, first.width, dtype=dtype)
    tiny, one = TimedWeight(form, 1, 64, dtype), _random(1, 64, dtype=dtype)
    called = _best(lambda: [tiny.product(one) for _ in matrices], rounds=2)
    seconds = _best(lambda: [each.product(x) for each in matrices], rounds=2)
    return max(seconds - called, seconds / 4) / (len(matrices) * first.rows * first.width)


class TimedWeight:
    """A matrix that lies in memory as a model's weights do, of numbers that are no zeros."""

    def __init__(self, form: Stored, rows: int, width: int, dtype: torch.dtype) -> None:
        if isinstance(form, Form):
            width = max(1, width // form.group) * form.group
        self.rows, self.width, self._dtype = rows, width, dtype
        self._weight = _packed(form, rows, width) if isinstance(form, Form) else _random(
            rows, width, dtype=form
        )  # fmt: skip

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        weight = self._weight
        return weight.n_bytes if isinstance(weight, PackedWeight) else weight.nbytes

    def copy(self) -> TimedWeight:
        """Another one, in memory of its own."""
        made, weight = copy(self), self._weight
        if isinstance(weight, PackedWeight):
            made._weight = replace(weight, qdata=weight.qdata.clone(), scale=weight.scale.clone())
        else:
            made._weight = weight.clone()
        return made

    def product(self, x: Tensor) -> Tensor:
        """x `[n, width]` -> `[n, rows]`."""
        weight = self._weight
        if isinstance(weight, PackedWeight):
            return linear(x, weight)
        if weight.dtype == x.dtype:
            return F.linear(x, weight)
        step = max(1, _WIDENED // self.width)  # as layers of another dtype than x do it
        return torch.cat([F.linear(x, w.to(x.dtype)) for w in weight.split(step)], -1)


def _packed(form: Form, rows: int, width: int) -> PackedWeight:
    """A packed matrix of ones."""
    q = torch.ones(rows, width, dtype=torch.int8 if form.bits == 8 else torch.uint8)
    scale = torch.full((rows, width // form.group), 0.01)
    return pack(q, scale, scale if form.minimum else None, bits=form.bits)


@torch.inference_mode()
def measured_attention(facts: ModelFacts, params: ContextParams, tokens: int) -> AttentionCosts:
    """Costs of attention on this CPU under these options, for a context of `tokens` tokens.

    Args:
        facts: of one layer.
    """
    share = _share(facts)
    facts = _with_heads(facts, share)
    chunk = min(params.n_batch, tokens)
    timed = _TimedAttention(facts, params)
    itself, beyond = timed.best(chunk, 0), timed.best(chunk, _KEYS) if tokens > chunk else 0.0
    near, far = timed.best(1, _NEAR), timed.best(1, _KEYS)
    step_key = max(0.0, far - near) / (_KEYS - _NEAR)
    called = _TimedAttention(replace(facts, num_heads=1, num_kv_heads=1), params).best(1, _NEAR)
    return AttentionCosts(
        chunk=itself / share,
        chunk_key=max(0.0, beyond - itself) / _KEYS / share,
        step=max(0.0, near - called - _NEAR * step_key) / share,
        step_key=step_key / share,
    )


class _TimedAttention:
    """A layer's cache, and attention over it, timed."""

    def __init__(self, facts: ModelFacts, params: ContextParams) -> None:
        own = facts.windows[0]
        self._facts, self._params = facts, params
        self._cache: Any = layer_cache(own, params)
        window, sinks = narrowed_window(own, params)
        self._mask = Mask(window=window or own, sinks=sinks)
        self._read(1)

    def best(self, count: int, behind: int) -> float:
        """Seconds of `count` queries behind so many keys, with the storing of their own."""
        self._cache.reset()
        if behind:
            k = self._keys(behind, self._facts.head_dim)
            self._cache.append(k, k)
        return min(self._read(count) for _ in range(_ROUNDS + 1))

    def _keys(self, count: int, width: int) -> Tensor:
        return _random(1, self._facts.num_kv_heads, count, width, dtype=self._facts.dtype)

    def _read(self, count: int) -> float:
        facts = self._facts
        k = self._keys(count, facts.head_dim)
        v = self._keys(count, facts.value_dim or facts.head_dim)
        q = _random(1, facts.num_heads, count, facts.head_dim, dtype=facts.dtype)
        begin = time.perf_counter()
        view = self._cache.append(k, v)
        call = make_call(q, view, mask=self._mask, q_offset=view.shape[2] - count)
        attend(call, backend=backend_of(self._params))
        return time.perf_counter() - begin


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
