"""Tokens of long texts: read in pieces, with bounded memory, and no further than they are used.

A tokenizer of transformers takes a text as a whole: for 50 MB that is a minute and gigabytes.  Here
it takes windows that overlap.  Two windows are joined where both have the same tokens at the same
characters, so the result is what the whole text would give.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

from saccade.core import BadInput

WINDOW: Final = 1 << 16
"""Characters that the tokenizer sees at once."""
_OVERLAP: Final = 1 << 10
_AGREEING: Final = 8
"""Tokens on both sides of a joint that have to be the same in both windows."""
_WIDEST: Final = 1 << 20
"""A text without any joint in so many characters (one endless word) is cut between two tokens."""


class LocatedTokens(NamedTuple):
    """Tokens of a text or of a part of it.

    Attributes:
        ids: `[n]`.
        starts, stops: the characters of the whole text that each begins at and ends before `[n]`;
            tokens that share a character have the same.
    """

    ids: list[int]
    starts: list[int]
    stops: list[int]


def located_tokens(tokenizer: Any, text: str) -> LocatedTokens:
    """The tokens of a text of any length, without special tokens around it, and where they lie.

    Raises:
        BadInput: a tokenizer that does not say where its tokens lie.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            f"{type(tokenizer).__name__} does not say where in a text its tokens lie: expected a "
            "fast tokenizer (PreTrainedTokenizerFast), whose folder has a tokenizer.json."
        )
    found = LocatedTokens([], [], [])
    for part in _parts(tokenizer, text):
        for all_of_them, more in zip(found, part, strict=True):
            all_of_them.extend(more)
    return found


def token_pieces(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """The tokens of a text as it is, without special tokens around it, in pieces.

    A tokenizer that does not say where its tokens begin gives them all at once.
    """
    if len(text) <= WINDOW or not getattr(tokenizer, "is_fast", False):
        yield list(tokenizer(text, add_special_tokens=False).input_ids)
        return
    for part in _parts(tokenizer, text):
        yield part.ids


def _parts(tokenizer: Any, text: str) -> Iterator[LocatedTokens]:
    """The tokens of a text in pieces, of a tokenizer that says where they lie."""
    at, width, first = 0, WINDOW, 0  # `first` is the index of the first token not yet given
    window = _encoded(tokenizer, text, 0, WINDOW)
    while at + width < len(text):
        after = at + width - _OVERLAP
        following = _encoded(tokenizer, text, after, after + WINDOW)
        joint = _joint(window, following, after, at + width)
        if joint is None and width < _WIDEST:
            width *= 4
            window = _encoded(tokenizer, text, at, at + width)
            continue
        if joint is None:  # cut in front of the last token, or behind the only one
            here, after, there = len(window.ids) - 1, window.starts[-1] if window.ids else at, 0
            if after <= at:
                here, after = len(window.ids), at + width
            following = _encoded(tokenizer, text, after, after + WINDOW)
        else:
            here, there = joint
        yield _cut(window, first, here)
        at, width, first, window = after, WINDOW, there, following
    yield _cut(window, first, len(window.ids))


def _cut(window: LocatedTokens, first: int, last: int) -> LocatedTokens:
    return LocatedTokens(*(each[first:last] for each in window))


def _encoded(tokenizer: Any, text: str, start: int, stop: int) -> LocatedTokens:
    found = tokenizer(text[start:stop], add_special_tokens=False, return_offsets_mapping=True)
    places = found.offset_mapping
    return LocatedTokens(
        list(found.input_ids), [start + a for a, _ in places], [start + b for _, b in places]
    )


def _joint(
    left: LocatedTokens, right: LocatedTokens, start: int, stop: int
) -> tuple[int, int] | None:
    """(index in left, index in right) of a token from which on both are the same text."""
    places = {place: index for index, place in reversed(list(enumerate(right.starts)))}
    margin = (stop - start) // 8
    for here in range(len(left.ids) - _AGREEING, _AGREEING, -1):
        if left.starts[here] < start + margin:
            return None
        there = places.get(left.starts[here], 0)
        if left.starts[here] > stop - margin or there < _AGREEING:
            continue
        if all(_around(a, here) == _around(b, there) for a, b in zip(left, right, strict=True)):
            return here, there
    return None


def _around(values: list[int], index: int) -> list[int]:
    return values[index - _AGREEING : index + _AGREEING]


def all_tokens(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Tokens of a text of any length; `special` puts the model's own around it."""
    if len(text) <= WINDOW:
        return list(tokenizer(text, add_special_tokens=special).input_ids)
    before, after = specials(tokenizer) if special else ([], [])
    return [*before, *chain.from_iterable(token_pieces(tokenizer, text)), *after]


def specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text and behind it."""
    text = list(tokenizer("a", add_special_tokens=False).input_ids)
    whole = list(tokenizer("a", add_special_tokens=True).input_ids)
    for at in range(len(whole) - len(text) + 1):
        if whole[at : at + len(text)] == text:
            return whole[:at], whole[at + len(text) :]
    return [], []


def first_tokens(
    tokenizer: Any, source: str | Path, count: int, *, special: bool = False
) -> list[int]:
    """The first `count` tokens of a text or of a file; fewer if it ends.

    Only as much is read as is needed.  `special` puts the model's own in front of it.

    Raises:
        BadInput: a file that cannot be read or is not UTF-8.
    """
    before = specials(tokenizer)[0] if special else []
    size = max(WINDOW, 8 * count)
    while True:
        text, whole = _beginning(source, size)
        tokens = _first(token_pieces(tokenizer, text), count if whole else count + _AGREEING)
        if whole or len(tokens) >= count + _AGREEING:
            return [*before, *tokens][:count]
        size *= 4


def _first(pieces: Iterable[list[int]], count: int) -> list[int]:
    found: list[int] = []
    for piece in pieces:
        found += piece
        if len(found) >= count:
            break
    return found


def _beginning(source: str | Path, size: int) -> tuple[str, bool]:
    """About the first `size` characters, and whether that is all."""
    if isinstance(source, str):
        return source[:size], len(source) <= size
    try:
        with source.open("rb") as file:
            data = file.read(size + 1)
        whole = len(data) <= size
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole), whole
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{source} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from None
    except OSError as error:
        raise BadInput(f"cannot read the text {source}: {error.strerror}.") from None


def count_tokens(tokenizer: Any, text: str, most: int) -> int:
    """How many tokens a text has: exactly up to `most`, else estimated from that many of them.

    The time it takes is bounded by `most`, not by the text.
    """
    if len(text) <= WINDOW or len(text.encode()) <= most:
        return sum(map(len, token_pieces(tokenizer, text)))
    size = WINDOW
    while True:
        found = sum(map(len, token_pieces(tokenizer, text[:size])))
        if size >= len(text):
            return found
        if found > most:
            return max(most + 1, found * len(text) // size)
        size *= 4
