"""Reading a context a second time, to see which of its keys that needs (KVzip).

The tokens follow once more behind the context, in chunks, over copies of the keys of each chunk, so
that the caches themselves stay as they are and nothing has to be removed from them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.cache import (
    DenseCache,
    LateQuantizedCache,
    LayerCache,
    RaggedCache,
    SlidingCache,
    StateCache,
)
from saccade.cache.base import CacheState
from saccade.cache.snapshot import kind_of
from saccade.compress import Rereading
from saccade.core import AttentionOutput, Unsupported
from saccade.ops import AttentionCall, attend, attend_received
from saccade.runtime.model import Model, ModelCache
from saccade.runtime.params import ContextParams

Weights = dict[int, Tensor]
"""Layer -> largest weight of each stored key, float32 `[B, Hkv, n]`; see `reread`."""


class Reader(NamedTuple):
    """What a second reading asks of a model.

    Attributes:
        texts: the tokens of each row in the caches, without padding.
        new_cache: empty caches; True: ragged ones.
        hidden: runs tokens `[1, t]` behind what a cache holds; see `runtime.model.Model`.
        n_batch: most tokens to read at once.
        limit: positions of a model that has a table of them; None: no limit.
    """

    texts: Callable[[], Sequence[Sequence[int]]]
    new_cache: Callable[[bool], ModelCache]
    hidden: Callable[[Tensor, ModelCache], Tensor]
    n_batch: int
    limit: Callable[[], int | None]


def reader_of(
    model: Model, params: ContextParams, texts: Callable[[], Sequence[Sequence[int]]]
) -> Reader:
    """What reads texts a second time by a model that is attached under these params."""

    def new_cache(ragged: bool) -> ModelCache:
        return model.new_cache(plain(params, ragged=ragged))

    def limit() -> int | None:
        return model.facts.positions.limit

    return Reader(texts, new_cache, model.hidden, params.n_batch, limit)


def plain(params: ContextParams, *, ragged: bool) -> ContextParams:
    """The options of a second reading: all keys as they are, chosen by no pattern."""
    kept = {} if ragged else {"kv_policy": None, "kv_budget": None}
    return replace(params, type_k=None, type_v=None, kv_every=None, sparse=None, **kept)


def reread(
    cache: ModelCache, reader: Reader, rereading: Rereading, padding: Sequence[int] | None
) -> Weights:
    """The largest weight that each key receives while the texts in the caches are read again.

    Keys are in the order of the slots of a cache, or of the columns of `RaggedCache.gather`.

    Args:
        padding: tokens before the text of each row; None: none.

    Raises:
        Unsupported: caches that hold other tokens than are known, padded rows over rings, or a
            text whose repetition would end behind the last position of the model.
    """
    rows = [list(text)[: cache.seen] for text in reader.texts()]
    padding = padding or [0] * len(rows)
    _check(cache, reader, rereading, rows, padding)
    found: dict[tuple[int, ...], Weights] = {}  # rows of one text, as beams are, have equal keys
    keys = [(before, *text) for text, before in zip(rows, padding, strict=True)]
    for row, (text, before) in enumerate(zip(rows, padding, strict=True)):
        if keys[row] not in found:
            again = _Row(cache, reader, row, before, len(text))
            for start in range(0, len(text), rereading.chunk):
                again.read(text, rereading, start, min(start + rereading.chunk, len(text)))
            found[keys[row]] = again.weights()
    every = [found[key] for key in keys]
    return {layer: torch.cat([each[layer] for each in every]) for layer in every[0]}


def _check(
    cache: ModelCache,
    reader: Reader,
    rereading: Rereading,
    rows: list[list[int]],
    padding: Sequence[int],
) -> None:
    """Raise Unsupported where a text cannot be read again."""
    limit = reader.limit()
    for text, before in zip(rows, padding, strict=True):
        if len(text) + before != cache.seen:
            raise Unsupported(
                f"KVzip reads a context again, but of the {cache.seen} tokens in the caches "
                f"{len(text)} are known: others were read by other code. Choose another kv_policy."
            )
        end = len(text) + rereading.lead + rereading.chunk
        if limit is not None and end > limit:
            raise Unsupported(
                f"KVzip reads a context again behind its end, up to position {end}, but this model "
                f"has {limit} positions. Read fewer tokens, or choose another kv_policy."
            )
    if any(padding) and any(isinstance(s, SlidingCache | StateCache) for s in cache.stores):
        raise Unsupported(
            "KVzip cannot read the rows of a padded batch again over sliding or recurrent layers, "
            "which hold the padding too. Run the rows one by one, or choose another kv_policy."
        )


class _Row:
    """One row of the caches, and what its keys have received.

    Args:
        before: columns of padding; length: of the text.
    """

    def __init__(
        self, cache: ModelCache, reader: Reader, row: int, before: int, length: int
    ) -> None:
        self._cache, self._reader = cache, reader
        self._row, self._before, self._length = row, before, length
        self._ragged = any(isinstance(s, RaggedCache) and s.is_compressed for s in cache.stores)
        self._found: Weights = {}

    def read(self, text: list[int], rereading: Rereading, start: int, stop: int) -> None:
        """Read the chunk start .. stop-1 once more over its own keys."""
        tokens = torch.tensor([text[i] for i in rereading.chosen(start, stop)])
        first = max(0, start - rereading.lead)
        at = [*range(min(rereading.sinks, first)), *range(first, stop)]
        again = self._reader.new_cache(self._ragged)
        again.reaches = self._cache.reaches
        columns = {
            i: self._copy(ours, theirs, at, len(tokens))
            for i, (ours, theirs) in enumerate(zip(again.stores, self._cache.stores, strict=True))
        }

        def observe(layer: int, call: AttentionCall, backend: str) -> AttentionOutput:
            at = columns[layer]
            if at is None:
                return attend(call, backend=backend)
            result, received = attend_received(call, backend=backend, largest=True)
            self._note(layer, at, received[..., : len(at)])
            return result

        again.observer = observe
        for part in tokens.split(self._reader.n_batch):
            self._reader.hidden(part[None], again)

    def weights(self) -> Weights:
        """Of all keys of this row, in the order of what is stored."""
        found: Weights = {}
        for layer, weights in self._found.items():
            store = self._cache.stores[layer]
            if isinstance(store, RaggedCache) and store.is_compressed:
                at = store.gather().positions[self._row : self._row + 1].clamp_min(0)
                found[layer] = weights.gather(-1, at)
            else:
                found[layer] = weights
        return found

    def _copy(
        self, ours: LayerCache, theirs: LayerCache, at: list[int], room: int
    ) -> Tensor | None:
        """Fill a cache with copies of the keys at some positions, all where keys were removed.

        Returns:
            Columns of the keys in the weights; None for a layer that is not compressed.
        """
        row = torch.tensor([self._row])
        if isinstance(theirs, SlidingCache | StateCache) or self._ragged:
            if kind_of(ours) != kind_of(theirs):
                raise Unsupported(
                    "KVzip cannot read a context again over quantized windows. Leave out type_k "
                    "and type_v, or choose another kv_policy."
                )
            ours.restore(theirs.state(), _device(theirs))
            ours.reorder(row)
            if isinstance(theirs, SlidingCache | StateCache):
                return None
            return torch.arange(theirs.seen, device=_device(theirs))
        k, v = _stored(theirs)
        if k.shape[2] < theirs.seen:
            columns = torch.arange(k.shape[2], device=k.device)
        else:
            columns = torch.tensor(at, device=k.device) + self._before
        k, v = (x[self._row : self._row + 1].index_select(2, columns) for x in (k, v))
        held = {"seen": self._length, "slots": k.shape[2], "capacity": k.shape[2] + room}
        assert isinstance(ours, DenseCache)
        ours.restore(CacheState({}, held, {"k": k, "v": v}), k.device)
        return columns

    def _note(self, layer: int, columns: Tensor, new: Tensor) -> None:
        """Keep the largest weight of each key of the context; those of its repetition are none."""
        if layer not in self._found:
            store = self._cache.stores[layer]
            stored = store.seen if self._ragged else _stored(store)[0].shape[2]
            self._found[layer] = new.new_zeros(*new.shape[:2], stored)
        self._found[layer][..., columns] = torch.maximum(self._found[layer][..., columns], new)


def _stored(store: LayerCache) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hkv, n, D]` of a cache that keeps equally many of every head."""
    if isinstance(store, LateQuantizedCache):
        return store.given()
    if isinstance(store, RaggedCache):
        store = store.prompt
    assert isinstance(store, DenseCache), "compress_cache has checked"
    view = store.view()
    return view.k, view.v


def _device(store: LayerCache) -> torch.device:
    """Where the tensors of a cache lie."""
    return next((x.device for x in store.state().tensors.values()), torch.device("cpu"))
