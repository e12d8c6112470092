"""Random packed weights, and the matrices they stand for in float64."""

import torch
from torch import Tensor

from saccade.ops.linear import PackedWeight, pack

FORMS = [(4, 32, False), (4, 32, True), (8, 32, False), (8, 32, True), (8, 16, False)]


def random_weight(
    out: int, width: int, form: tuple[int, int, bool], seed: int = 0
) -> tuple[PackedWeight, Tensor]:
    """A packed weight and the same numbers by the formula q * scale + minimum."""
    bits, group, with_minimum = form
    generator = torch.Generator().manual_seed(seed)
    low, high, dtype = (0, 16, torch.uint8) if bits == 4 else (-128, 128, torch.int8)
    q = torch.randint(low, high, (out, width), generator=generator).to(dtype)
    scale = torch.rand(out, width // group, generator=generator).half()
    minimum = torch.randn(out, width // group, generator=generator).half()
    centre = 8 if bits == 4 and not with_minimum else 0
    exact = (q.double() - centre).view(out, -1, group) * scale.double().unsqueeze(-1)
    if with_minimum:
        exact = exact + minimum.double().unsqueeze(-1)
    weight = pack(q, scale, minimum if with_minimum else None, bits=bits)
    return weight, exact.view(out, width)
