"""The public door: defaults, explain, decode, and the sentences of its errors."""

import pytest
import torch

import saccade
from saccade.core import Mask, PagedKV, Unsupported
from saccade.ops.attention.api import make_call
from tests.support.random_inputs import normal, qkv


def test_matches_torch_where_torch_can():
    q, k, v = qkv(k_len=6)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    assert torch.allclose(saccade.attention(q, k, v), expected, atol=1e-5)


def test_queries_sit_at_the_end():
    q, k, v = qkv(q_len=6)
    whole = saccade.attention(q, k, v)
    assert torch.allclose(saccade.attention(q[:, :, 4:], k, v), whole[:, :, 4:], atol=1e-5)


def test_one_token_over_pages_costs_no_kernels_for_its_place():
    """It attends to all keys of its row from any later position; several tokens do not."""
    pool = normal(4, 2, 16, 16)
    table = torch.arange(4, dtype=torch.int32).view(2, 2)
    view = PagedKV(pool, pool, table, torch.tensor([20, 7], dtype=torch.int32), 20)
    q = normal(2, 4, 2, 16)
    offsets = [
        make_call(q[:, :, :rows], view, mask=mask).q_offset
        for rows, mask in ((1, Mask()), (2, Mask(causal=False)), (2, Mask()), (1, Mask(window=3)))
    ]
    assert offsets[:2] == [19, 18]
    assert [x.tolist() for x in offsets[2:]] == [[18, 5], [19, 6]]


@pytest.mark.parametrize("kinds", [("half", "float", "float"), ("float", "bfloat16", "half")])
@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
def test_dtypes_that_differ_are_read_as_they_are(kinds, backend):
    """The float64 formula over the rounded numbers, rounded once to the dtype of the queries."""
    q, k, v = (getattr(x, kind)() for x, kind in zip(qkv(k_len=6), kinds, strict=True))
    found = saccade.attention(q, k, v, causal=False, backend=backend)
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q.double() @ k.mT * q.shape[3] ** -0.5).softmax(-1)
    assert found.dtype == q.dtype
    bound = torch.finfo(q.dtype).eps * 4
    assert torch.allclose(found.double(), weights @ v, rtol=bound, atol=bound)


def test_returns_lse_on_request():
    result = saccade.attention(*qkv(), return_lse=True)
    assert isinstance(result, saccade.AttentionOutput)
    assert result.lse.shape == (2, 4, 6)


def test_explain_names_every_backend_once():
    lines = saccade.explain(*qkv(), softcap=2.0)
    assert dict(lines)["sdpa"] == "cannot: PyTorch's kernels have no softcap"
    assert [verdict for _, verdict in lines].count("chosen") == 1
    assert len(lines) == len(dict(lines))


def call(**changes):
    q, k, v = qkv()
    given = {"q": q, "k": k, "v": v} | changes
    return saccade.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"q": [1]}, TypeError, r"q must be a floating-point tensor .* got list"),
        ({"q": torch.zeros(2, 4, 6)}, TypeError, r"got float32 \[2, 4, 6\]"),
        ({"q": torch.zeros(2, 4, 6, 16, dtype=torch.int64)}, TypeError, "got int64"),
        ({"v": torch.zeros(2, 2, 5, 16)}, ValueError, "k and v must share batch, heads and length"),
        ({"q": torch.zeros(3, 4, 6, 16)}, ValueError, "share the batch, got 3 and 2"),
        ({"q": torch.zeros(2, 4, 6, 8)}, ValueError, "share head_dim, got 8 and 16"),
        (
            {"q": torch.zeros(2, 3, 6, 16)},
            ValueError,
            "multiple of the key/value heads, got 3 and 2",
        ),
        ({"window": 0}, ValueError, "window must be at least 1 key"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
        ({"sink_logits": torch.zeros(3)}, ValueError, r"sink_logits must have shape \[4\]"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes must have shape \[4\]"),
        ({"key_padding": torch.ones(2, 5) > 0}, ValueError, r"key_padding must be bool \[2, 6\]"),
        ({"kv_lens": torch.ones(2)}, ValueError, r"kv_lens must be int64 \[2\], got float32"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'; expected one of auto, "),
        ({"backend": "sdpa", "softcap": 1.0}, Unsupported, "cannot run this call: PyTorch's"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "needs one packed row"),
        (
            {
                "blocks": saccade.BlockSelection(
                    allowed=torch.ones(1, 1, 1, 1) > 0, q_block=4, k_block=8
                )
            },
            ValueError,
            "BlockSelection covers 1 x 1 blocks, but 6 queries and 6 keys need 2 x 1",
        ),
    ],
)
def test_errors_are_sentences(changes, kind, text):
    with pytest.raises(kind, match=text):
        call(**changes)


def test_packed_bounds_are_checked():
    q, k, v = (x[:1] for x in qkv())
    with pytest.raises(ValueError, match="must rise from 0 to 6, the packed length, got"):
        saccade.attention(q, k, v, cu_seqlens=torch.tensor([0, 4, 5]))
