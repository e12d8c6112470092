"""The protocol of layer caches: append a chunk, get the view that its queries attend to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.core import BadInput, KVView

ShiftKeys = Callable[[Tensor, int], Tensor]
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
