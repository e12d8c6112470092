"""Views: attention over ring, paged, ragged and quantised storage equals that over plain keys."""

import pytest
import torch

from saccade.core import DenseKV, Mask, PagedKV, QuantizedKV, RaggedKV, Span, Unsupported
from saccade.core.formats import quantize_keys, quantize_values
from saccade.core.kv import dense
from saccade.ops import attend
from tests.support.cases import HERE

MASKS = [Mask(), Mask(window=9), Mask(window=9, sinks=2)]
OTHERS = [name for name in HERE if name != "reference"]


def random(*shape):
    return torch.randn(*shape)


def nan(*shape):
    return torch.full(shape, torch.nan)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("mask", MASKS)
def test_spans(backend, mask):
    """A ring: sinks, then the newer run before the older one, around poisoned slots."""
    k, v, q = random(2, 2, 30, 16), random(2, 2, 30, 16), random(2, 4, 5, 16)
    spans = (Span(0, 0, 2), Span(12, 2, 20), Span(4, 22, 8))
    ring_k, ring_v = nan(2, 2, 40, 16), nan(2, 2, 40, 16)
    for slot, position, length in spans:
        ring_k[:, :, slot : slot + length] = k[:, :, position : position + length]
        ring_v[:, :, slot : slot + length] = v[:, :, position : position + length]
    expected = attend(q, DenseKV(k, v), mask=mask, backend="reference")
    ours = attend(q, DenseKV(ring_k, ring_v, spans), mask=mask, backend=backend)
    assert torch.allclose(ours.out, expected.out, atol=1e-5)
    assert torch.allclose(ours.lse, expected.lse, atol=1e-5)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("page", [1, 4, 16])
def test_pages(backend, mask, page):
    kv_lens = [30, 17, 5]
    k, v, q = random(3, 2, 30, 16), random(3, 2, 30, 16), random(3, 4, 3, 16)
    pages_per_row = -(-30 // page)
    order = torch.randperm(3 * pages_per_row)
    pool_k, pool_v = nan(3 * pages_per_row, 2, page, 16), nan(3 * pages_per_row, 2, page, 16)
    table = order.view(3, pages_per_row).to(torch.int32)
    for row, length in enumerate(kv_lens):
        for p in range(length):
            pool_k[table[row, p // page], :, p % page] = k[row, :, p]
            pool_v[table[row, p // page], :, p % page] = v[row, :, p]
    view = PagedKV(pool_k, pool_v, table, torch.tensor(kv_lens, dtype=torch.int32), 30)
    ours = attend(q, view, mask=mask, backend=backend)
    for row, length in enumerate(kv_lens):
        alone = DenseKV(k[row : row + 1, :, :length], v[row : row + 1, :, :length])
        expected = attend(q[row : row + 1], alone, mask=mask, backend="reference")
        assert torch.allclose(ours.out[row : row + 1], expected.out, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *OTHERS])
def test_padding_over_pages_of_different_length(backend):
    """Row 0 is the shorter one: what it lacks must not decide for the others."""
    k, v, q = random(2, 1, 8, 16), random(2, 1, 8, 16), random(2, 2, 1, 16)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    kv_lens = torch.tensor([3, 8], dtype=torch.int32)
    pool_k, pool_v = (x.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1) for x in (k, v))
    view = PagedKV(pool_k, pool_v, table, kv_lens, 8)
    padding = torch.tensor([[True] * 8, [False, True, True, True, True, False, True, True]])
    try:
        ours = attend(q, view, mask=Mask(), key_padding=padding, backend=backend)
    except Unsupported:
        return
    for row, length in enumerate((3, 8)):
        expected = attend(
            q[row : row + 1],
            DenseKV(k[row : row + 1, :, :length], v[row : row + 1, :, :length]),
            mask=Mask(),
            key_padding=padding[row : row + 1, :length],
            backend="reference",
        )
        assert torch.allclose(ours.out[row : row + 1], expected.out, atol=1e-5)


def test_ragged_views_refuse_blocks():
    k, table, kv_lens = random(1, 4, 16), torch.zeros(1, 1, 1), torch.ones(1, 1)
    view = RaggedKV(k, k, torch.zeros(1, 4), table, kv_lens, 4, 4)
    with pytest.raises(Unsupported, match="a ragged view has none"):
        attend(random(1, 1, 1, 16), view, mask=Mask(), attn_mask=torch.ones(1, 1, 1, 4) > 0)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("mask", [Mask(), Mask(window=12)])
def test_ragged(backend, mask):
    """Every head keeps its own positions; the answer is attention over just those."""
    k, v, q = random(2, 2, 40, 16), random(2, 2, 40, 16), random(2, 4, 3, 16)
    kv_lens = torch.tensor([[25, 9], [40, 3]], dtype=torch.int32)
    page, pages = 8, 5
    pool_k, pool_v = nan(2 * 2 * pages, page, 16), nan(2 * 2 * pages, page, 16)
    positions = torch.full((2 * 2 * pages, page), -1, dtype=torch.int32)
    table = torch.randperm(2 * 2 * pages).view(2, 2, pages).to(torch.int32)
    kept = torch.zeros(2, 2, 40, dtype=torch.bool)
    for b in range(2):
        for h in range(2):
            stay = torch.randperm(37)[: int(kv_lens[b, h]) - 3].sort().values.tolist()
            for slot, p in enumerate([*stay, 37, 38, 39]):
                at = table[b, h, slot // page], slot % page
                pool_k[at], pool_v[at], positions[at] = k[b, h, p], v[b, h, p], p
                kept[b, h, p] = True
    view = RaggedKV(pool_k, pool_v, positions, table, kv_lens, 40, 40)
    ours = attend(q, view, mask=mask, backend=backend)
    foreign = kept[:, :, None].expand(2, 2, 3, 40).repeat_interleave(2, 1)
    expected = attend(q, DenseKV(k, v), mask=mask, attn_mask=foreign, backend="reference")
    assert torch.allclose(ours.out, expected.out, atol=1e-5)
    assert torch.allclose(ours.lse, expected.lse, atol=1e-5)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_equals_its_dequantized_self(backend, mask, bits):
    k, v, q = random(2, 2, 64, 32), random(2, 2, 64, 32), random(2, 4, 7, 32)
    recent_k, recent_v = random(2, 2, 9, 32), random(2, 2, 9, 32)
    view = QuantizedKV(
        k=quantize_keys(k, bits=bits, group=16),
        v=quantize_values(v, bits=bits, group=32),
        recent_k=recent_k,
        recent_v=recent_v,
        bits_k=bits,
        bits_v=bits,
        k_group=16,
    )
    whole = dense(view)
    assert whole.k.shape == (2, 2, 73, 32)
    expected = attend(q, DenseKV(whole.k, whole.v), mask=mask, backend="reference")
    ours = attend(q, view, mask=mask, backend=backend)
    assert torch.allclose(ours.out, expected.out, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", *OTHERS])
def test_fp8_codes_are_read_or_refused(backend):
    k, v, q = random(2, 2, 64, 32), random(2, 2, 64, 32), random(2, 4, 7, 32)
    coded = (
        quantize_keys(k, bits=8, group=16, fp8=True),
        quantize_values(v, bits=8, group=32, fp8=True),
    )
    view = QuantizedKV(*coded, k[:, :, :0], v[:, :, :0], bits_k=8, bits_v=8, k_group=16)
    whole = dense(view)
    try:
        ours = attend(q, view, mask=Mask(), backend=backend)
    except Unsupported as error:
        assert backend != "auto" and "fp8 codes" in str(error)
        return
    expected = attend(q, DenseKV(whole.k, whole.v), mask=Mask(), backend="reference")
    assert torch.allclose(ours.out, expected.out, atol=1e-5)


def test_hadamard_turns_back():
    from saccade.ops.kv_write.hadamard import block_of, hadamard_transform

    assert [block_of(d) for d in (64, 80, 96, 128)] == [64, 16, 32, 128]
    for dim in (16, 80, 128):
        x = random(2, 3, dim)
        assert torch.allclose(hadamard_transform(hadamard_transform(x)), x, atol=1e-5)
        assert torch.allclose(hadamard_transform(x).norm(dim=-1), x.norm(dim=-1), atol=1e-4)
