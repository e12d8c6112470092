"""The contract of patterns: they cover the call, keep sinks and newest keys, and can be exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core import DenseKV, Mask
from saccade.ops import attend, make_call
from saccade.sparse import (
    PATTERNS,
    BigBird,
    BlockTopK,
    BlockTopP,
    Dilated,
    PromptPattern,
    Quest,
    Strided,
    TriangleMix,
    VerticalSlash,
    XAttention,
)


def problem(q_len, kv_len):
    torch.manual_seed(q_len * 1000 + kv_len)
    view = DenseKV(torch.randn(2, 2, kv_len, 16), torch.randn(2, 2, kv_len, 16))
    return torch.randn(2, 4, q_len, 16), view


FOR_PROMPTS = [name for name, kind in PATTERNS.items() if issubclass(kind, PromptPattern)]


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=20, deadline=None)
@given(q_len=st.integers(1, 60), past=st.integers(0, 100))
def test_selection_covers_the_call_and_keeps_the_newest(name, q_len, past):
    pattern = PATTERNS[name](block=16)
    q, view = problem(q_len, past + q_len)
    selection = pattern.select(q, view, past)
    selection.check_covers(q_len, past + q_len)
    queries = torch.arange(q_len)
    visible = selection.visible(queries, torch.arange(past + q_len))
    own = visible[:, :, queries, past + queries]
    assert own.all(), "a query always attends to itself"
    assert visible[..., 0].all(), "the first block is a sink"


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "pattern",
    [
        Strided(block=8, stride=1),
        Strided(window_blocks=99),
        BlockTopK(block=8, top=99),
        BlockTopP(block=8, p=1),
        Quest(block=8, top=99),
        TriangleMix(block=8, dense_rows=999),
        Dilated(block=8, dilation=1, reach=99),
        BigBird(block=8, random_blocks=99),
        XAttention(block=8, stride=4, p=1),
        VerticalSlash(block=8, columns=99),
        VerticalSlash(block=8, columns=0, diagonals=99),
    ],
    ids=str,
)
@pytest.mark.parametrize("q_len", [1, 3, 40, 250])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selecting_all_blocks_is_the_dense_result_to_the_bit(pattern, q_len, dtype, one_thread):
    """By one thread: several divide the keys of some work, which are then added in other order."""
    q, view = problem(q_len, q_len + 350)
    q, view = q.to(dtype), DenseKV(view.k.to(dtype), view.v.to(dtype))
    blocks = pattern.select(q, view, 350)
    ours = attend(make_call(q, view, mask=Mask(), blocks=blocks))
    dense = attend(make_call(q, view, mask=Mask()))
    assert torch.equal(ours.out, dense.out) and torch.equal(ours.lse, dense.lse)


@pytest.mark.parametrize("name", sorted(set(PATTERNS) - set(FOR_PROMPTS)))
def test_decoding_one_by_one_reads_fewer_keys(name):
    """Where attention is concentrated: on white noise a share of it takes most blocks."""
    pattern = PATTERNS[name]()
    q, view = problem(1, 4096)
    q[:] = torch.randn(16)
    view.k[:, :, 1000:1200] = q[:, :2] * 3
    selection = pattern.select(q, view, 4095)
    assert selection.allowed.float().mean() < 0.6


def test_top_k_selects_the_block_with_the_highest_score():
    q, view = problem(8, 512)
    needle = torch.randn(16)
    q[:] = needle
    view.k[:, :, 200:208] = needle * 3
    selection = BlockTopK(block=8, top=1, window_blocks=1).select(q, view, 504)
    assert selection.allowed[..., 25].all()
    assert selection.allowed.sum(-1).max() <= 4


def test_future_blocks_are_not_scored():
    """In a causal call the best block lies in the past."""
    q, view = problem(64, 64)
    view.k[:, :, 56:] = q.unflatten(1, (2, 2)).mean((2, 3))[:, :, None] * 100
    selection = BlockTopK(block=8, top=1, window_blocks=1, sink_blocks=0).select(q, view, 0)
    assert not selection.allowed[:, :, 0, 1:].any()


@pytest.mark.parametrize("name", PATTERNS)
def test_errors(name):
    with pytest.raises(ValueError, match=r"block must be at least 1 .*got 0"):
        PATTERNS[name](block=0)
    with pytest.raises(ValueError, match=r"window_blocks must be at least 1 .*got 0"):
        PATTERNS[name](window_blocks=0)
    with pytest.raises(TypeError, match="sink_blocks must be an integer, got 1.5"):
        PATTERNS[name](sink_blocks=1.5)


@pytest.mark.parametrize("p", [0, 1.5, True, "0.9", float("nan")])
def test_p_is_a_share(p):
    for kind in (BlockTopP, XAttention):
        with pytest.raises(ValueError, match=r"p is a share of the attention, in \(0, 1\], got"):
            kind(p=p)


@pytest.mark.parametrize("kind", [BlockTopK, Quest])
def test_top_counts_blocks(kind):
    with pytest.raises(ValueError, match="top must be at least 0 .*got -1"):
        kind(top=-1)
