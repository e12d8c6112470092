"""Selections against a formula in float64, block by block, by C++ and by PyTorch alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.ops.selection import BlockRule, native, select_blocks, summarize
from saccade.ops.selection import select as module

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 24


@pytest.fixture(params=["kernels", "torch"])
def either(request, monkeypatch):
    """Both implementations; the kernels only where they were built."""
    if request.param == "torch":
        monkeypatch.setattr(native, "usable", lambda q, rows: False)
    elif not native.usable(torch.zeros(1, 1, 1, 8), None):
        pytest.skip("built without C++ kernels")
    return request.param


def draw(q_len, kv_len, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, q_len, DIM, generator=generator).to(dtype)
    return q, torch.randn(BATCH, KV_HEADS, kv_len, DIM, generator=generator).to(dtype)


def score(rule, q, k):
    """Of queries [n, D] of a group for the keys of a block [t, D], in float64."""
    if rule.summary == "mean":
        return (q @ k.mean(0)).sum()
    return np.maximum(q * k.max(0), q * k.min(0)).sum()


def expected(rule, q, k, offset):
    """The grid as the rule says, with Python loops over numpy arrays in float64."""
    q, k = q.double().numpy(), k.double().numpy()
    group, length = q.shape[1] // k.shape[1], k.shape[2]
    blocks, whole = -(-length // rule.k_block), length // rule.k_block
    grid = np.zeros((q.shape[0], k.shape[1], -(-q.shape[2] // rule.q_block), blocks), dtype=bool)
    for b, h, a in np.ndindex(grid.shape[:3]):
        first, stop = a * rule.q_block, min((a + 1) * rule.q_block, q.shape[2])
        own, last = (offset + first) // rule.k_block, (offset + stop - 1) // rule.k_block
        heads = q[b, h * group : (h + 1) * group, first:stop]
        others = []
        for n in range(last + 1):
            strided = rule.stride and n % rule.stride == 0
            always = n < rule.sinks or n > own - rule.window or strided
            summarized = rule.summary in ("mean", "bounds")
            if always or (summarized and n >= whole):
                grid[b, h, a, n] = True
            elif rule.summary != "none":
                others.append(n)
        keys = [k[b, h, n * rule.k_block : (n + 1) * rule.k_block] for n in others]
        if rule.summary == "keys":
            mass = masses(heads, k[b, h], offset + first, rule.k_block)
            chosen = sorted(range(len(others)), key=lambda i: -mass[others[i]])[: rule.top]
        elif rule.share:
            chosen = by_share(rule, heads, keys)
        else:
            scores = [score(rule, heads.reshape(-1, DIM), each) for each in keys]
            chosen = np.argsort(scores)[::-1][: rule.top]
        grid[b, h, a, [others[i] for i in chosen]] = True
    return torch.from_numpy(grid)


def masses(heads, k, first, block):
    """Of each block, the softmax weights of its keys, summed over heads and queries."""
    blocks, found = -(-len(k) // block), 0
    for q, at in ((q, first + i) for head in heads for i, q in enumerate(head)):
        weights = np.exp(k[: at + 1] @ q * DIM**-0.5)
        padded = np.zeros(blocks * block)
        padded[: at + 1] = weights / weights.sum()
        found = found + padded.reshape(blocks, block).sum(1)
    return found


def by_share(rule, heads, keys):
    """Indices of the fewest blocks whose mean softmax weight over the heads reaches the share."""
    if not keys:
        return []
    means = np.stack([each.mean(0) for each in keys])
    scores = heads.mean(1) @ means.T * DIM**-0.5
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights = (weights / weights.sum(1, keepdims=True)).mean(0)
    order = np.argsort(weights)[::-1]
    needed = int((np.cumsum(weights[order]) < rule.share - 1e-9).sum()) + 1
    return order[:needed]


def rows_of(rule, k):
    if rule.summary == "keys":
        return k
    return None if rule.summary == "none" else summarize(k, rule.k_block, rule.summary)


RULES = st.builds(
    BlockRule,
    summary=st.sampled_from(["none", "mean", "bounds", "keys"]),
    q_block=st.sampled_from([1, 5, 8]),
    k_block=st.sampled_from([4, 8]),
    sinks=st.integers(0, 2),
    window=st.integers(1, 3),
    stride=st.integers(0, 5),
    top=st.integers(0, 6),
)


@settings(max_examples=40, deadline=None)
@given(rule=RULES, q_len=st.integers(1, 20), past=st.integers(0, 90), seed=st.integers(0, 9))
def test_kernels_select_what_the_formula_says(rule, q_len, past, seed):
    q, k = draw(q_len, past + q_len, seed=seed)
    found = select_blocks(rule, q, rows_of(rule, k), past, past + q_len).allowed
    assert torch.equal(found.expand_as(expected(rule, q, k, past)), expected(rule, q, k, past))


@pytest.mark.parametrize("summary", ["none", "mean", "bounds", "keys"])
@pytest.mark.parametrize(("q_len", "past"), [(1, 95), (7, 60), (40, 0), (33, 50)])
def test_both_select_what_the_formula_says(either, summary, q_len, past):
    rule = BlockRule(summary=summary, q_block=8, k_block=8, sinks=1, window=2, stride=5, top=3)
    q, k = draw(q_len, past + q_len)
    found = select_blocks(rule, q, rows_of(rule, k), past, past + q_len).allowed
    assert torch.equal(found.expand_as(expected(rule, q, k, past)), expected(rule, q, k, past))


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
@pytest.mark.parametrize(("q_len", "past"), [(1, 95), (21, 60)])
def test_a_share_takes_the_fewest_blocks_that_hold_it(either, share, q_len, past):
    rule = BlockRule(summary="mean", q_block=8, k_block=8, sinks=1, window=1, share=share)
    q, k = draw(q_len, past + q_len)
    q = q * 4
    found = select_blocks(rule, q, rows_of(rule, k), past, past + q_len).allowed
    assert torch.equal(found, expected(rule, q, k, past))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("summary", ["bounds", "keys"])
def test_half_precision(either, dtype, summary):
    rule = BlockRule(summary=summary, q_block=4, k_block=8, sinks=0, window=1, top=4)
    q, k = draw(1, 400, dtype)
    found = select_blocks(rule, q, rows_of(rule, k), 399, 400).allowed
    assert torch.equal(found, expected(rule, q, k, 399))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("summary", ["none", "mean", "bounds", "keys"])
@pytest.mark.parametrize(("q_len", "past"), [(1, 95), (33, 50)])
def test_a_gpu_selects_what_the_formula_says(summary, q_len, past):
    rule = BlockRule(summary=summary, q_block=8, k_block=8, sinks=1, window=2, stride=5, top=3)
    q, k = draw(q_len, past + q_len)
    rows = None if summary == "none" else rows_of(rule, k).cuda()
    found = select_blocks(rule, q.cuda(), rows, past, past + q_len).allowed.cpu()
    assert torch.equal(found.expand_as(expected(rule, q, k, past)), expected(rule, q, k, past))


def test_bounds_are_never_below_a_score_of_the_block(either):
    """The property that Quest rests on, of single queries and heads."""
    q, k = draw(1, 64)
    rows = summarize(k, 8, "bounds")
    bounds = (
        q[:, ::2].clamp_min(0) @ rows[..., :DIM].mT + q[:, ::2].clamp_max(0) @ rows[..., DIM:].mT
    )
    scores = (q[:, ::2] @ k.mT).unflatten(3, (8, 8)).amax(-1)
    assert (bounds >= scores - 1e-5).all()


def test_nan_in_a_key_hides_its_block_and_no_other(either):
    rule = BlockRule(summary="mean", q_block=1, k_block=8, sinks=0, window=1, top=2)
    q, k = draw(1, 80)
    before = select_blocks(rule, q, rows_of(rule, k), 79, 80).allowed
    worst = int((~before[0, 0, 0]).nonzero()[0])
    k[:, :, worst * 8] = torch.nan
    after = select_blocks(rule, q, rows_of(rule, k), 79, 80).allowed
    assert torch.equal(before[0, 0], after[0, 0])


def test_errors():
    rule = BlockRule(summary="mean", q_block=8, k_block=8, sinks=0, window=1, top=2)
    q, k = draw(1, 80)
    with pytest.raises(ValueError, match="needs summaries"):
        module.select_blocks(rule, q, None, 79, 80)
    with pytest.raises(ValueError, match="needs summaries"):
        module.select_blocks(rule, q, summarize(k, 8, "bounds"), 79, 80)
    with pytest.raises(ValueError, match="share must be in"):
        BlockRule(summary="mean", q_block=8, k_block=8, sinks=0, window=1, top=2, share=0.5)
    with pytest.raises(ValueError, match="k_block must be at least 1 "):
        BlockRule(summary="mean", q_block=8, k_block=0, sinks=0, window=1)
