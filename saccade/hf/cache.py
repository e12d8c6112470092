"""saccade's layer caches behind the interface that transformers expects of `past_key_values`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionAndFullAttentionLayer

from saccade.cache import Cursor, LayerCache, StateCache, SteppingCache, SummarizingCache
from saccade.core import Unsupported
from saccade.hf.deferred_rope import DeferredTensor, materialize
from saccade.hf.handle import KVHandle, ObserveCall
from saccade.hf.layers import LayerKind, layer_kinds
from saccade.hf.recurrent import RecurrentLayer
from saccade.hf.rope import table_length
from saccade.hf.runs import Run, run_in_force
from saccade.hf.settings import AttentionSettings
from saccade.runtime.model import Observer

MakeLayer = Callable[[int, int | None], LayerCache]
"""(layer index, the model's own window or None) -> an empty cache for that layer."""


_LAYER_WITHOUT_CACHE: Final[Any] = getattr(cache_utils, "DummyLayer", RecurrentLayer)
"""Transformers' own; older ones (5.16) have none and give such layers states that stay empty."""


def _no_tensors(layer: SaccadeCacheLayer) -> None:
    """What is read of `layer.keys`: None before the first token, refused after it."""
    if layer.is_initialized:
        raise Unsupported(
            "the model reads the tensors of its cache itself, but a saccade cache keeps keys in "
            "another layout and gives them out by update() alone. Use a cache of transformers."
        )


class SaccadeCacheLayer(CacheLayerMixin):
    """One of our LayerCaches behind transformers' layer protocol.

    Lengths are numbers of tokens *seen*; the cache may store fewer.

    Args:
        store: the cache of the layer.
        window: the model's own window of this layer, None for full attention.
        settings: of attention over this cache; None: those of the model's run in force.
    """

    is_compileable = False
    supports_early_init = False
    is_initialized = False
    keys = values = property(_no_tensors, lambda layer, tensor: None)  # type: ignore[assignment]

    def __init__(
        self,
        store: LayerCache,
        window: int | None,
        settings: AttentionSettings | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.store = store
        self.window = window
        self.settings = settings
        self.rebuilt = False
        self.observe: ObserveCall | None = None
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
        key_states = materialize(key_states)
        self.lazy_initialization(key_states, value_states)
        self._batch = key_states.shape[0]
        view = self.store.append(key_states.detach(), value_states.detach())
        seen = self.store.seen
        handle = partial(
            KVHandle,
            view,
            seen=seen,
            settings=self.settings,
            window=self.window,
            like=key_states.dtype,
            rebuilt=self._note_rebuilt,
        )
        summaries = self.store.summarize() if isinstance(self.store, SummarizingCache) else None
        keys = handle(width=view.shape[3], observe=self.observe, summaries=summaries)
        return keys, handle(width=view.shape[4], values=True)

    def _note_rebuilt(self) -> None:
        self.rebuilt = True

    def _step(
        self, keys: Tensor | DeferredTensor, v: Tensor, cursor: Cursor
    ) -> tuple[KVHandle, KVHandle]:
        """`update` at the position of a device cursor; deferred RoPE is applied."""
        assert isinstance(self.store, SteppingCache), "DecodeStep has checked"
        deferred = keys.deferred if isinstance(keys, DeferredTensor) else None
        k, rope = (keys, None) if deferred is None else (deferred.k, deferred.rope)
        assert isinstance(k, Tensor)
        view, where, q = self.store.write(k, v, cursor, rope)
        if deferred is not None:
            deferred.stored(q)
        seen = self.store.seen + k.shape[2]
        kept = self.store.summaries if isinstance(self.store, SummarizingCache) else None
        rows = None if kept is None else kept.rows
        handle = partial(KVHandle, view, seen=seen, settings=self.settings, cursor=where)
        return (
            handle(width=view.shape[3], summaries=rows),
            handle(width=view.shape[4], values=True),
        )

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
        _check_removed(tokens_to_remove)
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


class SaccadeHybridLayer(  # type: ignore[misc]
    SaccadeCacheLayer, RecurrentLayer, LinearAttentionAndFullAttentionLayer
):
    """A layer that attends and keeps recurrent states too (Falcon-H1, Zamba)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_croppable = False  # type: ignore[misc]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys by position, of states by name, as transformers calls it."""
        if args:
            SaccadeCacheLayer.lazy_initialization(self, *args)
        else:
            RecurrentLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        SaccadeCacheLayer.reset(self)
        RecurrentLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i], of keys and states."""
        SaccadeCacheLayer.reorder_cache(self, beam_idx)
        RecurrentLayer.reorder_cache(self, beam_idx)


class SaccadeCache(Cache):
    """`past_key_values` made of saccade's caches, one per layer of the model that attends.

    Recurrent and convolution layers keep the states of transformers, behind a StateCache.

    Args:
        config: config of the model.
        make: makes the cache of a layer from its index and the model's own window.
        run: whose options attention over these caches follows; default those in force for the
            model when it is called.

    Raises:
        Unsupported: a model with layers that `layer_kinds` refuses.
    """

    def __init__(
        self, config: PreTrainedConfig, make: MakeLayer, *, run: Run | None = None
    ) -> None:
        self.run = run
        self.writing = False  # see ModelCache
        self.reaches: int | None = None
        self._behind: tuple[int, Callable[[], None]] | None = None
        self.awaits_prompt = False  # whether its end has to be known before anything is stored
        self._ours: list[SaccadeCacheLayer] = []
        self._stores: list[LayerCache] = []
        layers = [self._layer(index, kind, make) for index, kind in enumerate(layer_kinds(config))]
        self._observer: Observer | None = None
        super().__init__(layers=layers)

    def _layer(self, index: int, kind: LayerKind, make: MakeLayer) -> Any:
        """The layer of transformers' cache; its stores are added to those of the cache."""
        layer: Any = None
        if kind.keys:
            store = make(index, kind.window)
            settings = None if self.run is None else self.run.settings[index]
            hybrid = SaccadeHybridLayer if kind.states else SaccadeCacheLayer
            options = {"number_of_states": kind.states} if kind.states else {}
            layer = hybrid(store, kind.window, settings, **options)
            self._ours.append(layer)
            self._stores.append(store)
        elif kind.states:
            layer = RecurrentLayer(number_of_states=kind.states)
        if kind.states:
            checkpoints = 0 if self.run is None else self.run.params.ctx_checkpoints
            states = StateCache(layer, lambda: self.seen, checkpoints=checkpoints)
            self._stores.append(states)
        return _LAYER_WITHOUT_CACHE() if layer is None else layer

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[KVHandle, KVHandle]:
        """Store new keys and values of a layer; see `SaccadeCacheLayer.update`.

        Raises:
            Unsupported: the rotary positions in force are not those of the run, or change here.
        """
        update = _outside_graphs if torch.compiler.is_compiling() else SaccadeCache._update
        return update(self, key_states, value_states, layer_idx, *args, **kwargs)

    def _update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[KVHandle, KVHandle]:
        layer: Any = self.layers[layer_idx]
        if layer is self._ours[0] and self._behind is not None and self.seen >= self._behind[0]:
            (_, act), self._behind = self._behind, None
            act()
        if layer is self._ours[0] and self.run is not None:
            _check_rope(self.run)
            _check_prompt(self)
            rotary = (run_in_force(self.run.model) or self.run).rotary.values()
            self.reaches = table_length(rotary, self.seen, self.reaches)
        self.writing = self.cursor is None  # a step counts what it wrote when it ends
        stored = layer.update(key_states, value_states, *args, **kwargs)
        self.writing = False
        return stored

    def behind(self, length: int, act: Callable[[], None]) -> None:
        """Call `act` once, before a token behind the first `length` is stored."""
        self._behind, self.awaits_prompt = (length, act), False

    def follow(self, run: Run | None) -> None:
        """Attend by the settings of another run of the same options but for its pattern."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SaccadeCacheLayer):
                layer.settings = None if run is None else run.settings[index]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens, in all layers or in none.

        Raises:
            Unsupported: a layer that cannot go back so far.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers before 5.21 gives a tensor
        _check_removed(tokens_to_remove)
        length = max(0, self.seen + tokens_to_remove)
        for store in self._stores:
            if tokens_to_remove and store.max_rollback(length) != length:
                store.truncate(length)  # says why it cannot
        for store in self._stores:
            store.truncate(length)

    @property
    def stores(self) -> list[LayerCache]:
        """Our caches, in the order of the layers: keys, then states of a layer that has both."""
        return self._stores

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self._ours[0].store.seen

    @property
    def has_states(self) -> bool:
        """Whether any layer keeps recurrent or convolution states."""
        return any(isinstance(store, StateCache) for store in self._stores)

    @property
    def rebuilt(self) -> bool:
        """Whether the model has computed with cached keys itself, which were rebuilt for it."""
        return any(layer.rebuilt for layer in self._ours)

    def disturb_states(self) -> None:
        """Change all recurrent states, to see whether the model reads them."""
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                layer.write({n: x + n.startswith("recurrent") for n, x in layer.read().items()})

    @property
    def nbytes(self) -> int:
        """Bytes allocated in all layers."""
        return sum(store.nbytes for store in self.stores)

    @property
    def observer(self) -> Observer | None:
        """Runs every attention call; None for no observer."""
        return self._observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._observer = observer
        for layer in self._ours:
            index = self._stores.index(layer.store)
            layer.observe = None if observer is None else partial(observer, index)

    @property
    def cursor(self) -> Cursor | None:
        """Where new tokens go during a step; None while the host decides."""
        return self._ours[0].cursor

    @cursor.setter
    def cursor(self, cursor: Cursor | None) -> None:
        for layer in self._ours:
            layer.cursor = cursor


def _check_removed(tokens_to_remove: int) -> None:
    if tokens_to_remove > 0:
        raise ValueError(
            f"crop takes the number of tokens to remove as a negative number, got "
            f"{tokens_to_remove}."
        )


_outside_graphs = cast(Any, torch.compiler.disable)(SaccadeCache._update)
"""For torch.compile: our caches decide on the host what to store where."""


def _check_prompt(cache: SaccadeCache) -> None:
    """Raise Unsupported where nothing would ever compress a cache whose run has a policy."""
    if cache.awaits_prompt and cache.run is not None:
        policy = cache.run.params.kv_policy
        raise Unsupported(
            f"kv_policy={policy!r} compresses where a prompt ends, which a call of the model does "
            "not say. Call generate(), use saccade.Context, or leave kv_policy unset."
        )


def _check_rope(run: Run) -> None:
    current = run_in_force(run.model)
    if current is not run and ({} if current is None else current.ropes) != run.ropes:
        raise Unsupported(
            "this cache belongs to a run with other rotary positions than those in force for the "
            "model now. Use it inside its own attach, or make a cache with new_cache() here."
        )
