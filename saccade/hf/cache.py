"""saccade's layer caches in the shape that transformers expects of `past_key_values`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from saccade.cache import Cursor, LayerCache, ShiftKeys, SteppingCache
from saccade.core import KVView
from saccade.hf.deferred_rope import Promised, settled
from saccade.hf.handle import KVHandle, ObserveCall
from saccade.hf.layers import layer_windows
from saccade.runtime.model import Observer

MakeLayer = Callable[[int, int | None], LayerCache]
"""(layer index, the model's own window or None) -> an empty cache for that layer."""


class SaccadeCacheLayer(CacheLayerMixin):
    """One of our LayerCaches behind transformers' layer protocol.

    Everything is said in tokens *seen*: how much is stored is the business of the cache alone.

    Args:
        store: the cache of the layer.
        window: the model's own window of this layer, None for full attention.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, store: LayerCache, window: int | None) -> None:
        super().__init__()
        self.store = store
        self.window = window
        self.observe: Callable[[KVView, Tensor, Tensor, float], None] | None = None
        self.cursor: Cursor | None = None
        self.is_sliding = window is not None
        self.is_croppable = window is None
        self._batch = 0

    def __repr__(self) -> str:
        return f"SaccadeCacheLayer({type(self.store).__name__}, seen={self.store.seen})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype, device and batch; the store allocates when it is written to."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[KVHandle, KVHandle]:
        """Store new keys `[B, Hkv, t, D]` and values; handles of all that they may attend to.

        Gradients do not flow through a cache.
        """
        if self.cursor is not None:
            return self._step(key_states, value_states, self.cursor)
        key_states = settled(key_states)
        self.lazy_initialization(key_states, value_states)
        self._batch = key_states.shape[0]
        view = self.store.append(key_states.detach(), value_states.detach())
        seen = self.store.seen
        call: ObserveCall | None = None if self.observe is None else partial(self.observe, view)
        keys = KVHandle(view, seen=seen, width=view.shape[3], observe=call)
        return keys, KVHandle(view, seen=seen, width=view.shape[4])

    def _step(
        self, keys: Tensor | Promised, v: Tensor, cursor: Cursor
    ) -> tuple[KVHandle, KVHandle]:
        """`update` at a place that the device knows; keys and queries are turned on the way."""
        assert isinstance(self.store, SteppingCache), "DecodeStep has asked"
        promise = keys.promise if isinstance(keys, Promised) else None
        k, rope = (keys, None) if promise is None else (promise.k, promise.rope)
        assert isinstance(k, Tensor)
        view, where, q = self.store.write(k, v, cursor, rope)
        if promise is not None:
            promise.keep(q)
        seen = self.store.seen + k.shape[2]
        handles = [KVHandle(view, seen=seen, width=view.shape[i], cursor=where) for i in (3, 4)]
        return handles[0], handles[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, first position) of the mask for the next `query_length` tokens."""
        return self.store.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.store.seen

    def get_max_length(self) -> int:
        """The window, or -1 for no limit."""
        return -1 if self.window is None else self.window

    def get_max_cache_shape(self) -> int:
        """The same under the name of transformers before 5.21."""
        return self.get_max_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens (transformers counts downwards)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative number, got "
                f"{tokens_to_remove}."
            )
        if tokens_to_remove < 0:
            self.store.truncate(max(0, self.store.seen + tokens_to_remove))

    def reset(self) -> None:
        """Forget everything; memory stays allocated."""
        self.store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i]."""
        if self.store.seen:
            self.store.reorder(beam_idx.to(self.device))
            self._batch = beam_idx.shape[0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        self.reorder_cache(torch.arange(self._batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows (indices, or one bool per row)."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.reorder_cache(rows)

    def offload(self) -> None:
        """Nothing: our caches stay where they were made."""

    def prefetch(self) -> None:
        """Nothing, see `offload`."""


class SaccadeCache(Cache):
    """`past_key_values` made of saccade's caches, one per layer of the model.

    Args:
        config: config of the model.
        make: makes the cache of a layer from its index and the model's own window.

    Raises:
        Unsupported: a model with layers that are neither full nor sliding attention.
    """

    def __init__(self, config: PreTrainedConfig, make: MakeLayer) -> None:
        windows = layer_windows(config)
        self._ours = [SaccadeCacheLayer(make(i, w), w) for i, w in enumerate(windows)]
        self._observer: Observer | None = None
        super().__init__(layers=list(self._ours))

    @property
    def stores(self) -> list[LayerCache]:
        """Our cache of each layer."""
        return [layer.store for layer in self._ours]

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self._ours[0].store.seen

    @property
    def nbytes(self) -> int:
        """Bytes allocated in all layers."""
        return sum(store.nbytes for store in self.stores)

    @property
    def observer(self) -> Observer | None:
        """Is shown every attention call after it ran; None for nobody."""
        return self._observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._observer = observer
        for index, layer in enumerate(self._ours):
            layer.observe = None if observer is None else _ordered(observer, index)

    @property
    def cursor(self) -> Cursor | None:
        """Where new tokens go during a step; None while the host decides."""
        return self._ours[0].cursor

    @cursor.setter
    def cursor(self, cursor: Cursor | None) -> None:
        for layer in self._ours:
            layer.cursor = cursor

    def context_shift(self, start: int, stop: int, shift: Callable[[int], ShiftKeys]) -> None:
        """Context shift in all layers; `shift(i)` re-rotates keys of layer i."""
        for index, store in enumerate(self.stores):
            store.context_shift(start, stop, shift(index))


def _ordered(observer: Observer, layer: int) -> Callable[[KVView, Tensor, Tensor, float], None]:
    """The observer of one layer, with the arguments in the order in which they become known."""

    def observe(view: KVView, q: Tensor, lse: Tensor, scale: float) -> None:
        observer(layer, q, view, lse, scale)

    return observe
