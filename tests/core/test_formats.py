"""Storage formats: bit packing is exact, quantization errs by half a step at most."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


def grouped(x, group, dim):
    """Groups of the definition: keys `[.., N/group, group, D]`, values `[.., D/group, group]`."""
    return x.unflatten(dim, (-1, group))


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=80, deadline=None)
@given(
    magnitude=st.floats(-30, 4.8),
    offset=st.floats(-4.8, 4.8),
    sign=st.sampled_from([-1, 0, 1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_error_is_at_most_half_a_step(bits, magnitude, offset, sign, dtype, seed):
    """A step is (max - min) / levels, to the 2^-10 of float16, of 2^-24 at least; in float64."""
    x = torch.randn(1, 2, 32, 16, generator=torch.Generator().manual_seed(seed))
    largest = 65504 if dtype != torch.bfloat16 else 65280  # 65504 is 65536 in bfloat16
    x = (x * 10**magnitude + sign * 10**offset).clamp(-largest, largest).to(dtype)
    x[0, 0, :16, :4] = x[0, 0, 0, 0]  # constant, one value
    x[0, 1, :, 3] = 0
    for quantize, dequantize, group, dim in (
        (quantize_keys, partial(dequantize_keys, group=16), 16, 2),
        (quantize_keys, partial(dequantize_keys, group=1), 1, 2),
        (quantize_values, dequantize_values, 8, 3),
    ):
        stored = quantize(x, bits=bits, group=group)
        ours = dequantize(stored, bits=bits, dtype=torch.float64).double()
        exact = grouped(x.double(), group, dim)
        low, high = exact.amin(dim + 1, keepdim=True), exact.amax(dim + 1, keepdim=True)
        rounding = torch.maximum(low.abs() * 2.0**-10, torch.tensor(2.0**-24))
        step = ((high - low + rounding) / (2**bits - 1)).clamp_min(2.0**-24) * (1 + 2**-9)
        step = step + 2.0**-24  # the scale's own last bit where it is denormal
        error = (grouped(ours, group, dim) - exact).abs()
        float32 = torch.maximum(low.abs(), high.abs()) * 2.0**-22
        assert (error <= step / 2 + float32).all()


@pytest.mark.parametrize(("bits", "fp8"), [(4, False), (8, False), (8, True)])
def test_nan_changes_no_other_number(bits, fp8):
    x = torch.randn(1, 1, 32, 16)
    holed, hole = x.clone(), torch.zeros(x.shape, dtype=torch.bool)
    hole[:, :, 3] = hole[:, :, 16:, 5] = True
    holed[hole] = torch.nan
    for quantize, options in ((quantize_keys, {"group": 16}), (quantize_values, {})):
        found = []
        for one in (holed, x.masked_fill(hole, 0)):
            stored = quantize(one, bits=bits, group=16, fp8=fp8)
            back = dequantize_keys if options else dequantize_values
            found.append(back(stored, bits=bits, dtype=torch.float32, **options))
        assert found[0].isfinite().all()
        worst = (found[0] - x).abs().masked_fill(hole, 0).amax()
        assert worst <= {(4, False): 0.25, (8, False): 0.02, (8, True): 0.3}[bits, fp8]


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
