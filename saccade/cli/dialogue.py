"""A dialogue of any length in constant memory.

The caches hold what the options let them hold.  Positions are the other thing that grows: before
they pass what the model was trained for (or a full context), the latest messages are read again
from position 0, and what was said before them is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from saccade.cli.failure import UsageError
from saccade.cli.reading import OnProgress
from saccade.cli.tokens import Messages, encode_messages, encode_next_message

if TYPE_CHECKING:
    from saccade.runtime import Context, ContextParams, Sampler

WINDOW, SINKS = 2048, 4


def endless(params: ContextParams, n_ctx_train: int) -> ContextParams:
    """The params, with a window and sinks where no option bounds memory or needs all keys."""
    chosen = (params.n_swa, params.n_ctx, params.kv_policy, params.type_k, params.n_draft)
    if any(option is not None for option in chosen):
        return params
    return replace(params, n_swa=max(1, min(WINDOW, n_ctx_train // 2)), n_sinks=SINKS)


def opening(system: str | None) -> Messages:
    """What is read before the dialogue."""
    return [] if system is None else [{"role": "system", "content": system}]


@dataclass(kw_only=True)
class Dialogue:
    """Messages and answers on one context.

    Attributes:
        ctx: an empty context.
        tokenizer: of transformers; its chat template is used where it has one.
        sampler, stop, n_predict: how an answer is written and when it ends.
        system: what the model reads before the dialogue.
        rereads: how often the latest messages were read again.
        written: tokens of the last answer.
    """

    ctx: Context
    tokenizer: Any
    sampler: Sampler
    stop: set[int]
    n_predict: int
    system: str | None = None
    rereads: int = 0
    written: int = 0
    _messages: Messages = field(default_factory=list, init=False)
    _in_context: bool = field(default=False, init=False)  # the context holds all the messages

    def reset(self) -> None:
        """Forget everything that was said."""
        self._messages, self._in_context = [], False
        self.ctx.reset()

    @property
    def state(self) -> dict[str, Any]:
        """What a session has to keep beside the context, as JSON."""
        return {"messages": self._messages, "in_context": self._in_context, "system": self.system}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of a dialogue, which was saved with the context."""
        self._messages, saved = state["messages"], state.get("system")
        changed = self.system is not None and self.system != saved
        self.system = self.system if changed else saved
        self._in_context = state.get("in_context") is True and not changed

    def ask(self, text: str, on_progress: OnProgress | None = None) -> Iterator[int]:
        """Tokens of the answer; afterwards call `answered` with its text, however it ended."""
        follows = self._in_context and self._messages
        self._messages.append({"role": "user", "content": text})
        tokens = encode_next_message(self.tokenizer, text) if follows else []
        if not follows or self.ctx.seen + len(tokens) + self.n_predict > self.ctx.n_ctx:
            tokens = self._from_the_start()
        self._in_context = False
        if on_progress is not None:
            on_progress(0, len(tokens))
        generated = self.ctx.stream(
            tokens, n_predict=self.n_predict, sampler=self.sampler, stop=self.stop,
            on_progress=on_progress,
        )  # fmt: skip
        self.written = 0
        for each in generated:
            self._in_context = True
            self.written += 1
            yield each.token
        self._in_context = True

    def answered(self, text: str) -> None:
        """The answer as text, for when it has to be read again."""
        self._messages.append({"role": "assistant", "content": text})

    def withdraw(self) -> None:
        """The last message was not read to its end: as if it had not been said."""
        self._messages.pop()
        self._in_context = False

    def spoiled(self) -> None:
        """A step was interrupted in the middle, so the context has to start anew."""
        self._in_context = False

    def _from_the_start(self) -> list[int]:
        """Forget what the context holds; the latest messages that fit into half of it."""
        self.rereads += self.ctx.seen > 0
        self.ctx.reset()
        room = self.ctx.n_ctx // 2
        if self.ctx.params.n_swa is not None:
            room = min(room, self.ctx.params.n_swa)
        while True:
            tokens = encode_messages(self.tokenizer, opening(self.system) + self._messages)
            if len(tokens) <= room or len(self._messages) < 3:
                return tokens
            del self._messages[:2]


def check_dialogue(state: Mapping[str, Any], path: object) -> None:
    """Raise UsageError where what was saved at `path` is no state of a dialogue."""
    messages = state.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise UsageError(
            f"{path} is no dialogue: saccade generate saved it. Go on there, or give another "
            "--session."
        )


def _is_message(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(name), str)  # pyright: ignore[reportUnknownMemberType]
        for name in ("role", "content")
    )
