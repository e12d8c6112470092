"""Random packed weights, and the matrices they stand for in float64."""

import torch
from torch import Tensor

from saccade.ops.linear import PackedWeight, pack

FORMS = [
    (4, 32, False), (4, 32, True), (6, 32, False), (6, 32, True), (6, 16, False),
    (8, 32, False), (8, 32, True), (8, 16, False),
]  # fmt: skip


def random_weight(
    out: int, width: int, form: tuple[int, int, bool], seed: int = 0
) -> tuple[PackedWeight, Tensor]:
    """A packed weight and the same numbers by the formula q * scale + minimum."""
    bits, group, with_minimum = form
    generator = torch.Generator().manual_seed(seed)
    low, high, dtype = (-128, 128, torch.int8) if bits == 8 else (0, 1 << bits, torch.uint8)
    q = torch.randint(low, high, (out, width), generator=generator).to(dtype)
    scale = torch.rand(out, width // group, generator=generator).half()
    minimum = torch.randn(out, width // group, generator=generator).half()
    centre = 0 if bits == 8 or with_minimum else 1 << (bits - 1)
    exact = (q.double() - centre).view(out, -1, group) * scale.double().unsqueeze(-1)
    if with_minimum:
        exact = exact + minimum.double().unsqueeze(-1)
    weight = pack(q, scale, minimum if with_minimum else None, bits=bits)
    return weight, exact.view(out, width)
