"""`generate()` under a kv_policy: caches are compressed where the prompt ends.

transformers does not say where that is, but gives the whole prompt to `generate`.  So the cache
observes the queries of the prompt, and is compressed when the first token behind it is stored.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from saccade.core import Unsupported
from saccade.hf.cache import SaccadeCache
from saccade.runtime.compression import ObservationWindow, compress_cache
from saccade.runtime.params import ContextParams


def prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens of the prompt of a `generate` call; None where it gives none."""
    given = [kwargs.get("inputs"), kwargs.get("input_ids"), *args[:1]]
    tokens = next((x for x in given if isinstance(x, Tensor)), None)
    return None if tokens is None or tokens.dim() != 2 else tokens.shape[1]


def compress_behind_prompt(
    cache: SaccadeCache, params: ContextParams, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Compress the cache of a `generate` call by the params once its prompt is read.

    Raises:
        Unsupported: a prompt without token ids, or with padding.
    """
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
    window = ObservationWindow.for_policy(params.kv_policy)
    cache.observer = window.observe
    cache.behind(length, partial(_compress, cache, params, window))


def _compress(cache: SaccadeCache, params: ContextParams, window: ObservationWindow) -> None:
    assert params.kv_policy is not None and params.kv_budget is not None
    cache.observer = None
    compress_cache(cache, window, params.kv_policy, params.kv_budget)
