"""The record of what a model's caches hold, replaced as a whole when an operation has ended."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from torch import Tensor

from saccade.compress import ObservedQueries

Observed = dict[int, ObservedQueries]
"""State of an observation window: the newest queries of each layer."""


class Caches(Enum):
    """How the caches compare with the record while an operation runs, and after its interrupt."""

    AGREE = auto()
    AHEAD = auto()  # they hold tokens behind those of the record, which it may still take in
    READING = auto()  # some layers may hold more tokens, by `append`
    STEPPING = auto()  # the same, and some may have written a token that they do not count
    CHANGING = auto()  # they may hold anything


class NextToken(NamedTuple):
    """A token that was chosen but not yet read by the model.

    Attributes:
        shown: whether `stream` has yielded it.
    """

    token: int
    shown: bool


class Held(NamedTuple):
    """What the caches hold.

    Attributes:
        tokens: the first `length` of them are in the caches; an interrupted operation may leave
            more in the list.
        next_token: chosen but not yet read.
        hidden: hidden state `[hidden]` of the last token, where it is known.
        logits: logits `[vocab]` behind the last token, where they are known.
        compressed_at: tokens in the caches when they were compressed last; 0 for never.
        observed: of the observation window, None where nothing observes.
    """

    tokens: list[int]
    length: int = 0
    next_token: NextToken | None = None
    hidden: Tensor | None = None
    logits: Tensor | None = None
    compressed_at: int = 0
    observed: Observed | None = None
