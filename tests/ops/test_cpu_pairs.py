"""Prefill in bfloat16 products: dot products of pairs, and matrix tiles (emulated where there are
none, by the same code).

Every shape here is one that the packed layouts have to pad: heads that are no multiple of 32
channels, tiles of keys that are not full, strips of rows that are not.
"""

from dataclasses import replace

import pytest
import torch

from saccade.core import BlockSelection, DenseKV, Mask, PagedKV, RaggedKV
from saccade.ops import attend, make_call
from saccade.ops.attention.cpu import binding
from tests.ops.test_cpu import HALVES, MASKS, check, in_double, quantized
from tests.support.random_inputs import normal
from tests.support.tolerance import largest_error

_cpu = binding.extension()
PAIRS = ["amx", "avx512_bf16", "amx_emulated"]
HERE = [name for name in PAIRS if _cpu is not None and name in _cpu.targets()]
pytestmark = pytest.mark.skipif(not HERE, reason="no products of bfloat16 pairs here")


@pytest.fixture(params=HERE, autouse=True)
def target(request, monkeypatch):
    monkeypatch.setattr(binding, "target", lambda: request.param)
    return request.param


def dense(heads, length, dim, dtype, value_dim=None):
    k = normal(1, heads, length, dim, dtype=dtype)
    return DenseKV(k, normal(1, heads, length, value_dim or dim, dtype=dtype))


@pytest.mark.parametrize("dims", [(80, 80), (96, 112), (112, 33), (7, 5), (31, 65), (160, 48)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_heads_of_any_size(dims, dtype):
    for q_len, kv_len in ((3, 129), (11, 31), (49, 160)):
        q = normal(1, 3, q_len, dims[0], dtype=dtype)
        check(q, dense(1, kv_len, dims[0], dtype, dims[1]), mask=Mask())


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_strips_and_tiles_that_are_not_full(dtype, mask):
    for q_len in (2, 5, 9, 16, 17, 33):
        for kv_len in (q_len, 65, 257):
            q = normal(1, 10, q_len, 32, dtype=dtype)
            check(q, dense(2, kv_len, 32, dtype), mask=mask)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_extras(dtype):
    q_len, q = 37, normal(2, 6, 37, 48, dtype=dtype)
    kv = DenseKV(normal(2, 2, 150, 48, dtype=dtype), normal(2, 2, 150, 48, dtype=dtype))
    grid = torch.rand(2, 1, -(-q_len // 4), -(-150 // 16)) > 0.5
    packed = torch.tensor([0, 20, 20, 37]), torch.tensor([0, 70, 71, 150])
    options = [
        {"softcap": 2.0, "alibi_slopes": torch.rand(2, 6)},
        {"softcap": 30.0, "sink_logits": normal(6, dtype=dtype)},
        {"key_padding": torch.rand(2, 150) > 0.3, "kv_lens": torch.tensor([150, 9])},
        {"blocks": BlockSelection(allowed=grid, q_block=4, k_block=16)},
        {"attn_mask": torch.rand(2, 1, q_len, 150) > 0.5, "q_offset": torch.tensor([3, -1])},
        {"scale": -0.3},
        {"scale": 0.0},
    ]
    for option in options:
        for mask in (Mask(), Mask(window=30, sinks=2)):
            check(q, kv, mask=mask, **option)
    check(q[:1], DenseKV(kv.k[:1], kv.v[:1]), mask=Mask(), cu_seqlens=packed)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_views(dtype):
    table = torch.tensor([[3, 0, 2], [1, 5, 4]], dtype=torch.int32)
    pages = normal(6, 2, 8, 40, dtype=dtype), normal(6, 2, 8, 40, dtype=dtype)
    lens = torch.tensor([20, 9], dtype=torch.int32)
    q = normal(2, 4, 17, 40, dtype=dtype)
    kv = PagedKV(*pages, table, lens, 20)
    check(q, kv, PagedKV(*(x.double() for x in pages), table, lens, 20), mask=Mask())
    table = torch.arange(8, dtype=torch.int32).view(2, 2, 2)
    kept = torch.tensor([[16, 3], [1, 9]], dtype=torch.int32)
    slots = normal(8, 8, 40, dtype=dtype), normal(8, 8, 40, dtype=dtype)
    rest = (torch.randint(0, 20, (8, 8), dtype=torch.int32), table, kept, 20, 16)
    ragged = RaggedKV(*(x.double() for x in slots), *rest)
    check(q, RaggedKV(*slots, *rest), ragged, mask=Mask(causal=False))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_unseen_keys_may_be_anything(dtype, bad):
    q, kv = normal(1, 4, 20, 48, dtype=dtype), dense(2, 90, 48, dtype)
    options = {"mask": Mask(window=20, sinks=2), "q_offset": 60}
    clean = attend(make_call(q, kv, **options), backend="cpu")
    hidden = [*range(5, 41), *range(80, 90)]
    kv.k[:, :, hidden], kv.v[:, :, hidden] = bad, bad
    ours = attend(make_call(q, kv, **options), backend="cpu")
    assert largest_error(ours.out, clean.out) < 0.01 and largest_error(ours.lse, clean.lse) < 1e-5
    kv.v[:, :, 60] = torch.nan  # seen by every row
    ours = attend(make_call(q, kv, **options), backend="cpu")
    assert ours.out.isnan().all() and ours.lse.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_infinite_numbers_that_are_seen(dtype):
    """A key whose score is -inf weighs nothing; an infinite value makes its channel infinite."""
    q, kv = normal(1, 2, 40, 32, dtype=dtype).abs(), dense(1, 70, 32, dtype)
    kv.k[:, :, 3, 5] = -torch.inf
    kv.v[:, :, 0, 7] = torch.inf
    ours = attend(make_call(q, kv, mask=Mask(causal=False)), backend="cpu")
    exact = attend(make_call(q.double(), in_double(kv), mask=Mask(causal=False)))
    assert (ours.out[..., 7] == torch.inf).all()
    seen = [d for d in range(32) if d != 7]
    assert largest_error(ours.out[..., seen], exact.out[..., seen]) < 0.02
    assert largest_error(ours.lse, exact.lse) < 2e-4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_quantized_keys_of_odd_heads(dtype, bits):
    kv = quantized(1, 2, 96, 37, 80, bits, group=24, v_group=20, dtype=dtype)
    exact = in_double(replace(kv, recent_k=kv.recent_k.double(), recent_v=kv.recent_v.double()))
    for q_len, mask in ((3, Mask()), (50, Mask(window=70, sinks=3))):
        check(normal(1, 6, q_len, 80, dtype=dtype), kv, exact, mask=mask)


def test_weights_that_nearly_cancel_the_row():
    """One key takes all: its weight is exactly 1, so the output is its value."""
    q, kv = normal(1, 4, 30, 64, dtype=torch.bfloat16), dense(1, 200, 64, torch.bfloat16)
    kv.k[:, :, 9] = 0
    q[..., 0], kv.k[..., 0], kv.k[:, :, 9, 0] = 40, 0, 40
    ours = attend(make_call(q, kv, mask=Mask(causal=False)), backend="cpu")
    assert torch.equal(ours.out, kv.v[:, :, 9:10].expand_as(ours.out))


def test_the_peak_of_pairs(target):
    """Measured where the target has such products, 0 elsewhere."""
    assert _cpu.pair_peak(1, target="avx512") == _cpu.pair_peak(1, target="scalar") == 0
    if target != "amx_emulated":  # minutes
        assert _cpu.pair_peak(1, target=target) > 0
