"""Scaling rule -> inverse frequencies, in float64, and the magnitude that goes with them.

RoPE rotates pair i of a head by the angle `position * inv_freq[i]`, with `inv_freq[i]` falling from
1 to almost `1 / base`: the first pairs have high frequencies, the last ones low.  Past the trained
length, pairs of low frequency reach angles that training never covered.  Each scaling rule divides
every frequency by its own factor.

Everything is computed in float64: at position 1,000,000 a float32 frequency is off by 0.06 rad.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.rope.rules import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    NTKAware,
    Rule,
    Unscaled,
    YaRN,
)


class Frequencies(NamedTuple):
    """What `tables` needs of a rule.

    `inv_freq` is in radians per position, float64, on the CPU; `attention_factor` multiplies both
    cos and sin, so attention scores grow by its square.
    """

    inv_freq: Tensor  # [rotary_dim / 2]
    attention_factor: float


def inverse_frequencies(
    rule: Rule, *, base: float, rotary_dim: int, seq_len: int | None = None
) -> Frequencies:
    """(inv_freq [rotary_dim / 2] float64, attention_factor) of a scaling rule.

    Args:
        rule: one of the records of `saccade.rope.rules`.
        base: the model's rope_theta, above 1.
        rotary_dim: dimensions of a head that are rotated; even.
        seq_len: tokens in the whole sequence.  Only DynamicNTK and LongRoPE look at it, and None
            means not past training.  When it changes their frequencies, keys rotated before are
            no longer comparable with new queries.

    Raises:
        ValueError: impossible base, rotary_dim or seq_len, or a LongRoPE list of another length.
    """
    _check_call(base, rotary_dim, seq_len)
    magnitude = 1.0
    match rule:
        case Unscaled():
            inv_freq = _unscaled(base, rotary_dim)
        case Linear():
            inv_freq = _unscaled(base, rotary_dim) / rule.factor
        case NTKAware():
            inv_freq = _ntk(rule.factor, base, rotary_dim)
        case DynamicNTK():
            inv_freq = _ntk(_dynamic_growth(rule, seq_len), base, rotary_dim)
        case YaRN():
            inv_freq, magnitude = _yarn(rule, base, rotary_dim), _yarn_magnitude(rule)
        case Llama3():
            inv_freq = _llama3(rule, base, rotary_dim)
        case LongRoPE():
            inv_freq = _longrope(rule, base, rotary_dim, seq_len)
            magnitude = _longrope_magnitude(rule)
    return Frequencies(inv_freq, magnitude)


def _pairs(rotary_dim: int) -> Tensor:
    """Index of each pair, float64; on the CPU even where a model is being built on `meta`."""
    return torch.arange(rotary_dim // 2, dtype=torch.float64, device="cpu")  # [R/2]


def _unscaled(base: float, rotary_dim: int) -> Tensor:
    """RoPE, https://arxiv.org/abs/2104.09864: base ** (-2 i / d).

    Dividing it by a factor is position interpolation, https://arxiv.org/abs/2306.15595.
    """
    return base ** (-2.0 * _pairs(rotary_dim) / rotary_dim)  # [R/2]


def _ntk(factor: float, base: float, rotary_dim: int) -> Tensor:
    """NTK-aware scaling: base * factor ** (d / (d - 2)), so the slowest pair slows by `factor`.

    bloc97, https://www.reddit.com/r/LocalLLaMA/comments/14lz7j5/
    """
    if rotary_dim < 4:
        raise ValueError(
            f"NTK-aware scaling needs a rotary_dim of at least 4, got {rotary_dim}. "
            "With a single pair there is no slow one to stretch; use Linear."
        )
    return _unscaled(base * factor ** (rotary_dim / (rotary_dim - 2)), rotary_dim)


def _dynamic_growth(rule: DynamicNTK, seq_len: int | None) -> float:
    """Dynamic NTK, emozilla, https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr/

    factor * n / trained - (factor - 1): 1 up to the trained length, then linear in n.
    """
    trained = rule.original_max_position
    ratio = max(seq_len or trained, trained) / trained
    return rule.factor * ratio - (rule.factor - 1)


def _yarn(rule: YaRN, base: float, rotary_dim: int) -> Tensor:
    """YaRN's NTK-by-parts, https://arxiv.org/abs/2309.00071 section 3.2."""
    extrapolated = _unscaled(base, rotary_dim)
    interpolated = extrapolated / rule.factor
    low, high = _yarn_ramp(rule, base, rotary_dim)
    slowed = ((_pairs(rotary_dim) - low) / (high - low)).clamp(0, 1)  # 0 fast pair, 1 slow pair
    kept = (1 - slowed) * rule.ext_factor
    return interpolated * (1 - kept) + extrapolated * kept  # [R/2]


def _yarn_ramp(rule: YaRN, base: float, rotary_dim: int) -> tuple[float, float]:
    """First and last pair of the ramp, as (fractional, if not truncated) pair indices."""

    def pair_with_rotations(times: float) -> float:
        waves = rule.original_max_position / (times * 2 * math.pi)
        return rotary_dim * math.log(waves) / (2 * math.log(base))

    low, high = pair_with_rotations(rule.beta_fast), pair_with_rotations(rule.beta_slow)
    if rule.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The bound is rotary_dim - 1 and not the last pair: published weights were trained with it.
    low, high = max(low, 0), min(high, rotary_dim - 1)
    return (low, high + 0.001) if low == high else (low, high)


def _yarn_magnitude(rule: YaRN) -> float:
    """Factor on cos and sin: 0.1 ln(factor) + 1 (section 3.4), or DeepSeek's ratio of two."""

    def formula(weight: float) -> float:
        return 0.1 * weight * math.log(rule.factor) + 1.0

    if rule.attention_factor is not None:
        return rule.attention_factor
    if rule.ext_factor == 0:  # as ggml: pure interpolation comes without a magnitude
        return 1.0
    if rule.mscale and rule.mscale_all_dim:
        return formula(rule.mscale) / formula(rule.mscale_all_dim)
    return formula(1.0)


def _llama3(rule: Llama3, base: float, rotary_dim: int) -> Tensor:
    """Llama 3.1, https://github.com/meta-llama/llama-models (`apply_scaling`), arXiv 2407.21783.

    The share kept is a ramp in `waves`, the rotations of a pair over the trained length.
    """
    inv_freq = _unscaled(base, rotary_dim)
    waves = rule.original_max_position * inv_freq / (2 * math.pi)
    width = rule.high_freq_factor - rule.low_freq_factor
    kept = ((waves - rule.low_freq_factor) / width).clamp(0, 1)  # 1 short wave, 0 long wave
    return inv_freq / rule.factor * (1 - kept) + inv_freq * kept  # [R/2]


def _longrope(rule: LongRoPE, base: float, rotary_dim: int, seq_len: int | None) -> Tensor:
    """LongRoPE, https://arxiv.org/abs/2402.13753: each pair has its own searched divisor."""
    if len(rule.short_factor) != rotary_dim // 2:
        raise ValueError(
            f"LongRoPE needs rotary_dim / 2 = {rotary_dim // 2} divisors, got "
            f"{len(rule.short_factor)}. Check head_dim and partial_rotary_factor: together they "
            "make rotary_dim."
        )
    is_long = seq_len is not None and seq_len > rule.original_max_position
    divisors = rule.long_factor if is_long else rule.short_factor
    return _unscaled(base, rotary_dim) / torch.tensor(divisors, dtype=torch.float64, device="cpu")


def _longrope_magnitude(rule: LongRoPE) -> float:
    """sqrt(1 + ln(factor) / ln(trained)), the same for short and long sequences."""
    if rule.attention_factor is not None:
        return rule.attention_factor
    assert rule.factor is not None, "LongRoPE checks that it has one of the two"
    return math.sqrt(1 + math.log(rule.factor) / math.log(rule.original_max_position))


def _check_call(base: float, rotary_dim: int, seq_len: int | None) -> None:
    if not 1 < base < math.inf:
        raise ValueError(
            f"base must be a finite number above 1, got {base!r}. It is the model's rope_theta."
        )
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(
            f"rotary_dim must be an even number of at least 2, got {rotary_dim!r}. Dimensions are "
            "rotated in pairs; give int(head_dim * partial_rotary_factor)."
        )
    if seq_len is not None and seq_len < 1:
        raise ValueError(
            f"seq_len must be at least 1 token, got {seq_len!r}. Use None for up to training."
        )
