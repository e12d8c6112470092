"""Gluon gradients in squares: right on a Hopper card; elsewhere that they compile."""

import os
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon has no interpreter", allow_module_level=True)

from saccade.core import DenseKV, Mask
from saccade.ops import attention
from saccade.ops.attend import gluon, gluon_training
from saccade.ops.attend.api import make_call
from saccade.ops.attend.triton_problem import dense_problem

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == gluon.HOPPER
MASKS = {
    "causal": {},
    "all keys": {"causal": False},
    "window": {"window": 90},
    "sinks": {"window": 40, "sinks": 5},
}


def problem_of(heads, lengths, dim, mask, dtype=torch.bfloat16, batch=1):
    """A problem on the card, its gradient of the output, and the mask."""
    generator = torch.Generator("cuda").manual_seed(7)

    def random(h, n):
        made = torch.randn(batch, h, n, dim, device="cuda", generator=generator)
        return made.to(dtype)

    (q_len, k_len), mask = lengths, Mask(**mask)
    q, k, v, dout = (random(*x) for x in (
        (heads[0], q_len), (heads[1], k_len), (heads[1], k_len), (heads[0], q_len)
    ))  # fmt: skip
    return dense_problem(make_call(q, DenseKV(k, v), mask=mask)), dout


def plain_gradients(problem, dout, dtype):
    """Output, lse and gradients by the reference in a precision."""
    leaves = [x.to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v)]
    found = attention(
        *leaves, causal=problem.causal, window=problem.window, sinks=problem.sinks,
        return_lse=True, backend="reference",
    )  # fmt: skip
    return found, torch.autograd.grad(found.out, leaves, dout.to(found.out.dtype))


def check(problem, dout, splits=None):
    """At most twice the error of an eager run in the same precision, as every backend."""
    from saccade.ops.attend import gluon_squares_launch

    truth, right = plain_gradients(problem, dout, torch.float64)
    eager = plain_gradients(problem, dout, problem.q.dtype)[1]
    out, lse = truth.out.detach().to(problem.q.dtype), truth.lse.detach().float()
    nothing = torch.zeros_like(lse)
    ours = gluon_squares_launch.backward(problem, out, lse, dout, nothing, splits=splits)
    for found, other, true in zip(ours, eager, right, strict=False):
        allowed = 2 * (other - true).norm() + 1e-3 * true.norm()
        assert found.dtype == other.dtype
        assert (found - true).norm() <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
class TestOnTheCard:
    @pytest.mark.parametrize("dim", gluon_training.GRADIENT_DIMS)
    @pytest.mark.parametrize("lengths", [(33, 33), (1, 70), (65, 130), (300, 777)], ids=str)
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_equals_the_reference(self, mask, lengths, dim):
        check(*problem_of((6, 2), lengths, dim, mask, batch=2))

    @pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)], ids=str)
    def test_groups_in_float16(self, heads):
        check(*problem_of(heads, (513, 600), 64, {}, torch.float16))

    @pytest.mark.parametrize("splits", [1, 2, 4])
    def test_more_tiles_than_multiprocessors_and_shares_of_a_group(self, splits):
        check(*problem_of((16, 4), (5000, 5000), 64, {}), splits)

    def test_through_the_door(self, monkeypatch):
        """Training at D 64 takes this kernel, learned sinks and expanded gradients included."""
        from saccade.ops.attend import gluon_squares_launch

        ran, backward = [], gluon_squares_launch.backward
        for name in ("FORWARD_ROWS", "FORWARD_KEYS", "SQUARES_ROWS", "SQUARES_KEYS"):
            monkeypatch.setattr(gluon_training, name, 0)
        monkeypatch.setattr(
            gluon_squares_launch, "backward", lambda *args: ran.append(args) or backward(*args)
        )
        q, k, v = (torch.randn(1, h, 400, 64, device="cuda").bfloat16() for h in (4, 2, 2))
        sink = torch.randn(4, device="cuda")
        grads = []
        for tensors, backend in (((q, k, v, sink), "triton"), ((q, k, v, sink), "reference")):
            wide = backend == "reference"
            leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in tensors]
            out = attention(*leaves[:3], sink_logits=leaves[3], backend=backend)
            grads.append(torch.autograd.grad(out.sum(), leaves))
        assert len(ran) == 1
        for found, true in zip(*grads, strict=True):
            assert (found - true).norm() <= 2e-2 * true.norm()


@pytest.mark.parametrize("dim", gluon_training.GRADIENT_DIMS)
def test_compiles_for_hopper(dim, tmp_path):
    """Products run side by side, dQ is added by fours; at D 64 nothing spills.

    At D 128 ptxas keeps some addresses in memory, never an accumulator.
    """
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    from tests.ops.compiled import compile_gluon_squares

    found = compile_gluon_squares(dim)
    ptx = found.asm["ptx"]
    assert found.metadata.shared <= 227 * 1024
    assert "setmaxnreg" in ptx and "cp.async.bulk.tensor.4d" in ptx
    assert "add.v4.f32" in ptx
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    command = [get_ptxas(90).path, "-v", f"--gpu-name={sm_arch_from_capability(90)}", source]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernel"], capture_output=True, text=True, check=True
    )
    assert "serialized" not in done.stderr
    spilled = int(re.findall(r"(\d+) bytes spill stores", done.stderr)[0])
    assert spilled <= {64: 0, 128: 320}[dim]


@pytest.mark.parametrize(("dim", "rows"), [(64, 128), (128, 64)])
def test_every_element_of_dq_has_a_place_of_its_own(dim, rows):
    """The order of squares, in plain integers."""
    from saccade.ops.attend.gluon_squares import place_in_part

    row, col = torch.arange(rows)[:, None], torch.arange(dim)[None, :]
    square = row // 64 + col // 64
    at = square * 4096 + place_in_part.fn(row % 64, col % 64)
    assert sorted(at.flatten().tolist()) == list(range(rows * dim))
    # Four numbers of a thread lie side by side: two columns of rows r and r + 8.
    assert (at[8, 1] - at[0, 0], at[0, 1] - at[0, 0], at[8, 0] - at[0, 0]) == (3, 1, 2)


@pytest.mark.parametrize("splits", [1, 2])
def test_launcher_passes_what_the_kernels_take(splits, monkeypatch):
    """On a CPU: every argument has its parameter, and gradients have the shapes of their leaves."""
    import inspect

    from saccade.ops.attend import gluon_squares_launch as launcher
    from saccade.ops.attend.triton_problem import dense_problem

    seen = {}

    class Recorder:
        def __init__(self, name, kernel):
            self.name, self.signature = name, inspect.signature(kernel.fn)

        def __getitem__(self, grid):
            def launch(*args, num_warps, maxnreg=0, **constants):
                seen[self.name] = grid, self.signature.bind(*args, **constants).arguments

            return launch

    for name in ("rows_kernel", "squares_kernel", "collect_kernel"):
        monkeypatch.setattr(launcher, name, Recorder(name, getattr(launcher, name)))
    q, k, v = (torch.randn(2, h, n, 128).bfloat16() for h, n in ((8, 300), (2, 500), (2, 500)))
    problem = dense_problem(make_call(q, DenseKV(k, v), mask=Mask(window=90)))
    dout, lse = torch.ones((), dtype=q.dtype).expand(q.shape), q.new_empty(2, 8, 300).float()
    dq, dk, dv, delta = launcher.backward(problem, q, lse, dout, lse, splits=splits)
    assert (dq.shape, dk.shape, dv.shape, delta.shape) == (q.shape, k.shape, v.shape, lse.shape)
    assert {x.dtype for x in (dq, dk, dv)} == {q.dtype}
    grid, taken = seen["squares_kernel"]
    assert grid == (2 * 2 * splits * 4,)
    assert (taken["groups"], taken["q_tiles"], taken["k_tiles"]) == (4 // splits, 5, 4)
    assert taken["dout"].row % 8 == 0 and taken["dout"].row > 0  # the copy engine can read it
    assert taken["rules"].window == 90
