"""How a model's rotary positions are stretched past training: one small record per rule.

A rule is plain data, checked when it is made, and its repr is the call that makes it again.  It
holds what a paper or a config file states and nothing about a model; `inverse_frequencies` turns
rule, base and rotary dimension into numbers.  `parse` reads the `rope_parameters` dict of a
transformers config into a rule.

`original_max_position` is always the length the model was *trained* on, in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from saccade.rope.bounds import (
    as_float,
    check_divisors,
    check_length,
    check_magnitude,
    check_mscale,
    check_positive,
    check_stretch,
    require,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unscaled:
    """Rotary positions as trained; transformers calls it "default"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """Position interpolation: every frequency divided by `factor` (at least 1)."""

    factor: float

    def __post_init__(self) -> None:
        check_stretch("Linear.factor", self.factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class NTKAware:
    """A larger base, so that slow pairs stretch by `factor` (at least 1) and fast ones hardly."""

    factor: float

    def __post_init__(self) -> None:
        check_stretch("NTKAware.factor", self.factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicNTK:
    """NTK-aware scaling that grows with the sequence; transformers calls it "dynamic".

    Args:
        factor: strength of the growth, at least 1.
        original_max_position: length in tokens up to which nothing is scaled.
    """

    factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        check_stretch("DynamicNTK.factor", self.factor)
        check_length("DynamicNTK.original_max_position", self.original_max_position)


@dataclass(frozen=True, kw_only=True, slots=True)
class YaRN:
    """Slow pairs interpolated, fast ones kept, a ramp between, and sharper attention.

    Args:
        factor: served length over trained length, at least 1.
        original_max_position: trained length in tokens.
        beta_fast: pairs with at least this many rotations over the trained length are kept.
        beta_slow: frequencies of pairs with at most this many are divided by `factor`.
        attention_factor: multiplies cos and sin as it stands; None takes it from the formula.
        mscale: with `mscale_all_dim`, the ratio form of that formula (DeepSeek); both have to be
            given and non-zero, otherwise the plain form holds, as in transformers.
        mscale_all_dim: see `mscale`.
        truncate: round the ends of the ramp outwards to whole pairs; gpt-oss has False.
        ext_factor: share of the kept frequencies, 0 to 1, as in llama.cpp.  1 is the paper and
            transformers; 0 is pure interpolation, without a magnitude unless one is given.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    ext_factor: float = 1.0

    def __post_init__(self) -> None:
        check_stretch("YaRN.factor", self.factor)
        check_length("YaRN.original_max_position", self.original_max_position)
        check_positive("YaRN.beta_fast", self.beta_fast, "The paper uses 32.")
        check_positive("YaRN.beta_slow", self.beta_slow, "The paper uses 1.")
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"YaRN.beta_fast must not be below beta_slow, got beta_fast={self.beta_fast!r} and "
                f"beta_slow={self.beta_slow!r}. Fast pairs make more rotations: exchange the two."
            )
        check_magnitude("YaRN.attention_factor", self.attention_factor)
        check_mscale("YaRN.mscale", self.mscale)
        check_mscale("YaRN.mscale_all_dim", self.mscale_all_dim)
        advice = "Leave it out unless the model was trained with a ramp that is not rounded."
        require(self.truncate in (True, False), "YaRN.truncate", "a bool", self.truncate, advice)
        advice = "Use 1 for YaRN as published, 0 for pure interpolation."
        ok = 0 <= as_float(self.ext_factor) <= 1
        require(ok, "YaRN.ext_factor", "a number from 0 to 1", self.ext_factor, advice)


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3:
    """Llama 3.1: long waves interpolated, short ones kept, a blend between.

    Args:
        factor: divides the frequency of long waves, at least 1.
        low_freq_factor: waves longer than `original_max_position / low_freq_factor` are long.
        high_freq_factor: waves shorter than `original_max_position / high_freq_factor` are short.
        original_max_position: trained length in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        check_stretch("Llama3.factor", self.factor)
        check_positive("Llama3.low_freq_factor", self.low_freq_factor, "Llama 3.1 uses 1.")
        check_positive("Llama3.high_freq_factor", self.high_freq_factor, "Llama 3.1 uses 4.")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "Llama3.high_freq_factor must be greater than low_freq_factor, got "
                f"high_freq_factor={self.high_freq_factor!r} and "
                f"low_freq_factor={self.low_freq_factor!r}. Llama 3.1 uses 4 and 1."
            )
        check_length("Llama3.original_max_position", self.original_max_position)


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRoPE:
    """One searched divisor per pair, in two sets: for sequences up to and past training (Phi-3).

    Args:
        short_factor: divisors for sequences up to `original_max_position`, rotary_dim / 2 of them.
        long_factor: divisors for longer sequences, as many.
        original_max_position: trained length in tokens.
        factor: served length over trained length; gives the magnitude.
        attention_factor: multiplies cos and sin as it stands; wins over `factor`.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    factor: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_divisors("LongRoPE.short_factor", self.short_factor)
        check_divisors("LongRoPE.long_factor", self.long_factor)
        if len(self.short_factor) != len(self.long_factor):
            raise ValueError(
                "LongRoPE.short_factor and long_factor must be equally long, got "
                f"{len(self.short_factor)} and {len(self.long_factor)} divisors. "
                "Give rotary_dim / 2 of each."
            )
        check_length("LongRoPE.original_max_position", self.original_max_position)
        if self.factor is None and self.attention_factor is None:
            raise ValueError(
                "LongRoPE needs factor or attention_factor to know its magnitude, got neither. "
                "Give factor = served length / original_max_position."
            )
        if self.factor is not None:
            check_stretch("LongRoPE.factor", self.factor)
        check_magnitude("LongRoPE.attention_factor", self.attention_factor)


Rule: TypeAlias = Unscaled | Linear | NTKAware | DynamicNTK | YaRN | Llama3 | LongRoPE


class ParsedRope(NamedTuple):
    """The contents of a `rope_parameters` dict.

    Attributes:
        rule: scaling rule.
        base: rope_theta.
        partial_rotary_factor: share of a head's dimensions that is rotated.
    """

    rule: Rule
    base: float
    partial_rotary_factor: float

    def rotary_dim(self, head_dim: int) -> int:
        """Rotated leading dimensions of a head: `int(head_dim * partial_rotary_factor)`."""
        return int(head_dim * self.partial_rotary_factor)


class _Lengths(NamedTuple):
    """The length a config is used with and, where it has one, the length of training; in tokens."""

    served: int
    stated: int | None

    @property
    def trained(self) -> int:
        return self.served if self.stated is None else self.stated


_Builder: TypeAlias = Callable[[Mapping[str, Any], _Lengths], Rule]


def parse(
    rope_parameters: Mapping[str, Any],
    *,
    max_position_embeddings: int,
    original_max_position_embeddings: int | None = None,
    rope_theta: float | None = None,
    only_known: bool = False,
) -> ParsedRope:
    """(rule, base, partial_rotary_factor) of a transformers `rope_parameters` dict, taken verbatim.

    Follows transformers: a missing factor of "yarn" and "longrope" is n_ctx over trained length,
    and the trained length defaults to `max_position_embeddings`.  Stricter in one way: an unknown
    key or type is an error, because ignoring one silently changes the model's results.
    Keys that hold None count as absent.

    Args:
        rope_parameters: a flat dict; for one nested by layer type, call once per layer type.
        max_position_embeddings: the config's own, in tokens.
        original_max_position_embeddings: the config's own where it has one (Phi-3 keeps it outside
            the dict); it wins over the dict's.
        rope_theta: the config's own, for a dict that lacks it.
        only_known: leave out keys that the type does not have, for a caller who finds out itself
            whether they change anything.

    Raises:
        ValueError: unknown type or key, nested dict, missing or impossible value.
    """
    given = {key: value for key, value in rope_parameters.items() if value is not None}
    _reject_nested(given)
    build = _builder(given, only_known)
    check_length("max_position_embeddings", max_position_embeddings)
    stated = original_max_position_embeddings
    stated = given.get(_TRAINED) if stated is None else stated
    if stated is not None:
        check_length(_TRAINED, stated)
    rule = build(given, _Lengths(max_position_embeddings, stated))
    return ParsedRope(rule, _base(given, rope_theta), _partial(given))


def _linear(given: Mapping[str, Any], lengths: _Lengths) -> Rule:
    return Linear(factor=_required(given, "factor", "linear"))


def _dynamic(given: Mapping[str, Any], lengths: _Lengths) -> Rule:
    factor = _required(given, "factor", "dynamic")
    return DynamicNTK(factor=factor, original_max_position=lengths.served)


def _yarn(given: Mapping[str, Any], lengths: _Lengths) -> Rule:
    factor = given.get("factor")
    if factor is None and lengths.stated is None:
        raise ValueError(
            f"rope_parameters of type 'yarn' must hold 'factor' or {_TRAINED!r}, got "
            f"{_listed(given)}. Give the length the model was trained on, or the stretch."
        )
    return YaRN(
        factor=lengths.served / lengths.trained if factor is None else factor,
        original_max_position=lengths.trained,
        **{key: given[key] for key in _YARN_OPTIONS if key in given},
    )


def _llama3(given: Mapping[str, Any], lengths: _Lengths) -> Rule:
    return Llama3(
        factor=_required(given, "factor", "llama3"),
        low_freq_factor=_required(given, "low_freq_factor", "llama3"),
        high_freq_factor=_required(given, "high_freq_factor", "llama3"),
        original_max_position=lengths.trained,
    )


def _longrope(given: Mapping[str, Any], lengths: _Lengths) -> Rule:
    return LongRoPE(
        short_factor=_frozen(_required(given, "short_factor", "longrope")),
        long_factor=_frozen(_required(given, "long_factor", "longrope")),
        original_max_position=lengths.trained,
        # A model served below its trained length needs no magnitude: a ratio below 1 counts as 1.
        factor=given.get("factor", max(1.0, lengths.served / lengths.trained)),
        attention_factor=given.get("attention_factor"),
    )


_COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_YARN_OPTIONS = frozenset(
    {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}
)
_TRAINED = "original_max_position_embeddings"

# transformers' name -> (the keys it may hold beside the common ones, what builds its rule)
_KINDS: dict[object, tuple[frozenset[str], _Builder]] = {
    "default": (frozenset(), lambda given, lengths: Unscaled()),
    "linear": (frozenset({"factor"}), _linear),
    "dynamic": (frozenset({"factor"}), _dynamic),
    "yarn": (frozenset({"factor", _TRAINED}) | _YARN_OPTIONS, _yarn),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor", _TRAINED}), _llama3),
    "longrope": (
        frozenset({"short_factor", "long_factor", "factor", "attention_factor", _TRAINED}),
        _longrope,
    ),
}


def _reject_nested(given: Mapping[str, Any]) -> None:
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            "rope_parameters must be flat, got one dict per layer type under "
            f"{_listed(nested)}. Call parse once per layer type with that type's dict."
        )


def _builder(given: Mapping[str, Any], only_known: bool) -> _Builder:
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(
            f"rope_parameters['rope_type'] must be one of {_listed(_KINDS)}, got {kind!r}. "
            "Build the rule by hand if your model means one of these under another name."
        )
    keys, build = _KINDS[kind]
    if (unknown := given.keys() - keys - _COMMON_KEYS) and not only_known:
        raise ValueError(
            f"rope_parameters of type {kind!r} may hold {_listed(keys | _COMMON_KEYS)}, got also "
            f"{_listed(unknown)}. Remove them if you know that they change nothing."
        )
    return build


def _required(given: Mapping[str, Any], key: str, kind: str) -> Any:
    if key not in given:
        raise ValueError(
            f"rope_parameters of type {kind!r} must hold {key!r}, got {_listed(given)}. "
            f"Add {key!r} as the model's own config states it."
        )
    return given[key]


def _frozen(divisors: Any) -> Any:
    """A JSON list as a tuple; anything else as it is, which the check of the rule refuses."""
    return tuple(divisors) if isinstance(divisors, list) else divisors


def _base(given: Mapping[str, Any], rope_theta: float | None) -> float:
    base = given.get("rope_theta", rope_theta)
    if base is None:
        raise ValueError(
            f"rope_parameters must hold 'rope_theta', got {_listed(given)}. "
            "Add it, or pass rope_theta= from the config; models differ too much for a default."
        )
    place, advice = "rope_parameters['rope_theta']", "Typical bases are 10000 to 10000000."
    require(1 < as_float(base) < math.inf, place, "a finite number above 1", base, advice)
    return float(base)


def _partial(given: Mapping[str, Any]) -> float:
    share = given.get("partial_rotary_factor", 1.0)
    place = "rope_parameters['partial_rotary_factor']"
    advice = "It is the share of a head's dimensions that are rotated; leave it out for all."
    require(0 < as_float(share) <= 1, place, "above 0 and at most 1", share, advice)
    return float(share)


def _listed(names: Iterable[object]) -> str:
    return ", ".join(sorted(map(repr, names))) or "nothing"
