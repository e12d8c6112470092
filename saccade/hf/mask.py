"""SpecMask: a mask for transformers that is a description instead of a matrix.

transformers builds one mask per forward pass and layer type and passes it to every layer.  Its
stock patterns (causal, causal with a window, bidirectional; each with padding) are described by
four small facts, so nothing of size Lq x Lk is made.  Everything else (packed sequences,
chunked attention, overlays for images) becomes a real boolean mask, as for SDPA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, masking_utils
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

from saccade.core import Mask, Unsupported


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
        torch.Tensor.ndimension,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.__len__,
        torch.Tensor.is_floating_point,
        torch.is_floating_point,
        torch.numel,
    }
)


class SpecMask(Tensor):
    """A 4-D tensor without storage that carries a MaskSpec: boolean, or 0 and the dtype's minimum.

    It has to be a 4-D tensor, because that is how transformers recognizes a mask that is ready.
    Any operation on it runs on the real matrix instead, so code that slices, joins or adds masks
    stays right.  The matrix is made once and kept: a model may write into it, or into a view of
    it, and what was written counts (see `in_force`).
    """

    spec: MaskSpec
    _matrix: Tensor | None

    @staticmethod
    def make(
        spec: MaskSpec,
        shape: tuple[int, int, int, int],
        device: torch.device,
        dtype: torch.dtype = torch.bool,
    ) -> SpecMask:
        """A SpecMask of shape (batch, 1, q_length, kv_length)."""
        mask = torch.ones((), dtype=dtype, device=device).expand(shape).as_subclass(SpecMask)
        mask.spec, mask._matrix = spec, None
        return mask

    def dense(self) -> Tensor:
        """The real mask `[B, 1, Lq, Lk]`, contiguous, the same tensor at every call."""
        if self._matrix is None:
            with torch._C.DisableTorchFunctionSubclass():
                batch, _, q_length, kv_length = self.shape
                visible = self.spec.visible(q_length, kv_length, self.device)
                if self.dtype != torch.bool:
                    visible = additive(visible, self.dtype)
                self._matrix = visible.repeat(batch // visible.shape[0], 1, 1, 1)
        return self._matrix

    def in_force(self) -> Tensor:
        """Itself until something was done with its matrix; then that, as it may have changed."""
        return self if self._matrix is None else self._matrix

    def contiguous(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """The real matrix: `generate()` asks for it where a compiled forward may read the mask."""
        return self.dense()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """On another device still a SpecMask; of another dtype, or a copy, the real matrix."""
        try:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        except RuntimeError:  # it accepts no `copy=`
            return self.dense().to(*args, **kwargs)
        if dtype in (None, self.dtype) and device in (None, self.device):
            return self
        if self._matrix is not None or dtype not in (None, self.dtype):
            return self.dense().to(*args, **kwargs)
        batch, heads, q_length, kv_length = self.shape
        return SpecMask.make(self.spec, (batch, heads, q_length, kv_length), device, self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(SpecMask, SpecMask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as transformers' eager attention adds it to the scores."""
    return torch.where(visible, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


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
    dtype: torch.dtype = torch.float32,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that is registered with transformers next to the attention function.

    Args:
        q_offset: slot of the first query; StaticCache passes its live counter, which the first
            layer increments before attention runs, so it is read when the mask is made.
        attention_mask: bool `[B, slots]`, the user's 2-D padding mask.
        dtype: of the hidden states.

    Returns:
        A SpecMask for the stock patterns, a real `[B, 1, Lq, Lk]` for all others and in a graph
        that is being traced; None there for plain causal attention.  Boolean, except for models
        that were written for eager attention alone: they get the masks that it adds.
    """
    if attention_mask is not None:
        _check_padding(attention_mask)
    adds, traced = config is not None and only_adds_masks(type(config)), is_traced()
    mask = None if traced else stock_pattern(mask_function, local_size)
    if mask is None:
        ends = traced and isinstance(q_offset, int) and kv_offset + kv_length == q_offset + q_length
        kwargs["allow_is_causal_skip"] = ends and kwargs.get("allow_is_causal_skip", True)
        kwargs["allow_is_bidirectional_skip"] = traced and kwargs.get("allow_is_bidirectional_skip")
        sizes: Any = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function)
        options = {"attention_mask": attention_mask, "local_size": local_size, "device": device}
        if adds:
            return eager_mask(*sizes, dtype=dtype, **options, **kwargs)
        return sdpa_mask(*sizes, **options, **kwargs)
    first = int(q_offset)
    reach = first + q_length - kv_offset if mask.causal else kv_length
    padding = _padding(attention_mask, kv_offset, kv_length, reach)
    spec = MaskSpec(q_offset=first, kv_offset=int(kv_offset), mask=mask, padding=padding)
    shape = (batch_size, 1, q_length, kv_length)
    return SpecMask.make(spec, shape, torch.device(device), dtype if adds else torch.bool)


def _check_padding(attention_mask: Tensor) -> None:
    if attention_mask.ndim != 2:
        raise Unsupported(
            "attention_mask must be [batch, keys] or [batch, heads, queries, keys], got "
            f"{list(attention_mask.shape)}. Give a 3-D mask its dimension of heads: mask[:, None]."
        )
    if torch._C._functorch.is_batchedtensor(attention_mask):  # type: ignore[attr-defined]
        raise Unsupported(
            "torch.vmap cannot map over attention_mask: whether it hides anything decides how "
            "attention runs. Pass the rows as one batch."
        )


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records what runs now.

    A graph holds for other inputs too, so it may depend on no value that a tensor has.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def only_adds_masks(config_class: type[PreTrainedConfig]) -> bool:
    """Whether models of this config were written for eager attention's masks alone.

    Their code may treat every mask as numbers to add: DeepSeek-V4 appends 0.0 and -inf to it, which
    in a boolean mask would mean the opposite.
    """
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    classes = [
        value
        for value in vars(sys.modules.get(name, object)).values()
        if isinstance(value, type) and getattr(value, "config_class", None) is config_class
    ]
    return bool(classes) and not any(c._supports_sdpa for c in classes)  # type: ignore[attr-defined]


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
    if parts is None or local_size is None or local_size < 1 or len(parts) != 2:
        return None  # a window of 0 hides every key; configs write it for models without a window
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
