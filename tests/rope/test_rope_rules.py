"""Rules, `parse` and the formulas that transformers has no counterpart for."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch

from saccade.rope import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    NTKAware,
    ParsedRope,
    Rule,
    Unscaled,
    YaRN,
    inverse_frequencies,
    parse,
)

DYNAMIC = DynamicNTK(factor=2.0, original_max_position=2048)
LLAMA3 = Llama3(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position=8192)
LONG = LongRoPE(
    short_factor=(1.0, 1.5), long_factor=(2.0, 9.0), original_max_position=4096, factor=32.0
)
YARN = YaRN(factor=4.0, original_max_position=32768)
ALL_RULES: tuple[Rule, ...] = (
    *(Unscaled(), Linear(factor=2.0), NTKAware(factor=2.0)),
    *(DYNAMIC, YARN, LLAMA3, LONG),
)


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: type(rule).__name__)
def test_rules_are_plain_values(rule: Rule) -> None:
    """Hashable, frozen, without a dict, and their repr makes them again."""
    assert eval(repr(rule)) == rule
    assert hash(pickle.loads(pickle.dumps(rule))) == hash(rule)
    assert not hasattr(rule, "__dict__")
    with pytest.raises((AttributeError, TypeError)):
        rule.factor = 3.0  # pyright: ignore


# ---- formulas ----


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_ntk_aware_is_its_formula(factor: float) -> None:
    got, magnitude = inverse_frequencies(NTKAware(factor=factor), base=1e4, rotary_dim=128)
    base = 1e4 * factor ** (128 / 126)
    expected = [base ** (-i / 128) for i in range(0, 128, 2)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    assert magnitude == 1.0
    unscaled = inverse_frequencies(Unscaled(), base=1e4, rotary_dim=128).inv_freq
    assert got[0] == 1.0
    assert unscaled[-1] / got[-1] == pytest.approx(factor, rel=1e-12)  # the point of the exponent


def test_dynamic_ntk_starts_where_training_ended() -> None:
    unscaled = inverse_frequencies(Unscaled(), base=1e4, rotary_dim=64).inv_freq
    for seq_len in (None, 1, 2048):
        got = inverse_frequencies(DYNAMIC, base=1e4, rotary_dim=64, seq_len=seq_len).inv_freq
        assert torch.equal(got, unscaled)
    got = inverse_frequencies(DYNAMIC, base=1e4, rotary_dim=64, seq_len=6144).inv_freq
    five_fold = inverse_frequencies(NTKAware(factor=2 * 3 - 1), base=1e4, rotary_dim=64).inv_freq
    torch.testing.assert_close(got, five_fold, rtol=1e-14, atol=0)


def ggml_angle_per_position(pair: int, rule: YaRN, base: float, num_dims: int) -> float:
    """ggml's rope_yarn for position 1, line by line, with freq_scale = 1 / factor."""

    def correction(rotations: float) -> float:
        waves = rule.original_max_position / (rotations * 2 * math.pi)
        return num_dims * math.log(waves) / (2 * math.log(base))

    low = max(0, math.floor(correction(rule.beta_fast)))
    high = min(num_dims - 1, math.ceil(correction(rule.beta_slow)))
    ramp = 1 - min(1, max(0, (pair - low) / max(0.001, high - low)))
    extrapolated = base ** (-2 * pair / num_dims)
    interpolated = extrapolated / rule.factor
    mix = ramp * rule.ext_factor
    return interpolated * (1 - mix) + extrapolated * mix


@pytest.mark.parametrize("ext_factor", [0.0, 0.25, 0.5, 1.0])
def test_ext_factor_is_ggmls(ext_factor: float) -> None:
    rule = YaRN(factor=4.0, original_max_position=32768, ext_factor=ext_factor)
    got, magnitude = inverse_frequencies(rule, base=1e6, rotary_dim=128)
    expected = [ggml_angle_per_position(i, rule, 1e6, 128) for i in range(64)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    assert magnitude == pytest.approx(1 + 0.1 * math.log(4.0) if ext_factor else 1.0, rel=1e-15)


def test_ext_factor_0_is_interpolation_with_a_magnitude_only_on_request() -> None:
    for given, expected in ((None, 1.0), (1.3, 1.3)):
        rule = YaRN(
            factor=4.0, original_max_position=512, ext_factor=0, attention_factor=given, mscale=1.0
        )
        got, magnitude = inverse_frequencies(rule, base=1e4, rotary_dim=64)
        linear = inverse_frequencies(Linear(factor=4.0), base=1e4, rotary_dim=64).inv_freq
        assert torch.equal(got, linear)
        assert magnitude == expected


def test_factor_1_changes_nothing() -> None:
    unscaled = inverse_frequencies(Unscaled(), base=1e4, rotary_dim=64).inv_freq
    llama3 = Llama3(factor=1, low_freq_factor=1, high_freq_factor=4, original_max_position=8192)
    yarn = YaRN(factor=1, original_max_position=4096, mscale=1.0, mscale_all_dim=0.7)
    for rule in (Linear(factor=1), NTKAware(factor=1), yarn, llama3):
        got, magnitude = inverse_frequencies(rule, base=1e4, rotary_dim=64)
        torch.testing.assert_close(got, unscaled, rtol=1e-15, atol=0)
        assert magnitude == 1.0


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: type(rule).__name__)
def test_frequencies_are_real_while_a_model_is_built_on_meta(rule: Rule) -> None:
    expected = inverse_frequencies(rule, base=1e4, rotary_dim=4)
    with torch.device("meta"):
        got = inverse_frequencies(rule, base=1e4, rotary_dim=4)
    assert torch.equal(got.inv_freq, expected.inv_freq)


# ---- parse ----


def parsed(max_position_embeddings: int = 131072, **rope_parameters: Any) -> ParsedRope:
    given = {"rope_theta": 1e6, **rope_parameters}
    return parse(given, max_position_embeddings=max_position_embeddings)


def test_parse_reads_every_type() -> None:
    assert parsed(rope_type="default") == (Unscaled(), 1e6, 1.0)
    assert parsed(type="linear", factor=2.0).rule == Linear(factor=2.0)
    assert parsed(2048, rope_type="dynamic", factor=2.0).rule == DYNAMIC
    trained = {"original_max_position_embeddings": 32768}
    assert parsed(rope_type="yarn", factor=4.0, **trained).rule == YARN
    bands = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    assert parsed(rope_type="llama3", factor=8, **bands).rule == LLAMA3
    lists = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 9.0]}
    trained = {"original_max_position_embeddings": 4096}
    assert parsed(rope_type="longrope", **lists, **trained).rule == LONG


def test_parse_reads_every_option_of_yarn() -> None:
    options = {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.1}
    options |= {"mscale": 0.7, "mscale_all_dim": 0.8, "truncate": False}
    trained = {"original_max_position_embeddings": 4096}
    rope = parsed(rope_type="yarn", factor=3.0, **trained, **options)
    assert rope.rule == YaRN(factor=3.0, original_max_position=4096, **options)


def test_missing_factor_is_the_ratio_of_lengths() -> None:
    trained = {"original_max_position_embeddings": 32768}
    assert parsed(rope_type="yarn", **trained).rule == YARN
    assert parsed(rope_type="yarn", factor=None, mscale=None, **trained).rule == YARN


def test_a_longrope_served_below_its_training_has_no_magnitude() -> None:
    trained = {"original_max_position_embeddings": 4096}
    lists = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 9.0]}
    rule = parsed(2048, rope_type="longrope", **lists, **trained).rule
    assert inverse_frequencies(rule, base=1e4, rotary_dim=4).attention_factor == 1.0


def test_the_configs_own_trained_length_wins() -> None:
    given = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 999}
    rope = parse(given, max_position_embeddings=8192, original_max_position_embeddings=4096)
    assert rope.rule == YaRN(factor=2.0, original_max_position=4096)


def test_trained_length_defaults_to_the_served_one() -> None:
    rule = parsed(8192, rope_type="yarn", factor=2.0).rule
    assert rule == YaRN(factor=2.0, original_max_position=8192)


def test_base_and_share() -> None:
    rope = parse({"partial_rotary_factor": 0.4}, max_position_embeddings=64, rope_theta=5e4)
    assert rope == (Unscaled(), 5e4, 0.4)
    assert rope.rotary_dim(80) == 32
    assert parse({"rope_theta": 1e4}, max_position_embeddings=64, rope_theta=5e4).base == 1e4


# ---- errors ----

RULE_ERRORS: list[tuple[type, dict[str, Any], str]] = [
    (Linear, {"factor": 0.5}, r"Linear\.factor must be .* at least 1, got 0\.5\. .*Unscaled\(\)"),
    (Linear, {"factor": "4"}, r"Linear\.factor must be a finite number .*, got '4'\."),
    (Linear, {"factor": True}, r"got True\."),
    (NTKAware, {"factor": math.nan}, r"NTKAware\.factor .*, got nan\."),
    (DynamicNTK, {"factor": 2, "original_max_position": 0}, r"integer of at least 2 .*, got 0\."),
    (YaRN, {"factor": math.inf}, r"YaRN\.factor .*, got inf\."),
    (YaRN, {"original_max_position": 4096.0}, r"must be an integer .*, got 4096\.0\."),
    (YaRN, {"beta_slow": 0}, r"YaRN\.beta_slow .* above 0, got 0\. The paper uses 1\."),
    (YaRN, {"beta_fast": 1, "beta_slow": 32}, r"beta_fast=1 and beta_slow=32\. .*exchange"),
    (YaRN, {"attention_factor": 0.0}, r"YaRN\.attention_factor .*Use None .*1\.0 to switch it off"),
    (YaRN, {"mscale": -1.0}, r"YaRN\.mscale .* at least 0 or None, got -1\.0\."),
    (YaRN, {"truncate": "no"}, r"YaRN\.truncate must be a bool, got 'no'\. Leave it out"),
    (YaRN, {"ext_factor": -1}, r"YaRN\.ext_factor .* from 0 to 1, got -1\. Use 1 for YaRN"),
    (Llama3, {"high_freq_factor": 1}, r"high_freq_factor=1 and low_freq_factor=1\. .*4 and 1"),
    (LongRoPE, {"short_factor": [1.0, 1.0]}, r"must be a tuple .*, got \[1\.0, 1\.0\]\. Wrap a"),
    (LongRoPE, {"long_factor": (1.0, -2.0)}, r"LongRoPE\.long_factor\[1\] .*, got -2\.0\."),
    (LongRoPE, {"long_factor": (1.0,)}, r"equally long, got 2 and 1 divisors"),
    (LongRoPE, {"factor": None}, r"needs factor or attention_factor .*, got neither\. Give factor"),
]


@pytest.mark.parametrize(("rule", "change", "text"), RULE_ERRORS)
def test_impossible_rules(rule: type, change: dict[str, Any], text: str) -> None:
    valid = next(r for r in ALL_RULES if type(r) is rule)
    fields = {field.name: getattr(valid, field.name) for field in dataclasses.fields(valid)}
    with pytest.raises(ValueError, match=text):
        rule(**{**fields, **change})


PARSE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"rope_type": "yarm"}, r"must be one of 'default', 'dynamic', .*'yarn', got 'yarm'\. Build"),
    (
        {"rope_type": "yarn", "factor": 4.0, "beta_fats": 32},
        r"of type 'yarn' may hold .*'beta_fast'.*, got also 'beta_fats'\. Remove",
    ),
    ({"rope_type": "default", "factor": 4.0}, r"of type 'default' may hold .* got also 'factor'\."),
    (
        {"rope_type": "linear"},
        r"of type 'linear' must hold 'factor', got 'rope_theta', 'rope_type'",
    ),
    ({"rope_type": "yarn"}, r"must hold 'factor' or 'original_max_position_embeddings', got"),
    ({"rope_type": "llama3", "factor": 8.0}, r"of type 'llama3' must hold 'low_freq_factor'"),
    ({"rope_type": "longrope", "long_factor": [1.0]}, r"must hold 'short_factor'"),
    (
        {"rope_type": "longrope", "short_factor": 1.0, "long_factor": [1.0]},
        r"short_factor must be a tuple .*, got 1\.0",
    ),
    ({"rope_theta": None}, r"must hold 'rope_theta', got nothing\. Add it, or pass rope_theta="),
    ({"rope_theta": 1.0}, r"\['rope_theta'\] must be a finite number above 1, got 1\.0"),
    ({"partial_rotary_factor": 1.5}, r"above 0 and at most 1, got 1\.5\. It is the share"),
    ({"full_attention": {}}, r"must be flat, got .*under 'full_attention'\. Call parse once per"),
    (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
        r"original_max_position_embeddings must be an integer of at least 2 tokens, got 0",
    ),
]


@pytest.mark.parametrize(("given", "text"), PARSE_ERRORS)
def test_dicts_that_cannot_be_read(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parsed(**given)


CALL_ERRORS: list[tuple[Rule, dict[str, Any], str]] = [
    (
        Unscaled(),
        {"rotary_dim": 7},
        r"even number of at least 2, got 7\. Dimensions are rotated in pairs",
    ),
    (Unscaled(), {"base": 1.0}, r"base must be a finite number above 1, got 1\.0.*rope_theta"),
    (DYNAMIC, {"seq_len": 0}, r"seq_len must be at least 1 token, got 0\. Use None"),
    (NTKAware(factor=2), {"rotary_dim": 2}, r"at least 4, got 2\. .*use Linear"),
    (LONG, {"rotary_dim": 64}, r"rotary_dim / 2 = 32 divisors, got 2\. Check head_dim and"),
]


@pytest.mark.parametrize(("rule", "change", "text"), CALL_ERRORS)
def test_frequencies_that_cannot_be_had(rule: Rule, change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        inverse_frequencies(rule, **{"base": 1e4, "rotary_dim": 4, **change})
