"""Products of one row: right to twice the error of an eager run, and never begun too early."""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from saccade.ops import gemv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CARD = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CARD else "cpu"
TYPES = [torch.bfloat16, torch.float16, torch.float32] if CARD else [torch.float32]
pytestmark = pytest.mark.gpu if CARD else []
runs_kernels = pytest.mark.skipif(
    not CARD and not INTERPRETED, reason="needs an NVIDIA GPU or TRITON_INTERPRET=1"
)
SIZES = [(64, (48,)), (208, (33, 7, 5)), (1024, (130, 6)), (2304, (17,)), (5632, (9, 9, 9))]
if CARD:
    SIZES += [(4096, (4096, 1024, 1024)), (14336, (4096,)), (11008, (4097,))]


def random(*shape, dtype):
    return torch.randn(shape, device=DEVICE).to(dtype)


def check(ours, eager, truth, dtype):
    bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert ours.dtype == dtype and ours.shape == eager.shape
    scale = truth.abs().max()
    error, theirs = ((x.double() - truth).abs().max() / scale for x in (ours, eager))
    assert error <= max(2 * theirs, bound)


@runs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("columns,rows", SIZES, ids=str)
@torch.no_grad()
def test_products(columns, rows, dtype):
    x = random(1, 1, columns, dtype=dtype)
    weights = [random(n, columns, dtype=dtype) for n in rows]
    for biased in (False, True):
        biases = [random(n, dtype=dtype) if biased else None for n in rows]
        assert gemv.serves(x, *weights)
        found = gemv.products(x, weights, biases)
        for ours, w, b in zip(found, weights, biases, strict=True):
            truth = F.linear(x.double(), w.double(), None if b is None else b.double())
            check(ours, F.linear(x, w, b), truth, dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("columns,rows", SIZES, ids=str)
@torch.no_grad()
def test_gated(columns, rows, dtype):
    x = random(1, columns, dtype=dtype) / columns**0.5
    gate, up = (random(rows[0], columns, dtype=dtype) for _ in range(2))

    def eager(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    truth = eager(x.double(), gate.double(), up.double())
    check(gemv.gated(x, gate, up), eager(x, gate, up), truth, dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [64, 208, 4096])
@torch.no_grad()
def test_sum_and_norm(size, dtype):
    a, b = random(2, 1, size, dtype=dtype)
    weight = random(size, dtype=dtype)
    total, normed = gemv.sum_and_norm(a, b, weight, 1e-5)
    assert torch.equal(total, a + b)
    truth = F.rms_norm(total.double(), (size,), weight.double(), 1e-5)
    eager = F.rms_norm(total, (size,), weight, 1e-5)
    check(normed, eager, truth, dtype)
    check(gemv.norm(total, weight, 1e-5), eager, truth, dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@torch.no_grad()
def test_norms_of_heads(offset, dtype):
    x, weight = random(1, 1, 12, 80, dtype=dtype), random(80, dtype=dtype)
    assert gemv.norm_served(x, weight) and not gemv.norm_served(x, weight.double())
    truth = F.rms_norm(x.double(), (80,), weight.double() + offset, 1e-6)
    eager = F.rms_norm(x.float(), (80,), weight.float() + offset, 1e-6).to(dtype)
    check(gemv.norm(x, weight, 1e-6, offset), eager, truth, dtype)


@runs_kernels
@torch.no_grad()
def test_each_launch_waits_for_the_one_before():
    """Each output is the next input: a launch that began too early would read what was there."""
    dtype, size = torch.bfloat16 if CARD else torch.float32, 512
    weights = [random(size, size, dtype=dtype) / size**0.5 for _ in range(4)]
    norm, start = torch.ones(size, dtype=dtype, device=DEVICE), random(1, size, dtype=dtype)

    def chain(ends):
        x = start
        for i in range(20 if CARD else 2):
            y = gemv.products(x, [weights[i % 4]], [x.view(-1)])[0]
            x, y = gemv.sum_and_norm(x, y, norm, 1e-5)
            y = gemv.norm(y, norm, 1e-5)
            x = gemv.gated(y, weights[(i + 1) % 4], weights[i % 4])
            if ends and CARD:
                torch.cuda.synchronize()
        return x

    assert torch.equal(chain(False), chain(True))


def test_what_is_not_served():
    x, weight = torch.randn(1, 1, 64), torch.randn(32, 64)
    assert not gemv.serves(x, weight)  # gradients are wanted
    with torch.no_grad():
        assert gemv.serves(x, weight) == INTERPRETED
        assert not gemv.serves(x.expand(2, 1, 64), weight)
        assert not gemv.serves(x, weight.half())
        assert not gemv.serves(x, weight.repeat(1, 2)[:, ::2])


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("columns", [4096, 14336])
def test_weights_are_read_in_whole_lines_before_the_wait(columns):
    """16 bytes a thread and load, the first of them before it waits for x."""
    from saccade.ops.gemv.kernel import GATED, PRODUCTS, gated_kernel, products_kernel
    from tests.ops.compiled import compile_for

    def meta(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x, w, out = meta(columns), meta(4096, columns), meta(4096)
    none = dict.fromkeys(("a_bias", "b_bias", "c_bias"))
    calls = (
        (products_kernel, PRODUCTS, none | {"a": w, "b": w, "c": w} | dict.fromkeys(
            ("a_rows", "b_rows", "c_rows"), 4096)),
        (gated_kernel, GATED, {"gate": w, "up": w, "count": 4096}),
    )  # fmt: skip
    for kernel, cut, arguments in calls:
        meaning = {"COLUMNS": columns, "ROWS": cut.rows, "STEP": cut.columns, "PDL": True}
        options = {"num_warps": cut.warps, "num_stages": 3}
        ptx = compile_for(kernel, options=options, x=x, out=out, **arguments, **meaning).asm["ptx"]
        before, _, behind = ptx.partition("griddepcontrol.wait")
        assert "ld.global.v4" in before and "ld.global.v4" in behind
        assert "ld.global.b16" not in ptx and ".local" not in ptx
