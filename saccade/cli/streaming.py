"""Tokens to text as they come: a character whose bytes are still arriving is held back."""

from __future__ import annotations

from typing import Any


class TextStream:
    """Decodes a growing list of tokens piece by piece.

    Text is always decoded together with the tokens before it, because what a token looks like
    (a leading space, a byte of a character) depends on them.

    Args:
        tokenizer: anything with `decode(tokens, skip_special_tokens=True)`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # first token of the piece that is decoded
        self._shown = 0  # tokens whose text is out

    def push(self, token: int) -> str:
        """The text that this token completes, "" where it is not yet certain."""
        self._tokens.append(token)
        before, now = self._texts()
        if now.endswith("\ufffd"):  # the middle of a character
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def flush(self) -> str:
        """Whatever is left at the end, incomplete characters included."""
        before, now = self._texts()
        self._start, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return (
            decode(self._tokens[self._start : self._shown], skip_special_tokens=True),
            decode(self._tokens[self._start :], skip_special_tokens=True),
        )
