"""`generate()` under a kv_policy: caches are compressed where the prompt ends.

transformers does not say where that is, but gives the whole prompt to `generate`.  So the cache
observes the queries of the prompt, and is compressed when the first token behind it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.cache import RaggedCache, SlidingCache, StateCache
from saccade.compress import in_keys
from saccade.core import Unsupported
from saccade.hf.cache import SaccadeCache
from saccade.hf.facts import facts_of
from saccade.hf.generate_options import option
from saccade.hf.policy_sources import reader_of_run, sources_of
from saccade.hf.runs import Run
from saccade.runtime.budgets import budget_in_keys
from saccade.runtime.compression import compress_cache, room_behind
from saccade.runtime.model import ModelFacts
from saccade.runtime.observing import ObservationWindow, observing
from saccade.runtime.params import ContextParams
from saccade.units import Bytes

_COPYING: Final = ("num_beams", "num_return_sequences")
"""Options by which `generate` computes each row of a batch so many times, side by side."""


def prompt_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Tokens `[B, length]` of the prompt of a `generate` call; None where it gives none."""
    given = [kwargs.get("inputs"), kwargs.get("input_ids"), *args[:1]]
    tokens = next((x for x in given if isinstance(x, Tensor)), None)
    return None if tokens is None or tokens.dim() != 2 else tokens


def compress_behind_prompt(
    cache: SaccadeCache,
    run: Run,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    new_cache: Callable[[Run], SaccadeCache],
) -> None:
    """Compress the cache of a `generate` call by the params of its run once its prompt is read.

    Args:
        args, kwargs: of the call.
        new_cache: empty caches under the options of a run.

    Raises:
        BadInput: a budget in bytes that is too small for so many rows.
        Unsupported: a prompt without token ids, or with padding that is not on the left.
    """
    params = run.params
    prompt, mask = prompt_of(args, kwargs), kwargs.get("attention_mask")
    if prompt is None:
        raise Unsupported(
            "kv_policy compresses where the prompt ends, which inputs_embeds do not say: give "
            "input_ids, or leave kv_policy unset."
        )
    padding = None
    copies = max(option(kwargs, name, run.model) or 1 for name in _COPYING)
    if isinstance(mask, Tensor) and is_padded(kwargs):
        padding = [before for before in _padding(mask) for _ in range(copies)]
    full = [x for x in cache.stores if not isinstance(x, SlidingCache | StateCache)]
    if padding is not None and not all(isinstance(store, RaggedCache) for store in full):
        raise Unsupported(
            "rows of a padded batch keep different numbers of keys, which this cache cannot hold: "
            "expected that generate() makes one in full precision. Leave out past_key_values, "
            "type_k and type_v."
        )
    assert params.kv_policy is not None
    rows = [row for row in prompt.tolist() for _ in range(copies)]
    texts = [row[before:] for row, before in zip(rows, padding or [0] * len(rows), strict=True)]
    sources = sources_of(run, prompt.shape[1], reader_of_run(run, texts, new_cache))
    window = observing(params.kv_policy, cache, sources, padding)
    if isinstance(params.kv_budget, Bytes):
        ragged = any(isinstance(store, RaggedCache) for store in full)
        params = budget_in_keys(params, _facts(run.model), rows=len(rows), ragged=ragged)
    _Schedule(cache, params, window, prompt.shape[1]).next()


def _facts(model: PreTrainedModel) -> ModelFacts:
    """Sizes of a model; how long its positions reach does not matter here."""
    return facts_of(
        model.config, name="", n_ctx_train=1, dtype=model.dtype, model_class=type(model)
    )


def prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens of the prompt of a `generate` call; None where it gives none."""
    prompt = prompt_of(args, kwargs)
    return None if prompt is None else prompt.shape[1]


def is_padded(kwargs: dict[str, Any]) -> bool:
    """Whether the attention mask of a `generate` call hides tokens."""
    mask = kwargs.get("attention_mask")
    return isinstance(mask, Tensor) and not bool(mask.all())


def _padding(mask: Tensor) -> list[int]:
    """Tokens before the text of each row of a mask `[B, length]`."""
    if mask.dim() == 2:
        before = (mask == 0).sum(1)
        columns = torch.arange(mask.shape[1], device=mask.device)
        if torch.equal(mask != 0, columns >= before[:, None]):
            return before.tolist()
    raise Unsupported(
        "kv_policy takes batches that are padded on the left, but this attention_mask hides other "
        "tokens. Set tokenizer.padding_side='left'."
    )


class _Schedule(NamedTuple):
    """When the caches of one `generate` call are compressed: before a token is stored."""

    cache: SaccadeCache
    params: ContextParams
    window: ObservationWindow
    length: int

    def next(self) -> None:
        """Wait for the end of the prompt, or until `kv_every` more tokens were stored."""
        seen, every = self.cache.seen, self.params.kv_every
        at = None if every is None else seen + every
        if seen < self.length:
            at = self.length if at is None else min(at, self.length)
        if at is not None:
            self.cache.behind(at, self.compress)

    def compress(self) -> None:
        """Compress, and go on observing where that is wanted."""
        assert self.params.kv_budget is not None
        budget = in_keys(self.params.kv_budget)
        compress_cache(self.cache, self.window, budget, room=room_behind(self.params))
        if self.params.kv_every is None:
            self.cache.observer = None
        else:
            self.window.restore(self.window.after_compression() or {})
        self.next()
