"""The one definition of which keys a query attends to.

Every boundary of the library comes from `Mask`: the visibility of a pair, the key ranges that a
tile of queries reads, how many cache slots have to stay, and the exact count of pairs (so cost and
memory can be predicted before anything runs).  Positions are absolute token indices.

    window=W   a query attends to the last W keys, itself counted: 0 <= q_pos - k_pos < W
    sinks=S    the first S positions stay visible whatever the window (StreamingLLM)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core.check import LARGEST_POSITION, integer, short, truth

_BEYOND = LARGEST_POSITION + 1  # no query is that far from a key: kernels get numbers that fit


class KeyRange(NamedTuple):
    """Half-open range of key positions, `start <= position < stop`."""

    start: int
    stop: int


def _clamped_ramp_sum(begin: int, end: int, limit: int) -> int:
    """Sum of min(max(p + 1, 0), limit) over begin <= p < end, in closed form."""

    def below(n: int) -> int:  # the same sum over 0 <= p < n
        ramp = min(max(n, 0), limit)
        return ramp * (ramp + 1) // 2 + (max(n, 0) - ramp) * limit

    return below(end) - below(begin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """Which keys a query attends to, as a function of absolute positions alone.

    Args:
        causal: a query attends to no later key.
        window: number of most recent keys a query attends to, itself counted; None means all.
        sinks: number of first positions that stay visible outside the window.

    Raises:
        TypeError: causal is no bool, or window or sinks no integer.
        ValueError: window below 1, window without causal, negative sinks, sinks without window.
    """

    causal: bool = True
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        truth("causal", self.causal)
        if self.window is not None:
            object.__setattr__(self, "window", self._checked_window(self.window))
        sinks = integer("sinks", self.sinks)
        if sinks < 0:
            raise ValueError(f"sinks must be 0 or more positions, got {short(sinks)}.")
        object.__setattr__(self, "sinks", min(sinks, _BEYOND))
        if self.sinks and self.window is None:
            raise ValueError(
                f"sinks={self.sinks} needs a window: without one every earlier key is visible."
            )

    def _checked_window(self, given: object) -> int:
        window = integer("window", given)
        if window < 1:
            raise ValueError(
                f"window must be at least 1 key (a query counts itself), got {short(window)}. "
                "Use window=None for no window."
            )
        if not self.causal:
            raise ValueError("window needs causal=True: it means the last keys before a query.")
        return min(window, _BEYOND)

    def allows(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Visibility of each pair: boolean, the broadcast shape of `q_pos` and `k_pos`."""
        distance = q_pos - k_pos
        visible = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            visible = visible & ((distance < self.window) | (k_pos < self.sinks))
        return visible

    def key_ranges(self, first_q: int, last_q: int, num_keys: int) -> tuple[KeyRange, ...]:
        """Disjoint ascending key ranges that any query in [first_q, last_q] attends to."""
        stop = max(0, min(num_keys, last_q + 1)) if self.causal else num_keys
        if self.window is None:
            return (KeyRange(0, stop),) if stop > 0 else ()
        start = min(max(0, first_q - self.window + 1), stop)
        sinks = min(self.sinks, start)
        ranges = (KeyRange(0, sinks), KeyRange(start, stop))
        if sinks == start:
            ranges = (KeyRange(0, stop),)
        return tuple(r for r in ranges if r.start < r.stop)

    def is_full(self, first_q: int, last_q: int, keys: KeyRange) -> bool:
        """Whether every query in [first_q, last_q] attends to every key of the range."""
        if self.causal and keys.stop - 1 > first_q:
            return False
        if self.window is None:
            return True
        return keys.start > last_q - self.window or keys.stop <= self.sinks

    def num_pairs(self, q_len: int, num_keys: int, q_offset: int | None = None) -> int:
        """Exact number of visible (query, key) pairs, in O(1).

        Args:
            q_len: number of queries, at positions q_offset .. q_offset + q_len - 1.
            num_keys: number of keys, at positions 0 .. num_keys - 1.
            q_offset: position of the first query; default num_keys - q_len (bottom-right).
        """
        begin = num_keys - q_len if q_offset is None else q_offset
        end = begin + q_len
        if not self.causal:
            return q_len * num_keys
        pairs = _clamped_ramp_sum(begin, end, num_keys)
        if self.window is not None:
            outside = (begin - self.window, end - self.window)
            pairs -= _clamped_ramp_sum(*outside, num_keys)
            pairs += _clamped_ramp_sum(*outside, min(self.sinks, num_keys))
        return pairs

    def num_slots(self, num_tokens: int, chunk: int) -> int:
        """Cache slots needed for `num_tokens` tokens, appended in chunks of at most `chunk`.

        A ring must hold the window of the oldest query of a chunk together with the whole chunk.
        """
        if self.window is None:
            return num_tokens
        return min(num_tokens, self.sinks + self.window - 1 + chunk)
