"""Prefill over selected blocks, by every SIMD target: all sizes, masks, views and gaps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core import BlockSelection, DenseKV, Mask, PagedKV
from saccade.ops import attend, make_call
from saccade.ops.attention.cpu import binding
from tests.ops.test_cpu import check
from tests.support.random_inputs import normal

_cpu = binding.extension()
TARGETS = [] if _cpu is None else _cpu.targets()
pytestmark = pytest.mark.skipif(not TARGETS, reason="built without C++ kernels")


@pytest.fixture(params=TARGETS)
def target(request, monkeypatch):
    monkeypatch.setattr(binding, "target", lambda: request.param)
    return request.param


def grid(q_len, kv_len, q_block, k_block, density, heads=2):
    shape = 1, heads, -(-q_len // q_block), -(-kv_len // k_block)
    generator = torch.Generator().manual_seed(q_len * kv_len)
    allowed = torch.rand(shape, generator=generator) < density
    return BlockSelection(allowed=allowed, q_block=q_block, k_block=k_block)


def problem(heads, q_len, kv_len, dtype):
    q = normal(1, heads, q_len, 32, dtype=dtype)
    return q, DenseKV(normal(1, 2, kv_len, 32, dtype=dtype), normal(1, 2, kv_len, 32, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (64, 128), (1, 64), (96, 32), (7, 5)])
def test_blocks_of_all_sizes(target, blocks, dtype):
    """A group of two: items of rows hold several blocks of queries, or a part of one."""
    for density in (0.1, 0.5, 1.0):
        q, kv = problem(4, 300, 700, dtype)
        check(q, kv, mask=Mask(), blocks=grid(300, 700, *blocks, density))


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=90, sinks=5)], ids=str)
def test_masks(target, mask):
    q, kv = problem(2, 200, 500, torch.bfloat16)
    check(q, kv, mask=mask, blocks=grid(200, 500, 32, 64, 0.4))


def test_padding_and_pages(target):
    """Holes among the keys, and keys in pages that are no multiple of a block."""
    q, kv = problem(6, 150, 400, torch.float32)
    padding = torch.ones(1, 400, dtype=torch.bool)
    padding[:, 10:90:3] = False
    check(q, kv, mask=Mask(), blocks=grid(150, 400, 16, 24, 0.5), key_padding=padding)
    pages = torch.arange(10, dtype=torch.int32)[None]
    k, v = (x[0].unflatten(1, (10, 40)).transpose(0, 1).contiguous() for x in (kv.k, kv.v))
    paged = PagedKV(k, v, pages, torch.tensor([400], dtype=torch.int32), 400)
    check(q, paged, mask=Mask(), blocks=grid(150, 400, 16, 24, 0.5))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_keys_that_no_query_selects_may_be_anything(target, poison):
    q, kv = problem(4, 130, 256, torch.bfloat16)
    selection = grid(130, 256, 32, 32, 0.5)
    selection.allowed[..., 3] = False
    kv.k[:, :, 96:128] = poison
    kv.v[:, :, 96:128] = poison
    found = attend(make_call(q, kv, mask=Mask(), blocks=selection), backend="cpu")
    assert found.out.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    group=st.sampled_from([1, 3, 4]),
    q_len=st.integers(1, 260),
    past=st.integers(0, 300),
    q_block=st.integers(1, 130),
    k_block=st.integers(1, 130),
    density=st.sampled_from([0.05, 0.3, 0.8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_blocks(group, q_len, past, q_block, k_block, density, dtype):
    q, kv = problem(2 * group, q_len, past + q_len, dtype)
    check(q, kv, mask=Mask(), blocks=grid(q_len, past + q_len, q_block, k_block, density))
