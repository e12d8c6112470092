"""Marks of tests that need a Hopper card, where the Gluon kernels run."""

import pytest
import torch

from saccade.ops.attend.gluon import refusals

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == refusals.HOPPER
on_the_card = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
]
# What 16-bit numbers may be off beyond twice the error of an eager run.
BOUND = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
