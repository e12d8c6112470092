"""A million tokens, and tensors of more than 2^31 elements, on a GPU: every kernel.

Results are compared on the rows where an address or a position that wraps would show: the last
ones, of the last head of the last row of the batch.
"""

import os

import pytest
import torch

from saccade.core import DenseKV, Mask, PagedKV, QuantizedKV
from saccade.core.formats import QuantizedTensor, quantize_keys, quantize_values
from saccade.core.kv import dense
from saccade.ops import attend, attention, make_call
from saccade.ops.kv_write.append import append
from saccade.ops.kv_write.records import KVSlots
from tests.support.gpu import HOPPER, where_it_runs

GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
MEMORY = torch.cuda.get_device_properties(0).total_memory if GPU else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(MEMORY < 70 * 2**30, reason="needs an NVIDIA GPU with 70 GiB"),
]
KERNELS = ["triton", pytest.param("gluon", marks=pytest.mark.skipif(not HOPPER, reason="Hopper"))]
MILLION = 2**20
HUGE = 2**31


def normal(*shape):
    """Drawn in bfloat16: a float32 copy of the largest tensors would not fit."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()


def near(ours, truth, limit=1e-2):
    """Relative distance in norm, and no element far off."""
    ours, truth = ours.double(), truth.double()
    assert ours.shape == truth.shape and ours.isfinite().all()
    assert (ours - truth).norm() < limit * truth.norm()
    assert (ours - truth).abs().max() < 10 * limit * truth.abs().max()


def wide(*tensors):
    return [x.double() for x in tensors]


@pytest.fixture(autouse=True)
def give_memory_back():
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dim", [64, 128])
def test_a_million_tokens_in_a_window(backend, dim):
    q, k, v = (normal(1, h, MILLION, dim) for h in (2, 1, 1))
    result = attention(q, k, v, window=1024, sinks=4, return_lse=True, backend=backend)
    for stop in (300, MILLION // 2 + 77, MILLION):
        first = max(0, stop - 200)
        start = max(0, first - 1023)
        # The sinks come before the window; the mask is that of all keys by position.
        kept = torch.arange(start, stop, device="cuda")
        kept = torch.cat((torch.arange(min(4, start), device="cuda"), kept))
        seen = Mask(window=1024, sinks=4).allows(
            torch.arange(first, stop, device="cuda")[:, None], kept[None]
        )
        truth = attend(
            make_call(q[:, :, first:stop].double(), DenseKV(*wide(k[:, :, kept], v[:, :, kept])),
            mask=Mask(causal=False), attn_mask=seen[None, None]), backend="reference")  # fmt: skip
        near(result.out[:, :, first:stop], truth.out)
        assert (result.lse[:, :, first:stop] - truth.lse).abs().max() < 1e-3


@pytest.mark.parametrize("backend", [*KERNELS, where_it_runs("fa3"), where_it_runs("fa4")])
@pytest.mark.parametrize("queries", [64, 300])
def test_few_rows_over_a_million_keys(backend, queries):
    q, k, v = normal(1, 2, queries, 128), normal(1, 1, MILLION, 128), normal(1, 1, MILLION, 128)
    q *= 3  # so that a few keys matter, also far away ones
    ours = attention(q, k, v, return_lse=True, backend=backend)
    for rows in (slice(0, 8), slice(queries - 8, queries)):
        offset = MILLION - queries + rows.start
        truth = attend(
            make_call(q[:, :, rows].double(), DenseKV(*wide(k, v)), mask=Mask(), q_offset=offset),
            backend="reference",
        )
        near(ours.out[:, :, rows], truth.out)
        assert (ours.lse[:, :, rows] - truth.lse).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["dense", "pages", "int8", "int4"])
@pytest.mark.parametrize("window", [None, 5000])
def test_a_token_over_a_million_keys(kind, window):
    q, k, v = normal(1, 4, 1, 128) * 3, normal(1, 1, MILLION, 128), normal(1, 1, MILLION, 128)
    view = DenseKV(k, v)
    if kind == "pages":
        order = torch.randperm(MILLION // 16, device="cuda")
        pools = [torch.empty(MILLION // 16, 1, 16, 128, dtype=k.dtype, device="cuda") for _ in "kv"]
        for pool, x in zip(pools, (k, v), strict=True):
            pool[order] = x.view(-1, 1, 16, 128)
        kv_lens = torch.tensor([MILLION], dtype=torch.int32, device="cuda")
        view = PagedKV(*pools, order[None].to(torch.int32), kv_lens, MILLION)
    elif kind != "dense":
        bits, packed = int(kind[3:]), MILLION - 64
        quantized = (
            quantize_keys(k[:, :, :packed], bits=bits, group=64),
            quantize_values(v[:, :, :packed], bits=bits, group=64),
        )
        view = QuantizedKV(*quantized, k[:, :, packed:], v[:, :, packed:], bits, bits, 64)
    tile = dense(view)
    truth = attention(*wide(q, tile.k, tile.v), window=window, return_lse=True, backend="reference")
    ours = attend(make_call(q, view, mask=Mask(window=window)), backend="triton")
    near(ours.out, truth.out, 2e-2)
    assert (ours.lse - truth.lse).abs().max() < 2e-2


def test_gradients_of_more_than_two_to_the_31_elements():
    heads, window = 16, 128
    length = HUGE // (128 * heads) + 4096
    q, k, dout = (normal(1, heads, length, 128) for _ in range(3))
    q.requires_grad_(), k.requires_grad_()
    out = attention(q, k, k.detach(), window=window, backend="triton")
    dq, dk = torch.autograd.grad(out, (q, k), dout)
    last = [x.detach()[:, -1:, -600:].double() for x in (q, k, k, dout)]
    leaves = [x.requires_grad_() for x in last[:2]]
    truth = attention(*leaves, last[2], window=window, backend="reference")
    near(out[:, -1:, -256:], truth[:, :, -256:])
    for ours, theirs in zip((dq, dk), torch.autograd.grad(truth, leaves, last[3]), strict=True):
        near(ours[:, -1:, -256:], theirs[:, :, -256:], 2e-2)


@pytest.mark.parametrize("kind", ["dense", "pages", "int8"])
def test_a_token_over_more_than_two_to_the_31_elements(kind):
    batch, heads, length = 16, 8, 133120
    assert batch * heads * length * 128 > HUGE
    q = normal(batch, 8, 1, 128) * 2
    if kind == "pages":
        pool = normal(batch * length // 16, heads, 16, 128)
        table = torch.randperm(len(pool), device="cuda").view(batch, -1).to(torch.int32)
        kv_lens = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        view = PagedKV(pool, pool, table, kv_lens, length)
        last = pool[table[-1].long()].transpose(0, 1).reshape(1, heads, length, 128)
        k, v = last, last
    elif kind == "int8":
        x = normal(1, heads, length, 128)
        quantized = (quantize_keys(x, bits=8, group=64), quantize_values(x, bits=8, group=64))
        # Rows of the batch differ: each is rolled by so many groups of tokens.
        rolled = [
            QuantizedTensor(*(
                torch.cat([part.roll(b * (part.shape[2] // 32), 2) for b in range(batch)])
                for part in qdata
            ))
            for qdata in quantized
        ]  # fmt: skip
        empty = normal(batch, heads, 0, 128)
        view = QuantizedKV(*rolled, empty, empty, 8, 8, 64)
        alone = [QuantizedTensor(*(part[-1:] for part in qdata)) for qdata in rolled]
        tile = dense(QuantizedKV(*alone, empty[-1:], empty[-1:], 8, 8, 64))
        k, v = tile.k, tile.v
    else:
        x = normal(batch, heads, length, 128)
        view, k, v = DenseKV(x, x), x[-1:], x[-1:]
    ours = attend(make_call(q, view, mask=Mask()), backend="triton").out[-1:]
    for h in (0, heads - 1):
        parts = wide(q[-1:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1])
        near(ours[:, h : h + 1], attention(*parts, backend="reference"), 2e-2)


def test_storing_behind_two_to_the_31_elements():
    batch, heads, slots = 16, 8, 133120
    store = torch.zeros(batch, heads, slots, 128, dtype=torch.bfloat16, device="cuda")
    new = normal(batch, heads, 2, 128)
    at = torch.full((batch,), slots - 3, device="cuda")
    append(KVSlots(store, store, at), new, new)
    assert torch.equal(store[:, :, slots - 3 : slots - 1], new)
    assert not store[:, :, slots - 1].any() and not store[:, :, : slots - 3].any()
