"""Which threads compute the C++ kernels' work items: those that torch has already, or our own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saccade.core import DenseKV, Mask
from saccade.ops import attend, make_call
from saccade.ops.attention.cpu import binding
from tests.support.random_inputs import normal

_cpu = binding.extension()
pytestmark = pytest.mark.skipif(_cpu is None, reason="built without the C++ kernels")
ROOT = Path(__file__).parents[2]
LINUX = sys.platform == "linux"


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    _cpu.share_threads(True)


def test_results_do_not_depend_on_whose_threads_compute(two_threads):
    for q_len, length in ((1, 5000), (300, 400)):
        q, kv = normal(1, 8, q_len, 64), DenseKV(*(normal(1, 2, length, 64) for _ in "kv"))
        runs = []
        for shared in (True, False, True):
            _cpu.share_threads(shared)
            runs.append(attend(make_call(q, kv, mask=Mask()), backend="cpu").out)
        assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_items_are_cheap_to_start_whatever_their_number(two_threads):
    for shared in (True, False):
        _cpu.share_threads(shared)
        for items in (0, 1, 2, 1000):
            _cpu.empty_items(items, 2)
    with pytest.raises(ValueError, match="threads"):
        _cpu.empty_items(1, 0)


INTERRUPTED = """
import torch
from saccade.core import DenseKV, Mask
from saccade.ops import attend, make_call
torch.set_num_threads(2)
q, k = torch.randn(1, 8, 64, 64), torch.randn(1, 2, 4000, 64)
call = make_call(q, DenseKV(k, k), mask=Mask())
try:
    print("ready", flush=True)
    while True:
        attend(call, backend="cpu")
except KeyboardInterrupt:
    assert attend(call, backend="cpu").out.isfinite().all()
    print("whole", flush=True)
"""


@pytest.mark.skipif(not LINUX, reason="sends a signal")
def test_ctrl_c_between_items_leaves_the_threads_whole():
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "whole\n"
