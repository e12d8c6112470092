"""The protocols that the runtime needs of a model and of its caches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from saccade.cache import Cursor, LayerCache, ShiftKeys
from saccade.core import AttentionOutput
from saccade.ops import AttentionCall
from saccade.runtime.params import ContextParams
from saccade.runtime.positions import ROTARY, Positions

Observer = Callable[[int, AttentionCall, str], AttentionOutput]
"""Computes the attention of a layer, given (layer, the call, the backend to run it).

The call has queries after RoPE, the view of the keys, mask, softcap, learned sinks and block
selection.  An observer runs it by `attend` or by what gives more of the same attention
(`attend_received`), and returns the output with its lse `[B, H, t]`, float32.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Sizes and options of a model, known from its config alone.

    Attributes:
        name: for tables.
        num_layers, num_heads, num_kv_heads, head_dim, vocab_size: as in its config.
        dtype: of weights and keys.
        windows: the model's own sliding window of each layer that keeps keys, None for full
            attention.
        n_ctx_train: length the model was trained for, in tokens.
        softcap: of the attention scores, None for none.
        learned_sinks: one learned logit a head in the softmax (gpt-oss).
        value_dim: width of a value where it is not that of a key.
        kv_shapes: (KV heads, width of a key, width of a value) of each layer, where they differ.
        state_bytes: of the recurrent and convolution states of one row.
        positions: how it tells positions apart.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    n_ctx_train: int
    dtype: torch.dtype
    windows: tuple[int | None, ...]
    softcap: float | None = None
    learned_sinks: bool = False
    value_dim: int | None = None
    kv_shapes: tuple[tuple[int, int, int], ...] = ()
    state_bytes: int = 0
    positions: Positions = ROTARY

    def alike(self) -> list[tuple[ModelFacts, int]]:
        """(facts of one layer, how many layers are like it) of the layers that keep keys."""
        return list(Counter(self.layers()).items())

    def layers(self) -> list[ModelFacts]:
        """Facts of each layer that keeps keys; those of equal layers are the same object."""
        own = (self.num_kv_heads, self.head_dim, self.value_dim or self.head_dim)
        shapes = self.kv_shapes or (own,) * len(self.windows)
        every = list(zip(self.windows, shapes, strict=True))
        made = {layer: self._of_layer(layer[0], *layer[1]) for layer in every}
        return [made[layer] for layer in every]

    def _of_layer(self, window: int | None, heads: int, key: int, value: int) -> ModelFacts:
        shape = {"num_kv_heads": heads, "head_dim": key, "value_dim": value, "kv_shapes": ()}
        return replace(self, windows=(window,), state_bytes=0, **shape)  # type: ignore[arg-type]


class ModelCache(Protocol):
    """The caches of all layers of a running model."""

    @property
    def stores(self) -> Sequence[LayerCache]:
        """One cache a layer, in order."""
        ...

    @property
    def seen(self) -> int:
        """Tokens appended so far, the same in every layer."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        ...

    @property
    def reaches(self) -> int | None:
        """Length of the text whose rotary tables the keys have; None: of each call's own."""
        ...

    @reaches.setter
    def reaches(self, length: int | None) -> None: ...

    @property
    def observer(self) -> Observer | None:
        """Runs the attention of each layer, or None."""
        ...

    @observer.setter
    def observer(self, observer: Observer | None) -> None: ...

    @property
    def cursor(self) -> Cursor | None:
        """Positions of the new tokens in a `DecodeStep`, as tensors; None outside of a step."""
        ...

    @cursor.setter
    def cursor(self, cursor: Cursor | None) -> None: ...

    @property
    def writing(self) -> bool:
        """Whether a layer is in the middle of a change.

        It stays True where that was interrupted: then nobody knows what the layer holds.
        """
        ...

    @writing.setter
    def writing(self, writing: bool) -> None: ...


class Model(Protocol):
    """A causal language model that can be run under ContextParams."""

    @property
    def facts(self) -> ModelFacts:
        """Sizes and options of the model."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of its caches."""
        ...

    def identity(self) -> Mapping[str, str]:
        """Fingerprints of weights and rotary positions, which cached keys depend on.

        The positions are those under the params it is `attached` with.
        """
        ...

    def attached(self, params: ContextParams) -> AbstractContextManager[Model]:
        """The model that computes under these params inside the `with`.

        Several may be open for one model, and be closed in any order.
        """
        ...

    def new_cache(self, params: ContextParams, *, reserve: int = 0) -> ModelCache:
        """Empty caches under these params, with room for `reserve` tokens at once."""
        ...

    def hidden(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """Run new tokens `[B, t]` after what the cache holds -> hidden states `[B, t, hidden]`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[..., vocab]` of hidden states `[..., hidden]`."""
        ...

    def drafted(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """`hidden` under the pattern that drafts follow, `n_draft` of the options in force."""
        ...

    def table_key(self, length: int) -> Hashable:
        """Equal for two lengths of a text that have the same rotary tables."""
        ...

    def shift_keys(self, layer: int, length: int | None = None) -> ShiftKeys:
        """The function that moves cached keys of a layer by a number of positions.

        Args:
            length: of the text whose rotary tables the keys have.

        Raises:
            Unsupported: it is not known how this model rotates its keys.
        """
        ...

    def output_weights(self, layer: int) -> Tensor:
        """The output projection of a layer that keeps keys, `[H, Dv, hidden]`.

        Raises:
            Unsupported: it is not known which weights of this model are that.
        """
        ...
