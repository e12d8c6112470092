"""A text with fewer tokens: what a model finds important of it stays, in its order."""

from __future__ import annotations

import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.compress import keep_units, sentence_starts
from saccade.core import BadInput
from saccade.hf.context import Context, as_model
from saccade.hf.load import LoadedModel
from saccade.hf.text_tokens import LocatedTokens, located_tokens, specials, token_pieces
from saccade.runtime import ContextParams
from saccade.runtime.stats import OnProgress
from saccade.runtime.text_scores import TextScorer, TextScores

UNITS = ("token", "sentence", "chunk")
CHUNK = 32
"""Tokens of a chunk, as in SpecPrefill (arXiv 2502.02789)."""
PROTECTED = {
    "numbers": r"\d+(?:[.,:/-]\d+)*",
    "urls": r"\bhttps?://[^\s<>\"]+",
    "code": r"(?ms)^```.*?^```[ \t]*$|`[^`\n]+`",
    "headings": r"(?m)^#{1,6}[ \t].*$",
    "quotes": r"\"[^\"\n]+\"|“[^”]+”|«[^»]+»",
}
"""Names that stand for a regular expression."""


@dataclass(frozen=True, slots=True)
class CompressedText:
    """What `compress_text` kept, and what it took.

    Attributes:
        text: the units that were kept, in their order, as they were written.
        tokens: of `text`, without special tokens around it.
        tokens_before: of the whole text.
        kept: int64, ascending, positions in the whole text of the tokens that were kept; `text` may
            have fewer where its own tokens are longer.
        scores: float32 `[tokens_before]`, None where the text was short enough.
        windows: in how many windows it was scored.
        tokens_read: by the model, over all windows and readings, the question counted.
        seconds: that scoring took.
    """

    text: str
    tokens: int
    tokens_before: int
    kept: Tensor
    scores: Tensor | None = None
    windows: int = 0
    tokens_read: int = 0
    seconds: float = 0.0


def compress_text(
    model: LoadedModel | PreTrainedModel,
    text: str,
    target_len: int,
    *,
    question: str | None = None,
    score: str | None = None,
    unit: str = "sentence",
    protect: Sequence[str] = (),
    window: int | None = None,
    overlap: int | None = None,
    tokenizer: Any = None,
    params: ContextParams | None = None,
    on_progress: OnProgress | None = None,
) -> CompressedText:
    """The units of a text that a model finds most important, at most `target_len` tokens of it.

    The model may be a smaller one than the one that will read the result; tokens are those of its
    own tokenizer.

    Args:
        model: what `saccade.load_model` returns, or a transformers model and its `tokenizer`.
        text: of any length; what lies beyond `window` tokens is read in windows that overlap.
        target_len: most tokens of the result, special tokens around it not counted.
        question: what the text will be asked.
        score: "self_information": -log p(token | text before); "contrastive": how much likelier
            the question in front makes the token; "received_attention": the attention that it
            receives, from the question alone where there is one.  Default: "contrastive" with a
            question, else "received_attention".
        unit: what is kept or dropped whole: "token", "sentence" or "chunk" (of 32 tokens).  A
            sentence or chunk has the mean score of its tokens.
        protect: regular expressions, or names of PROTECTED ("numbers", say); units in which one is
            found are kept.
        window: tokens read together; None: as many as fit into the model's context.
        overlap: tokens that a window has of the one before; None: an eighth of it.
        tokenizer: a fast one; None: that of the model.
        params: of the context that scores; no kv_policy.
        on_progress: called with (tokens read, all that will be).

    Raises:
        BadInput: a value out of range, a question that is missing or of no use, an expression that
            is none, protected units of more than `target_len` tokens, a tokenizer that does not
            say where its tokens lie, or no text.

    Sources: Selective Context (arXiv 2310.06201), LongLLMLingua (2310.06839), H2O (2306.14048).
    """
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise BadInput(f"{type(model).__name__} has no tokenizer: give one (tokenizer=...).")
    if unit not in UNITS:
        raise BadInput(f"unit={unit!r}: expected one of {', '.join(UNITS)}.")
    if target_len < 1:
        raise BadInput(f"target_len={target_len}: expected at least 1 token to keep.")
    patterns = protected_patterns(protect)
    kind = score or ("received_attention" if question is None else "contrastive")
    asked = _question(tokenizer, question, behind=kind == "received_attention")
    before = _ids(specials(tokenizer)[0])
    scorer = TextScorer(kind, asked, before, window, overlap)
    located = located_tokens(tokenizer, text)
    count = len(located.ids)
    if not count:
        raise BadInput("the text has no tokens: expected some text.")
    if count <= target_len:
        return CompressedText(text, count, count, torch.arange(count))
    selection = _Selection.of(text, located, unit, patterns)
    found, seconds = _scored(model, params, scorer, _ids(located.ids), on_progress)
    kept, result, length = selection.fitting(found.scores, target_len, tokenizer)
    return CompressedText(
        result, length, count, kept, found.scores, found.windows, found.read, seconds
    )


def protected_patterns(protect: Iterable[str]) -> list[re.Pattern[str]]:
    """Regular expressions and names of PROTECTED, compiled.

    Raises:
        BadInput: one that is no regular expression.
    """
    found = list[re.Pattern[str]]()
    for each in protect:
        try:
            found.append(re.compile(PROTECTED.get(each, each)))
        except (re.error, OverflowError, RecursionError) as error:
            raise BadInput(
                f"protect={each!r} is no regular expression ({error}): expected one, or a name: "
                f"{', '.join(PROTECTED)}."
            ) from error
    return found


def _question(tokenizer: Any, question: str | None, *, behind: bool) -> Tensor:
    """Tokens of a question, an empty line between it and the text."""
    if question is None:
        return _ids(())
    if not question.strip():
        raise BadInput("the question is empty: expected some text, or none at all.")
    whole = f"\n\n{question}" if behind else f"{question}\n\n"
    return _ids(tokenizer(whole, add_special_tokens=False).input_ids)


def _scored(
    model: LoadedModel | PreTrainedModel,
    params: ContextParams | None,
    scorer: TextScorer,
    tokens: Tensor,
    on_progress: OnProgress | None,
) -> tuple[TextScores, float]:
    """The scores, and the seconds that they took without those of opening the context."""
    runnable = as_model(model)
    n_ctx = (params or ContextParams()).n_ctx or runnable.facts.n_ctx_train
    scorer.windows(len(tokens), n_ctx)  # refused before the model is compared with its own
    with Context(runnable, params) as ctx:
        start = time.perf_counter()
        found = scorer.scores(ctx, tokens, on_progress=on_progress)
        return found, time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class _Selection:
    """The units of a text.

    Attributes:
        text: the whole.
        cuts: `[n + 1]`, token i is written as `text[cuts[i]:cuts[i + 1]]`; nothing is between them.
        starts: the first token of each unit.
        protected: bool `[n]`.
    """

    text: str
    cuts: list[int]
    starts: list[int]
    protected: Tensor

    @classmethod
    def of(
        cls, text: str, located: LocatedTokens, unit: str, patterns: Sequence[re.Pattern[str]]
    ) -> _Selection:
        """The units of a text; tokens that share a character are in the same unit."""
        cuts = [0, *accumulate(located.stops[:-1], max), len(text)]
        whole = [
            i for i, start in enumerate(located.starts)
            if not i or (cuts[i + 1] > cuts[i] and start >= cuts[i])
        ]  # fmt: skip
        protected = torch.zeros(len(located.ids), dtype=torch.bool)
        for pattern in patterns:
            for found in pattern.finditer(text):
                if found.end() > found.start():
                    first = bisect_right(cuts, found.start()) - 1
                    protected[first : bisect_left(cuts, found.end())] = True
        return cls(text, cuts, _unit_starts(text, cuts, whole, unit), protected)

    def fitting(self, scores: Tensor, target_len: int, tokenizer: Any) -> tuple[Tensor, str, int]:
        """(tokens kept, their text, the tokens that it has), at most `target_len` of them.

        Tokens that come together may be read as others, rarely as more: then fewer are kept.
        """
        most = target_len
        while True:
            kept = keep_units(scores, self.starts, most, protected=self.protected)
            text = "".join(self.text[self.cuts[i] : self.cuts[i + 1]] for i in kept.tolist())
            length = sum(map(len, token_pieces(tokenizer, text)))
            if length <= target_len:
                return kept, text, length
            most -= length - target_len


def _unit_starts(text: str, cuts: list[int], whole: list[int], unit: str) -> list[int]:
    """The first token of each unit; `whole` are the tokens in front of which a text may be cut."""
    if unit == "token":
        return whole
    if unit == "chunk":
        of = [i // CHUNK for i in whole]
    else:  # a token belongs to the sentence of its last character
        begins = sentence_starts(text)
        of = [bisect_right(begins, cuts[i + 1] - 1) for i in whole]
    return [i for i, own, last in zip(whole, of, [-1, *of], strict=False) if own > last]


def _ids(tokens: Iterable[int]) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64)
