"""Saving and restoring caches: kind, settings, progress and tensors, checked before use.

The table of kinds is explicit.  Restoring never looks up a class by a name that a file contains
(which is what makes pickled sessions dangerous): the caches exist already, made from the options
of the running context, and a state either fits them or is refused.
"""

from __future__ import annotations

from typing import Final

import torch

from saccade.cache.base import CacheState, LayerCache
from saccade.cache.dense import DenseCache
from saccade.cache.offloaded import OffloadedCache
from saccade.cache.paged import PagedCache
from saccade.cache.quantized import QuantizedCache
from saccade.cache.ragged import RaggedCache
from saccade.cache.ring import RingCache
from saccade.cache.states import StateCache
from saccade.core import BadInput, Unsupported

KINDS: Final[dict[str, type[LayerCache]]] = {
    "dense": DenseCache,
    "ring": RingCache,
    "quantized": QuantizedCache,
    "paged": PagedCache,
    "ragged": RaggedCache,
    "offloaded": OffloadedCache,
    "states": StateCache,
}


def kind_of(cache: LayerCache) -> str:
    """The name of a cache's kind in a session file.

    Raises:
        Unsupported: a cache that is not in the table.
    """
    for name, known in KINDS.items():
        if type(cache) is known:
            return name
    raise Unsupported(
        f"a {type(cache).__name__} cannot be saved; expected one of {', '.join(KINDS)}."
    )


def check(cache: LayerCache, kind: str, state: CacheState) -> None:
    """Raise BadInput unless `state` is that of a cache of the same kind, made the same way."""
    own = kind_of(cache)
    if kind != own:
        raise BadInput(
            f"the session holds a {kind} cache where this context has a {own} one. "
            "Give the options it was saved with."
        )
    here = cache.state()
    for name, value in here.settings.items():
        if state.settings.get(name) != value:
            raise BadInput(
                f"the session was saved with {name}={state.settings.get(name)!r} in a {own} "
                f"cache, this context has {value!r}. Give the options it was saved with."
            )
    numbers = [state.progress.get(name) for name in here.progress]
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise BadInput(
            f"the session has impossible counts for a {own} cache: expected "
            f"{', '.join(here.progress)} of 0 or more, got {dict(state.progress)}. "
            "Delete the session to start anew."
        )


def restore(cache: LayerCache, kind: str, state: CacheState, device: torch.device) -> None:
    """Check `state`, then replace the contents of `cache` by it.

    Raises:
        BadInput: a state that does not fit; the cache may be empty afterwards, never half full.
    """
    check(cache, kind, state)
    try:
        cache.restore(state, device)
    except BadInput:
        cache.reset()
        raise
