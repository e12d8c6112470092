"""Tokens to text as they come: a character is shown once all of its bytes are there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from saccade.cli.decoding import Step, Tidied, steps_of


class TextStream:
    """Decodes tokens one by one, without special tokens; its parts joined are the whole text.

    Args:
        tokenizer: of transformers; one whose decoder has no steps that are known gives its text
            at the end.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer.decode
        self._backend = None if _decodes_itself(tokenizer) else tokenizer.backend_tokenizer
        self._tokens: list[int] = []
        self._steps = None if self._backend is None else steps_of(self._backend.decoder)
        if self._steps is None or self._backend is None:
            return
        added = self._backend.get_added_tokens_decoder()
        self._skipped = {token.content for token in added.values() if token.special}
        if _tidies(tokenizer, self._backend):
            self._steps.append(Tidied(tokenizer.clean_up_tokenization))

    def push(self, token: int) -> str:
        """The text that this token completes, "" where it is not yet certain."""
        if self._steps is None or self._backend is None:
            self._tokens.append(token)
            return ""
        piece = self._backend.id_to_token(token)
        if piece is None or piece in self._skipped:
            return ""
        return "".join(_through(self._steps, [piece]))

    def flush(self) -> str:
        """Whatever is left at the end, incomplete characters included."""
        if self._steps is None:
            tokens, self._tokens = self._tokens, []
            return self._decode(tokens, skip_special_tokens=True) if tokens else ""
        left: list[str] = []
        for index, step in enumerate(self._steps):
            left += _through(self._steps[index + 1 :], step.end())
        return "".join(left)


def _through(steps: Iterable[Step], pieces: Iterable[str]) -> list[str]:
    for step in steps:
        pieces = [text for piece in pieces for text in step.push(piece)]
    return list(pieces)


def _decodes_itself(tokenizer: Any) -> bool:
    """Whether its text is not simply what the decoder of its fast backend says."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return True
    own = getattr(type(tokenizer), "_decode", None)
    return own is not None and own.__qualname__.partition(".")[0] not in _PLAIN


_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def _tidies(tokenizer: Any, backend: Any) -> bool:
    """Whether transformers removes spaces in front of punctuation (for BPE if forced)."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    name = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return type(backend.model).__name__ != "BPE" or getattr(tokenizer, name, True)
