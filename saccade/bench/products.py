"""Torch's own product of two square bfloat16 matrices, sampled alternately with the kernels.

It is the rate that a machine's matrix units reach for those who only multiply: attention in
bfloat16 is compared with it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.bench.peers import Call
from saccade.bench.record import Row

PRODUCT = "product"
TITLE = "torch matrix product"
SIZE = 2048


def product(row: Row, size: int = SIZE) -> tuple[Row, Call]:
    """A row beside `row`, and a call that multiplies two bfloat16 matrices `[size, size]`."""
    a, b = torch.randn(2, size, size).bfloat16()

    def call() -> Tensor:
        return a @ b

    nbytes = 3 * a.nbytes
    return replace(row, backend=PRODUCT, ours=False, flops=2.0 * size**3, nbytes=nbytes), call
