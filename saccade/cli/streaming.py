"""Tokens to text as they come: a character is shown once all of its bytes are there."""

from __future__ import annotations

from typing import Any


class TextStream:
    """Decodes tokens one by one (`tokenizers.decoders.DecodeStream`), without special tokens.

    Args:
        tokenizer: of transformers; one without a fast backend gives its text at the end.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode = (self._backend or tokenizer).decode
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._given = 0  # characters

    def push(self, token: int) -> str:
        """The text that this token completes, "" where it is not yet certain."""
        self._tokens.append(token)
        if self._backend is None:
            return ""
        text = self._stream.step(self._backend, token) or ""
        self._given += len(text)
        return text

    def flush(self) -> str:
        """Whatever is left at the end, incomplete characters included."""
        text = self._decode(self._tokens, skip_special_tokens=True)[self._given :]
        self._given += len(text)
        return text
