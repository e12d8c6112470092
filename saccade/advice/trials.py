"""Trials: settings of an advice run on the model itself, a short text each.

Tokens are random ones of the vocabulary, since neither memory nor time depends on which they are.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from saccade.advice.evidence import evidence_for, setting_of
from saccade.advice.recommend import Advice, Option
from saccade.ops.allocated import AllocatedPeak
from saccade.runtime import Context, Sampler

if TYPE_CHECKING:
    from saccade.hf.load import LoadedModel

MOST_TOKENS: Final = {"cpu": 2048, "cuda": 32768}
_WRITTEN: Final = 16
_MOST_SETTINGS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting, measured.

    Attributes:
        tokens: of the prompt; peak: bytes the allocator had given out at once, weights counted.
        first_token: seconds; kl: of the record that the advice names, None without one.
    """

    name: str
    tokens: int
    peak: int
    cache_bytes: int
    first_token: float
    tokens_per_second: float
    kl: float | None

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def trials(model: LoadedModel, advice: Advice) -> list[Trial]:
    """The settings that fit, each read and written with once, at a context scaled down."""
    tokens = min(advice.tokens, MOST_TOKENS[advice.machine.kind])
    fitting = [each for each in advice.options if each.fits][:_MOST_SETTINGS]
    return [_trial(model, each, tokens) for each in fitting]


def _trial(model: LoadedModel, option: Option, tokens: int) -> Trial:
    """One setting on a model that is loaded."""
    from saccade.hf.context import Context as Opened

    params = replace(option.candidate.params, n_ctx=None)
    weights = model.weights_bytes
    with Opened(model, params) as ctx:
        vocabulary = ctx.model.facts.vocab_size
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, vocabulary, (tokens,), generator=generator)
        peak, caches, first, rate = _run(ctx, ids)
    found = evidence_for(params, tokens)
    kl = 0.0 if setting_of(params) is None else (found.kl if found else None)
    return Trial(
        name=option.name, tokens=tokens, peak=weights + peak, cache_bytes=caches,
        first_token=first, tokens_per_second=rate, kl=kl,
    )  # fmt: skip


def _run(ctx: Context, ids: Tensor) -> tuple[int, int, float, float]:
    """(peak bytes above the start, bytes of caches, seconds to the first token, tokens/s)."""
    with AllocatedPeak(ctx.model.device) as allocated:
        begin = time.perf_counter()
        stream = ctx.stream(ids, n_predict=_WRITTEN, sampler=Sampler())
        next(stream)
        first, caches = time.perf_counter() - begin, ctx.cache_bytes
    moments = [time.perf_counter() for _ in stream]
    rate = (len(moments) - 1) / (moments[-1] - moments[0]) if len(moments) > 1 else 0.0
    return allocated.bytes, caches, first, rate


def picture(found: Iterable[Trial]) -> str:
    """Memory and speed of all trials, as SVG."""
    from saccade.report.pareto import Point, pareto_svg

    return pareto_svg([
        Point(name=t.name, bytes=t.peak, tokens_per_second=t.tokens_per_second, kl=t.kl)
        for t in found
    ])  # fmt: skip


def page(found: Sequence[Trial]) -> str:
    """The picture as a page."""
    title = html.escape(
        f"Settings measured with {found[0].tokens:,} tokens" if found else "Nothing"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<h1>{title}</h1>{picture(found)}</html>\n"
    )
