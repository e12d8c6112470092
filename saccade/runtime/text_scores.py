"""Scores of a text of any length, read in windows that overlap."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import BadInput
from saccade.runtime.context import Context
from saccade.runtime.importance import (
    attention_received,
    check_scorer,
    contrastive_perplexity,
    in_parts,
    self_information,
)
from saccade.runtime.stats import OnProgress

SCORES = ("self_information", "contrastive", "received_attention")
_NOTHING = torch.zeros(0, dtype=torch.int64)


class TextScores(NamedTuple):
    """What scoring a text gave, and what it took.

    Attributes:
        scores: float32 `[n]`.
        read: tokens that the model read, those of all windows, passes and questions.
        windows: in how many windows.
    """

    scores: Tensor
    read: int
    windows: int


class Window(NamedTuple):
    """Tokens `start` to `stop` are read together; those of `first` to `last` take their scores."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class TextScorer:
    """Scores the tokens of a text, in overlapping windows where it is longer than one.

    A token that two windows have takes its score from the earlier, where more text is before it;
    attention received comes from the earlier in the first half of the overlap, from the later in
    the second: at the beginning of a window tokens receive what belongs to a text's first tokens,
    at its end hardly anything attends to them.  The last window is as long as the others.

    Args:
        kind: one of SCORES.
        question: int64 `[q]`, for "contrastive" in front of each window, for "received_attention"
            behind it; empty: none.
        before: int64 `[m]` in front of everything, the token that begins every text, say.
        window: tokens of the text that are read together; None: as many as fit into the context.
        overlap: tokens that a window has of the one before; None: an eighth of the window.

    Raises:
        BadInput: an unknown kind, or a question that is missing or of no use.
    """

    kind: str
    question: Tensor = _NOTHING
    before: Tensor = _NOTHING
    window: int | None = None
    overlap: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCORES:
            raise BadInput(f"score={self.kind!r}: expected one of {', '.join(SCORES)}.")
        asked = len(self.question) > 0
        if self.kind == "contrastive" and not asked:
            raise BadInput(
                "score='contrastive' compares the text with and without a question: give a question"
                ", or use score='self_information'."
            )
        if self.kind == "self_information" and asked:
            raise BadInput(
                "score='self_information' does not look at a question: use score='contrastive' or "
                "'received_attention', or leave the question out."
            )

    def scores(
        self, ctx: Context, tokens: Tensor, *, on_progress: OnProgress | None = None
    ) -> TextScores:
        """Scores of the tokens `[n]` of a text.

        Args:
            ctx: a context without tokens; it reads the windows one after the other.
            tokens: int64 `[n]`, at least one.
            on_progress: called with (tokens read, all that will be).

        Raises:
            BadInput: a context that holds tokens or has a kv_policy, a window that does not fit
                into it, an overlap that leaves nothing new, or no tokens.
        """
        check_scorer(ctx)
        if not len(tokens):
            raise BadInput("there is no token to score: expected at least one.")
        parts = self.windows(len(tokens), ctx.n_ctx)
        costs = [self._cost(part.stop - part.start) for part in parts]
        scores = torch.empty(len(tokens))
        for part, show in zip(parts, in_parts(on_progress, costs), strict=True):
            found = self._of_window(ctx, tokens[part.start : part.stop], show)
            scores[part.first : part.last] = found[part.first - part.start : part.last - part.start]
            ctx.reset()
        return TextScores(scores, sum(costs), len(parts))

    def windows(self, length: int, n_ctx: int) -> list[Window]:
        """The windows of a text of so many tokens, for a context of `n_ctx`.

        Raises:
            BadInput: as `scores`.
        """
        room = n_ctx - len(self.question) - len(self.before)
        size = room if self.window is None else self.window
        if room < 2:
            raise BadInput(
                f"a question of {len(self.question)} tokens leaves no room for text in a context "
                f"of {n_ctx}: ask a shorter one, or score by a model with a longer context."
            )
        if not 2 <= size <= room:
            raise BadInput(
                f"window={size}: expected 2 to {room} tokens, what a context of {n_ctx} has beside "
                "the question."
            )
        overlap = max(1, size // 8) if self.overlap is None else self.overlap
        if not 1 <= overlap < size:
            raise BadInput(
                f"overlap={overlap}: expected 1 to {size - 1} tokens, less than the window of "
                f"{size}."
            )
        starts = list(range(0, max(1, length - overlap), size - overlap))
        starts[-1] = max(0, length - size)
        joints = [0, *(self._joint(a + size, b) for a, b in pairwise(starts)), length]
        spans = zip(starts, pairwise(joints), strict=True)
        return [Window(at, min(at + size, length), *owned) for at, owned in spans]

    def _joint(self, stop: int, start: int) -> int:
        """The first token that takes its score from the window at `start`, not from that before."""
        return (start + stop + 1) // 2 if self.kind == "received_attention" else stop

    def _cost(self, length: int) -> int:
        """Tokens read for a window of so many."""
        passes = 2 if self.kind == "contrastive" else 1
        return passes * (length + len(self.before)) + len(self.question)

    def _of_window(self, ctx: Context, tokens: Tensor, show: OnProgress | None) -> Tensor:
        if self.kind == "self_information":
            return self_information(ctx, tokens, before=self.before, on_progress=show)
        if self.kind == "contrastive":
            return contrastive_perplexity(
                ctx, tokens, self.question, before=self.before, on_progress=show
            )
        question = self.question if len(self.question) else None
        return attention_received(ctx, tokens, question, before=self.before, on_progress=show)
