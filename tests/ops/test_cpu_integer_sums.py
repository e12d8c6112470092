"""Decoding in integers: sums at the edge of 32 bits, heads that fill no register."""

import pytest
import torch

from saccade.core import Mask, QuantizedKV
from saccade.core.formats import QuantizedTensor
from saccade.ops import attend, make_call
from tests.ops.test_cpu import quantized
from tests.support.random_inputs import normal


@pytest.mark.parametrize("dim", [512, 576])
def test_the_largest_products_of_queries_and_keys(dim):
    """All of a query and all of a key are largest, so that their product is the largest sum."""
    full = torch.full((1, 1, 64, dim), 255, dtype=torch.uint8)
    full[:, :, 32:] = 254
    scale = torch.full((1, 1, 1, dim), 2.0**-10, dtype=torch.float16)
    keys = QuantizedTensor(full, scale, scale * 0)
    values = quantized(1, 1, 64, 0, dim, 8, group=64, v_group=dim, dtype=torch.bfloat16)
    kv = QuantizedKV(keys, values.v, values.recent_k, values.recent_v, 8, 8, 64)
    q = torch.ones(1, 4, 1, dim, dtype=torch.bfloat16)
    ours = attend(make_call(q, kv, mask=Mask()), backend="cpu")
    truth = attend(make_call(q.float(), widened(kv), mask=Mask()), backend="reference")
    assert torch.allclose(ours.out.float(), truth.out, atol=1e-2)
    assert torch.allclose(ours.lse, truth.lse, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [16, 32, 40, 64, 72, 96, 160, 192, 256])
def test_heads_that_fill_no_register(dim, bits):
    for heads, group in ((1, 16), (2, 64), (3, 64), (4, 32), (7, 32)):
        kv = quantized(1, 2, 192, 5, dim, bits, group=group, v_group=dim, dtype=torch.bfloat16)
        q = normal(1, 2 * heads, 1, dim, dtype=torch.bfloat16)
        ours = attend(make_call(q, kv, mask=Mask()), backend="cpu")
        truth = attend(make_call(q.float(), widened(kv), mask=Mask()), backend="reference")
        assert torch.allclose(ours.out.float(), truth.out, atol=1e-2)
        assert torch.allclose(ours.lse, truth.lse, atol=1e-3)


def widened(kv):
    recent = kv.recent_k.float(), kv.recent_v.float()
    return QuantizedKV(kv.k, kv.v, *recent, kv.bits_k, kv.bits_v, kv.k_group)
