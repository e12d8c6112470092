"""Latent attention (MLA) in the space of its latents: values are the first channels of keys.

Triton's kernel, on a GPU or in the interpreter that test_triton.py starts, and the C++ kernels,
against the formula in float64.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from saccade.bench.tune_work import paged as paged_view
from saccade.core import DenseKV, Mask, PagedKV, Span
from saccade.ops import attend, attention, make_call
from saccade.ops.attention.api import explain
from saccade.ops.attention.cpu.binding import BUILT
from saccade.ops.attention.nvidia import triton_backend
from tests.ops.test_triton import DEVICE, INTERPRETED, pytestmark, runs_kernels
from tests.support.cases import on
from tests.support.gpu import pretend_hopper
from tests.support.random_inputs import normal

__all__ = ["pytestmark"]  # on a GPU these are GPU tests too

LATENT, ROPE, SCALE = 512, 64, 192**-0.5  # DeepSeek-V2 and V3
HALF = torch.float16  # Triton's interpreter multiplies bfloat16 wrongly
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [HALF]


def inputs(heads, q_len, k_len, *, batch=2, dims=(LATENT, ROPE), dtype=HALF):
    """Queries, and the one head of keys that all of them read."""
    dim = sum(dims)
    return normal(batch, heads, q_len, dim, dtype=dtype), normal(batch, 1, k_len, dim, dtype=dtype)


def formula(q, k, latent, lens=None, *, causal=True, scale=SCALE):
    """(out, lse) in float64; the queries of row b are the last ones of its lens[b] keys."""
    q, k = q.double().cpu(), k.double().cpu()[:, 0]
    lens = [k.shape[1]] * len(k) if lens is None else lens
    outs, lses = [], []
    for b, length in enumerate(lens):
        keys = k[b, :length]
        scores = q[b] @ keys.T * scale
        if causal:
            ends = torch.arange(length - q.shape[2] + 1, length + 1)
            hidden = torch.arange(length) >= ends[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        lses.append(scores.logsumexp(-1))
        outs.append((scores - lses[-1][..., None]).exp() @ keys[:, :latent])
    return torch.stack(outs), torch.stack(lses)


def check(ours, truth):
    out, lse = truth
    allowed = 2e-3 if ours.out.dtype == HALF else 1.5e-2
    assert (ours.out.cpu().double() - out).abs().max() <= allowed
    assert (ours.lse.cpu().double() - lse).abs().max() <= 1e-3


def launched(monkeypatch):
    """The keyword arguments of the decoding kernel's launches."""
    from saccade.ops.attention.nvidia.triton import decode_launch

    seen, right = [], decode_launch.launch_kernel
    monkeypatch.setattr(
        decode_launch, "launch_kernel",
        lambda *args, **options: (seen.append(options), right(*args, **options)),
    )  # fmt: skip
    return seen


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "q_len", "causal"), [(16, 1, True), (5, 4, True), (40, 2, False)]
)
@pytest.mark.parametrize("shared", [True, False])
def test_dense_keys(heads, q_len, causal, shared, dtype, monkeypatch):
    seen = launched(monkeypatch)
    q, k = on(DEVICE, *inputs(heads, q_len, 50, dtype=dtype))
    v = k[..., :LATENT]
    v = v if shared else v.clone()
    ours = attention(
        q, k, v, scale=SCALE, causal=causal, return_lse=True, backend="triton"
    )  # fmt: skip
    check(ours, formula(q, k, LATENT, causal=causal))
    assert [each["V_IN_K"] for each in seen] == [shared]
    assert seen[0]["HEAD_DIM"] == LATENT and seen[0]["REST"] == ROPE


@runs_kernels
@pytest.mark.parametrize("paged", [False, True])
def test_rows_of_their_own_lengths(paged):
    """Storage behind a row's keys holds NaN, and the keys of a page are those of its values."""
    lens, page = [50, 21], 8
    q, k = inputs(16, 3, 50)
    truth = formula(q, k, LATENT, lens)
    k[1, :, 21:] = torch.nan
    lengths = torch.tensor(lens)
    if paged:
        table = torch.randperm(16)[:14].view(2, 7).int()
        pool = torch.full((16, 1, page, k.shape[3]), torch.nan, dtype=k.dtype)
        for b, p in [(0, p) for p in range(50)] + [(1, p) for p in range(21)]:
            pool[table[b, p // page], :, p % page] = k[b, :, p]
        pool, table, lengths = on(DEVICE, pool, table, lengths.int())
        view, options = PagedKV(pool, pool[..., :LATENT], table, lengths, 50), {}
    else:
        k, lengths = on(DEVICE, k, lengths)
        view, options = DenseKV(k, k[..., :LATENT]), {"kv_lens": lengths}
    call = make_call(q.to(DEVICE), view, mask=Mask(), scale=SCALE, **options)
    check(attend(call, backend="triton"), truth)


@runs_kernels
@pytest.mark.parametrize("dims", [(32, 16), (40, 24), (32, 0)], ids=str)
def test_other_widths_windows_and_rings(dims):
    """Smaller latents (MiniCPM 3 has 256 + 32), and keys that are their own values."""
    q, k = inputs(4, 2, 30, dims=dims)
    q2, k2 = on(DEVICE, q, k)
    spans = (Span(0, 0, 10), Span(10, 10, 20))
    for mask in (Mask(), Mask(window=11, sinks=2)):
        kept = DenseKV(k.double(), k[..., : dims[0]].double())
        truth = attend(make_call(q.double(), kept, mask=mask, scale=0.3), backend="reference")
        for shape in ((), spans):
            view = DenseKV(k2, k2[..., : dims[0]], shape)
            ours = attend(make_call(q2, view, mask=mask, scale=0.3), backend="triton")
            check(ours, truth)


def test_auto_takes_triton_on_a_gpu(monkeypatch):
    pretend_hopper(monkeypatch)
    monkeypatch.setattr(triton_backend, "triton_refusal", lambda device: None)
    q, k = (x.to("meta", torch.bfloat16) for x in inputs(16, 4, 70))
    verdicts = dict(explain(q, k, k[..., :LATENT]))
    assert verdicts["triton"].startswith("chosen")
    verdicts = dict(explain(q.float(), k.float(), k.float()[..., :LATENT]))
    assert verdicts["triton"].startswith("cannot: head_dim 576 is above 512 (up to 576 for")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("heads", "q_len"), [(16, 1), (128, 4)])
@pytest.mark.parametrize("paged", [False, True])
def test_known_calls_and_captured_graphs(heads, q_len, paged):
    """The third call repeats the launches of the second one, over other tensors."""
    for _ in range(3):
        q, k = on(DEVICE, *inputs(heads, q_len, 4096, dtype=torch.bfloat16))
        truth = formula(q, k, LATENT)
        view = DenseKV(k, k[..., :LATENT])
        if paged:
            view = paged_view(k, k, 64)
            view = replace(view, v=view.k[..., :LATENT])
        run = partial(attend, make_call(q, view, mask=Mask(), scale=SCALE), backend="triton")
        check(run(), truth)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = run()
    graph.replay()
    check(ours, truth)


@pytest.mark.skipif(INTERPRETED or not BUILT, reason="the C++ kernels, outside the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "q_len"), [(16, 1), (7, 4)])
def test_the_same_call_on_a_cpu(heads, q_len, dtype):
    q, k = inputs(heads, q_len, 70, dtype=dtype)
    check(
        attention(q, k, k[..., :LATENT], scale=SCALE, return_lse=True),
        formula(q, k, LATENT),
    )
