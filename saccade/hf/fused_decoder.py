"""A step of decoding on a CPU by the C++ layers: a few rows through the whole decoder.

transformers runs a layer as some forty operations of torch, which take 0.2 ms on a CPU whatever the
size of the model; a small one is bound by that.  Here norms, products, RoPE and the MLP of a layer
are two calls, and all layers whose caches show where new tokens go are one.  Nothing of the model
is changed: a Context takes this way instead of the model's forward where it can.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from itertools import takewhile
from operator import call, is_
from typing import Any, Final
from weakref import ref

import torch
from torch import Tensor

from saccade.cache import DenseCache, LateQuantizedCache, Placement, PlacingCache
from saccade.core import DenseKV, KVView
from saccade.hf.attention import saccade_attention
from saccade.hf.cache import SaccadeCache
from saccade.hf.decoder_layers import Described, describe
from saccade.hf.rope import follow_length
from saccade.hf.runs import Run
from saccade.hf.settings import AttentionSettings
from saccade.ops.attention.cpu.binding import VIEWS, extension, record, target
from saccade.sparse import Pattern, RulePattern, summary_of
from saccade.sparse.pattern import StepPattern, decodes_densely

MAX_ROWS: Final = 9
"""Rows of one step: more are a matrix product, which torch computes faster."""
_TABLE: Final = 64
"""Positions whose cos and sin are computed at once."""

_UNROTATED: Final = "unrotated"
"""Kind of a layer without RoPE: two channels are turned by nothing, and the others stay."""

Range = tuple[int, int]
"""Window and sinks for the kernels: -1 for no window."""


def fused_decoder(run: Run) -> FusedDecoder | None:
    """The C++ steps of a run's model; None where it or its options have none."""
    model, kernels = run.model, extension()
    if run.params.fused_layers is False or model.device.type != "cpu" or model.training:
        return None
    if kernels is None or not hasattr(kernels, "Decoder") or follow_length(run.rotary.values()):
        return None
    described = describe(model)
    return None if described is None else FusedDecoder(run, described)


class FusedDecoder:
    """Steps through one model under the options of one run.

    Args:
        described: of the model of the run.
    """

    def __init__(self, run: Run, described: Described) -> None:
        kernels = extension()
        assert kernels is not None
        parts = (described.hidden, described.layers, described.norm, described.head)
        self._decoder = kernels.Decoder(*parts, run.model.config.vocab_size, target())
        self._described = described
        self._model: Any = run.model
        self._inner: Any = run.model.model
        self._settings = [run.settings[i] for i in range(len(described.layers))]
        self._summaries = [summary_of(each.sparse) for each in self._settings]
        settings = zip(described.windows, self._settings, strict=True)
        self._ranges = [_range(*each) for each in settings]
        types = run.params.type_k, run.params.type_v
        self._direct = [_is_direct(each) and "fp8" not in types for each in self._settings]
        self._stored: list[tuple[ref[Tensor], ...]] = [()] * len(described.layers)
        self._rotary = _Rotary(self._inner, described.rotated)
        kinds = list(zip(self._rotary.kinds, self._ranges, strict=True))
        self._kinds = list(dict.fromkeys(kinds))
        self._of_kind = [self._kinds.index(each) for each in kinds]

    def hidden(self, tokens: Tensor, cache: SaccadeCache) -> Tensor | None:
        """Hidden states `[B, t, hidden]` of new tokens `[B, t]`; None: the model has to do it."""
        if not 1 <= tokens.numel() <= MAX_ROWS or not self._serves(cache):
            return None
        x = self._inner.embed_tokens(tokens)
        if self._described.multiplier != 1:
            x = x * self._described.multiplier
        self._decoder.begin(record(x.contiguous()), torch.get_num_threads())
        start, count = cache.seen, tokens.shape[1]
        tables = self._rotary.tables(start, count, x)
        kinds = [(*tables[name], *reach) for name, reach in self._kinds]
        places, index = self._places(cache, count, x.dtype), 0
        while index < len(places):
            index += self._run(cache, index, places, count, kinds)
            if index < len(places):
                self._layer(index, cache, x, tables)
                index += 1
        out = torch.empty_like(x)
        self._decoder.finish(record(out))
        return out

    def _serves(self, cache: SaccadeCache) -> bool:
        plain = cache.cursor is None and not cache.has_states
        eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return plain and eager and not self._inner.training and self._described.unchanged.holds()

    def _places(
        self, cache: SaccadeCache, count: int, dtype: torch.dtype
    ) -> list[Placement | None]:
        """Where each layer stores new tokens; None: its cache has to be given them."""
        places: list[Placement | None] = [None] * len(self._ranges)
        if cache.observer is not None:
            return places
        cache.writing = True  # full groups of a quantized cache are quantized here
        for index, store in enumerate(cache.stores):
            windowed = self._ranges[index][0] >= 0
            dense = isinstance(store, DenseCache | LateQuantizedCache)
            gaps = windowed and dense and store.is_compressed
            if gaps or not self._direct[index] or not isinstance(store, PlacingCache):
                continue
            pattern = self._settings[index].sparse
            if _smallest_block(pattern) < count:
                continue  # a block that new tokens fill has no summary yet
            if isinstance(pattern, StepPattern) and not isinstance(store, DenseCache):
                continue  # keys are scored as they lie, each at its position
            place = places[index] = store.place(count, dtype)
            if place is None:
                continue
            if self._summaries[index] is None:  # the cache may keep some for drafts
                place = places[index] = place._replace(blocks=0, summaries=None)
            elif place.summaries is None:
                places[index] = None  # a cache of other options than those of the run
                continue
            if not self._knows(index, place):
                self._note(index, place, store.storage())
        cache.writing = False
        return self._together(places)

    def _together(self, places: list[Placement | None]) -> list[Placement | None]:
        """The same, where layers that share blocks are all computed by C++, or none of them."""
        patterns = [each.sparse for each in self._settings]
        sharing = [i for i, each in enumerate(patterns) if isinstance(each, StepPattern)]
        if all(places[index] is not None for index in sharing):
            return places
        return [None if index in sharing else place for index, place in enumerate(places)]

    def _knows(self, index: int, place: Placement) -> bool:
        """Whether the C++ layers were told of this storage."""
        known, parts = self._stored[index], _parts_of(place)
        return len(known) == len(parts) and all(map(is_, map(call, known), parts))

    def _note(self, index: int, place: Placement, view: KVView) -> None:
        """Tell the C++ layers where a layer stores its keys and values."""
        sinks = VIEWS[DenseKV](DenseKV(place.sinks[0], place.sinks[1])) if place.sinks else None
        selection, pattern = None, self._settings[index].sparse
        if isinstance(pattern, RulePattern | StepPattern):
            _, _, dim, *_ = self._described.layers[index]
            rows = None if place.summaries is None else record(place.summaries)
            reuse = None if isinstance(pattern, RulePattern) else pattern.reuse
            selection = pattern.rule.numbers(dim**-0.5), rows, reuse
        self._decoder.stored(index, VIEWS[type(view)](view), view.hadamard, sinks, selection)
        self._stored[index] = tuple(map(ref, _parts_of(place)))

    def _run(
        self,
        cache: SaccadeCache,
        first: int,
        places: list[Placement | None],
        count: int,
        kinds: list[Any],
    ) -> int:
        """As many layers from `first` on as one call computes; how many they are."""
        placed = list(takewhile(lambda place: place is not None, places[first:]))
        if not placed:
            return 0
        wanted = [(*place[1:4], place.blocks) for place in placed if place is not None]
        done = self._decoder.run(first, wanted, kinds, self._of_kind)
        for store in cache.stores[first : first + done]:
            assert isinstance(store, PlacingCache)
            store.commit(count)
        return done

    def _layer(
        self, index: int, cache: SaccadeCache, like: Tensor, tables: dict[Hashable, Any]
    ) -> None:
        """One layer, whose cache stores keys and values itself."""
        _, kv_heads, dim, *_ = self._described.layers[index]
        batch, count, _ = like.shape
        k, v = like.new_empty(2, batch, kv_heads, count, dim)
        cos_sin = tables[self._rotary.kinds[index]]
        self._decoder.front(index, *cos_sin, record(k), record(v))
        key, value = cache.update(k, v, index)
        view, (window, sinks) = key.view, self._ranges[index]
        whole = key.shape[2] == key.seen or window < 0
        plain = key.observe is None and not view.hadamard
        plain = plain and decodes_densely(self._settings[index].sparse)
        if self._direct[index] and plain and whole:
            offset = view.shape[2] - count
            if type(view) in VIEWS:
                kv = VIEWS[type(view)](view)
                self._decoder.attend(index, kv, window, sinks, offset)
                return
        self._attend(index, like, key, value)

    def _attend(self, index: int, like: Tensor, key: Any, value: Any) -> None:
        """The rest of a layer, with attention as transformers would call it."""
        heads, _, dim, *_, scale, softcap, _, _, _ = self._described.layers[index]
        batch, count, _ = like.shape
        q = like.new_empty(batch, heads, count, dim)
        self._decoder.queries(record(q))
        attended, _ = saccade_attention(
            self._described.attention[index],
            q,
            key,
            value,
            scaling=scale,
            sliding_window=self._described.windows[index],
            softcap=softcap or None,
        )
        self._decoder.back(index, record(attended.flatten(2)))

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Logits `[rows, vocab]` float32 of hidden states; None: the model has to compute them."""
        if not 1 <= len(hidden) <= MAX_ROWS or not self._described.unchanged_head.holds():
            return None
        out = torch.empty(len(hidden), self._model.config.vocab_size)
        self._decoder.logits(record(hidden.contiguous()), record(out), torch.get_num_threads())
        cap, divisor = self._described.softcap, self._described.divisor
        out = out if divisor == 1 else out / divisor
        return out if cap is None else torch.tanh(out / cap) * cap


def _range(own: int | None, settings: AttentionSettings) -> Range:
    """Window and sinks of a layer: those of the settings in place of the model's own."""
    if settings.window is not None:
        return settings.window, settings.sinks
    return (-1 if own is None else own), 0


def _is_direct(settings: AttentionSettings) -> bool:
    """Whether attention is the C++ kernels' own, over all keys in the window or chosen blocks."""
    rules = isinstance(settings.sparse, RulePattern | StepPattern)
    follows = decodes_densely(settings.sparse) or rules
    return follows and settings.backend in ("auto", "cpu")


def _smallest_block(pattern: Pattern | None) -> int:
    """Tokens of the blocks of a pattern; all tokens of a step have to lie in one of queries."""
    if not isinstance(pattern, RulePattern):
        return MAX_ROWS
    return min(pattern.rule.q_block, pattern.rule.k_block)


def _parts_of(place: Placement) -> tuple[Tensor, ...]:
    """All tensors that the C++ layers are told of."""
    summaries = () if place.summaries is None else (place.summaries,)
    return place.parts + place.sinks + summaries


class _Rotary:
    """cos and sin of the next positions, from the model's rotary module, a block at a time.

    Args:
        rotated: whether a layer has RoPE.
    """

    def __init__(self, decoder: Any, rotated: tuple[bool, ...]) -> None:
        self._decoder = decoder
        takes = "layer_type" in inspect.signature(type(decoder.rotary_emb).forward).parameters
        types: list[Hashable] = [None] * len(rotated)
        if takes:
            types = list(decoder.config.layer_types)
        kinds = zip(types, rotated, strict=False)
        self.kinds = [kind if rotates else _UNROTATED for kind, rotates in kinds]
        self._start, self._stop = 0, 0
        self._blocks: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def tables(self, start: int, count: int, like: Tensor) -> dict[Hashable, Any]:
        """Kind of layer -> (cos, sin) of `count` positions, float32 `[count, head_dim]`."""
        if start < self._start or start + count > self._stop:
            self._compute(start, like)
        first = start - self._start
        return {
            kind: tuple(record(x[first : first + count]) for x in block)
            for kind, block in self._blocks.items()
        }

    def _compute(self, start: int, like: Tensor) -> None:
        positions = torch.arange(start, start + _TABLE)[None]
        for kind in set(self.kinds):
            if kind == _UNROTATED:
                self._blocks[kind] = torch.ones(_TABLE, 2), torch.zeros(_TABLE, 2)
                continue
            options = {} if kind is None else {"layer_type": kind}
            found = self._decoder.rotary_emb(like, position_ids=positions, **options)
            cos, sin = (x[0].float().contiguous() for x in found)
            self._blocks[kind] = cos, sin
        self._start, self._stop = start, start + _TABLE
