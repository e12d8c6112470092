"""Which RoPE scaling a model gets: what its config says, changed as the params say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, cast

from saccade.rope import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    NTKAware,
    ParsedRope,
    Unscaled,
    YaRN,
    parse,
)
from saccade.rope.rules import Rule
from saccade.runtime.params import ContextParams

_YARN_OPTIONS: Final = {
    "yarn_ext_factor": "ext_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def asks_for_rope(params: ContextParams) -> bool:
    """Whether any option changes the rotary positions (n_ctx alone does not)."""
    names = ("rope_scaling_type", "rope_freq_base", "rope_freq_scale", *_YARN_OPTIONS)
    return any(getattr(params, name) is not None for name in names)


def stretches(params: ContextParams) -> bool:
    """Whether positions are scaled, so that n_ctx may say how far."""
    return params.rope_scaling_type not in (None, "none") or params.rope_freq_scale is not None


def depends_on_length(rule: Rule) -> bool:
    """Whether the frequencies of a rule change with the length of the sequence."""
    return isinstance(rule, DynamicNTK | LongRoPE)


def configured_ropes(config: Any, *, only_known: bool = False) -> dict[str | None, ParsedRope]:
    """The rule of each layer type, or of all layers under None, as the config says.

    Args:
        only_known: leave out keys that no rule has, instead of refusing them.

    Raises:
        ValueError: rope parameters that are not known here, or with impossible values.
    """
    given = config.rope_parameters
    if not isinstance(given, Mapping):
        raise ValueError(
            f"rope_parameters must be a dict, got {given!r}. Write it as the model's own config "
            "does, with rope_type and rope_theta."
        )
    trained = getattr(config, "original_max_position_embeddings", None)
    return {
        kind: parse(
            part,
            max_position_embeddings=config.max_position_embeddings,
            original_max_position_embeddings=trained,
            only_known=only_known,
        )
        for kind, part in _by_layer_type(cast(Mapping[str, Any], given), only_known).items()
    }


def _by_layer_type(
    given: Mapping[str, Any], only_known: bool
) -> dict[str | None, Mapping[str, Any]]:
    """The parameters of each layer type, or all of them under None."""
    parts: dict[str | None, Mapping[str, Any]] = {
        kind: part for kind, part in given.items() if isinstance(part, Mapping)
    }
    others = [kind for kind, part in given.items() if part is not None and kind not in parts]
    if parts and others and not only_known:
        raise ValueError(
            f"rope_parameters must be flat or one dict per layer type, got {others} beside "
            f"{list(parts)}. Move them into the dict of each layer type."
        )
    return parts or {None: given}


def scaled(rope: ParsedRope, params: ContextParams, config: Any) -> ParsedRope:
    """The model's own rule changed as the params say.

    Raises:
        ValueError: yarn options for another rule, a factor that nothing determines, or a trained
            length that the model's own attention would not follow.
    """
    _check_temperature(params, config)
    rule = rule_under(rope.rule, params, config.max_position_embeddings)
    base = rope.base if params.rope_freq_base is None else params.rope_freq_base
    return rope._replace(rule=rule, base=float(base))


def rule_under(own: Rule, params: ContextParams, served: int) -> Rule:
    """A model's own rule changed as the params say.

    Args:
        served: tokens that the model's config serves.

    Raises:
        ValueError: yarn options for another rule, or a factor that nothing determines.
    """
    rule = _rule(own, params, params.yarn_orig_ctx or _trained(own, served))
    yarn = {
        theirs: getattr(params, ours)
        for ours, theirs in _YARN_OPTIONS.items()
        if getattr(params, ours) is not None
    }
    if yarn and not isinstance(rule, YaRN):
        raise ValueError(
            f"yarn options need rope_scaling_type='yarn', but {_in_force(rule)}. Set it, or leave "
            "the yarn_* options unset."
        )
    try:
        return replace(rule, **yarn)
    except ValueError as error:
        said = str(error)
        for ours, theirs in _YARN_OPTIONS.items():
            said = re.sub(rf"\b(?:YaRN\.)?{theirs}\b", ours, said)
        raise ValueError(said) from error


def _in_force(rule: Rule) -> str:
    return (
        "positions are not scaled here"
        if isinstance(rule, Unscaled)
        else f"the rule in force is {type(rule).__name__}"
    )


def _check_temperature(params: ContextParams, config: Any) -> None:
    """Raise where the model scales queries by the trained length of its config (Ministral 3)."""
    given = config.rope_parameters
    own = given.get("original_max_position_embeddings")
    if given.get("llama_4_scaling_beta") and params.yarn_orig_ctx not in (None, own):
        raise ValueError(
            f"yarn_orig_ctx={params.yarn_orig_ctx} differs from the {own} tokens of the config, by "
            "which this model scales its queries too. Leave it unset, or change "
            "original_max_position_embeddings of the config and load the model again."
        )


def _rule(own: Rule, params: ContextParams, trained: int) -> Rule:
    """The scaling rule, yarn options apart."""
    kind = params.rope_scaling_type
    if kind == "none":
        return Unscaled()
    if kind is None and params.rope_freq_scale is None:
        return own
    factor = _factor(params, trained, kind or "linear")
    if kind is None:
        return _refactored(own, factor)
    return _named(kind, own, factor, trained)


def _refactored(own: Rule, factor: float) -> Rule:
    """The model's own rule with another factor; plain interpolation where it has none."""
    if isinstance(own, Linear | NTKAware | DynamicNTK | YaRN | Llama3):
        return replace(own, factor=factor)
    if isinstance(own, Unscaled):
        return Linear(factor=factor)
    raise ValueError(
        f"rope_freq_scale cannot be applied to the model's own {type(own).__name__} scaling. "
        "Set rope_scaling_type too."
    )


def _named(kind: str, own: Rule, factor: float, trained: int) -> Rule:
    """The rule of that name."""
    if kind == "linear":
        return Linear(factor=factor)
    if kind == "ntk":
        return NTKAware(factor=factor)
    if kind == "dynamic":
        return DynamicNTK(factor=factor, original_max_position=trained)
    if isinstance(own, YaRN):  # keeps what this model was trained with: ramp, mscale, truncate
        return replace(own, factor=factor, original_max_position=trained)
    return YaRN(factor=factor, original_max_position=trained)


def _trained(own: Rule, served: int) -> int:
    """Length the model was trained for before any scaling."""
    if isinstance(own, Linear):
        return max(2, round(served / own.factor))
    return getattr(own, "original_max_position", served)


def _factor(params: ContextParams, trained: int, kind: str) -> float:
    if params.rope_freq_scale is not None:
        return 1.0 / params.rope_freq_scale
    if params.n_ctx is None:
        raise ValueError(
            f"rope_scaling_type={kind!r} needs to know how far to stretch: set n_ctx (beyond the "
            f"{trained} tokens of training) or rope_freq_scale."
        )
    return max(1.0, params.n_ctx / trained)
