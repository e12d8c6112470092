"""Launches that are repeated for other tensors: the same kernels, on the right memory."""

import ctypes
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import _allocation

from saccade.core import Mask
from saccade.ops.attention import dispatch, known
from saccade.ops.gpu import replay
from saccade.ops.gpu.launching import strided

COUNT, STREAM = 8, 77


class AddKernel:
    """A compiled kernel as Triton's: out[i] = x.ptr[i] + y[i] + more, on addresses."""

    arg_names = ("x", "y", "out", "more", "BLOCK")
    params = tuple(SimpleNamespace(name=name, default=None) for name in arg_names)
    packed_metadata, function = "metadata", "function"

    def __init__(self, scratch=0):
        self.run = Launcher(self, scratch)
        self.runs, self.scratch = 0, []

    def __getitem__(self, grid):
        def launched(x, y, out, more, BLOCK, num_warps):
            addresses = [t.data_ptr() for t in (y, out)]
            first = (x.ptr.data_ptr(), *x[1:])
            self.add("before", first, *addresses, more, BLOCK)
            return self

        return launched

    def add(self, scratch, first, y, out, more, block):
        x, *strides = first
        assert strides == [0, 0, 0] and block == COUNT
        self.runs += 1
        self.scratch.append(scratch)
        at = [(ctypes.c_float * COUNT).from_address(address) for address in (x, y, out)]
        for i in range(COUNT):
            at[2][i] = at[0][i] + at[1][i] + more


class Launcher:
    """As Triton's CudaLauncher: asks for memory, and hands all to `launch`."""

    num_ctas, profile_scratch_size = 1, 0

    def __init__(self, kernel, scratch):
        self.launch, self.global_scratch_size = partial(self.start, kernel), scratch

    def __call__(self, x, y, z, stream, *rest):
        size = self.global_scratch_size * x * y * z
        memory = _allocation._allocator.get()(size, 128, stream) if size else None
        self.launch(x, y, z, stream, memory, *rest)

    @staticmethod
    def start(kernel, x, y, z, stream, memory, function, metadata, *rest):
        assert (x, y, z, stream) == (2, 1, 1, STREAM)
        assert (function, metadata, *rest[:3]) == ("function", "metadata", None, None, None)
        kernel.add(memory, *rest[3:])


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    return AddKernel()


def work(kernel, x, y, *, before=lambda: None):
    """2 x + y + 2, by two launches: y is read from its second row, the result is a view."""
    before()
    buffer, out = torch.empty(2, COUNT), torch.empty(1, COUNT)
    for first, y_row, result in ((x, y[1], buffer[1]), (x, buffer[1], out)):
        given = strided(first[None, None]), y_row, result, 1.0
        replay.launch_kernel(kernel, (2,), *given, BLOCK=COUNT, num_warps=4)
    return (out[0],)


def inputs():
    return torch.randn(1, COUNT), torch.randn(2, COUNT)


def test_later_tensors_are_read_and_new_ones_are_written(kernel):
    x, y = inputs()
    (first,), again = replay.record(lambda: work(kernel, x, y), [x, y])
    assert torch.allclose(first, 2 * x[0] + y[1] + 2)
    for run in range(2, 4):
        x, y = inputs()
        (found,) = again([x, y])
        assert torch.allclose(found, 2 * x[0] + y[1] + 2) and kernel.runs == 2 * run
        assert found.shape == first.shape and found.data_ptr() != first.data_ptr()


def test_memory_for_descriptors_is_its_own_in_every_launch(kernel):
    """32 bytes for each of two programs, as far apart as the allocator would place them."""
    kernel = AddKernel(scratch=32)
    x, y = inputs()
    _, again = replay.record(lambda: work(kernel, x, y), [x, y])
    (found,) = again([x, y])
    first, second = kernel.scratch[2:]
    assert torch.allclose(found, 2 * x[0] + y[1] + 2) and second - first == replay.ALIGNED


@pytest.mark.parametrize(
    "before", [lambda: torch.zeros(3), lambda: torch.ones(2) + 1], ids=["fills", "adds"]
)
def test_work_with_other_operators_is_not_repeated(kernel, before):
    x, y = inputs()
    (found,), again = replay.record(lambda: work(kernel, x, y, before=before), [x, y])
    assert again is None and torch.allclose(found, 2 * x[0] + y[1] + 2)


def test_tensors_of_unknown_origin_are_not_repeated(kernel):
    x, y = inputs()
    assert replay.record(lambda: work(kernel, x, y), [x])[1] is None  # y came from elsewhere
    both = torch.randn(3, COUNT)  # x and y in one memory: which one a pointer is, is not clear
    x, y = both[:1], both[1:]
    assert replay.record(lambda: work(kernel, x, y), [x, y])[1] is None
    assert replay.record(lambda: (x,), [x, y])[1] is None  # returns what it was given
    same = torch.randn(2, COUNT)
    assert replay.record(lambda: work(kernel, same[:1], same), [same[:1], same])[1] is None


def test_nothing_is_recorded_outside(kernel):
    x, y = inputs()
    work(kernel, x, y)
    _, again = replay.record(lambda: (torch.empty(1),), [x])
    assert again is not None and again([x])[0].shape == (1,) and kernel.runs == 2


def test_a_known_call_of_plain_tensors_is_found_by_its_backend(monkeypatch):
    """As on a GPU: by the name that was asked for, unless a profiler listens or gradients flow."""
    monkeypatch.setattr(dispatch, "is_hooked", lambda: False)
    again = replay.Replay([], [], ([], 0), torch.device("cuda", 0))
    found = known.Known(Mask(), (1.0, None), 0, (), wants_lse=False, learns=True)
    found.backends[dispatch._gpu_circumstances("auto")] = dispatch.BACKENDS["triton"]
    q, nothing = SimpleNamespace(is_cuda=True), known.NO_OTHERS

    def repeated(name="auto", others=nothing):
        with torch.no_grad():
            return dispatch.repeated(found, q, name, others)

    assert repeated() is None
    found.prepared["triton"] = again
    assert repeated() is again
    assert repeated(name="gluon") is None and repeated(others=(q, *nothing[1:])) is None
    assert dispatch.repeated(found, q, "auto", nothing) is None  # gradients are enabled
    monkeypatch.setattr(dispatch, "is_hooked", lambda: True)
    assert repeated() is None


def test_every_kernel_of_the_operators_is_launched_where_it_can_be_recorded():
    sources = Path(replay.__file__).parents[1].rglob("*.py")
    direct = [path.name for path in sources if re.search(r"\w\[.*\]\($", path.read_text(), re.M)]
    assert direct == []
