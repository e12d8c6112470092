"""The contract of policies, and what each one promises."""

import pytest
import torch

from saccade.compress import (
    POLICIES,
    AdaSnapKV,
    Observed,
    SnapKV,
    received_attention,
    resolve_budget,
    select,
    select_across_heads,
)
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


class TestAdaSnapKV:
    @pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
    @pytest.mark.parametrize("kept", [1, 10, 80, 200])
    def test_the_layer_keeps_its_budget(self, kept, floor):
        chosen = select_across_heads(AdaSnapKV().scores(observed()), kept, floor)
        assert (chosen.sum((1, 2)) == kept * 2).all()
        assert (chosen.sum(-1) >= max(1, round(floor * kept))).all()

    def test_with_a_whole_floor_it_is_snapkv(self):
        chosen = select_across_heads(AdaSnapKV().scores(observed()), 80, 1.0)
        alike = torch.zeros_like(chosen).scatter(-1, select(SnapKV().scores(observed()), 80), True)
        assert torch.equal(chosen, alike)

    def test_a_head_that_looks_at_one_key_gives_room_to_another(self):
        """A flat head keeps more than a sharp one, but never all."""
        seen = observed()
        needle = torch.randn(16)
        seen.k[:, 0, 50] = needle * 8
        seen.q[:, :2] += needle
        counts = select_across_heads(AdaSnapKV().scores(seen), 90, 0.2).sum(-1)
        assert (counts[:, 0] < 80).all() and (counts[:, 1] > 100).all()

    def test_empty_slots_do_not_exist(self):
        """Heads with fewer keys, moved to the right: the same scores as without the gap."""
        seen = observed(100, 20)
        real = torch.ones(2, 2, 130, dtype=torch.bool)
        real[:, :, :30] = False
        wide = [torch.cat((torch.full((2, 2, 30, 16), 9.0), x), 2) for x in (seen.k, seen.v)]
        padded = Observed(q=seen.q, k=wide[0], v=wide[1], scale=0.25, real=real)
        # Without pooling: an average over neighbours also sees the edge.
        scores = AdaSnapKV(kernel=1).scores(padded)
        assert torch.allclose(scores[..., 30:], AdaSnapKV(kernel=1).scores(seen), atol=1e-6)
        chosen = select_across_heads(scores, 120, 0.2)
        assert torch.equal(chosen, real)


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
