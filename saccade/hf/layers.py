"""What a transformers config and model say about their attention layers."""

from __future__ import annotations

from typing import Any, Final

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from saccade.core import Unsupported

_SLIDING: Final = "sliding_attention"
_FULL: Final = "full_attention"


def text_config(model_or_config: PreTrainedModel | PreTrainedConfig | Any) -> Any:
    """The config of the decoder that reads text (multimodal models nest it)."""
    config: Any = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)


def layer_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The model's own window of each layer, None for full attention.

    Raises:
        Unsupported: a layer that is neither full nor sliding softmax attention.
    """
    types, options = get_layer_types_and_kwargs(text_config(config))
    windows: list[int | None] = []
    for index, (kind, option) in enumerate(zip(types, options, strict=True)):
        if kind not in (_FULL, _SLIDING):
            raise Unsupported(
                f"saccade's caches serve full_attention and sliding_attention layers, but layer "
                f"{index} of {config.model_type} is {kind!r}. Use a cache of transformers."
            )
        windows.append(option["sliding_window"] if kind == _SLIDING else None)
    return tuple(windows)


def attention_modules(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """(layer index, module) of every module that calls the attention interface."""
    found = []
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "is_causal"):
            found.append((index, module))
    return found
