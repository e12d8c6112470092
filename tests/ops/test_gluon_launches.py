"""Launches of the Gluon kernels: their table, and that launchers pass all arguments."""

import pytest
import torch

pytest.importorskip("triton")

from saccade.core import DenseKV, Mask
from saccade.ops.attention.api import make_call
from saccade.ops.attention.nvidia.gluon.backward import launch as backward
from saccade.ops.attention.nvidia.gluon.fp8 import launch as fp8
from saccade.ops.attention.nvidia.gluon.fp8 import transpose
from saccade.ops.attention.nvidia.gluon.prefill import launch as prefill
from saccade.ops.attention.nvidia.problem import dense_problem
from saccade.ops.tuning import gluon as tuning

ROWS = {"128": {"stages": 3}}


def file(**section):
    kernels = {"prefill": {"source": "a log", "rows": ROWS} | section}
    return {"schema": tuning.SCHEMA, "architecture": "sm_90", "kernels": kernels}


def test_rows_have_what_their_section_shares():
    found = tuning.parsed(file(shared={"l2_bytes": 5, "stages": 2}, rows=ROWS | {"64/varlen": {}}))
    assert found["prefill"]["128"] == {"l2_bytes": 5, "stages": 3}
    assert found["prefill"]["64/varlen"] == {"l2_bytes": 5, "stages": 2}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "the file: expected an object, got"),
        ({"schema": "x"}, "the file: expected architecture, kernels, schema, got"),
        (file() | {"schema": "saccade.gluon/0"}, 'expected "schema": "saccade.gluon/1", got'),
        (file(source=None), "prefill: source must name a log or record, got None"),
        (file(row={}), "prefill: expected rows, source, got"),
        (file(rows=[1]), "prefill, rows: expected an object, got"),
        (file(rows={"D128": {}}), 'a row is named "128" or "128/variant", got "D128"'),
        (file(rows={"128": {"stages": "3"}}), "prefill, 128: stages must be a boolean or a number"),
        (file(shared={"stages": -1}), "prefill, shared: stages must be a boolean or a number"),
    ],
    ids=range(9),
)
def test_wrong_files_are_named(data, reason):
    with pytest.raises(ValueError, match=reason):
        tuning.parsed(data)


def test_every_row_is_a_launch():
    for name in tuning.rows("prefill"):
        dim, _, variant = name.partition("/")
        assert prefill.measured_launch(int(dim), variant).block_m in (128, 192)
    for name in tuning.rows("backward"):
        assert backward.measured_launch(int(name)).stages >= 2
    for name in tuning.rows("fp8"):
        assert fp8.measured_launch(int(name)).kv_stages >= 2


class Recorder:
    """Stands for a kernel: checks the arguments against its parameters, and launches nothing."""

    def __init__(self, kernel, launched):
        self.names, self.launched = [p.name for p in kernel.params], launched
        self.name = kernel.__name__

    def __getitem__(self, grid):
        def launch(*arguments, num_warps=4, maxnreg=None, **constants):
            by_position = self.names[: len(arguments)]
            assert sorted([*by_position, *constants]) == sorted(self.names)
            assert all(n > 0 for n in grid)
            self.launched.append(self.name)

        return launch


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched; they compute nothing."""
    names = []
    for module in (prefill, backward, fp8, transpose):
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and hasattr(value, "params"):
                monkeypatch.setattr(module, name, Recorder(value, names))
        monkeypatch.setattr(module, "multiprocessors", lambda _: 132, raising=False)
    return names


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", [{}, {"window": 100}], ids=str)
def test_launchers_pass_what_the_kernels_take(launched, mask, dim):
    q, k = (torch.randn(1, heads, 300, dim).bfloat16() for heads in (8, 2))
    problem = dense_problem(make_call(q, DenseKV(k, k), mask=Mask(**mask)))
    out, lse = prefill.forward(problem)
    backward.backward(problem, out, lse, torch.zeros_like(out), torch.zeros_like(lse))
    fp8.forward(problem, (torch.ones(1, 8), torch.ones(1, 2), torch.ones(1, 2)))
    gradients = ["preprocess_kernel", "backward_kernel", "convert_dq_kernel", "sum_dkv_kernel"]
    attention_of_fp8 = ["transpose_kernel", "forward_kernel"]
    assert launched == ["forward_kernel", *gradients, *attention_of_fp8]


def test_packed_sequences_have_query_tiles_of_their_own(launched):
    q, k = (torch.randn(1, heads, 300, 256).bfloat16() for heads in (8, 2))
    cu = torch.tensor([0, 100, 300])
    problem = dense_problem(make_call(q, DenseKV(k, k), mask=Mask(), cu_seqlens=cu))
    prefill.forward(problem)
    assert launched == ["forward_kernel"]
