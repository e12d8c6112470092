"""One sample under one set of options: read, compress, ask, write, score."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

from saccade.evals.frame import Prompt
from saccade.evals.tasks import Sample, Turn, score, settled
from saccade.hf.context import Context as CheckedContext
from saccade.hf.model import HFModel
from saccade.runtime import Context, ContextParams
from saccade.runtime.compression import DECODE_ROOM
from saccade.runtime.stats import OnProgress

Asked = Literal["before", "after"]
"""Whether the (first) question is read before the cache is compressed, or after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a model answered.

    Attributes:
        answers: what it wrote, and scores: of each, by turn.
        cache_bytes: bytes of the caches right after compression.
        seconds: of the whole sample.
    """

    answers: list[str]
    scores: list[float]
    cache_bytes: int
    seconds: float


def answer(
    model: HFModel,
    params: ContextParams,
    prompt: Prompt,
    sample: Sample,
    *,
    asked: Asked,
    tokenizer: Any,
    ends: set[int],
    on_progress: OnProgress | None = None,
) -> Outcome:
    """Read the context, compress it before or after the first question, and answer all questions.

    Every later question is read behind the model's own answer to the one before it.

    Args:
        on_progress: called with (tokens of the context read, all of them) behind each chunk.
    """
    begin = time.perf_counter()
    answers: list[str] = []
    # As much room behind the text as a compressed cache gets, so that bytes can be compared.
    reserve = len(prompt.context) + DECODE_ROOM
    with CheckedContext(model, params, reserve=reserve) as ctx:
        ctx.append(prompt.context, on_progress=on_progress)
        compressed = asked == "after"
        if compressed:
            ctx.compress()
        size = ctx.cache_bytes
        for turn, tokens in zip(sample.turns, prompt.turns, strict=True):
            ctx.append(tokens.question)
            if not compressed:
                ctx.compress()
                compressed, size = True, ctx.cache_bytes
            ctx.append(tokens.prefix)
            answers.append(_written(ctx, turn, tokenizer, ends))
    scores = [score(turn, text) for turn, text in zip(sample.turns, answers, strict=True)]
    return Outcome(
        answers=answers, scores=scores, cache_bytes=size, seconds=time.perf_counter() - begin
    )


def _written(ctx: Context, turn: Turn, tokenizer: Any, ends: set[int]) -> str:
    """The greedy answer, up to where its score is settled."""
    tokens: list[int] = []
    text = ""
    for each in ctx.stream((), n_predict=turn.n_predict, stop=ends):
        tokens.append(each.token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if settled(turn, text):
            break
    return text
