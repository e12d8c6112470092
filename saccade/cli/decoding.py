"""The decoders of the tokenizers library, one token at a time: text that no later token changes.

Each step takes the pieces of the one before it and gives its own as soon as they are certain; all
of them joined are what the library's decoder makes of all tokens at once.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tokenizers import decoders


class Step(Protocol):
    """One decoder."""

    def push(self, piece: str) -> Sequence[str]:
        """What is certain once this piece has come."""
        ...

    def end(self) -> Sequence[str]:
        """What is left once no more pieces come."""
        ...


class Each:
    """A decoder that reads every piece by itself, and the first one otherwise."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode, self._guard = decode, ""

    def push(self, piece: str) -> Sequence[str]:
        if not self._guard:
            self._guard = "x"
            return [self._decode([piece])]
        return [self._decode([self._guard, piece])[len(self._guard) :]]

    def end(self) -> Sequence[str]:
        return ()


class Alone:
    """A decoder that reads every piece by itself."""

    def __init__(self, decode: Callable[[str], str]) -> None:
        self._decode = decode

    def push(self, piece: str) -> Sequence[str]:
        return [self._decode(piece)]

    def end(self) -> Sequence[str]:
        return ()


class Distinct:
    """CTC: a piece that follows its equal is left out."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode, self._before = decode, ""

    def push(self, piece: str) -> Sequence[str]:
        same, self._before = piece == self._before, piece
        return () if same else [self._decode([piece])]

    def end(self) -> Sequence[str]:
        return ()


class Suffixed:
    """BPE with an ending such as </w>: a space, but nothing behind the last piece."""

    def __init__(self, suffix: str) -> None:
        self._suffix, self._waits = suffix, list[str]()

    def push(self, piece: str) -> Sequence[str]:
        done = [text.replace(self._suffix, " ") for text in self._waits]
        self._waits = [piece]
        return done

    def end(self) -> Sequence[str]:
        done = [text.replace(self._suffix, "") for text in self._waits]
        self._waits = []
        return done


class ByteRuns:
    """Byte fallback: `<0xE4>` and those that follow it are text only if all of them are."""

    def __init__(self) -> None:
        self._decode, self._run = decoders.ByteFallback().decode, list[str]()

    def push(self, piece: str) -> Sequence[str]:
        if self._decode([piece]) != piece:
            self._run.append(piece)
            return ()
        return [*self.end(), piece]

    def end(self) -> Sequence[str]:
        run, self._run = self._run, []
        return [self._decode(run)] if run else ()


class Utf8:
    """Byte level: pieces are spelled in GPT-2's letters for bytes; a character needs all of its."""

    def __init__(self) -> None:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self._bytes = {chr(byte): byte for byte in printable}
        self._bytes |= {chr(256 + index): byte for index, byte in enumerate(others)}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> Sequence[str]:
        try:
            read = bytes(self._bytes[letter] for letter in piece)
        except KeyError:  # a token that is added to the vocabulary is spelled as it is
            read = piece.encode()
        return [self._decoder.decode(read)]

    def end(self) -> Sequence[str]:
        return [self._decoder.decode(b"", final=True)]


class Stripped:
    """The whole text without so many of one character at its start and end."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop
        self._tail = ""

    def push(self, piece: str) -> Sequence[str]:
        text = self._tail + self._without_start(piece)
        tail = len(text) - len(text.rstrip(self._content))
        cut = len(text) - min(tail, self._stop)
        self._tail = text[cut:]
        return [text[:cut]]

    def end(self) -> Sequence[str]:
        return ()

    def _without_start(self, piece: str) -> str:
        while self._start and piece.startswith(self._content):
            piece, self._start = piece[len(self._content) :], self._start - 1
        self._start = 0 if piece else self._start
        return piece


class Tidied:
    """transformers' clean-up of spaces in front of punctuation, where a tokenizer asks for it.

    It only ever changes runs of these characters, so text up to any other one is certain.
    """

    _CHANGED = frozenset(" .?!,'ntmsver")

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._clean, self._waits = clean, list[str]()

    def push(self, piece: str) -> Sequence[str]:
        cut = len(piece)
        while cut and piece[cut - 1] in self._CHANGED:
            cut -= 1
        if not cut:
            self._waits.append(piece)
            return ()
        text, self._waits = "".join(self._waits) + piece[:cut], [piece[cut:]]
        return [self._clean(text)]

    def end(self) -> Sequence[str]:
        text, self._waits = "".join(self._waits), []
        return [self._clean(text)]


def steps_of(decoder: Any) -> list[Step] | None:
    """The steps of a decoder; None where it has one whose text is only certain at the end."""
    if decoder is None:
        return [Each(" ".join)]
    state = json.loads(decoder.__getstate__())
    whole, steps = False, list[Step]()
    for part in state["decoders"] if state["type"] == "Sequence" else [state]:
        step = _step(part, whole)
        if step is None:
            return None
        steps += step
        whole = whole or part["type"] in ("Fuse", "ByteLevel")
    return steps


def _step(state: Mapping[str, Any], whole: bool) -> list[Step] | None:
    """The step of a decoder's state, behind one that made a single text of all pieces or not."""
    kind = state["type"]
    if kind == "Fuse":
        return []
    if kind == "Strip" and whole:
        return [Stripped(state["content"], state["start"], state["stop"])]
    if kind == "Replace":
        return _replace(state["pattern"], state["content"], whole)
    made = _MADE.get(kind)
    return None if made is None or whole else [made(state)]


def _replace(pattern: Mapping[str, str], content: str, whole: bool) -> list[Step] | None:
    text = pattern.get("String")
    if text is None or (whole and len(text) != 1):
        return None
    return [Alone(lambda piece: piece.replace(text, content))]


def _word_piece(state: Mapping[str, Any]) -> Step:
    return Each(decoders.WordPiece(state["prefix"], state["cleanup"]).decode)


def _metaspace(state: Mapping[str, Any]) -> Step:
    return Each(decoders.Metaspace(state["replacement"], state["prepend_scheme"]).decode)


def _ctc(state: Mapping[str, Any]) -> Step:
    options = (state["pad_token"], state["word_delimiter_token"], state["cleanup"])
    return Distinct(decoders.CTC(*options).decode)


def _strip(state: Mapping[str, Any]) -> Step:
    strip = decoders.Strip(state["content"], state["start"], state["stop"]).decode
    return Alone(lambda piece: strip([piece]))


_MADE: Mapping[str, Callable[[Mapping[str, Any]], Step]] = {
    "ByteLevel": lambda state: Utf8(),
    "ByteFallback": lambda state: ByteRuns(),
    "BPEDecoder": lambda state: Suffixed(state["suffix"]),
    "WordPiece": _word_piece,
    "Metaspace": _metaspace,
    "CTC": _ctc,
    "Strip": _strip,
}
