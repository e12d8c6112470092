"""Saving and restoring caches: kind, settings, progress and tensors, all checked before use.

The table of kinds is explicit.  Restoring never looks up a class by a name that a file contains
(which is what makes pickled sessions dangerous): the caches exist already, made from the options
of the running context, and a state either fits them or is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor

from saccade.cache.base import CacheState, LayerCache
from saccade.cache.dense import DenseCache
from saccade.cache.late_quantized import LateQuantizedCache
from saccade.cache.offloaded import OffloadedCache
from saccade.cache.paged import PagedCache
from saccade.cache.quantized import QuantizedCache
from saccade.cache.quantized_ring import QuantizedRing
from saccade.cache.ragged import RaggedCache
from saccade.cache.ring import RingCache
from saccade.cache.states import StateCache
from saccade.core import BadInput, Unsupported

KINDS: Final[dict[str, type[LayerCache]]] = {
    "dense": DenseCache,
    "ring": RingCache,
    "quantized": QuantizedCache,
    "quantized ring": QuantizedRing,
    "late quantized": LateQuantizedCache,
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


def check(cache: LayerCache, kind: str, state: CacheState, tokens: int | None = None) -> None:
    """Raise BadInput unless `state` is that of a cache of the same kind, made the same way.

    Args:
        tokens: how many the cache has to have seen; None: as many as it says.
    """
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
    possible = all(type(n) is int and n >= 0 for n in numbers)
    if not possible or not _counts_fit(own, state, tokens):
        raise BadInput(
            f"the session has impossible counts for a {own} cache"
            f"{'' if tokens is None else f' of {tokens} tokens'}: expected "
            f"{', '.join(here.progress)} of 0 or more that fit together, got "
            f"{dict(state.progress)}. Delete the session to start anew."
        )


def _counts_fit(kind: str, state: CacheState, tokens: int | None) -> bool:
    """Whether the counts of a cache can be those of one that has seen so many tokens."""
    counts, made = state.progress, cast(Mapping[str, int], state.settings)
    if tokens is None:
        names = ("seen", "quantized", "recent", *(("oldest",) if "quantized" in counts else ()))
        tokens = sum(counts.get(name, 0) for name in names)
    if "quantized" in counts:
        whole = counts["quantized"] % made["group"] == 0
        fits = counts["recent"] <= made["recent"] + made["group"]
        stored = counts["quantized"] + counts["recent"]
        return whole and fits and counts.get("oldest", 0) + stored == tokens
    if kind == "late quantized":
        recent = counts["slots"] - counts["filled"]
        bounds = counts["filled"] % made["group"] == 0 and counts["late"] <= 1
        fits = not counts["late"] or 0 <= recent <= made["recent"] + made["group"]
        if not (bounds and fits and recent >= 0 and counts["compressed_at"] <= counts["seen"]):
            return False
    if kind == "ring":
        sinks, ring = made["sinks"], made["window"] - 1 + made["chunk"]
        oldest = max(sinks, tokens - ring)
        if not oldest <= counts["oldest"] <= max(sinks, tokens):
            return False
    smaller = {"dense": "slots", "late quantized": "slots", "ragged": "compressed_at"}.get(
        kind, "seen"
    )
    return counts.get("seen", tokens) == tokens and counts.get(smaller, tokens) <= tokens


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


def check_tensors(kind: str, state: CacheState, like: CacheState) -> None:
    """Raise BadInput unless the tensors can be those of a cache that holds one like `like`.

    Args:
        kind: of the cache; recurrent states alone have shapes that no number of tokens changes.
        like: of the same layer after it has read something; only shapes and dtypes are used.
    """
    expected = dict(like.tensors)
    if state.progress.get("pages"):  # a ragged cache that was compressed
        at = torch.empty(*like.tensors["k"].shape[:3], dtype=torch.int64, device="meta")
        expected["positions"] = at
    if state.progress.get("late"):  # a cache that was quantized behind its compression
        made = QuantizedCache(**cast(Any, like.settings))
        made.append(like.tensors["k"], like.tensors["v"])
        expected = dict(made.state().tensors)
    if state.tensors and set(state.tensors) != set(expected):
        raise BadInput(
            f"the saved cache contradicts itself: expected the tensors {', '.join(expected)}, got "
            f"{', '.join(state.tensors)}. Delete the session to start anew."
        )
    for name, tensor in state.tensors.items():
        _check_tensor(name, tensor, expected[name], grows=kind != "states")
    if "positions" in state.tensors:
        _check_positions(state.tensors["positions"], state.progress["seen"])


def _check_tensor(name: str, tensor: Tensor, like: Tensor, *, grows: bool) -> None:
    # Lengths in tokens, the third dimension, are compared with the counts by `restore`.
    found, expected = list(tensor.shape), list(like.shape)
    if grows and len(found) > 2:
        found[2] = expected[2]
    length = " but for the length" if grows else ""
    if found != expected or tensor.dtype != like.dtype:
        raise BadInput(
            f"the saved cache contradicts itself: its {name} has shape {list(tensor.shape)} and "
            f"{tensor.dtype}, expected {expected}{length}, and {like.dtype}. Delete the session to "
            "start anew."
        )
    if tensor.dtype.is_floating_point and not tensor.float().isfinite().all():
        raise BadInput(
            f"the saved cache holds numbers in {name} that are NaN or infinite. Delete the session "
            "and read the prompt again; check the model's dtype if that happens again."
        )


def _check_positions(at: Tensor, seen: int) -> None:
    """Ascending in each head, behind -1 in front of heads with fewer keys."""
    steps = at[..., 1:] - at[..., :-1]
    ascending = (steps > 0) | ((at[..., 1:] == -1) & (at[..., :-1] == -1))
    if at.numel() and not (ascending.all() and at.min() >= -1 and at.max() < seen):
        raise BadInput(
            "the saved cache contradicts itself: the positions of its keys do not ascend. Delete "
            "the session to start anew."
        )


def bounded(state: CacheState, slots: int) -> CacheState:
    """The state with room for no more than `slots` tokens, whatever it claims was allocated."""
    progress = dict(state.progress)
    if "capacity" in progress:
        progress["capacity"] = min(progress["capacity"], slots)
    if progress.get("pages"):
        k, size = state.tensors["k"], cast(int, state.settings["page_size"])
        heads = k.shape[0] * k.shape[1]
        progress["pages"] = min(progress["pages"], heads * (slots // size + 1))
    return state._replace(progress=progress)
