"""SpecMask: a mask for transformers that is a description instead of a matrix.

transformers builds one mask per forward pass and layer type and passes it to every layer.  Its
stock patterns (causal, causal with a window, bidirectional; each with padding) are described by
five small facts, so nothing of size Lq x Lk is made.  Everything else (packed sequences,
chunked attention, overlays for images) becomes a real boolean mask, as for SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from saccade.core import Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSpec:
    """The facts of a stock mask.  Slots are indices into the row, padding included.

    Attributes:
        q_offset: slot of the first query.
        kv_offset: slot of the first key in the layer.
        mask: which key slots a query slot attends to.
        padding: bool `[B, kv_length]`, True for real keys, or None for no padding.
    """

    q_offset: int
    kv_offset: int
    mask: Mask
    padding: Tensor | None

    def visible(self, q_length: int, kv_length: int, device: torch.device) -> Tensor:
        """The same mask as a matrix: bool `[B | 1, 1, q_length, kv_length]`."""
        q_pos = torch.arange(q_length, device=device)[:, None] + self.q_offset
        k_pos = torch.arange(kv_length, device=device) + self.kv_offset
        pairs = self.mask.allows(q_pos, k_pos)[None, None]
        if self.padding is None:
            return pairs
        return pairs & self.padding.to(device)[:, None, None]


# Attributes and methods of a SpecMask that do not build the matrix.
_FREE: Final = frozenset(
    {
        torch.Tensor.shape.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.dtype.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.device.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.ndim.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.is_cuda.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.requires_grad.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.is_floating_point,
    }
)


class SpecMask(Tensor):
    """A 4-D boolean tensor without storage that carries a MaskSpec.

    It has to be a 4-D tensor, because that is how transformers recognizes a mask that is ready.
    Any operation on it builds the real matrix first, so code that slices or adds masks stays
    right.
    """

    spec: MaskSpec

    @staticmethod
    def make(spec: MaskSpec, shape: tuple[int, int, int, int], device: torch.device) -> SpecMask:
        """A SpecMask of shape (batch, 1, q_length, kv_length)."""
        mask = torch.ones((), dtype=torch.bool, device=device).expand(shape).as_subclass(SpecMask)
        mask.spec = spec
        return mask

    def dense(self) -> Tensor:
        """The real mask: bool `[B, 1, Lq, Lk]`."""
        with torch._C.DisableTorchFunctionSubclass():
            batch, _, q_length, kv_length = self.shape
            visible = self.spec.visible(q_length, kv_length, self.device)
            return visible.expand(batch, 1, q_length, kv_length)

    def contiguous(self, *args: Any, **kwargs: Any) -> SpecMask:  # type: ignore[override]
        """Itself: `generate()` calls it, and there is no storage to copy."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> SpecMask:  # type: ignore[override]
        """Itself: the attention function moves the padding to where the queries are."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _FREE:
                args = tuple(_densified(arg) for arg in args)
                kwargs = {name: _densified(arg) for name, arg in (kwargs or {}).items()}
            return func(*args, **(kwargs or {}))


def _densified(arg: Any) -> Any:
    if isinstance(arg, SpecMask):
        return arg.dense()
    return [_densified(part) for part in arg] if isinstance(arg, list) else arg


def saccade_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """The mask function that is registered with transformers next to the attention function.

    Args:
        q_offset: slot of the first query; StaticCache passes its live counter, which the first
            layer increments before attention runs, so it is read when the mask is made.
        attention_mask: bool `[B, slots]`, the user's 2-D padding mask.

    Returns:
        A SpecMask for the stock patterns, a real boolean `[B, 1, Lq, Lk]` for all others.
    """
    mask = stock_pattern(mask_function, local_size)
    if mask is None:
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        sizes: Any = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function)
        attn_mask = sdpa_mask(
            *sizes,
            attention_mask=attention_mask,
            local_size=local_size,
            device=device,
            **kwargs,
        )
        assert attn_mask is not None, "both ways of skipping the mask are switched off"
        return attn_mask
    first = int(q_offset)
    reach = first + q_length - kv_offset if mask.causal else kv_length
    padding = _padding(attention_mask, kv_offset, kv_length, reach)
    spec = MaskSpec(q_offset=first, kv_offset=int(kv_offset), mask=mask, padding=padding)
    return SpecMask.make(spec, (batch_size, 1, q_length, kv_length), torch.device(device))


def stock_pattern(mask_function: Callable[..., Any], local_size: int | None) -> Mask | None:
    """The Mask that one of transformers' own pattern functions means, or None for any other.

    The window pattern is recognized by the closure that transformers builds.  If that ever looks
    different the result is None, which costs memory and not correctness.
    """
    if mask_function is causal_mask_function:
        return Mask()
    if mask_function is bidirectional_mask_function:
        return Mask(causal=False)
    parts = _closure(mask_function, masking_utils.and_masks, "mask_functions")
    if parts is None or local_size is None or len(parts) != 2:
        return None
    window = _closure(parts[0], masking_utils.sliding_window_overlay, "sliding_window")
    is_window = parts[1] is causal_mask_function and window == local_size
    return Mask(window=local_size) if is_window else None


def _closure(function: Any, maker: Callable[..., Any], variable: str) -> Any:
    """The variable that an inner function of `maker` captured; None if it is no such function."""
    if not getattr(function, "__qualname__", "").startswith(f"{maker.__name__}.<locals>."):
        return None
    names = function.__code__.co_freevars
    if function.__module__ != maker.__module__ or variable not in names:
        return None
    return function.__closure__[names.index(variable)].cell_contents


def _padding(
    attention_mask: Tensor | None, kv_offset: int, kv_length: int, reach: int
) -> Tensor | None:
    """The 2-D mask cut to the keys of a layer; None if all keys in reach are real."""
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    padding = F.pad(padding, (0, kv_length - padding.shape[1]))
    return None if bool(padding[:, :reach].all()) else padding
