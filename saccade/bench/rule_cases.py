"""The calls by which rules of a CPU are measured, and which calls each of them stands for.

A series is one kind of call in one type and head dimension, at growing lengths: each length stands
for those from it up to the next one, the last one for all longer ones.  Head dimensions stand for
those around them.  What no series covers keeps the usual order of `auto`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from saccade.core import DenseKV, Mask
from saccade.ops.attention.api import make_call
from saccade.ops.attention.call import MANY_QUERIES, AttentionCall
from saccade.ops.tuning.rules import DTYPES, LARGEST

HEADS = {64: (9, 3), 128: (8, 2)}
BATCH_OF_PADDING = 2
SEED = 2205


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of call.

    Attributes:
        name: for people; sizes: (queries, keys) that are measured, growing; quick: of them.
        conditions: of a Rule, beside type, head dimension and size.
        ranges: by `queries` (else by `keys`) the sizes of the series follow one another.
        dtypes: in which it is measured.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    quick: tuple[int, ...]
    conditions: dict[str, Any]
    by_queries: bool = False
    dtypes: tuple[str, ...] = DTYPES


def _square(*lengths: int) -> tuple[tuple[int, int], ...]:
    return tuple((length, length) for length in lengths)


_DENSE: dict[str, Any] = {"extras": ("none",), "pattern": ("causal",)}
MANY = (MANY_QUERIES + 1, LARGEST)

# The first rule that fits a call counts, so kinds with more conditions come first.
KINDS = (
    Kind(
        name="gradients", sizes=_square(512, 2048), quick=(0,), dtypes=("float32", "bfloat16"),
        conditions=_DENSE | {"square": True, "training": True},
    ),
    Kind(
        name="prompt", sizes=_square(128, 512, 2048, 8192), quick=(1, 2),
        conditions=_DENSE | {"square": True},
    ),
    Kind(
        name="all keys", sizes=_square(256, 2048), quick=(1,),
        conditions=_DENSE | {"pattern": ("all",), "queries": MANY},
    ),
    Kind(
        name="chunk of a prompt", sizes=((32, 4096), (512, 4096)), quick=(1,), by_queries=True,
        conditions=_DENSE | {"keys": (1024, LARGEST)},
    ),
    Kind(
        name="mask", sizes=((512, 1024),), quick=(0,),
        conditions={"extras": ("attn_mask",), "queries": MANY, "pattern": ("causal", "all")},
    ),
    Kind(
        name="padded batch", sizes=((512, 512),), quick=(0,),
        conditions={"extras": ("key_padding",), "queries": MANY, "pattern": ("causal",)},
    ),
    Kind(
        name="one token", sizes=((1, 512), (1, 8192)), quick=(1,),
        conditions={"extras": ("none",), "pattern": ("causal", "all"), "queries": (1, 1)},
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One kind of call in one type and head dimension; `dims` are those that it stands for."""

    kind: Kind
    dtype: str
    dim: int
    dims: tuple[int, int]
    quick: bool = False

    @property
    def name(self) -> str:
        """`prompt, bfloat16, D 128`."""
        return f"{self.kind.name}, {self.dtype}, D {self.dim}"

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(queries, keys) in ascending order."""
        sizes = self.kind.sizes
        return tuple(sizes[i] for i in self.kind.quick) if self.quick else sizes

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and KV heads."""
        return HEADS.get(self.dim, (8, 2))

    def conditions(self, first: int, last: int) -> dict[str, Any]:
        """Conditions of a rule that holds from size `first` to size `last` of the series."""
        at = 0 if self.kind.by_queries else 1
        low = self.sizes[first][at]
        high = self.sizes[last + 1][at] - 1 if last + 1 < len(self.sizes) else LARGEST
        sized = {"queries" if self.kind.by_queries else "keys": (low, high)}
        return self.kind.conditions | sized | {"dtype": (self.dtype,), "head_dim": self.dims}

    def call(self, queries: int, keys: int) -> AttentionCall:
        """Random tensors of a size; those that train require gradients."""
        source = torch.Generator().manual_seed(SEED)
        dtype, kind = getattr(torch, self.dtype), self.kind.name
        batch = BATCH_OF_PADDING if kind == "padded batch" else 1

        def normal(heads: int, length: int) -> Tensor:
            x = torch.randn(batch, heads, length, self.dim, generator=source).to(dtype)
            return x.requires_grad_(kind == "gradients")

        heads, kv_heads = self.heads
        q, k, v = normal(heads, queries), normal(kv_heads, keys), normal(kv_heads, keys)
        mask = padding = None
        if kind == "mask":  # its first key is always visible, so that no row is empty
            mask = torch.rand(1, 1, queries, keys, generator=source) < 0.7
            mask[..., 0] = True
        if kind == "padded batch":  # the second row has some padding in front, as in generation
            padding = torch.arange(keys) >= torch.tensor([[0], [keys // 4]])
        causal = kind != "all keys"
        return make_call(
            q, DenseKV(k, v), mask=Mask(causal=causal), attn_mask=mask, key_padding=padding,
            wants_lse=False,
        )  # fmt: skip


def all_series(dims: Sequence[int], *, quick: bool = False) -> list[Series]:
    """Every series, in the order of the rules that are made of them."""
    spans = dims_around(dims)
    return [
        Series(kind=kind, dtype=dtype, dim=dim, dims=spans[dim], quick=quick)
        for kind, dim in product(KINDS, spans)
        for dtype in kind.dtypes
    ]


def dims_around(dims: Sequence[int]) -> dict[int, tuple[int, int]]:
    """The head dimensions that each measured one stands for: three quarters to five quarters of it.

    Between two that are near one another the nearer one counts.
    """
    ordered = sorted(set(dims))
    spans: dict[int, tuple[int, int]] = {}
    before = 0
    for dim, following in zip(ordered, (*ordered[1:], None), strict=True):
        high = dim * 5 // 4
        if following is not None:
            high = min(high, (dim + following) // 2)
        spans[dim] = max(dim * 3 // 4, before + 1), high
        before = high
    return spans
