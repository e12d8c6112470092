"""Recurrent and convolution states of a layer: of fixed size, overwritten by every token.

What they were before cannot be computed from what they are, so rolling back needs a copy
(a checkpoint), and nothing can be removed from the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from saccade.cache.base import CacheState, ShiftKeys
from saccade.core import BadInput, KVView, Unsupported


class StateHolder(Protocol):
    """What stores the states while a model runs."""

    def read(self) -> dict[str, Tensor]:
        """The states by name, rows of the batch first; none before the first token."""
        ...

    def write(self, states: Mapping[str, Tensor]) -> None:
        """Replace all of them; without any, the next token is the first."""
        ...


class StateCache:
    """The states of one layer behind the protocol of layer caches.

    Args:
        holder: stores them.
        seen: says how many tokens the model has read; states do not count them.
        checkpoints: most copies to keep.
    """

    def __init__(
        self, holder: StateHolder, seen: Callable[[], int], *, checkpoints: int = 0
    ) -> None:
        self._holder, self._count, self._max_checkpoints = holder, seen, checkpoints
        self._checkpoints: dict[int, dict[str, Tensor]] = {}  # by position, ascending

    @property
    def seen(self) -> int:
        """Tokens read so far."""
        return self._count()

    @property
    def nbytes(self) -> int:
        """Bytes of the states and of their copies."""
        kept = [self._holder.read(), *self._checkpoints.values()]
        return sum(state.nbytes for states in kept for state in states.values())

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """A recurrent layer has no keys: the model itself updates the states."""
        raise Unsupported("a recurrent layer keeps states, so no keys can be appended to it.")

    def reorder(self, rows: Tensor) -> None:
        """Replace row i of the batch by row rows[i], in the checkpoints too."""
        self._holder.write(_picked(self._holder.read(), rows))
        self._checkpoints = {at: _picked(kept, rows) for at, kept in self._checkpoints.items()}

    def checkpoint(self) -> None:
        """Copy the states at this position; where there are too many copies, free an old one.

        Freed is the copy whose neighbours are closest together.
        """
        states = self._holder.read()
        if not states or not self._max_checkpoints or self.seen in self._checkpoints:
            return
        self._checkpoints[self.seen] = _copied(states)
        if len(self._checkpoints) > self._max_checkpoints:
            at = [0, *self._checkpoints]
            middle = zip(at[2:], at, at[1:], strict=False)
            del self._checkpoints[min(middle, key=lambda x: x[0] - x[1])[2]]

    def truncate(self, length: int) -> None:
        """Go back to the copy at position `length`.

        Raises:
            Unsupported: no copy was made there.
        """
        if length in self._checkpoints:
            self._holder.write(_copied(self._checkpoints[length]))
        elif length == 0:
            self.reset()
        elif length < self.seen:
            raise Unsupported(
                f"a recurrent layer cannot go back to position {length} of {self.seen}: copies of "
                f"its states are at {list(self._checkpoints) or 'no position'}. Set "
                "ctx_checkpoints, or read the prompt again."
            )
        self._checkpoints = {at: kept for at, kept in self._checkpoints.items() if at <= length}

    def max_rollback(self, length: int) -> int:
        """`length` where nothing has to be undone, else the last copy before it, or 0."""
        if length >= self.seen:
            return self.seen
        return max((at for at in self._checkpoints if at <= length), default=0)

    def context_shift(self, start: int, stop: int, shift: ShiftKeys) -> None:
        """Refused: the removed tokens cannot be taken out of a state."""
        raise Unsupported(
            "context shift removes tokens from the middle, which cannot be taken out of the state "
            "of a recurrent layer. Leave n_keep unset for this model."
        )

    def reset(self) -> None:
        """Remove everything."""
        self._holder.write({})
        self._checkpoints.clear()

    def state(self) -> CacheState:
        """See LayerCache; checkpoints are not part of it."""
        return CacheState({}, {"seen": self.seen}, self._holder.read())

    def restore(self, state: CacheState, device: torch.device) -> None:
        """Replace the states by those of `state`, copied to `device`.

        Raises:
            BadInput: tokens without states, or states without tokens.
        """
        if bool(state.tensors) != bool(state.progress["seen"]):
            raise BadInput(
                f"the saved states contradict themselves: {len(state.tensors)} of them for "
                f"{state.progress['seen']} tokens. Delete the session to start anew."
            )
        self._checkpoints.clear()
        self._holder.write({name: x.to(device, copy=True) for name, x in state.tensors.items()})


def _copied(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: state.clone() for name, state in states.items()}


def _picked(states: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: state.index_select(0, rows.to(state.device)) for name, state in states.items()}
