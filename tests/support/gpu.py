"""Marks of tests that need a GPU, and what they share."""

import warnings
from typing import Any

import pytest
import torch

from saccade.core import DenseKV, Mask
from saccade.ops import attend, make_call
from saccade.ops.attention import dispatch
from saccade.ops.attention.nvidia import (
    gluon_backend,
    gluon_fp8_backend,
    gluon_triton_backend,
    triton_backend,
)
from saccade.ops.gpu import support
from tests.support.peers import pretend_installed
from tests.support.tolerance import ALLOWANCE as BOUND  # beyond twice the error of an eager run

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
HOPPER = CAPABILITY == support.HOPPER
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
on_ampere = [
    pytest.mark.gpu,
    pytest.mark.skipif(CAPABILITY < (8, 0), reason="needs an NVIDIA GPU from Ampere on"),
]
__all__ = [
    "BOUND",
    "CAPABILITY",
    "HOPPER",
    "assert_a_graph_replays",
    "on_ampere",
    "on_gpu",
    "pretend_hopper",
    "where_it_runs",
]


def assert_a_graph_replays(q, view):
    """A captured step gives what an eager one gives, after the queries have changed in place."""
    attend(make_call(q, view, mask=Mask()), backend="gluon")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(make_call(q, view, mask=Mask()), backend="gluon").out
    q.copy_(q.flip(1))
    graph.replay()
    assert torch.equal(out, attend(make_call(q, view, mask=Mask()), backend="gluon").out)


def where_it_runs(peer: str) -> Any:
    """A parameter of a test: a package of others, skipped by name where it cannot run."""
    reason: str | None = "needs a Hopper GPU"
    if HOPPER:
        q = torch.zeros(1, 2, 6, 64, dtype=torch.bfloat16, device="cuda")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the package's own imports
            reason = dispatch.load(peer).refusal(make_call(q, DenseKV(q, q), mask=Mask()))
    skip = pytest.mark.skipif(reason is not None, reason=f"{peer}: {reason}")
    return pytest.param(peer, marks=[skip, pytest.mark.filterwarnings("ignore")])


def pretend_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every question for the device be answered as on an H200 that has everything."""
    pretend_installed(monkeypatch)
    for module in (gluon_backend, gluon_fp8_backend, gluon_triton_backend):
        monkeypatch.setattr(module, "gluon_refusal", lambda device: None)
    monkeypatch.setattr(triton_backend, "triton_refusal", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: support.HOPPER)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    for kernel in ("cudnn", "flash", "mem_efficient"):
        monkeypatch.setattr(torch.backends.cuda, f"{kernel}_sdp_enabled", lambda: True)
