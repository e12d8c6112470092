"""A dialogue that never ends in memory that never grows, whoever shows it.

The caches hold what the options let them hold.  Positions are the other thing that grows: before
they pass what the model was trained for (or a full context), the latest messages are read again
from position 0, and what was said before them is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saccade.runtime import Context, ContextParams, Sampler

WINDOW, SINKS = 2048, 4

Messages = list[dict[str, str]]


def endless(params: ContextParams, n_ctx_train: int) -> ContextParams:
    """The params, with a window and sinks where nothing in them says how to bound memory."""
    chosen = (params.n_swa, params.n_ctx, params.kv_policy, params.type_k)
    if any(option is not None for option in chosen):
        return params
    return replace(params, n_swa=max(1, min(WINDOW, n_ctx_train // 2)), n_sinks=SINKS)


class Dialogue:
    """Messages and answers on one context.

    Args:
        ctx: an empty context.
        encode: messages to tokens, the start of the next answer included.
        encode_next: one more user message behind an answer to tokens, likewise.
        sampler, stop, n_predict: how an answer is written and when it ends.
        system: what the model is told first.
    """

    def __init__(
        self,
        ctx: Context,
        encode: Callable[[Messages], list[int]],
        encode_next: Callable[[str], list[int]],
        *,
        sampler: Sampler,
        stop: set[int],
        n_predict: int,
        system: str | None = None,
    ) -> None:
        self.ctx = ctx
        self._encode, self._encode_next = encode, encode_next
        self._sampler, self._stop, self._n_predict = sampler, stop, n_predict
        self._system: Messages = [] if system is None else [{"role": "system", "content": system}]
        self._messages: Messages = []
        self._whole = False  # whether the context has read exactly the messages
        self.rereads = 0

    @property
    def limit(self) -> int:
        """Positions that the dialogue may use before it reads its latest messages again."""
        return self.ctx.n_ctx

    def reset(self) -> None:
        """Forget everything that was said."""
        self._messages, self._whole = [], False
        self.ctx.reset()

    def ask(self, text: str) -> Iterator[int]:
        """Tokens of the answer; `answered` has to be told its text, however it ended."""
        tokens = self._encode_next(text) if self._whole and self._messages else None
        self._messages.append({"role": "user", "content": text})
        if tokens is None or self.ctx.seen + len(tokens) + self._n_predict > self.limit:
            tokens = self._from_the_start()
        self._whole = False
        pieces = self.ctx.stream(
            tokens, n_predict=self._n_predict, sampler=self._sampler, stop=self._stop
        )
        for piece in pieces:
            self._whole = True
            yield piece.token
        self._whole = True

    def answered(self, text: str) -> None:
        """The answer as text, for when it has to be read again."""
        self._messages.append({"role": "assistant", "content": text})

    def withdraw(self) -> None:
        """The last message could not be read: as if it had not been said."""
        self._messages.pop()
        self._whole = False

    def spoiled(self) -> None:
        """A step was interrupted in the middle, so the context has to start anew."""
        self._whole = False

    def _from_the_start(self) -> list[int]:
        """Forget what the context holds; the latest messages that fit into half of it."""
        self.rereads += self.ctx.seen > 0
        self.ctx.reset()
        room = self.limit // 2
        if self.ctx.params.n_swa is not None:
            room = min(room, self.ctx.params.n_swa)
        while True:
            tokens = self._encode(self._system + self._messages)
            if len(tokens) <= room or len(self._messages) < 3:
                return tokens
            del self._messages[:2]
