"""What the C++ kernels allocate for themselves: the plan from shapes equals what they take."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from saccade.core import BlockSelection, DenseKV, Mask
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.cpu import backend, binding
from tests.ops.test_cpu import FLOATS, ROOT, quantized
from tests.ops.test_cpu_binding import paged, ragged
from tests.support.random_inputs import normal

_cpu = binding.extension()
pytestmark = pytest.mark.skipif(_cpu is None, reason="built without the C++ kernels")


def new_workspace(call):
    """(planned, allocated) bytes of one call by a new thread, which has no workspace yet."""

    def compute():
        torch.set_num_threads(1)
        backend.run(call)
        return binding.workspace_bytes(call), _cpu.workspace_bytes_of_thread()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(compute).result()


def call_of(q, kv, mask=None, **options):
    options = {
        "mask": mask or Mask(),
        "q_offset": kv.shape[2] - q.shape[2],
        "scale": 0.1,
        **options,
    }
    return AttentionCall(q=q, kv=kv, **options)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=33, sinks=5)], ids=str)
@pytest.mark.parametrize("q_len", [1, 2, 50, 300])
def test_workspace_of_shapes(target, q_len, mask):
    """Up to more rows than the largest tile has; wide heads reach that with fewer queries."""
    batch = 1 if q_len == 300 else 2
    for heads, dim, value_dim in [(1, 64, 64), (8, 40, 72), (4, 576, 512)]:
        queries = min(q_len, 100) if dim == 576 else q_len
        kv = DenseKV(normal(batch, 1, 800, dim), normal(batch, 1, 800, value_dim))
        planned, allocated = new_workspace(call_of(normal(batch, heads, queries, dim), kv, mask))
        assert planned == allocated > 0


@pytest.mark.parametrize("q_len", [1, 3, 20])
def test_workspace_of_views(target, q_len):
    kinds = [
        paged(),
        ragged(),
        quantized(2, 2, 32, 5, 16, 8, group=16, v_group=16, dtype=FLOATS[0]),
    ]
    for kv in kinds:
        for view in (kv, replace(kv, hadamard=True)):
            planned, allocated = new_workspace(call_of(normal(2, 4, q_len, 16), view, q_offset=17))
            assert planned == allocated > 0


@pytest.mark.parametrize("blocks", [(4, 16), (16, 1), (64, 300)])
@pytest.mark.parametrize("q_len", [1, 60])
def test_workspace_of_block_selection(target, q_len, blocks):
    q, kv = normal(2, 6, q_len, 32), DenseKV(normal(2, 2, 3000, 32), normal(2, 2, 3000, 32))
    grid = torch.rand(2, 1, -(-q_len // blocks[0]), -(-3000 // blocks[1])) > 0.5
    selection = BlockSelection(allowed=grid, q_block=blocks[0], k_block=blocks[1])
    planned, allocated = new_workspace(call_of(q, kv, blocks=selection))
    assert planned == allocated > 0


SPLIT = """
import sys, torch
from saccade import _cpu
from saccade.core import DenseKV
from saccade.ops.attention.cpu import backend, binding
from tests.ops.test_cpu_workspace import call_of
torch.set_num_threads(3)
_cpu.share_threads(False)  # torch's threads, when late, are left out: both kinds would have one
k = torch.randn(1, 1, 5000, 64)
call = call_of(torch.randn(1, 8, int(sys.argv[1]), 64), DenseKV(k, k))
planned = binding.workspace_bytes(call)
for _ in range(500):  # until each thread has had a work item
    backend.run(call)
    if _cpu.workspace_bytes_of_all() >= planned:
        break
print(planned, _cpu.workspace_bytes_of_all())
"""


@pytest.mark.parametrize("q_len", [1, 9])
def test_workspace_of_split_keys_on_several_threads(q_len):
    """In a fresh process, whose threads have allocated nothing yet."""
    call = [sys.executable, "-c", SPLIT, str(q_len)]
    found = subprocess.run(call, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    planned, allocated = map(int, found.split())
    assert planned == allocated > 0


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [(0, (1, 3, 4, 64), "multiple"), (0, (1, 4, 4, 600), "head_dim"), (6, 2**40, "q_offset"),
     (7, (4, 0), "block sizes"), (8, 3, "2 or 4"), (9, 0, "threads"),
     (1, (2, -1, 64), "negative")],
)  # fmt: skip
def test_impossible_shapes_have_no_workspace(place, value, match):
    shape = [(1, 4, 4, 64), (2, 20, 64), False, True, -1, 0, 16, (0, 0), 0, 2, ""]
    assert _cpu.workspace_bytes(*shape) > 0
    shape[place] = value
    with pytest.raises(ValueError, match=match):
        _cpu.workspace_bytes(*shape)


# ---- the raw binding: bad arguments are a ValueError, never a crash ----
