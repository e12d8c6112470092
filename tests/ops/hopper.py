"""Marks of tests that need a Hopper card, where the Gluon kernels run."""

import pytest
import torch

from saccade.core import Mask
from saccade.ops import attend, make_call
from saccade.ops.gpu import support

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == support.HOPPER
on_the_card = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
]
# What 16-bit numbers may be off beyond twice the error of an eager run.
BOUND = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_a_graph_replays(q, view):
    """A captured step gives what an eager one gives, after the queries have changed in place."""
    attend(make_call(q, view, mask=Mask()), backend="gluon")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(make_call(q, view, mask=Mask()), backend="gluon").out
    q.copy_(q.flip(1))
    graph.replay()
    assert torch.equal(out, attend(make_call(q, view, mask=Mask()), backend="gluon").out)
