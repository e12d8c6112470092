"""Selected blocks over storage that is not plain: quantized keys with recent ones, rings, pages.

Blocks are selected by position, and kernels read slots.  As test_triton.py: on a GPU, or in the
interpreter that it starts, where every address has to lie in a tensor of the launch.
"""

import pytest
import torch

pytest.importorskip("triton")

from saccade.core import BlockSelection, DenseKV, Mask, PagedKV, QuantizedKV, Span
from saccade.core.formats import QuantizedTensor, quantize_keys, quantize_values
from saccade.ops import attend, make_call
from tests.ops.test_triton import DEVICE, INTERPRETED, pytestmark, runs_kernels
from tests.support.cases import on
from tests.support.views import in_spans

__all__ = ["pytestmark"]  # on a GPU these are GPU tests too

DIM, KV_HEADS, HEADS, GROUP = 32, 2, 6, 32


def keys_and_values(length):
    return torch.randn(1, KV_HEADS, length, DIM), torch.randn(1, KV_HEADS, length, DIM)


def quantized(recent, bits, history=64):
    """Storage without any room to spare: what is read past its end belongs to nobody."""
    k, v = keys_and_values(history + recent)
    parts = (
        quantize_keys(k[:, :, :history], bits=bits, group=GROUP),
        quantize_values(v[:, :, :history], bits=bits, group=DIM),
    )
    stored = [QuantizedTensor(*on(DEVICE, *part)) for part in parts]
    newest = on(DEVICE, *(x[:, :, history:].contiguous() for x in (k, v)))
    return QuantizedKV(*stored, *newest, bits, bits, GROUP)


def ring(recent):
    k, v = keys_and_values(64 + recent)
    spans = (Span(0, 0, 4), Span(70, 4, 50), Span(6, 54, 10 + recent))
    view = in_spans(k, v, spans, 128)
    return DenseKV(*on(DEVICE, view.k, view.v), spans)


def pages(recent):
    length, page = 64 + recent, 16
    k, v = keys_and_values(length)
    count = -(-length // page)
    pools = [torch.zeros(count, KV_HEADS, page, DIM) for _ in range(2)]
    for pool, x in zip(pools, (k, v), strict=True):
        for at in range(length):
            pool[count - 1 - at // page, :, at % page] = x[0, :, at]
    table = torch.arange(count - 1, -1, -1, dtype=torch.int32)[None]
    lengths = torch.tensor([length], dtype=torch.int32)
    return PagedKV(*on(DEVICE, *pools, table, lengths), length)


STORED = {"int8": lambda n: quantized(n, 8), "int4": lambda n: quantized(n, 4), "ring": ring,
          "pages": pages}  # fmt: skip


@runs_kernels
@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize(("queries", "recent", "block"), [(1, 37, 16), (7, 9, 16), (19, 30, 24)])
def test_selected_blocks_are_those_of_their_positions(storage, queries, recent, block):
    view, length = STORED[storage](recent), 64 + recent
    q = torch.randn(1, HEADS, queries, DIM)
    allowed = torch.rand(1, KV_HEADS, -(-queries // block), -(-length // block)) > 0.5
    allowed[..., -1], allowed[..., 0] = True, False
    q, allowed = on(DEVICE, q, allowed)
    blocks = BlockSelection(allowed=allowed, q_block=block, k_block=block)
    call = make_call(q, view, mask=Mask(), q_offset=length - queries, blocks=blocks)
    truth = attend(call, backend="reference")  # of every key's own position
    ours = attend(call, backend="triton")
    allowance = 1e-5 if INTERPRETED else 1e-2
    assert torch.allclose(ours.out, truth.out, atol=allowance)
    assert torch.allclose(ours.lse, truth.lse, atol=allowance)


@runs_kernels
@pytest.mark.parametrize("block", [16, 24])
def test_a_step_reads_blocks_up_to_a_position_on_the_device(block):
    """Storage has room for more keys, whose slots may hold anything."""
    k, v = (x.expand(2, -1, -1, -1).contiguous() for x in keys_and_values(192))
    k[:, :, 101:], v[:, :, 101:] = torch.nan, torch.nan
    q, allowed = torch.randn(2, HEADS, 1, DIM), torch.rand(2, KV_HEADS, 1, -(-192 // block)) > 0.5
    allowed[..., 0] = True
    at = torch.full((2,), 100)
    q, k, v, allowed, at = on(DEVICE, q, k, v, allowed, at)
    blocks = BlockSelection(allowed=allowed, q_block=block, k_block=block)
    options = {"mask": Mask(), "blocks": blocks}
    stored = DenseKV(k[:, :, :101], v[:, :, :101])
    truth = attend(make_call(q, stored, **options), backend="reference")
    call = make_call(q, DenseKV(k, v), q_offset=at, kv_lens=at + 1, **options)
    ours = attend(call, backend="triton")
    allowance = 1e-5 if INTERPRETED else 1e-2
    assert torch.allclose(ours.out, truth.out, atol=allowance)
    assert torch.allclose(ours.lse, truth.lse, atol=allowance)
