"""The contract of policies, and what each one promises."""

import pytest
import torch

from saccade.compress import POLICIES, Observed, received_attention, resolve_budget, select
from saccade.compress.snapkv import SnapKV
from saccade.core import DenseKV, Mask
from saccade.ops import attend


def observed(length=200, width=64, heads=4, kv_heads=2):
    torch.manual_seed(0)
    return Observed(
        q=torch.randn(2, heads, width, 16),
        k=torch.randn(2, kv_heads, length, 16),
        v=torch.randn(2, kv_heads, length, 16),
        scale=0.25,
    )


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("length", [3, 64, 65, 200])
def test_scores_every_key_of_every_kv_head(name, length):
    policy = POLICIES[name]()
    seen = observed(length, min(length, policy.num_queries))
    scores = policy.scores(seen)
    assert scores.shape == (2, 2, length) and not scores.isnan().any()


@pytest.mark.parametrize("name", POLICIES)
def test_selection_is_in_order_and_distinct(name):
    index = select(POLICIES[name]().scores(observed()), 80)
    assert index.shape == (2, 2, 80)
    assert (index.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("name", POLICIES)
def test_keeping_all_keeps_all(name):
    index = select(POLICIES[name]().scores(observed()), resolve_budget(1.0, 200))
    assert torch.equal(index, torch.arange(200).expand(2, 2, 200))


def test_snapkv_keeps_its_window_and_what_it_attends_to():
    seen = observed()
    needle = torch.randn(16)
    seen.k[:, :, 50] = needle * 4
    seen.q[:] += needle
    kept = select(SnapKV().scores(seen), 64 + 5)
    assert (kept[..., -64:] == torch.arange(136, 200)).all()
    assert (kept == 50).any(-1).all()


def test_snapkv_heads_of_a_group_vote_together():
    seen = observed(heads=2, kv_heads=1)
    alone = [
        SnapKV(kernel=1).scores(Observed(q=seen.q[:, h : h + 1], k=seen.k, v=seen.v, scale=0.25))
        for h in range(2)
    ]
    together = SnapKV(kernel=1).scores(seen)
    finite = together.isfinite()
    assert torch.allclose(together[finite], ((alone[0] + alone[1]) / 2)[finite])


def test_budget():
    assert resolve_budget(10, 100) == 10 and resolve_budget(0.25, 100) == 25
    assert resolve_budget(500, 100) == 100 and resolve_budget(0.001, 100) == 1


def test_received_attention_sums_what_softmax_gives():
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    view = DenseKV(k, v)
    lse = attend(q, view, mask=Mask()).lse
    mass = received_attention(q, view, lse, 0.25)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.25
    hidden = torch.arange(30)[None] > torch.arange(21, 30)[:, None]
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1).sum((1, 2))
    assert torch.allclose(mass, expected, atol=1e-4)
    assert torch.allclose(mass.sum(-1), torch.full((2,), 36.0))
