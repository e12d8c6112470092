"""The float64 reference against attention that shares no code with it: loops in numpy, PyTorch's
own operator, and values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from saccade.core import BlockSelection, DenseKV, Mask
from saccade.ops import attend, attention, make_call
from tests.support import oracle
from tests.support.cases import EXTRAS, MASKS, Case
from tests.support.random_inputs import qkv
from tests.support.views import paged, ragged, ring

SHAPES = [((4, 2), (5, 9)), ((3, 1), (9, 9)), ((2, 2), (7, 4))]


def numpy_problem(q, k, v, **options):
    """The problem of the oracle for the arguments of `saccade.attention`."""
    blocks = options.pop("blocks", None)
    if blocks is not None:
        options |= {"allowed": blocks.allowed, "q_block": blocks.q_block, "k_block": blocks.k_block}
    arrays = {name: array(value) for name, value in (options | {"q": q, "k": k, "v": v}).items()}
    return oracle.Problem(**arrays)


def array(x):
    if isinstance(x, tuple):
        return tuple(array(part) for part in x)
    return x.double().numpy() if isinstance(x, torch.Tensor) and x.is_floating_point() else (
        x.numpy() if isinstance(x, torch.Tensor) else x
    )  # fmt: skip


def assert_equal(ours, truth):
    out, lse = truth
    assert np.abs(ours.out.numpy() - out).max() < 1e-12
    assert np.array_equal(np.isneginf(ours.lse.numpy()), np.isneginf(lse))
    seen = ~np.isneginf(lse)
    assert np.abs(ours.lse.numpy()[seen] - lse[seen]).max(initial=0) < 1e-6  # stored in float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("extra", EXTRAS)
def test_loops_over_pairs(extra, mask, shape):
    case = Case(*shape, mask, extra, dtype=torch.float64, head_dim=4)
    q, k, v, options = case.inputs()
    ours = attention(q, k, v, **options, return_lse=True, backend="reference")
    assert_equal(ours, oracle.attention(numpy_problem(q, k, v, **options)))


@pytest.mark.parametrize("offset", [0, 2, torch.tensor([1, 5])], ids=str)
@pytest.mark.parametrize("mask", [{}, {"window": 3, "sinks": 1}, {"causal": False}], ids=str)
def test_loops_over_pairs_with_queries_anywhere(mask, offset):
    q, k, v = (x.double() for x in qkv(q_len=4, k_len=7, dim=4))
    more = {"q_offset": offset, "attn_mask": torch.rand(2, 1, 4, 7) > 0.3}
    slopes = {"alibi_slopes": torch.rand(4), "scale": 0.7, "softcap": 1.5}
    ours = attend(
        make_call(q, DenseKV(k, v), mask=Mask(**mask), **more, **slopes), backend="reference"
    )
    assert_equal(ours, oracle.attention(numpy_problem(q, k, v, **mask, **more, **slopes)))


@pytest.mark.parametrize("mask", [{}, {"window": 9, "sinks": 2}], ids=str)
def test_loops_over_pairs_of_every_view(mask):
    """What a view stores is attended to as if it were plain; ragged heads as a mask says."""
    q, k, v = (x.double() for x in qkv(q_len=3, k_len=24, dim=4))
    kept = torch.rand(2, 2, 24) > 0.4
    of_heads = kept.repeat_interleave(2, 1)[:, :, None].expand(2, 4, 3, 24)
    lens = [24, 13]
    cases = [
        (ring(k, v), {}),
        (paged(k, v, 4, lens), {"kv_lens": torch.tensor(lens)}),
        (ragged(k, v, kept), {"attn_mask": of_heads}),
    ]
    for view, same in cases:
        ours = attend(make_call(q, view, mask=Mask(**mask)), backend="reference")
        assert_equal(ours, oracle.attention(numpy_problem(q, k, v, **mask, **same)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
def test_pytorch_where_pytorch_can(heads, causal):
    q, k, v = (x.double() for x in qkv(*heads, q_len=9, k_len=9))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )
    assert torch.allclose(attention(q, k, v, causal=causal, backend="reference"), expected)


def by_hand(q_len, k_len, batch=1, heads=1, **options):
    """Attention with equal scores over values 0, 1, 2, ..: the mean of the positions seen."""
    q, k = torch.zeros(batch, heads, q_len, 2), torch.zeros(batch, 1, k_len, 2)
    v = torch.arange(k_len).double()[None, None, :, None].expand(batch, 1, k_len, 1)
    found = attention(
        q.double(), k.double(), v, **options, return_lse=True, backend="reference"
    )  # fmt: skip
    return found.out.squeeze(-1), found.lse


def about(*numbers):
    return pytest.approx(numbers, abs=1e-6)


def test_a_window_of_three_keys_by_hand():
    """Four queries over six keys sit at 2 3 4 5 and see 012 123 234 345."""
    out, lse = by_hand(4, 6, window=3)
    assert out[0, 0].tolist() == about(1, 2, 3, 4)
    assert lse[0, 0].tolist() == about(*[math.log(3)] * 4)


def test_a_window_with_a_sink_by_hand():
    """With key 0 always visible they see 012 0123 0234 0345."""
    out, lse = by_hand(4, 6, window=3, sinks=1)
    assert out[0, 0].tolist() == about(1, 1.5, 9 / 4, 3)
    assert lse[0, 0].tolist() == about(math.log(3), *[math.log(4)] * 3)


def test_more_queries_than_keys_by_hand():
    """Three queries over two keys sit at -1 0 1: the first sees nothing."""
    out, lse = by_hand(3, 2)
    assert out[0, 0].tolist() == about(0, 0, 0.5)
    assert lse[0, 0].tolist() == [-math.inf, 0, pytest.approx(math.log(2))]


def test_rows_of_their_own_length_by_hand():
    """Two queries at the end of two and of four keys see 0 01 and 012 0123."""
    out, _ = by_hand(2, 4, batch=2, kv_lens=torch.tensor([2, 4]))
    assert out[:, 0].flatten().tolist() == about(0, 0.5, 1, 1.5)


def test_padding_by_hand():
    """Without key 1 the queries at 2 and 3 see 02 and 023."""
    out, _ = by_hand(2, 4, key_padding=torch.tensor([[True, False, True, True]]))
    assert out[0, 0].tolist() == about(1, 5 / 3)


def test_packed_sequences_by_hand():
    """Sequences of 1 and 2 queries over 3 and 2 keys: 012, then 3 and 34."""
    cu = torch.tensor([0, 1, 3]), torch.tensor([0, 3, 5])
    out, _ = by_hand(3, 5, cu_seqlens=cu)
    assert out[0, 0].tolist() == about(1, 3, 3.5)


def test_blocks_by_hand():
    """Queries 0 1 may read keys 0 1, queries 2 3 keys 2 3; causal leaves 0 01 2 23."""
    allowed = torch.eye(2, dtype=torch.bool)[None, None]
    out, _ = by_hand(4, 4, blocks=BlockSelection(allowed=allowed, q_block=2, k_block=2))
    assert out[0, 0].tolist() == about(0, 0.5, 2, 2.5)


def test_a_learned_sink_by_hand():
    """A sink of weight exp(log 2) = 2 beside one, two, three keys of weight 1."""
    out, lse = by_hand(3, 3, sink_logits=torch.tensor([math.log(2)]))
    assert out[0, 0].tolist() == about(0, 1 / 4, 3 / 5)
    assert lse[0, 0].tolist() == about(math.log(3), math.log(4), math.log(5))


def test_alibi_by_hand():
    """A slope of log 2 halves the weight with every position: 1; 1/2 1; 1/4 1/2 1."""
    out, lse = by_hand(3, 3, alibi_slopes=torch.tensor([math.log(2)]))
    assert out[0, 0].tolist() == about(0, 2 / 3, 10 / 7)
    assert lse[0, 0].tolist() == about(0, math.log(1.5), math.log(1.75))


def test_softcap_by_hand():
    """A product of 8 with scale 1/2 becomes 2 tanh(4 / 2) before it is exponentiated."""
    q, k = torch.tensor([[[[8.0]]]]).double(), torch.tensor([[[[1.0], [0.0]]]]).double()
    v = torch.tensor([[[[1.0], [0.0]]]]).double()
    out, lse = attention(
        q, k, v, scale=0.5, softcap=2.0, return_lse=True, backend="reference"
    )  # fmt: skip
    weight = math.exp(2 * math.tanh(2))
    assert out.item() == pytest.approx(weight / (weight + 1))
    assert lse.item() == pytest.approx(math.log(weight + 1))


def test_grouped_heads_by_hand():
    """Heads 0 1 read key head 0, heads 2 3 key head 1."""
    q, k = torch.zeros(1, 4, 1, 2).double(), torch.zeros(1, 2, 1, 2).double()
    v = torch.tensor([5.0, 7.0]).double().view(1, 2, 1, 1)
    assert attention(q, k, v, backend="reference").flatten().tolist() == [5, 5, 7, 7]
