"""How the attention layers of a run compute, beyond what transformers itself passes to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from torch import nn
from transformers import PreTrainedConfig

from saccade.core import Unsupported
from saccade.hf.layers import layer_kinds
from saccade.runtime.layers import backend_of, narrowed_window
from saccade.runtime.params import ContextParams
from saccade.sparse import Pattern
from saccade.sparse.pattern import of_layers

ATTRIBUTE: Final = "saccade_runs"
"""Name under which `attach` leaves the model's one list of runs on its attention modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSettings:
    """How one attention layer computes; the defaults are what the model itself says.

    Attributes:
        backend: a backend of `saccade.attention` by name.
        window, sinks: replace the model's own window; None and 0 leave it as it is.
        sparse: picks blocks of keys for each call.
        needs_own_cache: the options in force need saccade's caches, so tokens kept by a
            cache of transformers would silently ignore them.
    """

    backend: str = "auto"
    window: int | None = None
    sinks: int = 0
    sparse: Pattern | None = None
    needs_own_cache: bool = False


DEFAULT: Final = AttentionSettings()


class LayerSettings:
    """The settings of every layer of a model under params.

    Raises:
        Unsupported: n_swa or sparse for a model with layers that are neither full nor sliding.
    """

    def __init__(self, config: PreTrainedConfig, params: ContextParams) -> None:
        narrows = params.n_swa is not None or params.sparse is not None
        kinds = layer_kinds(config) if narrows else ()
        if any(kind.chunked for kind in kinds):
            raise Unsupported(
                f"{config.model_type} attends within chunks of the context, which n_swa and sparse "
                "patterns would replace by all of it. Leave them out for this model."
            )
        patterns = of_layers(params.attends_by, len(kinds))
        self._layers = [
            _of_layer(kind.window, params, pattern)
            for kind, pattern in zip(kinds, patterns, strict=True)
        ]
        self._any = _of_layer(None, params, params.attends_by)

    def __getitem__(self, layer: int) -> AttentionSettings:
        return self._layers[layer] if 0 <= layer < len(self._layers) else self._any


def _of_layer(own: int | None, params: ContextParams, sparse: Pattern | None) -> AttentionSettings:
    """Settings of a layer whose own window is `own`."""
    window, sinks = narrowed_window(own, params)
    return AttentionSettings(
        backend=backend_of(params),
        window=window,
        sinks=sinks,
        sparse=sparse if own is None else None,  # a window is sparse already
        needs_own_cache=needs_own_cache(params),
    )


def needs_own_cache(params: ContextParams) -> bool:
    """Whether options are in force that only saccade's caches carry out."""
    options = (params.type_k, params.page_size, params.kv_policy, params.ctx_checkpoints or None)
    return any(option is not None for option in options) or not params.offload_kqv


class SettingsSource(Protocol):
    """What says which settings are in force (`saccade.hf.runs.ModelRuns`)."""

    def settings(self, layer: int) -> AttentionSettings: ...


def settings_of(module: nn.Module) -> AttentionSettings:
    """The settings in force for an attention module, the defaults where nothing is attached."""
    source: SettingsSource | None = vars(module).get(ATTRIBUTE)
    return DEFAULT if source is None else source.settings(getattr(module, "layer_idx", 0))
