"""Storage formats: bit packing is exact, quantization errs by half a step at most."""

import pytest
import torch

from saccade.core.formats import (
    dequantize_keys,
    dequantize_values,
    pack,
    quantize_keys,
    quantize_values,
    unpack,
)


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_round_trip(bits):
    qdata = torch.randint(0, 2**bits, (2, 3, 5, 16), dtype=torch.uint8)
    packed = pack(qdata, bits)
    assert packed.nbytes == qdata.nbytes * bits // 8
    assert torch.equal(unpack(packed, bits), qdata)


def test_nibbles_are_halves_of_the_head():
    packed = pack(torch.arange(8, dtype=torch.uint8), 4)
    assert packed.tolist() == [0 | 4 << 4, 1 | 5 << 4, 2 | 6 << 4, 3 | 7 << 4]


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_at_most_half_a_step(bits):
    x = torch.randn(2, 2, 64, 32) * 3 + 1
    keys = quantize_keys(x, bits=bits, group=32)
    error = (dequantize_keys(keys, bits=bits, group=32, dtype=torch.float32) - x).abs()
    step = keys.scale.float().repeat_interleave(32, 2)
    # The offset is rounded to float16 before quantizing: at most one such step more.
    slack = x.abs().max() * 2**-10
    assert (error <= step / 2 + slack).all()
    values = quantize_values(x, bits=bits, group=16)
    error = (dequantize_values(values, bits=bits, dtype=torch.float32) - x).abs()
    step = values.scale.float().repeat_interleave(16, 3)
    assert (error <= step / 2 + slack).all()


def test_fp8_error_is_relative_to_the_distance_from_the_middle():
    """Three bits of mantissa: half a step is a sixteenth of the number, or the smallest step."""
    x = torch.randn(2, 2, 64, 32) * 3 + 10
    keys = quantize_keys(x, bits=8, group=32, fp8=True)
    values = quantize_values(x, bits=8, group=16, fp8=True)
    assert keys.qdata.dtype == values.qdata.dtype == torch.float8_e4m3fn
    slack = x.abs().max() * 2**-10
    ours = dequantize_keys(keys, bits=8, group=32, dtype=torch.float32)
    middle = keys.offset.float().repeat_interleave(32, 2)
    assert ((ours - x).abs() <= (x - middle).abs() / 16 + slack).all()
    ours = dequantize_values(values, bits=8, dtype=torch.float32)
    middle = values.offset.float().repeat_interleave(16, 3)
    assert ((ours - x).abs() <= (x - middle).abs() / 16 + slack).all()


def test_fp8_never_overflows():
    x = torch.tensor([-1e4, 1e4, 0, 3.0] * 4)[None, None, :, None].repeat(1, 1, 1, 16)
    keys = quantize_keys(x, bits=8, group=16, fp8=True)
    assert torch.allclose(dequantize_keys(keys, bits=8, group=16, dtype=torch.float32), x, rtol=0.1)


@pytest.mark.parametrize(("bits", "fp8"), [(4, False), (8, False), (8, True)])
def test_constant_channels_survive(bits, fp8):
    x = torch.full((1, 1, 64, 16), 0.5)
    keys = quantize_keys(x, bits=bits, group=64, fp8=fp8)
    assert torch.equal(dequantize_keys(keys, bits=bits, group=64, dtype=torch.float32), x)
