"""Triton's kernels: the contract of backends, on a GPU or in Triton's interpreter.

Without a GPU the contract runs in a subprocess with TRITON_INTERPRET=1, on fewer cases.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from saccade.core import (
    BlockSelection,
    DenseKV,
    Mask,
)
from saccade.ops import attend, attention, make_call
from tests.support.cases import Case, all_cases, on
from tests.support.reference import check_case
from tests.support.tolerance import ALLOWANCE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs an NVIDIA GPU or TRITON_INTERPRET=1"
)
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
CASES = all_cases() if DEVICE == "cuda" else all_cases()[::17]


INTERPRETED_FILES = (
    "test_chunked",
    "test_gluon_pre_postprocess",
    "test_gemv",
    "test_kernel_bounds",
    "test_kv_write",
    "test_triton",
    "test_triton_blocks",
    "test_triton_latent",
    "test_triton_selection",
    "test_triton_views",
)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="this test starts the interpreter")
@pytest.mark.parametrize("name", INTERPRETED_FILES)
def test_contract_in_the_interpreter(name):
    """Triton is told to interpret when it is imported, so each file has a process of its own."""
    file = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def check(case, dtype=torch.float32):
    """The contract of all backends; wide heads sum more products and may err more."""
    allowance = ALLOWANCE[dtype] * max(1, case.head_dim / 128)
    check_case(case, "triton", dtype, DEVICE, allowance=allowance)


@runs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case):
    check(case)


LONG = 150 if DEVICE == "cuda" else 50
SHAPES = [
    (16, torch.float16),
    (24, torch.bfloat16),
    (64, torch.bfloat16),
    (80, torch.float16),
    (128, torch.bfloat16),
    (192, torch.bfloat16),
    (256, torch.bfloat16),
    (512, torch.bfloat16),
    (512, torch.float32),
]


@runs_kernels
@pytest.mark.parametrize(("dim", "dtype"), SHAPES if DEVICE == "cuda" else SHAPES[0:4:3], ids=str)
@pytest.mark.parametrize("length", [(3, LONG), (LONG, LONG)], ids=str)
@pytest.mark.parametrize("mask", [{}, {"window": 40, "sinks": 3}, {"causal": False}], ids=str)
def test_head_dims(dim, dtype, length, mask):
    check(Case((4, 2), length, mask, "plain", head_dim=dim, batch=1), dtype)


@runs_kernels
def test_value_dim_may_differ():
    q, k, v = torch.randn(1, 4, 37, 48), torch.randn(1, 2, 41, 48), torch.randn(1, 2, 41, 32)
    truth = attention(q, k, v, backend="reference")
    for queries in (37, 2):
        ours = attention(*on(DEVICE, q[:, :, -queries:], k, v), backend="triton").cpu()
        assert torch.allclose(ours, truth[:, :, -queries:], atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("extra", ["attn_mask", "strided", "empty", "offsets"])
def test_odd_inputs(extra):
    case = Case((4, 2), (20, 37), {"window": 30}, "plain")
    q, k, v, _ = case.inputs()
    options = {"mask": Mask(window=30)}
    if extra == "attn_mask":
        options["attn_mask"] = torch.rand(2, 1, 20, 37) > 0.5
    elif extra == "strided":
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    elif extra == "empty":
        k, v = k[:, :, :0], v[:, :, :0]
    else:
        options["q_offset"] = torch.tensor([3, 11])
    for queries in (20, 4):
        given = {
            name: x[:, :, :queries] if name == "attn_mask" else x for name, x in options.items()
        }
        truth = attend(make_call(q[:, :, :queries], DenseKV(k, v), **given), backend="reference")
        q2, k2, v2 = on(DEVICE, q[:, :, :queries], k, v)
        ours = attend(make_call(q2, DenseKV(k2, v2), **on(DEVICE, given)), backend="triton")
        assert torch.allclose(ours.out.cpu(), truth.out, atol=1e-5)
        assert torch.equal(ours.lse.cpu().isneginf(), truth.lse.isneginf())


GRADIENTS = [
    Case((4, 2), (33, 33), {}, "plain"),
    Case((4, 2), (20, 37), {"window": 9, "sinks": 3}, "plain"),
    Case((3, 1), (33, 33), {"causal": False}, "softcap"),
    Case((4, 2), (33, 50), {}, "sink_logits"),
    Case((4, 2), (33, 33), {}, "alibi"),
    Case((4, 2), (40, 70), {"window": 30, "sinks": 2}, "blocks"),
    Case((4, 2), (40, 70), {"window": 19}, "packed"),
    Case((4, 2), (33, 50), {}, "padding"),
    Case((4, 2), (33, 50), {"window": 11}, "lengths"),
    Case((2, 1), (5, 3), {}, "plain"),
]


@runs_kernels
@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients(case):
    q, k, v, options = case.inputs()
    k, v = k.nan_to_num(), v.nan_to_num()
    if "sink_logits" in options:
        options["sink_logits"].requires_grad_()
    grads = []
    for backend, device in (("reference", "cpu"), ("triton", DEVICE)):
        leaves = [x.detach().to(device).requires_grad_() for x in (q, k, v)]
        given = on(device, options)
        if "sink_logits" in options:
            given["sink_logits"] = options["sink_logits"].detach().to(device).requires_grad_()
            leaves.append(given["sink_logits"])
        out, lse = attention(*leaves[:3], **given, return_lse=True, backend=backend)
        weights = torch.arange(out.numel(), device=device).reshape(out.shape).cos()
        seen = lse.masked_fill(lse.isneginf(), 0)
        ((out * weights).sum() + (seen * weights[..., 0]).sum()).backward()
        grads.append([x.grad.cpu() for x in leaves])
    for truth, ours in zip(*grads, strict=True):
        assert (ours - truth).abs().max() < 3e-5


@runs_kernels
@pytest.mark.skipif(DEVICE == "cpu", reason="slow in the interpreter")
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("mask", [{}, {"window": 300, "sinks": 4}, {"causal": False}], ids=str)
def test_gradients_in_half_precision(dim, mask):
    case = Case((4, 2), (700, 700), mask, "plain", head_dim=dim, batch=1)
    q, k, v = (x.to(DEVICE, torch.bfloat16) for x in case.inputs()[:3])
    results = []
    for backend, dtype in (
        ("reference", torch.float64), ("reference", torch.bfloat16), ("triton", torch.bfloat16),
        ("triton", torch.bfloat16),
    ):  # fmt: skip
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        attention(*leaves, **mask, backend=backend).float().sin().sum().backward()
        results.append([x.grad for x in leaves])
    for truth, eager, ours, again in zip(*results, strict=True):
        scale = truth.norm()
        assert (ours - truth).norm() / scale <= 2 * (eager - truth).norm() / scale + 5e-3
        assert torch.equal(ours, again)  # no atomics: the same bits


@runs_kernels
def test_selected_blocks_while_decoding():
    q, k, v = torch.randn(2, 4, 2, 16), torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 16)
    allowed = torch.rand(2, 2, 1, 9) > 0.5
    blocks = BlockSelection(allowed=allowed, q_block=2, k_block=10)
    truth = attention(q, k, v, blocks=blocks, return_lse=True, backend="reference")
    ours = attention(
        *on(DEVICE, q, k, v), **on(DEVICE, {"blocks": blocks}), return_lse=True, backend="triton"
    )
    assert torch.allclose(ours.out.cpu(), truth.out, atol=1e-5)


@runs_kernels
def test_registered_operator():
    """torch.library's own checks: schema, fake tensors, autograd registration."""
    from saccade.ops.attention import operator
    from saccade.ops.attention.api import make_call

    q, k, v = (
        torch.randn(1, h, 20, 16, device=DEVICE, requires_grad=True) for h in (2, 1, 1)
    )  # fmt: skip
    call = make_call(q, DenseKV(k, v), mask=Mask(window=9))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator.attention, operator.flatten(call, "triton"), test_utils=tests)


@runs_kernels
def test_compiles_without_graph_breaks():
    q, k, v = (
        torch.randn(1, h, 20, 16, device=DEVICE, requires_grad=True) for h in (2, 1, 1)
    )  # fmt: skip
    expected = attention(q, k, v, window=9, backend="triton")
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, window=9, backend="triton")
    assert torch.allclose(out, expected, atol=1e-6)
    out.sum().backward()
    assert q.grad is not None


@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_cuda_graph_of_a_decoding_step():
    q, k, v = on("cuda", *(torch.randn(2, h, n, 64) for h, n in ((8, 1), (2, 3000), (2, 3000))))
    view = DenseKV(k, v)
    expected = attend(make_call(q, view, mask=Mask()), backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attend(make_call(q, view, mask=Mask()), backend="triton")
    k.copy_(k.flip(2)), v.copy_(v.flip(2))
    graph.replay()
    assert torch.allclose(result.out, expected.out, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_more_than_two_to_the_31_elements():
    length = 2**31 // (128 * 16) + 4096
    k = torch.empty(1, 16, length, 128, device="cuda", dtype=torch.bfloat16).normal_()
    q = torch.randn(1, 16, 200, 128, device="cuda", dtype=torch.bfloat16)
    for queries in (200, 1):
        ours = attention(q[:, :, :queries], k, k, window=256, backend="triton")[:, 15:]
        part = k[:, 15:, -256 - queries :]
        truth = attention(q[:, 15:, :queries], part, part, window=256, backend="reference")
        assert torch.allclose(ours, truth, atol=2e-2)


def test_refuses_cpu_tensors_in_a_sentence():
    if INTERPRETED:
        pytest.skip("the interpreter takes CPU tensors")
    x = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"tensors are on cpu, not on an NVIDIA GPU"):
        attention(x, x, x, backend="triton")


@runs_kernels
def test_one_offset_for_all_rows():
    """An expanded tensor of offsets is read with its stride of 0."""
    q, k, v = (torch.randn(2, 2, n, 16) for n in (2, 9, 9))
    offset = torch.tensor([3, 7])[:1].expand(2)
    truth = attend(make_call(q, DenseKV(k, v), mask=Mask(), q_offset=offset), backend="reference")
    there = DenseKV(*on(DEVICE, k, v))
    call = make_call(q.to(DEVICE), there, mask=Mask(), q_offset=offset.to(DEVICE))
    ours = attend(call, backend="triton")
    assert torch.allclose(ours.out.cpu(), truth.out, atol=2e-5)
