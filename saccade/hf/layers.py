"""What a transformers config and model say about their layers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from saccade.core import Unsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What one layer of a model keeps of the tokens that it has read.

    Attributes:
        keys: whether it keeps keys and values of its own; a layer that attends to those of another
            one, or that does not attend at all, has none.
        window: of its attention, None for full attention.
        chunked: whether it attends within chunks of the context (Llama 4), which its mask says.
        states: number of recurrent or convolution states, of fixed size; 0 for none.
    """

    keys: bool = False
    window: int | None = None
    chunked: bool = False
    states: int = 0


_ATTENTION: Final = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_HYBRID: Final = frozenset({"hybrid", "hybrid_sliding"})
_RECURRENT: Final = frozenset({"conv", "linear_attention"})
_NOTHING: Final = frozenset({"dummy", "moe", "mlp"})
_SLIDING: Final = frozenset({"sliding_attention", "hybrid_sliding"})


def text_config(model_or_config: PreTrainedModel | PreTrainedConfig | Any) -> Any:
    """The config of the decoder that reads text (multimodal models nest it)."""
    config: Any = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)


def layer_kinds(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    """What each layer keeps.

    Raises:
        Unsupported: attention that is no softmax over all keys, over a window or over chunks; or a
            model without any attention.
    """
    config = text_config(config)
    types, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # older transformers (5.16): one dict for all layers
        options = [options] * len(types)
    named = getattr(config, "layer_types", None) or types
    kinds = tuple(
        _kind(index, kind, named[index], option, config)
        for index, (kind, option) in enumerate(zip(types, options, strict=True))
    )
    if not any(kind.keys for kind in kinds):
        raise Unsupported(
            f"{config.model_type} has {len(kinds)} layers and none with attention, expected one at "
            "least: saccade has nothing to do there. Use the model as transformers runs it."
        )
    return kinds


def _kind(index: int, kind: str, named: str, option: dict[str, Any], config: Any) -> LayerKind:
    """A layer of type `kind` for a cache, called `named` in the config."""
    if kind not in _ATTENTION | _HYBRID | _RECURRENT | _NOTHING:
        raise Unsupported(
            f"saccade serves attention over all keys, over a window or over chunks, and recurrent "
            f"and convolution layers, but layer {index} of {config.model_type} is {kind!r}. "
            "Use the model as transformers runs it."
        )
    window = option.get("sliding_window") if kind in _SLIDING else None
    if kind == "dummy" and named == "sliding_attention":  # attends to keys of another layer
        window = config.sliding_window
    return LayerKind(
        keys=kind in _ATTENTION | _HYBRID,
        window=window if isinstance(window, int) and window > 0 else None,
        chunked=kind == "chunked_attention",
        states=option.get("number_of_states", 1) if kind in _HYBRID | _RECURRENT else 0,
    )


def layer_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The model's own window of each layer, None for full attention and for no attention.

    Raises:
        Unsupported: as `layer_kinds`.
    """
    return tuple(kind.window for kind in layer_kinds(config))


def attention_modules(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """(layer index, module) of every module that calls the attention interface."""
    found = []
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "is_causal"):
            found.append((index, module))
    return found


INTERFACE: Final = "ALL_ATTENTION_FUNCTIONS"
"""The table of attention functions, as every attention module of transformers names it."""


def check_attention(model: nn.Module) -> None:
    """Raise Unsupported for a model that computes attention itself, in any layer with a cache.

    Its caches and masks would be ours, and its attention would not: options would have no effect,
    and our masks no meaning to it.
    """
    kinds = {kind: _code(kind) for kind in {type(module) for module in model.modules()}}
    if None in kinds.values():
        return  # compiled or wrapped: transformers has said that the class calls the interface
    calling = {kind for kind, code in kinds.items() if code and INTERFACE in code.co_names}
    # What such a module holds works for its attention (compressed keys of DeepSeek-V4).
    parts = [part for m in model.modules() if type(m) in calling for part in m.modules()]
    others = kinds.keys() - {type(part) for part in parts}
    for kind in sorted(others, key=lambda kind: kind.__name__):
        code = kinds[kind]
        assert code
        cached = {"past_key_values", "past_key_value", "layer_past"} & set(code.co_varnames)
        if cached and "softmax" in code.co_names:
            raise _own_attention(model, f"its {kind.__name__}")
    if not calling:
        raise _own_attention(model, "no layer of it")


def _code(kind: type[nn.Module]) -> CodeType | None:
    """What the forward of a class is compiled to; None where it is not Python."""
    return getattr(inspect.unwrap(kind.forward), "__code__", None)


def _own_attention(model: nn.Module, what: str) -> Unsupported:
    does = "computes attention itself" if what.startswith("its") else "calls the interface"
    return Unsupported(
        f"{type(model).__name__} does not call transformers' attention interface ({what} {does}), "
        "so its attention cannot be replaced. Use a model class that supports attn_implementation."
    )
