"""The matrices of all experts of a layer as stored weights.

A layer of experts is written with one parameter `[experts, out, in]`, of which it takes a matrix by
the number of an expert and multiplies by `torch.nn.functional.linear`.  What takes the parameter's
place gives the same by the number, and computes the product with the packed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.hf.packed_layers import (
    StoredWeight,
    WeightStore,
    dequantized,
    refuse_gradients,
    stored_linear,
)


class PackedExperts(nn.Module):
    """Stored weights of equal shape, by the number of the expert."""

    def __init__(self, weights: Sequence[StoredWeight], dtype: torch.dtype) -> None:
        super().__init__()
        self.stores = nn.ModuleList(WeightStore(weight) for weight in weights)
        self.like = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    @property
    def shape(self) -> torch.Size:
        """`[experts, out, in]`."""
        return torch.Size((len(self.stores), *self[0].shape))

    def __getitem__(self, expert: int | Tensor) -> ExpertMatrix:
        """The matrix of one expert."""
        store: Any = self.stores[int(expert)]
        return ExpertMatrix(store.value, self.like.dtype)


class ExpertMatrix:
    """A stored weight that `linear` takes for a tensor; anything else makes it plain numbers."""

    def __init__(self, weight: StoredWeight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape

    @property
    def T(self) -> Tensor:
        """The transposed matrix as plain numbers."""
        return dequantized(self.weight, self.dtype).T

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What torch calls instead of one of its functions on a matrix."""
        if func is nn.functional.linear and not kwargs and isinstance(args[1], cls):
            x, matrix = args[:2]
            refuse_gradients(x)
            return stored_linear(x, matrix.weight, args[2] if len(args) > 2 else None)
        plain = [dequantized(a.weight, a.dtype) if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))
