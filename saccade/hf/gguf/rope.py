"""What a GGUF file says about rotary positions, as transformers' `rope_parameters`.

llama.cpp multiplies the angle of pair i at position p by `1 / (factors[i] * factor)`; the factors
are tensors beside the weights.  Where transformers has no rule with the same numbers, the table is
given as `longrope` with equal factors for short and long texts, which is any table at all.
"""

from __future__ import annotations

import math
from typing import Any, Final

from saccade.hf.gguf.facts import Facts, missing

_LLAMA3: Final = (1.0, 4.0)
"""Low and high frequency factor of every Llama 3: only the trained length differs."""


def rotary(
    facts: Facts,
    *,
    head_dim: int,
    context: int,
    theta: float = 10000.0,
    partial: bool = False,
    tables_only: bool = False,
    truncate: bool | None = None,
) -> dict[str, Any]:
    """The `rope_parameters` of the file.

    Args:
        context: length the model serves, the default of the trained one.
        theta: where the file has none.
        partial: whether the model can rotate a part of each head.
        tables_only: the model knows no rule but `longrope`.
        truncate: of YaRN, where the model's rule is not the usual one.

    Raises:
        BadInput: values that cannot be, or that transformers' model cannot follow.
    """
    dims = _dims(facts, head_dim, partial)
    rope: dict[str, Any] = {"rope_theta": facts.real("rope.freq_base", theta)}
    if partial:
        rope["partial_rotary_factor"] = _share(dims, head_dim)
    kind, factor = _kind_and_factor(facts)
    yarn = _yarn(facts, factor, context, truncate)
    long, short = (facts.numbers(f"rope_factors_{which}.weight") for which in ("long", "short"))
    factors = facts.numbers("rope_freqs.weight")
    for table in (long, short, factors):
        _check_table(facts, table, dims)
    if kind == "yarn" and factor != 1.0:
        if factors or long or tables_only:
            raise facts.wrong("rope.scaling.type", "another one for this model", kind)
        return rope | yarn
    if long or short or kind == "longrope":
        return rope | _longrope(facts, long, short, factor, context)
    return rope | _scaled(facts, factors, factor, rope["rope_theta"], dims, context, tables_only)


def _dims(facts: Facts, head_dim: int, partial: bool) -> int:
    dims = facts.integer("rope.dimension_count", head_dim)
    if dims % 2 or dims > head_dim:
        raise facts.wrong("rope.dimension_count", f"an even number up to {head_dim}", dims)
    if dims != head_dim and not partial:
        raise facts.wrong("rope.dimension_count", f"{head_dim} (whole heads are rotated)", dims)
    return dims


def _share(dims: int, head_dim: int) -> float:
    """A share of which `int(head_dim * share)` is `dims`."""
    share = dims / head_dim
    return share if int(head_dim * share) == dims else (dims + 0.5) / head_dim


def _kind_and_factor(facts: Facts) -> tuple[str, float]:
    """llama.cpp scales linearly where a factor has no type; `rope.scale_linear` is its old name."""
    kind = facts.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise facts.wrong("rope.scaling.type", "none, linear, yarn or longrope", kind)
    old = facts.real("rope.scale_linear", 1.0)
    factor = facts.real("rope.scaling.factor", old) if facts.get("rope.scaling.factor") else old
    return kind, 1.0 if kind == "none" else factor


def _yarn(facts: Facts, factor: float, context: int, truncate: bool | None) -> dict[str, Any]:
    facts.must_be("rope.scaling.yarn_ext_factor", 1.0, "transformers' YaRN has no other")
    rule: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _original(facts, context),
    }
    if truncate is not None:
        rule["truncate"] = truncate
    for name in ("beta_fast", "beta_slow"):
        value = facts.real(f"rope.scaling.yarn_{name}", None)
        if value is not None:
            rule[name] = value
    magnitude = facts.real("rope.scaling.attn_factor", 1.0)
    whole = facts.real("rope.scaling.yarn_attn_factor", None)
    log = facts.get("rope.scaling.yarn_log_multiplier") and facts.real(
        "rope.scaling.yarn_log_multiplier"
    )
    if magnitude != 1.0 or whole or log:  # transformers' replaces the formula, GGUF's multiplies it
        formula = _mscale(factor, 1.0) / (_mscale(factor, log) if log else 1.0)
        rule["attention_factor"] = magnitude * (whole or formula)
    return rule


def _mscale(factor: float, multiplier: float) -> float:
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _original(facts: Facts, context: int) -> int:
    return facts.integer("rope.scaling.original_context_length", context)


def _longrope(
    facts: Facts, long: list[float] | None, short: list[float] | None, factor: float, context: int
) -> dict[str, Any]:
    if not long or not short:
        lacking = "short" if long else "long"
        raise missing(facts.file, [f"rope_factors_{lacking}.weight"])
    if factor != 1.0:
        raise facts.wrong("rope.scaling.factor", "none beside rope_factors tensors", factor)
    original = _original(facts, context)
    rule = _table(short, long, original) | {"factor": max(1.0, context / original)}
    magnitude = facts.real("rope.scaling.attn_factor", None)
    return rule if magnitude is None else rule | {"attention_factor": magnitude}


def _table(short: list[float], long: list[float], original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
    }


def _scaled(
    facts: Facts,
    factors: list[float] | None,
    factor: float,
    theta: float,
    dims: int,
    context: int,
    tables_only: bool,
) -> dict[str, Any]:
    magnitude = facts.real("rope.scaling.attn_factor", 1.0)
    _original(facts, context)  # nothing depends on it here
    if factors is None or all(value == 1.0 for value in factors):
        if factor == magnitude == 1.0:
            return {"rope_type": "default"}
        if magnitude == 1.0 and not tables_only:
            return {"rope_type": "linear", "factor": factor}
        factors = [1.0] * (dims // 2)
    elif factor == magnitude == 1.0 and not tables_only:
        fitted = llama3(factors, theta, dims)
        if fitted is not None:
            return fitted
    scaled = [value * factor for value in factors]
    return _table(scaled, scaled, context) | {"factor": 1.0, "attention_factor": magnitude}


def _check_table(facts: Facts, table: list[float] | None, dims: int) -> None:
    if table is None:
        return
    if len(table) != dims // 2 or not all(0 < value < math.inf for value in table):
        raise facts.wrong(
            "rope.dimension_count", f"twice the {len(table)} positive rope factors", dims
        )


def llama3(factors: list[float], theta: float, dims: int) -> dict[str, Any] | None:
    """Llama 3's rule with these factors of its frequencies; None where it has others."""
    low, high = _LLAMA3
    factor = max(factors)
    waves = [2 * math.pi * theta ** (2 * i / dims) for i in range(dims // 2)]
    between = [(w, f) for w, f in zip(waves, factors, strict=True) if 1.0 < f < factor]
    fast = [wave for wave, value in zip(waves, factors, strict=True) if value == 1.0]
    slow = [wave for wave, value in zip(waves, factors, strict=True) if value == factor]
    lengths = {8192.0}
    if fast and slow:  # where no pair lies between, any length between them gives the same
        lengths.add(float(round(math.sqrt(high * max(fast) * low * min(slow)))))
    for wave, value in between:
        smooth = (1 / value - 1 / factor) / (1 - 1 / factor)
        lengths.add(float(round((smooth * (high - low) + low) * wave)))
    for original in sorted(lengths, reverse=True):
        rule = [_llama3_factor(wave, factor, original) for wave in waves]
        if all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(rule, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": _short(factor),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(original),
            }
    return None


def _llama3_factor(wave: float, factor: float, original: float) -> float:
    low, high = _LLAMA3
    if wave < original / high:
        return 1.0
    if wave > original / low:
        return factor
    smooth = (original / wave - low) / (high - low)
    return 1.0 / ((1 - smooth) / factor + smooth)


def _short(value: float) -> float:
    """8.0 for 8.00000018: factors were divided in float32."""
    return round(value) * 1.0 if math.isclose(value, round(value), rel_tol=1e-5) else value
