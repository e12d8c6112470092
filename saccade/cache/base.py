"""The protocol of layer caches: append a chunk, get back the view its queries attend to."""

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
    """Everything a cache holds, in parts that can be written down; see `cache.snapshot`.

    Attributes:
        settings: how the cache was made; only a cache made the same way can take the state.
        progress: whole numbers that say what the tensors hold.
        tensors: views of what is stored, empty slots left out.
    """

    settings: Mapping[str, Setting]
    progress: Mapping[str, int]
    tensors: Mapping[str, Tensor]


class LayerCache(Protocol):
    """Keys and values of one attention layer.

    Attributes:
        seen: tokens appended so far, which is the position of the next one.
        nbytes: bytes allocated for keys, values and what describes them.
    """

    @property
    def seen(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Store keys `[B, Hkv, t, D]` and values `[B, Hkv, t, Dv]`; lend what they attend to.

        The view holds at least every stored key that any of the t new tokens may see under the
        cache's mask, and stays valid until the next append.
        """
        ...

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i] (beam search, batch selection)."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on.

        Raises:
            Unsupported: what would have to come back was overwritten.
        """
        ...

    def max_rollback(self, length: int) -> int:
        """The largest position up to `length` that `truncate` can go back to; 0 needs a reset."""
        ...

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Context shift: forget positions start .. stop-1 and move the later ones down.

        Raises:
            Unsupported: this cache cannot shift.
        """
        ...

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        ...

    def state(self) -> CacheState:
        """What it takes to go on from here; the tensors are valid until the next change."""
        ...

    def restore(self, state: CacheState, device: torch.device) -> None:
        """Hold what `state` says, copied to `device`; see `cache.snapshot.check` for refusals."""
        ...


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """`float16` for torch.float16, None for None: dtypes as a state writes them down."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def expect_tensors(state: CacheState, lengths: dict[str, int]) -> None:
    """Raise BadInput unless the state has exactly these tensors `[B, H, length, ...]`.

    A state of a cache that was never written to has none.
    """
    found = {name: tensor.shape[2] for name, tensor in state.tensors.items() if tensor.ndim == 4}
    empty = not state.tensors and not any(lengths.values())
    if found != lengths and not empty:
        raise BadInput(f"the saved cache contradicts itself: expected {lengths}, got {found}.")
