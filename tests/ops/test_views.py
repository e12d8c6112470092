"""Views: attention over ring, paged, ragged and quantized storage equals that over plain keys."""

import pytest
import torch

from saccade.core import DenseKV, Mask, Unsupported
from saccade.core.kv import dense
from saccade.ops import attend, make_call
from tests.support import matrix, views
from tests.support.cases import HERE
from tests.support.random_inputs import normal, qkv

MASKS = [Mask(), Mask(window=9), Mask(window=9, sinks=2)]
OTHERS = [name for name in HERE if name != "reference"]


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("mask", MASKS)
def test_spans(backend, mask):
    """A ring: sinks, then the newer run before the older one, around poisoned slots."""
    q, k, v = qkv(q_len=5, k_len=30)
    expected = attend(make_call(q, DenseKV(k, v), mask=mask), backend="reference")
    ours = attend(make_call(q, views.ring(k, v), mask=mask), backend=backend)
    assert torch.allclose(ours.out, expected.out, atol=1e-5)
    assert torch.allclose(ours.lse, expected.lse, atol=1e-5)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("page", [1, 4, 16])
def test_pages(backend, mask, page):
    kv_lens = [30, 17, 5]
    q, k, v = qkv(q_len=3, k_len=30, batch=3)
    view = views.paged(k, v, page, kv_lens)
    ours = attend(make_call(q, view, mask=mask), backend=backend)
    for row, length in enumerate(kv_lens):
        alone = DenseKV(k[row : row + 1, :, :length], v[row : row + 1, :, :length])
        expected = attend(make_call(q[row : row + 1], alone, mask=mask), backend="reference")
        assert torch.allclose(ours.out[row : row + 1], expected.out, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *OTHERS])
def test_padding_over_pages_of_different_length(backend):
    """Row 0 is the shorter one: what it lacks must not decide for the others."""
    q, k, v = qkv(heads=2, kv_heads=1, q_len=1, k_len=8)
    view = views.paged(k, v, 4, [3, 8])
    padding = torch.tensor([[True] * 8, [False, True, True, True, True, False, True, True]])
    ours = attend(make_call(q, view, mask=Mask(), key_padding=padding), backend=backend)
    for row, length in enumerate((3, 8)):
        expected = attend(
            make_call(
                q[row : row + 1],
                DenseKV(k[row : row + 1, :, :length], v[row : row + 1, :, :length]),
                mask=Mask(),
                key_padding=padding[row : row + 1, :length],
            ),
            backend="reference",
        )
        assert torch.allclose(ours.out[row : row + 1], expected.out, atol=1e-5)


def test_ragged_views_refuse_blocks():
    q, k, v = qkv(q_len=1, k_len=4)
    view = views.ragged(k, v, torch.ones(2, 2, 4, dtype=torch.bool))
    with pytest.raises(Unsupported, match="a ragged view has none"):
        attend(make_call(q, view, mask=Mask(), attn_mask=torch.ones(1, 1, 1, 4) > 0))


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("mask", [Mask(), Mask(window=12)])
def test_ragged(backend, mask):
    """Every head keeps its own positions; the answer is attention over just those."""
    q, k, v = qkv(q_len=3, k_len=40)
    kept = torch.zeros(2, 2, 40, dtype=torch.bool)
    for head, length in zip(kept.flatten(0, 1), (25, 9, 40, 3), strict=True):
        head[torch.randperm(37)[: length - 3]] = True
    kept[..., 37:] = True
    view = views.ragged(k, v, kept)
    ours = attend(make_call(q, view, mask=mask), backend=backend)
    of_heads = kept[:, :, None].expand(2, 2, 3, 40).repeat_interleave(2, 1)
    expected = attend(
        make_call(q, DenseKV(k, v), mask=mask, attn_mask=of_heads), backend="reference"
    )
    assert torch.allclose(ours.out, expected.out, atol=1e-5)
    assert torch.allclose(ours.lse, expected.lse, atol=1e-5)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_equals_its_dequantized_self(backend, mask, bits):
    q, k, v = qkv(q_len=7, k_len=73, dim=32)
    view = views.quantized(k, v, recent=9, bits=bits, group=16)
    whole = dense(view)
    assert whole.k.shape == (2, 2, 73, 32)
    expected = attend(make_call(q, DenseKV(whole.k, whole.v), mask=mask), backend="reference")
    ours = attend(make_call(q, view, mask=mask), backend=backend)
    assert torch.allclose(ours.out, expected.out, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", *OTHERS])
def test_fp8_keys_are_read_or_refused(backend):
    q, k, v = qkv(q_len=7, k_len=64, dim=32)
    view = views.quantized(k, v, recent=0, group=16, fp8=True)
    if backend != "auto" and "P" not in matrix.ROWS["quantized_fp8"][backend]:
        with pytest.raises(Unsupported, match="fp8"):
            attend(make_call(q, view, mask=Mask()), backend=backend)
        return
    whole = dense(view)
    expected = attend(make_call(q, DenseKV(whole.k, whole.v), mask=Mask()), backend="reference")
    ours = attend(make_call(q, view, mask=Mask()), backend=backend)
    assert torch.allclose(ours.out, expected.out, atol=1e-5)


def test_hadamard_is_its_own_inverse():
    from saccade.ops.kv_write.hadamard import block_of, hadamard_transform

    assert [block_of(d) for d in (64, 80, 96, 128)] == [64, 16, 32, 128]
    for dim in (16, 80, 128):
        x = normal(2, 3, dim)
        assert torch.allclose(hadamard_transform(hadamard_transform(x)), x, atol=1e-5)
        assert torch.allclose(hadamard_transform(x).norm(dim=-1), x.norm(dim=-1), atol=1e-4)
