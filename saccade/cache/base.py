"""The protocol of layer caches: append a chunk, get the view that its queries attend to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.core import BadInput, KVView, Unsupported
from saccade.core.check import describe

ShiftKeys = Callable[[Tensor, int | Tensor], Tensor]
"""Re-rotate keys `[B, Hkv, n, D]` by a number of positions (saccade.rope.shift_keys, bound)."""


Setting = int | str | bool | None


class CacheState(NamedTuple):
    """The contents of a cache as data, for sessions; see `cache.snapshot`.

    Attributes:
        settings: how the cache was made; only a cache made the same way can take the state.
        progress: counts that say what the tensors hold, none below 0.
        tensors: views of what is stored, without empty slots.
    """

    settings: Mapping[str, Setting]
    progress: Mapping[str, int]
    tensors: Mapping[str, Tensor]


class LayerCache(Protocol):
    """Keys and values of one attention layer, appended in chunks.

    Every append has the same batch, heads and head dimensions; positions count from 0.
    """

    @property
    def seen(self) -> int:
        """Tokens appended so far, which is the position of the next one."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values, scales, positions and page tables."""
        ...

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Store keys `[B, Hkv, t, D]` and values `[B, Hkv, t, Dv]`; the view their queries read.

        The view holds at least every stored key that any of the t new tokens attends to under the
        cache's mask, and stays valid until the next append.
        """
        ...

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i] (beam search, batch selection)."""
        ...

    def truncate(self, length: int) -> None:
        """Roll back: remove all tokens from position `length` on.

        Raises:
            Unsupported: keys that attention needs at `length` were overwritten or removed.
        """
        ...

    def max_rollback(self, length: int) -> int:
        """The largest position up to `length` that `truncate` accepts; 0 where there is none."""
        ...

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Remove positions start .. stop-1 and move later tokens down, their keys re-rotated.

        Args:
            start, stop: half-open range of positions.
            shift: applies RoPE for a number of positions to keys that are rotated already.

        Raises:
            Unsupported: this cache cannot shift.
        """
        ...

    def reset(self) -> None:
        """Remove everything; memory stays allocated."""
        ...

    def state(self) -> CacheState:
        """Contents of the cache; the tensors are valid until the next change."""
        ...

    def restore(self, state: CacheState, device: torch.device) -> None:
        """Replace the contents by `state`, copied to `device`.

        Raises:
            BadInput: tensors of other lengths than the progress says; see `cache.snapshot`.
        """
        ...


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """`float16` for torch.float16, None for None: a dtype as CacheState.settings hold it."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def expect_tensors(state: CacheState, lengths: dict[str, int]) -> None:
    """Raise BadInput unless the state has exactly these tensors `[B, H, length, ...]`.

    A state of a cache that was never written to has none.
    """
    found = {name: tensor.shape[2] for name, tensor in state.tensors.items() if tensor.ndim == 4}
    empty = not state.tensors and not any(lengths.values())
    if found != lengths and not empty:
        raise BadInput(f"the saved cache contradicts itself: expected {lengths}, got {found}.")


def check_append(k: Tensor, v: Tensor, stored_k: Tensor | None, stored_v: Tensor | None) -> None:
    """Raise TypeError or ValueError unless a chunk fits to what a cache stores; None: nothing yet.

    Args:
        stored_k, stored_v: `[B, Hkv, ., D]`, whose sizes and device the chunk must share.
    """
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.dtype.is_floating_point:  # type: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"{name} must be a floating-point tensor [batch, kv_heads, tokens, head_dim], got "
                f"{describe(x)}."
            )
    if k.shape[:3] != v.shape[:3] or k.dtype != v.dtype or k.device != v.device:
        raise ValueError(
            "k and v must share batch, heads, tokens, dtype and device, got "
            f"{describe(k)} on {k.device} and {describe(v)} on {v.device}."
        )
    for name, x, stored in (("k", k, stored_k), ("v", v, stored_v)):
        if stored is None:
            continue
        expected = (*stored.shape[:2], stored.shape[3])
        if (*x.shape[:2], x.shape[3]) != expected or x.device != stored.device:
            raise ValueError(
                f"{name} must have the batch, heads and head_dim {list(expected)} on "
                f"{stored.device} as what this cache holds, got {describe(x)} on {x.device}. "
                "Reset the cache to read another batch."
            )


def fits(x: Tensor, stored: Tensor | None) -> bool:
    """Whether a chunk has the sizes (but the length) and device of a buffer, if there is one."""
    if stored is None:
        return True
    same = x.shape[:2] == stored.shape[:2] and x.shape[3:] == stored.shape[3:]
    return same and x.device == stored.device


def check_rows(rows: Tensor, batch: int) -> None:
    """Raise ValueError unless `rows` are indices of a batch, int64 or int32 `[n]`."""
    if rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"rows must be int64 [n], got {describe(rows)}.")
    found = rows.tolist()
    if not found or min(found) < 0 or max(found) >= batch:
        raise ValueError(
            f"rows must name at least one of the {batch} rows, 0 to {batch - 1}, got {found[:8]}."
        )


def chosen_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Row rows[i] of `x` as row i, in place if there are as many: captured graphs stay valid."""
    chosen = x.index_select(0, rows)
    return x.copy_(chosen) if len(rows) == len(x) else chosen


def check_not_removed(length: int, compressed_at: int) -> None:
    """Raise Unsupported where keys before position `length` were removed after `compressed_at`."""
    if length < compressed_at:
        raise Unsupported(
            f"a compressed cache cannot go back to position {length}: removed keys are gone. "
            "Reset it and read the prompt again."
        )


def check_length(length: int) -> None:
    """Raise ValueError unless `length` is a position."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:  # type: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"a cache is truncated to a position of 0 or more, got {length!r}.")


def check_shift(start: int, stop: int, seen: int) -> None:
    """Raise ValueError unless start .. stop-1 are positions that were seen."""
    if not 0 <= start < stop <= seen:
        raise ValueError(
            f"context_shift needs 0 <= start < stop <= {seen} (tokens seen), got {start} and "
            f"{stop}."
        )
