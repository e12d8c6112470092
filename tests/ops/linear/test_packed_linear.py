"""Products with packed weights against the same matrix in float64."""

import pytest
import torch

from saccade.ops.linear import dequantize, linear, pack, rows


@pytest.mark.parametrize("bits,group", [(4, 32), (8, 32), (8, 16)])
@pytest.mark.parametrize("with_minimum", [False, True])
def test_packed_weight_gives_its_numbers_back(bits: int, group: int, with_minimum: bool):
    torch.manual_seed(0)
    low, high, dtype = (0, 16, torch.uint8) if bits == 4 else (-128, 128, torch.int8)
    q = torch.randint(low, high, (48, 96)).to(dtype)
    scale = torch.rand(48, 96 // group).half()
    minimum = torch.rand(48, 96 // group).half() if with_minimum else None
    centre = 8 if bits == 4 and not with_minimum else 0
    exact = (q.double() - centre).view(48, -1, group) * scale.double().unsqueeze(-1)
    if minimum is not None:
        exact = exact + minimum.double().unsqueeze(-1)
    exact = exact.view(48, 96)
    weight = pack(q, scale, minimum, bits=bits)
    torch.testing.assert_close(
        dequantize(weight, torch.float32).double(), exact, rtol=1e-6, atol=1e-6
    )
    index = torch.tensor([[3, 0], [47, 3]])
    torch.testing.assert_close(
        rows(weight, index, torch.float32).double(), exact[index], rtol=1e-6, atol=1e-6
    )
    x = torch.randn(2, 5, 96)
    torch.testing.assert_close(
        linear(x, weight).double(), x.double() @ exact.T, rtol=1e-2, atol=0.5
    )
