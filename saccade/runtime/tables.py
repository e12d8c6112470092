"""Rotary tables that follow the length of the text: one text, one table (LongRoPE, dynamic NTK).

A prompt is read under the tables of the length that it reaches, however it is split.  Where later
tokens need other tables, all tokens are read again under those: what the caches hold is always what
one reading of the whole text gives.  LongRoPE changes its tables once, past the trained length;
dynamic NTK for every token past it, which makes each of them as expensive as a prompt.
"""

from __future__ import annotations

import warnings

from saccade.cache import SlidingCache
from saccade.core import Unsupported
from saccade.runtime.model import Model, ModelCache


def outgrown(model: Model, cache: ModelCache, length: int) -> bool:
    """Whether a text of `length` tokens has other tables than the cached keys."""
    if not cache.seen or cache.reaches is None:
        return False
    return model.table_key(length) != model.table_key(cache.reaches)


def must_read_again(model: Model, cache: ModelCache, length: int) -> bool:
    """Whether the tokens in the caches have to be read again for a text of `length` tokens.

    Raises:
        Unsupported: they have to be, but were compressed.
    """
    if not outgrown(model, cache, length):
        return False
    _check_not_compressed(cache, length)
    if model.table_key(length) != model.table_key(length + 1):
        warnings.warn(_SLOW.format(length=length), stacklevel=4)
    return True


_SLOW = (
    "dynamic NTK changes the rotary frequencies of all keys with every token past the trained "
    "length, so all {length} tokens are read again for each. Set rope_scaling_type='ntk' or 'yarn' "
    "with n_ctx: one table then serves the whole context."
)


def _check_not_compressed(cache: ModelCache, length: int) -> None:
    for layer in cache.stores:
        if not isinstance(layer, SlidingCache) and layer.max_rollback(1) == 0:
            raise Unsupported(
                f"at {length} tokens the rotary tables of this model change, and a compressed "
                f"cache cannot be read again: it holds {cache.seen} tokens under the tables before."
                " Leave kv_policy unset, or set rope_scaling_type and n_ctx so that one table "
                "serves the whole context."
            )
