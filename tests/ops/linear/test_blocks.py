"""Blocks of GGUF against the package gguf, and rounding against its bounds."""

import numpy as np
import pytest
import torch

from saccade.ops.linear import dequantize, packed_blocks, quantized

gguf = pytest.importorskip("gguf")
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
HALVES = {  # offsets of a block's float16 numbers
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray:
    """Any bytes are a block, but for its scales, which have to be numbers."""
    rng = np.random.default_rng(0)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = rng.normal(size=(rows, blocks, 1), scale=0.02).astype(np.float16)
        raw[..., at : at + 2] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 37])
def test_blocks_keep_the_numbers_of_the_file(kind: str, rows: int):
    raw = random_blocks(kind, rows, 3)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    weight = packed_blocks(kind, torch.from_numpy(raw))
    assert weight is not None and weight.shape == expected.shape
    found = dequantize(weight, torch.float32).numpy()
    # A scale of 16 bits is as in the file; a product of scales is rounded to 11 bits.
    group = np.abs(expected.reshape(-1, weight.group)).max(-1).repeat(weight.group)
    share = 2**-10 if kind.endswith("K") else 1e-6
    assert (np.abs(found - expected).reshape(-1) <= share * group + 1e-7 * 64).all()


def test_kinds_without_a_packed_form_are_left_to_the_caller():
    assert packed_blocks("Q2_K", torch.zeros(2, 84, dtype=torch.uint8)) is None
    assert packed_blocks("F16", torch.zeros(2, 84, dtype=torch.uint8)) is None


def test_scales_beyond_float16_have_no_packed_form():
    raw = torch.from_numpy(random_blocks("Q6_K", 2, 1))
    raw[1, 208:210] = torch.tensor([60000.0]).half().view(torch.uint8)
    assert packed_blocks("Q6_K", raw) is None


def test_rows_that_are_not_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="whole blocks of 18 bytes"):
        packed_blocks("Q4_0", torch.zeros(2, 19, dtype=torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_errs_by_half_a_step(bits: int, dtype: torch.dtype):
    torch.manual_seed(0)
    matrix = (torch.randn(37, 96) * 0.02).to(dtype)
    matrix[3, 32:64] = 0  # a group without a range
    weight = quantized(matrix, bits)
    groups = matrix.float().view(37, 3, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15 if bits == 4 else groups.abs().amax(-1) / 127
    error = (dequantize(weight, torch.float32).view(37, 3, 32) - groups).abs().amax(-1)
    assert (error <= step * 0.52 + 1e-4 * groups.abs().amax(-1)).all()
    assert error[3, 1] == 0


def test_rounding_needs_whole_groups():
    with pytest.raises(ValueError, match="multiples of 32"):
        quantized(torch.zeros(4, 40), 4)
