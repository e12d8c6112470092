"""Frequencies and rotation equal transformers' own, read from its own configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saccade.rope import Frequencies, ParsedRope, apply, inverse_frequencies, parse, tables

transformers = pytest.importorskip("transformers")
modeling_rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
modeling_cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")

# Settings as the models publish them; Phi-3's divisors are rounded to two decimals, which
# changes nothing for a comparison of formulas.
PHI3_SHORT = [
    *(1.05, 1.05, 1.05, 1.1, 1.1, 1.1, 1.25, 1.25, 1.4, 1.45, 1.55, 1.85, 1.9),
    *(2.0,) * 19,
    *(2.1, 2.1, 2.2, 2.35, 2.35, 2.35, 2.35, 2.4, 2.4, 2.65, 2.7, 2.9, 2.95, 3.05, 3.05, 3.05),
]
PHI3_LONG = [
    *(1.03, 1.05, 1.05, 1.08, 1.23, 1.23, 1.3, 1.45, 1.6, 1.65, 1.9, 2.86, 3.69, 5.42, 5.49, 5.49),
    *(9.09, 11.58, 15.66, 15.77, 15.79, 18.36, 21.99, 23.08, 30.01, 32.35, 32.59, 35.56, 39.95),
    *(53.84, 56.2, 57.95, 59.29, 59.77, 59.92, 61.19, 61.96, 62.5, 63.37, 63.48, 63.48, 63.66),
    *(63.85, 64.08, 64.76, 64.8, 64.81, 64.81),
]

Config = Any  # transformers' configs have no useful common type


def qwen3_yarn() -> Config:
    """Qwen3 with the YaRN setting its model card gives for 128k."""
    return transformers.Qwen3Config(
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    )


def gpt_oss() -> Config:
    """gpt-oss: the one whose ramp is not rounded to whole pairs."""
    return transformers.GptOssConfig(
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    )


def deepseek(mscale: float, mscale_all_dim: float) -> Config:
    """DeepSeek-V2 (0.707 both) and V3 (1.0 both); unequal weights show the ratio."""
    return transformers.DeepseekV3Config(
        qk_rope_head_dim=64,
        max_position_embeddings=163840,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": mscale,
            "mscale_all_dim": mscale_all_dim,
            "original_max_position_embeddings": 4096,
        },
    )


def llama31() -> Config:
    return transformers.LlamaConfig(
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )


def phi3() -> Config:
    """Phi-3 128k: no factor, and the trained length stands outside the dict."""
    return transformers.Phi3Config(
        hidden_size=3072,
        num_attention_heads=32,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": list(PHI3_SHORT),
            "long_factor": list(PHI3_LONG),
        },
    )


def llama(rope_type: str, **options: float) -> Config:
    """A Llama of 2048 trained tokens under any rule that needs no more than a factor."""
    return transformers.LlamaConfig(
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 10_000.0, "rope_type": rope_type, **options},
    )


CASES = {
    "qwen3 yarn": qwen3_yarn(),
    "gpt-oss": gpt_oss(),
    "deepseek-v2": deepseek(0.707, 0.707),
    "deepseek-v3": deepseek(1.0, 1.0),
    "deepseek unequal": deepseek(1.0, 0.707),
    "deepseek all_dim 0": deepseek(1.0, 0.0),
    "deepseek mscale 0": deepseek(0.0, 1.0),
    "llama 3.1": llama31(),
    "phi-3 128k": phi3(),
    "linear": llama("linear", factor=2.5),
    "linear partial": llama("linear", factor=2.0, partial_rotary_factor=0.25),
    "dynamic": llama("dynamic", factor=2.0),
    "yarn, own magnitude": llama("yarn", factor=4.0, attention_factor=1.25),
    # ramps that start before the first pair, are of no width, end behind the last pair, are clamped
    "yarn from 32": llama("yarn", factor=64.0, original_max_position_embeddings=32),
    "yarn from 5": llama("yarn", factor=64.0, original_max_position_embeddings=5),
    "yarn from 128k": llama("yarn", factor=4.0, original_max_position_embeddings=131072),
    "yarn, base 10": llama(
        "yarn", factor=4.0, original_max_position_embeddings=1377, rope_theta=10.0
    ),
}
# None, inside training, its last token, one past it, far past it
SEQ_LENS = (None, 1000, 2048, 2049, 4096, 4097, 100_000)


def head_dim(config: Config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def parsed(config: Config) -> ParsedRope:
    return parse(
        config.rope_parameters,
        max_position_embeddings=config.max_position_embeddings,
        original_max_position_embeddings=getattr(config, "original_max_position_embeddings", None),
    )


def ours(config: Config, seq_len: int | None = None) -> Frequencies:
    rope = parsed(config)
    dim = rope.rotary_dim(head_dim(config))
    return inverse_frequencies(rope.rule, base=rope.base, rotary_dim=dim, seq_len=seq_len)


@pytest.mark.parametrize("seq_len", SEQ_LENS)
@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_transformers(name: str, seq_len: int | None) -> None:
    config = CASES[name]
    compute = modeling_rope_utils.ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    expected, magnitude = compute(config, seq_len=seq_len)
    got = ours(config, seq_len)
    assert got.inv_freq.dtype == torch.float64
    torch.testing.assert_close(got.inv_freq, expected.double(), rtol=1e-6, atol=0)
    assert got.attention_factor == pytest.approx(magnitude, rel=1e-12)


def test_default_equals_transformers() -> None:
    config = llama("default")
    expected, _ = modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    got = ours(config)
    torch.testing.assert_close(got.inv_freq, expected.double(), rtol=1e-6, atol=0)
    assert got.attention_factor == 1.0


def test_known_magnitudes() -> None:
    """Numbers that are published or quoted by others, so that both sides cannot be wrong."""
    assert ours(CASES["qwen3 yarn"]).attention_factor == pytest.approx(1.138629, abs=1e-6)
    assert ours(CASES["deepseek-v2"]).attention_factor == 1.0
    assert ours(CASES["phi-3 128k"]).attention_factor == pytest.approx(1.190238, abs=1e-6)


def test_truncate_false_is_not_a_detail() -> None:
    """gpt-oss with the ramp rounded, as ggml does, is off by tens of percent."""
    config = gpt_oss()
    exact = ours(config).inv_freq
    rounded = parse(
        {**config.rope_parameters, "truncate": True},
        max_position_embeddings=config.max_position_embeddings,
    )
    other = inverse_frequencies(rounded.rule, base=rounded.base, rotary_dim=64).inv_freq
    worst = (other / exact - 1).abs()
    assert worst.max() > 0.4
    assert worst.argmax() == 17


def test_truncate_is_honoured_in_a_nested_dict() -> None:
    """transformers 5.23 reads `truncate` beside the layer types and loses this one."""
    full = {**gpt_oss().rope_parameters}
    nested = {"full_attention": full, "sliding_attention": {"rope_theta": 10_000.0}}
    rope = parse(nested["full_attention"], max_position_embeddings=131072)
    inv_freq, _ = inverse_frequencies(rope.rule, base=rope.base, rotary_dim=64)
    assert torch.equal(inv_freq, ours(gpt_oss()).inv_freq)


@pytest.mark.parametrize("name", ["qwen3 yarn", "llama 3.1", "linear"])
def test_rotation_equals_transformers(name: str) -> None:
    config = CASES[name]
    positions = torch.arange(5, 22)
    x = torch.randn(2, 3, 17, head_dim(config), generator=torch.Generator().manual_seed(0))
    module = modeling_llama.LlamaRotaryEmbedding(config)
    expected, _ = modeling_llama.apply_rotary_pos_emb(x, x, *module(x, positions[None]))
    inv_freq, magnitude = ours(config)
    torch.testing.assert_close(apply(x, *tables(inv_freq, positions, magnitude)), expected)


def test_interleaved_rotation_equals_transformers() -> None:
    config = transformers.CohereConfig(hidden_size=256, num_attention_heads=4)
    positions = torch.arange(40, 51)
    x = torch.randn(1, 2, 11, 64, generator=torch.Generator().manual_seed(1))
    module = modeling_cohere.CohereRotaryEmbedding(config)
    expected, _ = modeling_cohere.apply_rotary_pos_emb(x, x, *module(x, positions[None]))
    inv_freq, magnitude = ours(config)
    got = apply(x, *tables(inv_freq, positions, magnitude), interleaved=True)
    torch.testing.assert_close(got, expected)
