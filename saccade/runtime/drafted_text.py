"""Exact speculation: tokens are drafted under a sparse pattern and verified densely, all at once.

The model drafts for itself over the caches that it has (MagicDec, arXiv 2408.11049; TriForce,
2404.11912).  What a draft stores is removed before the dense model reads the same tokens, so that
the caches hold what dense decoding leaves there.  A drafted token counts once the caller has chosen
it from the dense logits before it; with the first one that it has not, the rest is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.cache import SlidingCache, StateCache
from saccade.core import Unsupported
from saccade.runtime.cached_text import CachedText
from saccade.runtime.held import Caches
from saccade.runtime.model import Model, ModelCache
from saccade.runtime.params import ContextParams
from saccade.runtime.rollback import roll_back
from saccade.runtime.sampling import Sampler
from saccade.runtime.stats import Stats
from saccade.runtime.tables import outgrown


class _Verified(NamedTuple):
    """Tokens that the dense model has read.

    Attributes:
        start: length of the text before them.
        logits: `[n, vocab]` float32 behind each.
    """

    start: int
    tokens: list[int]
    logits: Tensor


class DraftedText(CachedText):
    """A text whose caches may hold tokens ahead of it; see CachedText.

    Whatever but `read_ahead` asks for the caches finds them without those tokens.

    Raises:
        Unsupported: a model with a layer that cannot go back to where a draft began, or with other
            rotary tables for every length.
    """

    def __init__(self, model: Model, params: ContextParams, *, reserve: int = 0) -> None:
        self._verified: _Verified | None = None
        super().__init__(model, params, reserve=reserve)
        _check_goes_back(self._cache, params)
        _check_tables(model, params)

    def read_ahead(
        self, token: int, most: int, sampler: Sampler, ends: set[int], stats: Stats
    ) -> bool:
        """Read the next token, and at once those that are drafted behind it.

        Args:
            most: tokens to draft, within n_draft.
            sampler: draws of a copy of it choose drafts, as its own will choose the text.
            ends: tokens behind which no more are drafted.
            stats: where drafted and accepted tokens are counted.

        Returns:
            False where nothing was read, because nothing is to be drafted.
        """
        if self._take(token):
            stats.accepted += 1
            return True
        most = min(most, self._params.n_draft or 0)
        self.settle()
        if most < 1 or outgrown(self._model, self._cache, self._cache.seen + 1 + most):
            return False
        stats.drafted += self._read_drafting(token, most, sampler.ahead(), ends)
        stats.draft_rounds += 1
        return True

    def _take(self, token: int) -> bool:
        """Whether `token` was read ahead as the next one; it is then part of the text."""
        if not self._is_ahead or self._verified is None:
            return False
        held, (start, tokens, logits) = self._held, self._verified
        at = held.length - start
        if at >= len(tokens) or tokens[at] != token:
            return False
        self._hold(held, [token], logits=logits[at])
        return True

    def _read_drafting(self, token: int, most: int, sampler: Sampler, ends: set[int]) -> int:
        """Read a token, and behind it those that the pattern drafts; how many these are."""
        with self._operation(Caches.READING, Caches.AHEAD) as held, torch.inference_mode():
            before = self._cache.seen
            tokens = [token, *self._drafts(token, most, sampler, ends)]
            self._cache.writing = True  # layers are in the middle of a change until this ends
            roll_back(self._cache.stores, before)
            self._cache.writing = False
            hidden = self._model.hidden(torch.tensor([tokens]), self._cache)[0]
            logits = self._model.logits(hidden).float()
            self._verified = _Verified(held.length, tokens, logits)
            self._hold(held, [token], logits=logits[0])
        return len(tokens) - 1

    def _drafts(self, token: int, most: int, sampler: Sampler, ends: set[int]) -> list[int]:
        found: list[int] = []
        while len(found) < most and not (found and token in ends):
            hidden = self._model.drafted(torch.tensor([[token]]), self._cache)[0, -1]
            token = sampler.pick(self._model.logits(hidden).float())
            found.append(token)
        return found


def _check_goes_back(cache: ModelCache, params: ContextParams) -> None:
    for index, layer in enumerate(cache.stores):
        if isinstance(layer, SlidingCache | StateCache):
            what = "keeps a window" if isinstance(layer, SlidingCache) else "is recurrent"
            raise Unsupported(
                f"n_draft={params.n_draft} removes rejected tokens from all layers, but layer "
                f"{index} of this model {what} and cannot go back to every token. Leave n_draft "
                "unset."
            )


def _check_tables(model: Model, params: ContextParams) -> None:
    longest = 2 * (params.n_ctx or model.facts.n_ctx_train)
    if model.table_key(longest) != model.table_key(longest + 1):
        raise Unsupported(
            f"n_draft={params.n_draft} reads several tokens at once, but the rotary tables of this "
            "model change with every token beyond the trained length. Leave n_draft unset, or set "
            "rope_scaling_type='ntk' or 'yarn' with n_ctx."
        )
