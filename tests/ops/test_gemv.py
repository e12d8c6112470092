"""Batch-1 linear layers and norms: accuracy against eager runs, PDL, machine code."""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from saccade.ops import gemv
from tests.support.tolerance import FACTOR

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
TYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float32]
pytestmark = pytest.mark.gpu if GPU else []
runs_kernels = pytest.mark.skipif(
    not GPU and not INTERPRETED, reason="needs an NVIDIA GPU or TRITON_INTERPRET=1"
)
SIZES = [(64, (48,)), (208, (33, 7, 5)), (1024, (130, 6)), (2304, (17,)), (5632, (9, 9, 9))]
if GPU:
    SIZES += [(4096, (4096, 1024, 1024)), (14336, (4096,)), (11008, (4097,))]


def normal(*shape, dtype):
    return torch.randn(shape, device=DEVICE).to(dtype)


def check(ours, eager, truth, dtype):
    bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert ours.dtype == dtype and ours.shape == eager.shape
    scale = truth.abs().max()
    error, theirs = ((x.double() - truth).abs().max() / scale for x in (ours, eager))
    assert error <= max(FACTOR * theirs, bound)


@runs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("columns,rows", SIZES, ids=str)
@torch.no_grad()
def test_linears(columns, rows, dtype):
    x = normal(1, 1, columns, dtype=dtype)
    weights = [normal(n, columns, dtype=dtype) for n in rows]
    for biased in (False, True):
        biases = [normal(n, dtype=dtype) if biased else None for n in rows]
        assert gemv.supports(x, *weights)
        found = gemv.linears(x, weights, biases)
        for ours, w, b in zip(found, weights, biases, strict=True):
            truth = F.linear(x.double(), w.double(), None if b is None else b.double())
            check(ours, F.linear(x, w, b), truth, dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("columns,rows", SIZES, ids=str)
@torch.no_grad()
def test_gated_mlp(columns, rows, dtype):
    x = normal(1, columns, dtype=dtype) / columns**0.5
    gate, up = (normal(rows[0], columns, dtype=dtype) for _ in range(2))

    def eager(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    truth = eager(x.double(), gate.double(), up.double())
    check(gemv.gated_mlp(x, gate, up), eager(x, gate, up), truth, dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [64, 208, 4096])
@torch.no_grad()
def test_add_rms_norm(size, dtype):
    a, b = normal(2, 1, size, dtype=dtype)
    weight = normal(size, dtype=dtype)
    total, normed = gemv.add_rms_norm(a, b, weight, 1e-5)
    assert torch.equal(total, a + b)
    truth = F.rms_norm(total.double(), (size,), weight.double(), 1e-5)
    eager = F.rms_norm(total, (size,), weight, 1e-5)
    check(normed, eager, truth, dtype)
    check(gemv.rms_norm(total, weight, 1e-5), eager, truth, dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@torch.no_grad()
def test_rms_norm_of_heads(offset, dtype):
    x, weight = normal(1, 1, 12, 80, dtype=dtype), normal(80, dtype=dtype)
    assert gemv.supports_rms_norm(x, weight) and not gemv.supports_rms_norm(x, weight.double())
    truth = F.rms_norm(x.double(), (80,), weight.double() + offset, 1e-6)
    eager = F.rms_norm(x.float(), (80,), weight.float() + offset, 1e-6).to(dtype)
    check(gemv.rms_norm(x, weight, 1e-6, offset), eager, truth, dtype)


@pytest.mark.skipif(not GPU, reason="the interpreter runs one launch at a time")
@torch.no_grad()
def test_each_launch_waits_for_the_preceding_one():
    """Each output is the next input: a launch that did not wait would read stale data."""
    dtype, size = torch.bfloat16, 512
    weights = [normal(size, size, dtype=dtype) / size**0.5 for _ in range(4)]
    norm, start = torch.ones(size, dtype=dtype, device=DEVICE), normal(1, size, dtype=dtype)

    def chain(synchronize):
        x = start
        for i in range(20):
            y = gemv.linears(x, [weights[i % 4]], [x.view(-1)])[0]
            x, y = gemv.add_rms_norm(x, y, norm, 1e-5)
            y = gemv.rms_norm(y, norm, 1e-5)
            x = gemv.gated_mlp(y, weights[(i + 1) % 4], weights[i % 4])
            if synchronize:
                torch.cuda.synchronize()
        return x

    assert torch.equal(chain(False), chain(True))


def test_what_is_not_supported():
    x, weight = torch.randn(1, 1, 64), torch.randn(32, 64)
    assert not gemv.supports(x, weight)  # gradients are wanted
    with torch.no_grad():
        assert gemv.supports(x, weight) == INTERPRETED
        assert not gemv.supports(x.expand(2, 1, 64), weight)
        assert not gemv.supports(x, weight.half())
        assert not gemv.supports(x, weight.repeat(1, 2)[:, ::2])


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("columns", [4096, 14336])
def test_weights_are_loaded_by_16_bytes_and_before_the_wait(columns):
    """16 bytes per thread and load; the first loads are issued before the wait for x."""
    from saccade.ops.gemv.kernel import gated_mlp_kernel, linears_kernel
    from saccade.ops.tuning.gemv import launches
    from tests.ops.compiled import compile_for

    def meta(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x, w, out = meta(columns), meta(4096, columns), meta(4096)
    none = dict.fromkeys(("a_bias", "b_bias", "c_bias"))
    calls = (
        (linears_kernel, "linear", none | {"a": w, "b": w, "c": w} | dict.fromkeys(
            ("a_rows", "b_rows", "c_rows"), 4096)),
        (gated_mlp_kernel, "gated_mlp", {"gate": w, "up": w, "count": 4096}),
    )  # fmt: skip
    for kernel, name, arguments in calls:
        launch = launches("sm_90")[name]
        sizes = {"COLUMNS": columns, "ROWS": launch.rows, "STEP": launch.columns, "PDL": True}
        options = {"num_warps": launch.warps, "num_stages": 3}
        ptx = compile_for(kernel, options=options, x=x, out=out, **arguments, **sizes).asm["ptx"]
        before, _, after = ptx.partition("griddepcontrol.wait")
        assert "ld.global.v4" in before and "ld.global.v4" in after
        assert "ld.global.b16" not in ptx and ".local" not in ptx


def test_launch_files_are_complete():
    from saccade.ops.tuning import gemv as tuning

    names = {path.stem for path in tuning.FOLDER.glob("*.json")}
    assert names == {"interpreter", "sm_90"}
    for name in names:
        assert set(tuning.launches(name)) == {tuning.LINEAR, tuning.GATED_MLP}
    assert tuning.launches("sm_80") is None
