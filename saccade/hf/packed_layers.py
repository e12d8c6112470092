"""Linear layers and embeddings over weights that stay as small in memory as their file has them.

Two forms are known: `PackedWeight` (groups of 4 or 8 bits, `ops.linear`), and `HalfWeight`, a
matrix in float16 or bfloat16 under activations in float32.  Layers of one weight (a tied embedding
and output head) share one `WeightStore`, so copying, pickling, moving and state_dict keep them one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from saccade.core import Unsupported
from saccade.ops import linear as products
from saccade.ops.linear import PackedWeight

_AT_ONCE: Final = 2**18
"""Numbers of a half weight that are widened at a time: they stay in a core's own cache."""


@dataclass(frozen=True, slots=True, eq=False)
class HalfWeight:
    """A matrix `[out, in]` in float16 or bfloat16 whose products are those of its float32 form."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return self.values.nbytes


StoredWeight = PackedWeight | HalfWeight


def dequantized(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """The matrix `[out, in]` as plain numbers."""
    if isinstance(weight, HalfWeight):
        return weight.values.to(dtype)
    return products.dequantize(weight, dtype)


def stored_rows(weight: StoredWeight, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the matrix by int64 index `[..]` -> `[.., in]`."""
    if isinstance(weight, HalfWeight):
        return weight.values[index].to(dtype)
    return products.rows(weight, index, dtype)


def stored_linear(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """x `[.., in]` times the transposed matrix, plus bias -> `[.., out]` in x's dtype."""
    if isinstance(weight, PackedWeight):
        return products.linear(x, weight, bias)
    if weight.values.dtype == x.dtype:
        return nn.functional.linear(x, weight.values, bias)
    out, width = weight.shape
    result = x.new_empty(*x.shape[:-1], out)
    for at in range(0, out, step := max(1, _AT_ONCE // width)):
        part = weight.values[at : at + step].to(x.dtype)
        some = None if bias is None else bias[at : at + step]
        result[..., at : at + step] = nn.functional.linear(x, part, some)
    return result


class WeightStore(nn.Module):
    """The tensors of a stored weight, as buffers.  Their dtypes are kept whatever is asked for."""

    def __init__(self, weight: StoredWeight) -> None:
        super().__init__()
        self.value = weight
        for name, tensor in tensors_of(weight).items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightStore:
        for name, tensor in list(self._buffers.items()):
            assert tensor is not None
            # A cast (`.half()`, `.to(dtype)`) leaves integers alone, a move to a device does not.
            plain = tensor.view(torch.int16) if tensor.is_floating_point() else tensor
            moved = fn(plain)
            if moved is not plain and moved.dtype == plain.dtype:
                self._buffers[name] = moved.view(tensor.dtype)
        self._renew()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._renew()

    def _renew(self) -> None:
        """The weight of the buffers as they are now."""
        self.value = replace(self.value, **{name: self._buffers[name] for name in self._buffers})  # type: ignore[arg-type]


def tensors_of(weight: StoredWeight) -> dict[str, Tensor]:
    """The fields of a weight that are tensors."""
    found = {part.name: getattr(weight, part.name) for part in fields(weight)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


class StoredLayer(nn.Module):
    """What linear layers and embeddings over a stored weight have in common.

    `like` has no numbers: its dtype is that of the activations, and follows `.to(dtype)`.
    """

    def __init__(self, store: WeightStore, dtype: torch.dtype) -> None:
        super().__init__()
        self.store = store
        self.like = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    @property
    def packed(self) -> StoredWeight:
        """The weight as it is stored."""
        return self.store.value

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in]` as plain numbers, made anew each time it is asked for."""
        return dequantized(self.store.value, self.like.dtype)


class StoredLinear(StoredLayer):
    """`nn.Linear` over a stored weight.

    Attributes:
        packed: the weight.
        bias: `[out]` or None.
        in_features, out_features: its shape.
    """

    def __init__(
        self, store: WeightStore, bias: nn.Parameter | None, dtype: torch.dtype, *, training: bool
    ) -> None:
        super().__init__(store, dtype)
        self.out_features, self.in_features = store.value.shape
        self.register_parameter("bias", bias)
        self.train(training)

    def forward(self, x: Tensor) -> Tensor:
        """x `[.., in]` -> `[.., out]`.

        Raises:
            Unsupported: gradients are asked for.
        """
        if torch.is_grad_enabled() and (self.training or x.requires_grad):
            raise Unsupported(
                "this model's weights are packed, so it cannot be trained and no gradient goes "
                'through it: load it with weights="f32" or "bf16", or run it under '
                "torch.no_grad() after model.eval()."
            )
        return stored_linear(x, self.store.value, self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight={described(self.store.value)}"
        )


class PackedLinear(StoredLinear):
    """A linear layer whose weight is a `PackedWeight`."""


class HalfLinear(StoredLinear):
    """A linear layer whose weight is a `HalfWeight`."""


class PackedEmbedding(StoredLayer):
    """`nn.Embedding` over a stored weight; rows are multiplied by `factor` where it is not 1."""

    def __init__(
        self, store: WeightStore, dtype: torch.dtype, *, padding_idx: int | None, factor: float = 1
    ) -> None:
        super().__init__(store, dtype)
        self.num_embeddings, self.embedding_dim = store.value.shape
        self.padding_idx, self.factor = padding_idx, factor

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `[..]` -> `[.., in]` in the dtype of activations."""
        rows = stored_rows(self.store.value, input, self.like.dtype)
        if self.factor == 1:
            return rows
        return rows * torch.tensor(self.factor, dtype=rows.dtype, device=rows.device)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {described(self.store.value)}"


def described(weight: StoredWeight) -> str:
    """`4 bits in groups of 32`, `float16`."""
    if isinstance(weight, HalfWeight):
        return str(weight.values.dtype).removeprefix("torch.")
    return f"{weight.bits} bits in groups of {weight.group}"


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of a model has a stored weight."""
    return any(isinstance(module, StoredLayer) for module in model.modules())


def weights_bytes(model: nn.Module) -> int:
    """Memory of a model's weights, those that layers share counted once."""
    stores = [module for module in model.modules() if isinstance(module, WeightStore)]
    plain = {each.untyped_storage().data_ptr(): each.nbytes for each in model.parameters()}
    return sum(plain.values()) + sum(store.value.n_bytes for store in stores)
