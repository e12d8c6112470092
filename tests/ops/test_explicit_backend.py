"""An explicit backend is the kernel that runs: the launches of each call, counted by name.

Without a GPU the kernels are recorded instead of launched, for every supported cell of the support
matrix; on one, what PyTorch's profiler saw is compared with what was recorded.
"""

import os
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="the kernels that are counted are Triton's and Gluon's")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are no launches", allow_module_level=True)

from saccade.ops import attend, make_call
from saccade.ops.attention import known
from tests.support import matrix
from tests.support.gpu import on_gpu, pretend_hopper
from tests.support.launches import record

OWN = {
    "triton": ("triton.",),
    "gluon": ("gluon.",),
    "gluon_triton": ("gluon.", "triton."),
    "gluon_fp8": ("gluon.fp8",),
}
CELLS = [c for c in matrix.cells() if c.backend in OWN and c.supported and "tensors" not in c.row]
RECENT = ("int8", "int4", "quantized_fp8", "growing")  # they hold keys of full precision too


def places(launches):
    return {launch.place for launch in launches} - {""}


def solve(given, backend):
    """Run a call, and its gradients where it has leaves."""
    result = attend(make_call(given.q, given.kv, **given.options), backend=backend)
    if given.leaves:
        torch.autograd.grad(result.out.sum(), given.leaves)


def recorded(cell, monkeypatch):
    """The launches of a cell, none of which is made."""
    pretend_hopper(monkeypatch)
    given = matrix.call_of(cell)
    launches = record(monkeypatch)
    solve(given, cell.backend)
    return launches


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_only_kernels_of_the_backend_are_launched(cell, monkeypatch):
    """One kernel combines partials; recent keys of a quantized cache are read by Triton's."""
    found = places(recorded(cell, monkeypatch))
    if cell.row in RECENT and cell.kind == "D":
        found -= {"triton.decode"}
    own = {place for place in found if place.startswith(OWN[cell.backend])}
    assert own and found - own <= {"combine"}, found


EXACTLY = [
    ("triton", "causal", "P", {"triton.forward"}),
    ("triton", "window", "P", {"triton.forward"}),
    ("triton", "blocks", "P", {"triton.forward"}),
    ("triton", "cu_seqlens", "P", {"triton.forward"}),
    ("triton", "ring", "P", {"triton.forward"}),
    ("triton", "int8", "P", {"triton.forward"}),
    ("triton", "paged", "P", {"triton.decode"}),
    ("triton", "ragged", "P", {"triton.decode"}),
    ("triton", "causal", "D", {"triton.decode"}),
    ("triton", "paged", "D", {"triton.decode"}),
    ("triton", "ring", "D", {"triton.decode"}),
    ("triton", "int4", "D", {"triton.quantized_decode", "triton.decode"}),
    ("triton", "causal", "G", {"triton.forward", "triton.backward"}),
    ("gluon", "causal", "P", {"gluon.prefill"}),
    ("gluon", "window", "P", {"gluon.prefill"}),
    ("gluon", "blocks", "P", {"gluon.prefill"}),
    ("gluon", "cu_seqlens", "P", {"gluon.prefill"}),
    ("gluon", "paged", "P", {"gluon.prefill"}),
    ("gluon", "ring", "P", {"gluon.prefill"}),
    ("gluon", "int8", "P", {"gluon.prefill"}),
    ("gluon", "causal", "D", {"gluon.decode"}),
    ("gluon", "paged", "D", {"gluon.decode"}),
    ("gluon", "int4", "D", {"gluon.quantized_decode", "triton.decode"}),
    ("gluon", "causal", "G", {"gluon.prefill", "gluon.backward"}),
    ("gluon_triton", "causal", "G", {"gluon.prefill", "triton.backward"}),
    ("gluon_triton", "head_dim_256", "G", {"gluon.prefill", "triton.backward"}),
    ("gluon_fp8", "causal", "P", {"gluon.fp8"}),
    ("gluon_fp8", "sinks", "D", {"gluon.fp8"}),
]


def in_order(x):
    """Names of tests are the same in every process: sets are sorted."""
    return "+".join(sorted(x)) if isinstance(x, set) else str(x)


@pytest.mark.parametrize(
    ("backend", "row", "kind", "expected"),
    EXACTLY,
    ids=in_order,
)
def test_which_kernels_serve_a_call(backend, row, kind, expected, monkeypatch):
    cell = matrix.Cell(backend, row, kind, True)
    assert places(recorded(cell, monkeypatch)) - {"combine"} == expected


def test_a_selection_of_blocks_is_listed_by_its_own_kernel(monkeypatch):
    launches = recorded(matrix.Cell("gluon", "blocks", "P", True), monkeypatch)
    assert "saccade.ops.attention.nvidia.block_lists" in {launch.module for launch in launches}


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize(("backend", "row", "kind", "expected"), EXACTLY, ids=in_order)
    def test_the_profiler_sees_the_launches_that_were_recorded(
        self, backend, row, kind, expected, monkeypatch
    ):
        from torch.profiler import ProfilerActivity, profile

        given = matrix.on_cuda(matrix.call_of(matrix.Cell(backend, row, kind, True)))
        solve(given, backend)  # compiles
        known.clear()
        launches = record(monkeypatch, run=True)
        names = None
        for _ in range(2):  # worked out, then repeated from what the first call has launched
            with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
                solve(given, backend)
                torch.cuda.synchronize()
            names = names or Counter(launch.kernel for launch in launches)
            seen = Counter(event.name for event in found.events() if event.name in names)
            assert seen == names
        assert places(launches) - {"combine"} == expected
