"""What a GGUF file says about rotary positions, against the formula of llama.cpp in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saccade.core import BadInput
from saccade.hf import load_model
from saccade.hf.gguf.rope import llama3
from tests.hf.gguf_files import write_gguf
from tests.hf.test_gguf_architectures import IDS, make

DIMS = 16
BASE = 500000.0 ** -(np.arange(0, DIMS, 2) / DIMS)
SCALING = "rope.scaling."


def rotary_of(path: Path, case: str = "llama", *, tensors: Any = None, **keys: Any) -> Any:
    """The rotary module of a file with these keys (`__` for a dot) and tensors."""
    changed = {key.replace("__", "."): value for key, value in keys.items()}
    architecture = case.split(maxsplit=1)[0]
    write_gguf(make(case), path / "m.gguf", architecture, keys=changed, tensors=tensors)
    return load_model(path / "m.gguf").model.model.rotary_emb


def sentence_about(path: Path, **options: Any) -> str:
    with pytest.raises(BadInput) as caught:
        rotary_of(path, **options)
    return str(caught.value)


def assert_table(rotary: Any, wanted: np.ndarray, magnitude: float = 1.0) -> None:
    """The table that texts of any length get, and the factor of cosines and sines."""
    for length in (3, 400):
        hidden = torch.zeros(1, length, 64)
        cos, sin = rotary(hidden, torch.arange(length)[None])
        angles = np.arange(length)[:, None] * wanted
        angles = np.concatenate((angles, angles), axis=-1)
        np.testing.assert_allclose(cos[0].numpy(), np.cos(angles) * magnitude, atol=1e-4)
        np.testing.assert_allclose(sin[0].numpy(), np.sin(angles) * magnitude, atol=1e-4)


def yarn_table(factor: float, original: int, fast: float, slow: float) -> np.ndarray:
    """ggml_rope_yarn: interpolated and extrapolated angles, mixed by a ramp over the pairs."""

    def corrected(turns: float) -> float:
        return DIMS * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(500000.0))

    low, high = math.floor(corrected(fast)), math.ceil(corrected(slow))
    low, high = max(0, low), min(DIMS - 1, high)
    ramp = 1 - np.clip((np.arange(DIMS // 2) - low) / max(0.001, high - low), 0, 1)
    return BASE / factor * (1 - ramp) + BASE * ramp


@pytest.mark.parametrize("kind", ["linear", None])
def test_linear_scaling_with_and_without_its_name(tmp_path, kind):
    rotary = rotary_of(tmp_path, rope__scaling__type=kind, rope__scaling__factor=4.0)
    assert_table(rotary, BASE / 4)


def test_the_old_name_of_linear_scaling(tmp_path):
    assert_table(rotary_of(tmp_path, rope__scale_linear=2.0), BASE / 2)


def test_no_scaling_whatever_the_factor(tmp_path):
    rotary = rotary_of(tmp_path, rope__scaling__type="none", rope__scaling__factor=4.0)
    assert_table(rotary, BASE)


def test_the_base(tmp_path):
    rotary = rotary_of(tmp_path, rope__freq_base=None)
    assert_table(rotary, 10000.0 ** -(np.arange(0, DIMS, 2) / DIMS))


YARN = {
    "rope__scaling__type": "yarn",
    "rope__scaling__factor": 8.0,
    "rope__scaling__original_context_length": 64,
}
FORMULA = 0.1 * math.log(8.0) + 1


@pytest.mark.parametrize(
    ("keys", "magnitude"),
    [
        ({}, FORMULA),
        ({"rope__scaling__attn_factor": 0.5}, 0.5 * FORMULA),
        ({"rope__scaling__yarn_attn_factor": 0.7}, 0.7),
        ({"rope__scaling__yarn_log_multiplier": 1.0}, 1.0),
        ({"rope__scaling__yarn_log_multiplier": 0.5}, FORMULA / (0.05 * math.log(8.0) + 1)),
        ({"rope__scaling__yarn_log_multiplier": 0.0}, FORMULA),
        ({"rope__scaling__yarn_ext_factor": 1.0}, FORMULA),
    ],
    ids=str,
)
def test_magnitude_of_yarn(tmp_path, keys, magnitude):
    rotary = rotary_of(tmp_path, **YARN, **keys)
    assert_table(rotary, yarn_table(8.0, 64, 32, 1), magnitude)


def test_the_ramp_of_yarn(tmp_path):
    betas = {"rope__scaling__yarn_beta_fast": 4.0, "rope__scaling__yarn_beta_slow": 0.5}
    rotary = rotary_of(tmp_path, **YARN, **betas)
    assert_table(rotary, yarn_table(8.0, 64, 4.0, 0.5), FORMULA)


def test_yarn_without_a_trained_length_takes_the_context(tmp_path):
    rotary = rotary_of(tmp_path, **{**YARN, "rope__scaling__original_context_length": None})
    assert_table(rotary, yarn_table(8.0, 128, 32, 1), FORMULA)


@pytest.mark.parametrize("seed", range(3))
def test_any_table_of_factors(tmp_path, seed):
    factors = 1 + 7 * np.random.default_rng(seed).random(DIMS // 2)
    rotary = rotary_of(tmp_path, tensors={"rope_freqs.weight": factors})
    assert_table(rotary, BASE / factors.astype(np.float32))


def test_factors_beside_linear_scaling_and_a_magnitude(tmp_path):
    factors = np.linspace(1, 5, DIMS // 2)
    keys = {"rope__scaling__factor": 2.0, "rope__scaling__attn_factor": 1.25}
    rotary = rotary_of(tmp_path, tensors={"rope_freqs.weight": factors}, **keys)
    assert_table(rotary, BASE / factors / 2, 1.25)


def test_a_magnitude_alone(tmp_path):
    assert_table(rotary_of(tmp_path, rope__scaling__attn_factor=1.5), BASE, 1.5)


def test_factors_of_one_change_nothing(tmp_path):
    rotary = rotary_of(tmp_path, tensors={"rope_freqs.weight": np.ones(8)})
    assert rotary.rope_type == "default"
    assert_table(rotary, BASE)


def test_phi3_has_linear_scaling_as_a_table(tmp_path):
    rotary = rotary_of(tmp_path, "phi3", rope__scaling__factor=4.0)
    assert_table(rotary, 10000.0 ** -(np.arange(0, DIMS, 2) / DIMS) / 4)


def test_magnitude_of_longrope_follows_from_the_lengths_where_it_is_missing(tmp_path):
    rotary = rotary_of(tmp_path, "phi3 longrope", rope__scaling__attn_factor=None)
    assert rotary.attention_scaling == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))


def test_the_base_of_sliding_layers_of_gemma3(tmp_path):
    rotary = rotary_of(tmp_path, "gemma3", rope__freq_base_swa=777.0)
    assert rotary.sliding_attention_inv_freq[1] == pytest.approx(777.0 ** (-2 / 16))
    assert rotary.full_attention_inv_freq[0] == 0.125


@pytest.mark.parametrize(
    "options",
    [
        {"rope__dimension_count": 8},
        {"rope__dimension_count": 15},
        {"rope__dimension_count": 32},
        {"rope__freq_base": 0.0},
        {"rope__freq_base": math.nan},
        {"rope__freq_base": "big"},
        {"rope__scaling__type": "wavy"},
        {"rope__scaling__type": 3},
        {"rope__scaling__factor": -2.0},
        {"rope__scaling__type": "longrope"},
        {**YARN, "rope__scaling__yarn_ext_factor": 0.5},
        {**YARN, "tensors": {"rope_freqs.weight": np.full(8, 2.0)}},
        {"tensors": {"rope_freqs.weight": np.ones(7)}},
        {"tensors": {"rope_freqs.weight": np.zeros(8)}},
        {"tensors": {"rope_freqs.weight": np.full(8, np.nan)}},
        {"tensors": {"rope_factors_long.weight": np.ones(8)}},
        {"case": "phi3", **YARN},
        {"case": "phi3", "rope__dimension_count": 7},
    ],
    ids=str,
)
def test_what_cannot_be(tmp_path, options):
    sentence_about(tmp_path, **options)


@pytest.mark.parametrize("original", [64, 300, 8192, 100_000])
@pytest.mark.parametrize("dims", [16, 64, 128])
def test_factors_of_llama3_are_recognized(original, dims):
    wanted = []
    for i in range(dims // 2):
        wave = 2 * math.pi * 500000.0 ** (2 * i / dims)
        smooth = min(1.0, max(0.0, (original / wave - 1) / 3))
        wanted.append(float(np.float32(1 / ((1 - smooth) / 32 + smooth))))
    rule = llama3(wanted, 500000.0, dims)
    assert rule is not None and rule["factor"] == 32.0
    if any(1 < factor < 32 for factor in wanted):
        assert rule["original_max_position_embeddings"] == pytest.approx(original, abs=1)


def test_other_factors_are_not_taken_for_llama3():
    assert llama3([1.0, 1.0, 3.0, 5.0, 5.0, 6.0, 8.0, 8.0], 10000.0, 16) is None


def test_ids_reach_beyond_the_trained_length_of_the_cases():
    assert IDS.shape[1] > 32
