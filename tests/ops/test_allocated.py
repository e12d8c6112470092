"""The peak of allocations, against patterns whose sizes are known."""

import gc
import subprocess
import sys

import pytest
import torch

from saccade.core import Mask
from saccade.core.kv import DenseKV
from saccade.ops import attend, make_call
from saccade.ops.allocated import AllocatedPeak
from saccade.ops.attention.cpu import binding

CPU = torch.device("cpu")
MB = 1_000_000


def floats(count):
    """A tensor of so many float32 numbers."""
    return torch.empty(count)


def test_the_peak_is_the_most_that_was_alive_at_once():
    with AllocatedPeak(CPU) as peak:
        a = floats(2 * MB)
        b = floats(3 * MB)
        del a
        c = floats(1 * MB)
        del b, c
        floats(4 * MB)
    assert peak.bytes == 4 * 5 * MB  # a and b; later 4 and 4 million


def test_memory_from_before_does_not_count():
    old = floats(3 * MB)
    with AllocatedPeak(CPU) as peak:
        new = floats(MB)
        old.zero_()
    assert peak.bytes == 4 * MB
    assert new.numel() < old.numel()


def test_new_garbage_from_before_is_gone_when_counting_begins(capfd):
    """PyTorch would write a line about each release of what it did not see allocated."""
    gc.collect()  # that of other tests is older
    cycle = [floats(MB)]
    cycle.append(cycle)
    del cycle
    with AllocatedPeak(CPU):
        gc.collect()
    lines = capfd.readouterr().err.splitlines()
    assert not [line for line in lines if not line.startswith("USDT:")]  # of any profiler's start


def test_temporaries_inside_of_an_operator_count():
    x = torch.ones(MB, dtype=torch.float32)
    with AllocatedPeak(CPU) as peak:
        x.sort()  # values and int64 indices, and what sort needs itself
    assert peak.bytes >= (4 + 8) * MB


@pytest.mark.skipif(not binding.BUILT, reason="built without the C++ kernels")
def test_workspaces_of_our_own_kernels_are_added():
    q, k = torch.randn(1, 8, 256, 64), torch.randn(1, 2, 1024, 64)
    call = make_call(q, DenseKV(k, k), mask=Mask(), q_offset=768)
    with AllocatedPeak(CPU) as peak:
        out = attend(call, backend="cpu")
    returned = out.out.nbytes + 8 * 256 * 4  # and the LSE, float32
    assert peak.bytes >= returned + binding.workspace_bytes(call) > returned


def test_an_error_inside_comes_out_and_ends_the_counting():
    with pytest.raises(ValueError, match="inside"), AllocatedPeak(CPU):
        raise ValueError("inside")
    with AllocatedPeak(CPU) as peak:
        floats(MB)
    assert peak.bytes == 4 * MB


def test_counting_prints_nothing():
    """The profiler's own lines would stand between those of the progress."""
    code = (
        "import torch\nfrom saccade.ops.allocated import AllocatedPeak\n"
        "with AllocatedPeak(torch.device('cpu')) as peak:\n    torch.empty(10)\n"
        "assert peak.bytes == 40"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
