"""The Gluon decode kernel: results on a Hopper GPU; elsewhere its PTX, launches and refusals."""

import os
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon has no interpreter", allow_module_level=True)

from saccade.core import DenseKV, Mask, PagedKV, Span, Unsupported
from saccade.ops import attend
from saccade.ops.attention.api import make_call
from saccade.ops.attention.nvidia import gluon_backend as gluon
from saccade.ops.attention.nvidia.gluon.decode import support as gluon_decode
from saccade.ops.gpu import support
from tests.support.gpu import BOUND, assert_a_graph_replays, on_gpu
from tests.support.random_inputs import normal
from tests.support.tolerance import assert_output

TYPES = [torch.float16, torch.bfloat16]


def paged(k, v, page, kv_lens=None):
    """The same keys in pages in random order; unused pages and slots hold nan."""
    batch, heads, length, dim = k.shape
    count = -(-length // page)
    order = torch.randperm(batch * count + 3, device=k.device)[: batch * count]
    table = order.view(batch, count).to(torch.int32)
    pools = []
    for x in (k, v):
        pool = torch.full((batch * count + 3, heads, page, dim), torch.nan).to(x)
        for row in range(batch):
            stop = length if kv_lens is None else int(kv_lens[row])
            for i in range(-(-stop // page)):
                part = x[row, :, i * page : min((i + 1) * page, stop)]
                pool[table[row, i], :, : part.shape[1]] = part
            table[row, -(-stop // page) :] = -1
        pools.append(pool)
    if kv_lens is None:
        kv_lens = torch.full((batch,), length, device=k.device)
    return PagedKV(*pools, table, kv_lens.to(torch.int32), int(kv_lens.max()))


def random(*shape, dtype=torch.bfloat16, device="cuda"):
    return normal(*shape, dtype=dtype, device=device)


# (heads, KV heads), batch, keys, queries, head_dim, mask
SHAPES = [
    ((32, 8), 1, 8192, 1, 128, Mask()),
    ((8, 2), 2, 1, 1, 128, Mask()),
    ((8, 2), 3, 1077, 4, 128, Mask()),
    ((3, 3), 2, 4099, 8, 64, Mask()),
    ((8, 1), 2, 77, 1, 64, Mask()),
    ((6, 2), 2, 2050, 3, 128, Mask(window=300)),
    ((6, 2), 1, 3000, 4, 64, Mask(window=77, sinks=5)),
    ((5, 1), 1, 700, 1, 128, Mask(causal=False)),
]


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("page", [0, 16, 64])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    def test_equals_the_reference(self, page, shape, dtype):
        """At most twice the error of an eager run in the same precision."""
        heads, batch, keys, queries, dim, mask = shape
        k, v = (random(batch, heads[1], keys, dim, dtype=dtype) for _ in range(2))
        q = random(batch, heads[0], queries, dim, dtype=dtype)
        mask_args = {"mask": mask, "sink_logits": random(heads[0]).float() if batch > 1 else None}
        wide = DenseKV(k.double(), v.double())
        truth = attend(make_call(q.double(), wide, **mask_args), backend="reference")
        eager = attend(make_call(q, DenseKV(k, v), **mask_args), backend="reference")
        ours = attend(
            make_call(q, paged(k, v, page) if page else DenseKV(k, v), **mask_args), backend="gluon"
        )
        assert_output(ours, eager, truth, lse_allowance=1e-3)

    @pytest.mark.parametrize("page", [0, 16, 64])
    @pytest.mark.parametrize("mask", [Mask(), Mask(window=100, sinks=3)], ids=str)
    def test_sequences_of_different_length(self, page, mask):
        """Keys behind the end of a sequence never matter, even if they are nan."""
        k, v, q = random(3, 2, 2077, 128), random(3, 2, 2077, 128), random(3, 8, 2, 128)
        kv_lens = torch.tensor([2077, 0, 303], device="cuda")
        where = {"kv_lens": kv_lens, "q_offset": kv_lens - 2, "mask": mask}
        truth = attend(
            make_call(q.double(), DenseKV(k.double(), v.double()), **where), backend="reference"
        )
        for x in (k, v):
            for row, length in enumerate(kv_lens.tolist()):
                x[row, :, length:] = torch.nan
        view = paged(k, v, page, kv_lens) if page else DenseKV(k, v)
        ours = attend(make_call(q, view, **where), backend="gluon")
        assert (ours.out - truth.out).abs().max() <= BOUND[torch.bfloat16]
        assert torch.allclose(ours.lse, truth.lse.float(), atol=1e-3)

    @pytest.mark.parametrize("page", [16, 64])
    def test_one_query_without_q_offset(self, page):
        """The host has the longest length only; kv_lens on the device end the shorter rows."""
        k, v, q = random(4, 2, 2077, 128), random(4, 2, 2077, 128), random(4, 8, 1, 128)
        kv_lens = torch.tensor([2077, 0, 303, 1], device="cuda")
        wide = DenseKV(k.double(), v.double())
        truth = attend(
            make_call(q.double(), wide, mask=Mask(), kv_lens=kv_lens), backend="reference"
        )
        ours = attend(make_call(q, paged(k, v, page, kv_lens), mask=Mask()), backend="gluon")
        assert (ours.out - truth.out).abs().max() <= BOUND[torch.bfloat16]
        assert torch.allclose(ours.lse, truth.lse.float(), atol=1e-3)

    def test_strides_of_storage(self):
        """Tokens before heads, slices of longer storage, queries of a model's layout."""
        k, v = (random(2, 500, 2, 128).transpose(1, 2)[:, :, 3:403] for _ in range(2))
        q = random(2, 1, 8, 128).transpose(1, 2)
        truth = attend(
            make_call(q.double(), DenseKV(k.double(), v.double()), mask=Mask()), backend="tiled"
        )
        ours = attend(make_call(q, DenseKV(k, v), mask=Mask()), backend="gluon")
        assert (ours.out - truth.out).abs().max() <= BOUND[torch.bfloat16]

    def test_a_step_reads_what_the_step_before_wrote(self):
        """PDL starts kernels early: each output is the next query, and is written into the keys."""
        q, k, v = random(2, 8, 1, 64), random(2, 2, 9000, 64), random(2, 2, 9000, 64)

        def chain(ends):
            x, keys = q, k.clone()
            for i in range(20):
                x = attend(make_call(x, DenseKV(keys, v), mask=Mask()), backend="gluon").out
                keys[:, :, -1 - i] = x[:, ::4, 0]
                if ends:
                    torch.cuda.synchronize()
            return x

        assert torch.equal(chain(False), chain(True))

    def test_inside_a_cuda_graph(self):
        k, v, q = random(1, 2, 2048, 128), random(1, 2, 2048, 128), random(1, 8, 1, 128)
        assert_a_graph_replays(q, paged(k, v, 16))


REFUSALS = [
    ({"softcap": 5.0}, {}, "no softcap"),
    ({"scale": -1.0}, {}, "scale must be positive"),
    ({}, {"dim": 96}, "head_dim 96 is not one of 64, 128"),
    ({}, {"dtype": torch.float32}, "float32 is not one of bfloat16, float16"),
    ({}, {"page": 8}, "pages have to hold 16 n keys, got 8"),
]


@pytest.mark.parametrize(("options", "how", "reason"), REFUSALS, ids=[row[2] for row in REFUSALS])
def test_refuses_in_a_sentence(options, how, reason):
    dim, dtype = how.get("dim", 64), how.get("dtype", torch.float16)
    k = random(1, 2, 64, dim, dtype=dtype, device="cpu")
    q = random(1, 4, how.get("queries", 1), dim, dtype=dtype, device="cpu")
    call = make_call(q, paged(k, k, how.get("page", 16)), **({"mask": Mask()} | options))
    assert reason in str(gluon_decode.refusal(call))


def test_reads_few_queries_and_nothing_runs_without_a_gpu():
    k, q = random(1, 2, 128, 128, device="cpu"), random(1, 8, 1, 128, device="cpu")
    for view in (DenseKV(k, k), paged(k, k, 64)):
        call = make_call(q, view, mask=Mask(window=9, sinks=2))
        assert gluon_decode.reads(call) and gluon_decode.refusal(call) is None
        with pytest.raises(Unsupported, match="tensors are on cpu, not on an NVIDIA GPU"):
            attend(make_call(q, view, mask=Mask()), backend="gluon")
    assert not gluon_decode.reads(make_call(q.expand(1, 8, 5, 128), DenseKV(k, k), mask=Mask()))
    packed = torch.tensor([0, 1]), torch.tensor([0, 128])
    assert not gluon_decode.reads(make_call(q, DenseKV(k, k), mask=Mask(), cu_seqlens=packed))
    ring = replace(DenseKV(k, k), spans=(Span(64, 0, 64), Span(0, 64, 64)))
    assert not gluon_decode.reads(replace(call, kv=ring))


@pytest.mark.parametrize(
    ("batch", "keys", "queries", "mask", "kv_lens", "launch", "splits"),
    [
        (1, 8192, 1, Mask(), False, "split_kv", 33),
        (1, 2048, 1, Mask(), False, "short_context", 16),
        (1, 8192, 4, Mask(), False, "short_context", 16),  # each partial has twice the rows
        (1, 32768, 1, Mask(window=1024), False, "short_context", 16),
        (16, 8192, 1, Mask(), False, "single_cta", 1),
        (16, 8192, 1, Mask(), True, "split_kv", 2),  # sequences of unequal lengths leave CTAs idle
        (64, 8192, 1, Mask(), False, "split_kv", 1),
        (1, 64, 1, Mask(), False, "short_context", 1),
    ],
)
def test_launch_and_number_of_splits(
    monkeypatch, batch, keys, queries, mask, kv_lens, launch, splits
):
    from saccade.ops.attention.nvidia.gluon.decode import launch as decode_launch
    from saccade.ops.attention.nvidia.problem import dense_problem

    monkeypatch.setattr(decode_launch, "multiprocessors", lambda device: 132)
    k = torch.empty(1, 8, 1, 128, device="meta").expand(batch, 8, keys, 128)
    q = torch.empty(batch, 32, queries, 128, device="meta")
    rows = torch.empty(batch, dtype=torch.int64, device="meta") if kv_lens else None
    problem = dense_problem(make_call(q, DenseKV(k, k), mask=mask, kv_lens=rows))
    found = decode_launch.launch_of(problem, 8, keys)
    assert found == decode_launch.LAUNCHES[f"128/{launch}"]
    assert decode_launch.splits_of(problem, 8, keys, found) == splits


@pytest.mark.parametrize(("dim", "page_size", "rows"), [(128, 0, 4), (128, 16, 16), (64, 16, 1)])
def test_no_barrier_of_the_cta_in_the_main_loop(dim, page_size, rows):
    """cp.async of 16 bytes, ldmatrix for every fragment, and CTA barriers only at the end."""
    from tests.ops.compiled import compile_decode

    found = compile_decode(dim, page_size, rows)
    ptx = found.asm["ptx"]
    loop = ptx[: ptx.rindex("cp.async.wait_group 0")]
    assert "cp.async.cg.shared.global" in loop and not re.search(r"^\s*bar\.sync", loop, re.M)
    assert len(re.findall(r"^\s*ldmatrix", ptx, re.M)) == dim // 8
    assert len(re.findall(r"^\s*mma\.sync", ptx, re.M)) == dim // 8 * -(-rows // 8)
    assert not re.search(r"(ld|st)\.local", ptx)
    assert found.metadata.shared <= 227 * 1024


def test_torch_compile_is_refused_before_a_cached_function_is_called(monkeypatch):
    """Dynamo warns about every functools.cache that it traces."""
    k, q = random(1, 2, 128, 128, device="cpu"), random(1, 8, 1, 128, device="cpu")
    plain = make_call(q, DenseKV(k, k), mask=Mask())
    pages = make_call(q, paged(k, k, 16), mask=Mask())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(
        support, "_triton_version", lambda: pytest.fail("a cached function was called")
    )
    assert gluon.refusal(plain) is None  # traced as an operator, which asks when it runs
    assert gluon.refusal(pages) == "it has no torch.compile registration"
    assert support.gluon_refusal(torch.device("cuda")) == "it has no torch.compile registration"
