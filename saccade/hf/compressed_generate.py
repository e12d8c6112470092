"""`generate()` under a kv_policy: caches are compressed where the prompt ends.

transformers does not say where that is, but gives the whole prompt to `generate`.  So the cache
observes the queries of the prompt, and is compressed when the first token behind it is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from saccade.core import Unsupported
from saccade.hf.cache import SaccadeCache
from saccade.hf.policy_sources import sources_of
from saccade.hf.runs import Run
from saccade.runtime.compression import ObservationWindow, compress_cache, observing
from saccade.runtime.params import ContextParams


def prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens of the prompt of a `generate` call; None where it gives none."""
    given = [kwargs.get("inputs"), kwargs.get("input_ids"), *args[:1]]
    tokens = next((x for x in given if isinstance(x, Tensor)), None)
    return None if tokens is None or tokens.dim() != 2 else tokens.shape[1]


def compress_behind_prompt(
    cache: SaccadeCache, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Compress the cache of a `generate` call by the params of its run once its prompt is read.

    Raises:
        Unsupported: a prompt without token ids, or with padding.
    """
    params = run.params
    length, mask = prompt_length(args, kwargs), kwargs.get("attention_mask")
    if length is None:
        raise Unsupported(
            "kv_policy compresses where the prompt ends, which inputs_embeds do not say: give "
            "input_ids, or leave kv_policy unset."
        )
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise Unsupported(
            "kv_policy keeps the same number of keys of each text, but this batch is padded: "
            "generate for texts of one length, or for each by itself."
        )
    assert params.kv_policy is not None
    window = observing(params.kv_policy, cache, sources_of(run, length))
    _Schedule(cache, params, window, length).next()


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
        compress_cache(self.cache, self.window, self.params.kv_budget)
        if self.params.kv_every is None:
            self.cache.observer = None
        else:
            self.window.restore(self.window.after_compression() or {})
        self.next()
