"""The C++ kernels beyond the contract of all backends: targets, precisions, threads, bad input."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from saccade.core import BlockSelection, DenseKV, Mask, QuantizedKV, Unsupported
from saccade.core.formats import quantize_keys, quantize_values
from saccade.core.kv import dense
from saccade.ops import attend, attention, make_call
from saccade.ops.attention.cpu import backend, binding
from tests.support.random_inputs import normal
from tests.support.tolerance import assert_as_exact, assert_lse, largest_error

_cpu = binding.extension()
pytestmark = pytest.mark.skipif(_cpu is None, reason="built without the C++ kernels")
TARGETS = [] if _cpu is None else _cpu.targets()
HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALVES]
ROOT = Path(__file__).parents[2]
MASKS = [Mask(), Mask(causal=False), Mask(window=40), Mask(window=33, sinks=5)]


def in_double(kv):
    whole = dense(kv)
    return DenseKV(whole.k.double(), whole.v.double())


def check(q, kv, exact=None, **options):
    """Error of out within twice that of an eager run in the same precision, lse near the truth."""
    wide = exact or in_double(kv)
    truth = attend(make_call(q.double(), wide, **options), backend="reference")
    ours = attend(make_call(q, kv, **options), backend="cpu")
    eager = attend(make_call(q, kv, **options), backend="reference")
    rounding = 0 if q.dtype == torch.float32 else truth.out.abs().max() * torch.finfo(q.dtype).eps
    assert_as_exact(ours.out, eager.out, truth.out, 4e-6 + float(rounding))
    # Sums over up to 576 channels in another order.
    near, lse = 2e-5 if q.dtype == torch.float32 else 2e-4, truth.lse
    if exact is not None and q.dtype == torch.bfloat16 and off(ours.lse, lse) > near:
        # The products of many bfloat16 queries round dequantized keys, all of them, and only that.
        keys = DenseKV(wide.k.bfloat16().double(), wide.v)
        lse = attend(make_call(q.double(), keys, **options), backend="reference").lse
        near = 2e-5
    assert_lse(ours.lse, lse, near)


def off(lse, truth):
    return largest_error(lse.nan_to_num(neginf=0), truth.nan_to_num(neginf=0))


def quantized(batch, heads, length, recent, dim, bits, *, group=32, v_group=32, dtype):
    k, v = normal(batch, heads, length, dim), normal(batch, heads, length, dim)
    return QuantizedKV(
        k=quantize_keys(k, bits=bits, group=group),
        v=quantize_values(v, bits=bits, group=v_group),
        recent_k=normal(batch, heads, recent, dim, dtype=dtype),
        recent_v=normal(batch, heads, recent, dim, dtype=dtype),
        bits_k=bits,
        bits_v=bits,
        k_group=group,
    )


# ---- every target: precision, shapes, masks ----


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 5, 8])
def test_prefill_and_decoding(target, group, mask):
    for q_len, kv_len in ((70, 170), (1, 301), (2, 77), (3, 128), (16, 140)):
        q, k = normal(1, 2 * group, q_len, 64), normal(1, 2, kv_len, 64)
        check(q, DenseKV(k, normal(1, 2, kv_len, 64)), mask=mask)


@pytest.mark.parametrize("dims", [(16, 16), (24, 24), (40, 72), (80, 80), (256, 256), (576, 512)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_head_sizes(target, dims, dtype):
    for q_len in (1, 3, 37):
        q, k = normal(1, 4, q_len, dims[0], dtype=dtype), normal(1, 1, 150, dims[0], dtype=dtype)
        check(q, DenseKV(k, normal(1, 1, 150, dims[1], dtype=dtype)), mask=Mask())


@pytest.mark.parametrize("q_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kv_dtype", FLOATS, ids=str)
def test_mixed_storage(target, q_dtype, kv_dtype):
    for q_len in (1, 60):
        q, k = normal(1, 4, q_len, 64, dtype=q_dtype), normal(1, 2, 200, 64, dtype=kv_dtype)
        check(q, DenseKV(k, normal(1, 2, 200, 64, dtype=kv_dtype)), mask=Mask())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("groups", [(32, 64), (64, 16), (16, 32), (40, 8)], ids=str)
def test_quantized(target, bits, dtype, groups):
    kv = quantized(2, 2, 320, 7, 64, bits, group=groups[0], v_group=groups[1], dtype=dtype)
    # Reference: the quantized values dequantized exactly, in float64.
    exact = in_double(
        QuantizedKV(kv.k, kv.v, kv.recent_k.double(), kv.recent_v.double(), bits, bits, groups[0])
    )
    for q_len, mask in ((1, Mask()), (2, Mask(window=50, sinks=4)), (45, Mask())):
        check(normal(2, 8, q_len, 64, dtype=dtype), kv, exact, mask=mask)


@pytest.mark.parametrize("q_len", [1, 2, 50])
def test_extras(target, q_len):
    q, kv = normal(2, 6, q_len, 32), DenseKV(normal(2, 2, 150, 32), normal(2, 2, 150, 32))
    padding = torch.rand(2, 150) > 0.3
    grid = torch.rand(2, 1, -(-q_len // 4), -(-150 // 16)) > 0.5
    options = [
        {"softcap": 2.0, "alibi_slopes": torch.rand(2, 6)},
        {"softcap": 30.0, "sink_logits": normal(6, dtype=torch.bfloat16)},
        {"key_padding": padding, "kv_lens": torch.tensor([150, 9])},
        {"blocks": BlockSelection(allowed=grid, q_block=4, k_block=16)},
        {"attn_mask": torch.rand(1, 6, q_len, 150) > 0.5},
        {"attn_mask": torch.rand(2, 1, q_len, 150) > 0.5, "q_offset": torch.tensor([3, -1])},
    ]
    for option in options:
        for mask in (Mask(), Mask(window=30, sinks=2)):
            check(q, kv, mask=mask, **option)


@pytest.mark.parametrize("q_len", [1, 20])
def test_unseen_values_may_be_anything(target, q_len):
    """NaN or infinite keys and values behind the mask leave a row alone; seen ones do not."""
    q, k, v = normal(1, 4, q_len, 32), normal(1, 2, 90, 32), normal(1, 2, 90, 32)
    mask = Mask(window=20, sinks=2)
    clean = attend(make_call(q, DenseKV(k, v), mask=mask, q_offset=60), backend="reference")
    hidden = [*range(5, 41), *range(60 + q_len, 90)]
    for bad in (torch.nan, torch.inf):
        k[:, :, hidden], v[:, :, hidden] = bad, bad
        ours = attend(make_call(q, DenseKV(k, v), mask=mask, q_offset=60), backend="cpu")
        assert torch.allclose(ours.out, clean.out, atol=1e-6)
        assert torch.allclose(ours.lse, clean.lse, atol=1e-5)
    v[:, :, 60] = torch.nan  # seen by every row
    ours = attend(make_call(q, DenseKV(k, v), mask=mask, q_offset=60), backend="cpu")
    assert ours.out.isnan().all() and ours.lse.isfinite().all()


def test_far_positions(target):
    """A window far into a long stream: position a million, a few hundred keys in memory."""
    q, k, v = normal(1, 4, 3, 64), normal(1, 2, 300, 64), normal(1, 2, 300, 64)
    from saccade.core import Span

    kv = DenseKV(k, v, (Span(0, 0, 4), Span(4, 1_000_000, 296)))
    ours = attend(make_call(q, kv, mask=Mask(window=100, sinks=4)), backend="cpu")
    truth = attend(make_call(q, kv, mask=Mask(window=100, sinks=4)), backend="reference")
    assert torch.allclose(ours.out, truth.out, atol=1e-5)


def test_exponential(target):
    """Below 2 ulp for arguments up to 0, exactly 0 far below, NaN kept."""
    x = -torch.rand(100_000, dtype=torch.float64).float() * 120
    y = torch.tensor(_cpu.exp2(x.tolist(), target))
    exact = torch.exp2(x.double())
    ulp = torch.nextafter(exact.float(), torch.tensor(torch.inf)) - exact.float()
    assert ((y - exact).abs() / ulp).max() < 2
    edge = _cpu.exp2([0.0, -float("inf"), -1e30, float("nan")], target)
    assert edge[:3] == [1.0, 0.0, 0.0] and edge[3] != edge[3]


# ---- storage ----


def test_strides_are_respected():
    for dtype in FLOATS:
        whole = normal(2, 120, 3, 2, 64, dtype=dtype)  # [batch, length, q/k/v, heads, dim]
        q, k, v = (whole[:, :, i].transpose(1, 2) for i in range(3))
        ours = attention(q, k, v, backend="cpu")
        assert torch.allclose(
            ours, attention(q.contiguous(), k.contiguous(), v.contiguous(), backend="cpu")
        )
    with pytest.raises(Unsupported, match="unit last stride"):
        attention(q, k.mT.contiguous().mT, v, backend="cpu")


def test_refusals_say_why():
    q = normal(1, 2, 4, 16)
    with pytest.raises(Unsupported, match="float64 is not one of float32"):
        attention(q.double(), q.double(), q.double(), backend="cpu")
    wide = normal(1, 1, 4, 600)
    with pytest.raises(Unsupported, match="head_dim 600 is above 576"):
        attention(wide, wide, wide, backend="cpu")


def test_without_the_extension(monkeypatch):
    """`auto` goes on with torch, and the named backend says what to install."""
    monkeypatch.setattr(backend, "BUILT", False)
    q = normal(1, 2, 4, 16)
    assert attention(q, q, q).shape == q.shape
    with pytest.raises(Unsupported, match="install a C"):
        attention(q, q, q, backend="cpu")


# ---- threads ----


def shapes_for_threads():
    decode = normal(1, 8, 1, 64), DenseKV(normal(1, 2, 5000, 64), normal(1, 2, 5000, 64))
    prefill = normal(1, 6, 400, 64), DenseKV(normal(1, 2, 400, 64), normal(1, 2, 400, 64))
    middle = normal(1, 8, 9, 64), DenseKV(normal(1, 1, 3000, 64), normal(1, 1, 3000, 64))
    return decode, prefill, middle


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bit_identical_from_run_to_run(threads):
    for q, kv in shapes_for_threads():
        results = {}
        for n in (1, 2, 4):
            threads(n)
            runs = [attend(make_call(q, kv, mask=Mask()), backend="cpu") for _ in range(4)]
            assert all(torch.equal(run.out, runs[0].out) for run in runs)
            assert all(torch.equal(run.lse, runs[0].lse) for run in runs)
            results[n] = runs[0]
        for n in (2, 4):
            assert torch.allclose(results[n].out, results[1].out, atol=1e-6)


def test_several_python_threads_at_once(threads):
    threads(2)
    problems = list(shapes_for_threads()) * 8
    expected = [attend(make_call(q, kv, mask=Mask()), backend="cpu").out for q, kv in problems]

    def solve(problem):
        torch.set_num_threads(2)
        return attend(make_call(*problem, mask=Mask()), backend="cpu").out

    with ThreadPoolExecutor(4) as pool:
        for ours, truth in zip(pool.map(solve, problems), expected, strict=True):
            assert torch.equal(ours, truth)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_in_a_forked_child(threads):
    threads(2)
    q, kv = shapes_for_threads()[0]
    expected = attend(make_call(q, kv, mask=Mask()), backend="cpu").out.numpy().tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        same = (
            attend(make_call(q, kv, mask=Mask()), backend="cpu").out.numpy().tobytes() == expected
        )
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- workspaces: what the kernels say they allocate is what they allocate ----
