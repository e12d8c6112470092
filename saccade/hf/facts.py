"""ModelFacts of a transformers config: sizes that are checked, shapes that are found by running."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from saccade.core import BadInput, Unsupported
from saccade.hf.cached_shapes import CachedShapes, KVShape, cached_shapes, positions_said
from saccade.hf.layers import layer_kinds, text_config
from saccade.runtime.model import ModelFacts
from saccade.runtime.positions import ROTARY

_LENGTHS: Final = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    *("max_target_positions", "max_sequence_length"),
)
"""What configs call the length that a model was trained for."""
MOST_LAYERS: Final = 10_000
MOST_WIDTH: Final = 1 << 16


def facts_of(
    model_config: PreTrainedConfig,
    *,
    name: str,
    n_ctx_train: int | None,
    dtype: torch.dtype,
    model_class: type[PreTrainedModel] | None = None,
) -> ModelFacts:
    """What a config says of a model that need not be loaded; its trained length unless given.

    Args:
        model_class: default: the causal language model of transformers for this config.

    Raises:
        BadInput: sizes that are no positive numbers, or a length that is not said.
        Unsupported: layers that our caches do not serve.
    """
    config = text_config(model_config)
    model_class = model_class or _class_for(model_config) or _class_for(config)
    if model_class is not None:
        check_interface(model_class)
    length = n_ctx_train or trained_length(model_config, model_class)
    layers = positive(config, "num_hidden_layers", most=MOST_LAYERS)
    kinds = layer_kinds(config)
    heads = positive(config, "num_attention_heads")
    found = None if model_class is None else cached_shapes(model_class, model_config)
    keys, numbers = found or CachedShapes(_shapes_said(config), 0)
    first, alike = keys[0], len(set(keys)) == 1
    _check_widths(config, keys)
    return ModelFacts(
        name=name,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=first[0],
        head_dim=first[1],
        value_dim=None if first[1] == first[2] else first[2],
        kv_shapes=() if alike else keys,
        state_bytes=numbers * dtype.itemsize,
        vocab_size=positive(config, "vocab_size"),
        n_ctx_train=length,
        dtype=dtype,
        windows=tuple(kind.window for kind in kinds if kind.keys),
        softcap=getattr(config, "attn_logit_softcapping", None),
        learned_sinks=config.model_type == "gpt_oss",
        positions=ROTARY if model_class is None else positions_said(model_class, model_config),
    )


def trained_length(
    model_config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None
) -> int:
    """Tokens that a model was trained for, as its config says.

    Raises:
        BadInput: the config does not say.
        Unsupported: a model that saccade cannot run.
    """
    config = text_config(model_config)
    model_class = model_class or _class_for(model_config) or _class_for(config)
    if model_class is not None:
        check_interface(model_class)
    positive(config, "num_hidden_layers", most=MOST_LAYERS)
    layer_kinds(config)
    return positive(config, *_LENGTHS)


def check_interface(model_class: type[PreTrainedModel]) -> None:
    """Raise Unsupported for a class whose attention cannot be replaced."""
    if not model_class._can_set_attn_implementation():
        raise Unsupported(
            f"{model_class.__name__} does not call transformers' attention interface, so its "
            "attention cannot be replaced. Use a model class that supports attn_implementation."
        )


def positive(config: Any, *names: str, most: int = 1 << 40) -> int:
    """The first of these fields that a config has.

    Raises:
        BadInput: none of them, or no whole number from 1 to `most`.
    """
    for name in names:
        value = getattr(config, name, None)
        if type(value) is int and 0 < value <= most:
            return value
        if value is not None:
            raise BadInput(
                f"the config of this {config.model_type} says {name}={_short(value)}, expected a "
                f"whole number from 1 to {most}. Correct its config.json."
            )
    raise BadInput(
        f"the config of this {config.model_type} has no {names[0]}, expected a whole number from "
        f"1 to {most}. Add it to its config.json."
    )


def _check_widths(config: Any, keys: tuple[KVShape, ...]) -> None:
    """Raise BadInput for heads that no model has."""
    for kv_heads, *widths in keys:
        if max(widths) > MOST_WIDTH:
            raise BadInput(
                f"the config of this {config.model_type} says {kv_heads} KV heads of {widths[0]} "
                f"numbers, expected at most {MOST_WIDTH}. Correct its config.json."
            )


def _short(value: Any) -> str:
    return repr(value)[:40]


def _class_for(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found


def _shapes_said(config: Any) -> tuple[KVShape, ...]:
    """Shapes by the usual fields, for models that cannot run without memory."""
    layers = getattr(config, "per_layer_config", None)
    kinds = layer_kinds(config)
    return tuple(
        _shape_said(config if layers is None else layers[index])
        for index, kind in enumerate(kinds)
        if kind.keys
    )


def _shape_said(config: Any) -> KVShape:
    heads = positive(config, "num_attention_heads")
    given = getattr(config, "head_dim", None)
    head_dim = positive(config, "head_dim" if given else "hidden_size") // (1 if given else heads)
    kv_heads = getattr(config, "num_key_value_heads", None)
    return positive(config, "num_key_value_heads") if kv_heads else heads, head_dim, head_dim
