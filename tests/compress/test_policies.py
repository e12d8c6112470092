"""The contract of policies, and the behaviour of each."""

import pytest
import torch

from saccade.compress import (
    POLICIES,
    AdaSnapKV,
    LayerObservation,
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
    return LayerObservation(
        q=torch.randn(2, heads, width, 16),
        k=torch.randn(2, kv_heads, length, 16),
        v=torch.randn(2, kv_heads, length, 16),
        scale=0.25,
    )


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("length", [3, 64, 65, 200])
def test_scores_every_key_of_every_kv_head(name, length):
    policy = POLICIES[name]()
    observation = observed(length, min(length, policy.num_queries))
    scores = policy.scores(observation)
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


def test_snapkv_keeps_its_window_and_the_keys_it_attends_to():
    observation = observed()
    needle = torch.randn(16)
    observation.k[:, :, 50] = needle * 4
    observation.q[:] += needle
    kept = select(SnapKV().scores(observation), 64 + 5)
    assert (kept[..., -64:] == torch.arange(136, 200)).all()
    assert (kept == 50).any(-1).all()


def test_snapkv_averages_the_heads_of_a_group():
    observation = observed(heads=2, kv_heads=1)
    alone = [
        SnapKV(kernel=1).scores(
            LayerObservation(
                q=observation.q[:, h : h + 1], k=observation.k, v=observation.v, scale=0.25
            )
        )
        for h in range(2)
    ]
    together = SnapKV(kernel=1).scores(observation)
    finite = together.isfinite()
    assert torch.allclose(together[finite], ((alone[0] + alone[1]) / 2)[finite])


class TestAdaSnapKV:
    @pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
    @pytest.mark.parametrize("kept", [1, 10, 80, 200])
    def test_the_layer_keeps_its_budget(self, kept, floor):
        chosen = select_across_heads(AdaSnapKV().scores(observed()), kept, floor)
        assert (chosen.sum((1, 2)) == kept * 2).all()
        assert (chosen.sum(-1) >= max(1, round(floor * kept))).all()

    def test_with_a_floor_of_one_it_is_snapkv(self):
        chosen = select_across_heads(AdaSnapKV().scores(observed()), 80, 1.0)
        alike = torch.zeros_like(chosen).scatter(-1, select(SnapKV().scores(observed()), 80), True)
        assert torch.equal(chosen, alike)

    def test_a_head_with_one_important_key_keeps_fewer(self):
        """A flat head keeps more than a sharp one, but never all."""
        observation = observed()
        needle = torch.randn(16)
        observation.k[:, 0, 50] = needle * 8
        observation.q[:, :2] += needle
        counts = select_across_heads(AdaSnapKV().scores(observation), 90, 0.2).sum(-1)
        assert (counts[:, 0] < 80).all() and (counts[:, 1] > 100).all()

    def test_masked_keys_are_never_chosen(self):
        """Heads with fewer keys, right-aligned: the same scores as without padding."""
        observation = observed(100, 20)
        key_mask = torch.ones(2, 2, 130, dtype=torch.bool)
        key_mask[:, :, :30] = False
        wide = [
            torch.cat((torch.full((2, 2, 30, 16), 9.0), x), 2)
            for x in (observation.k, observation.v)
        ]
        padded = LayerObservation(
            q=observation.q, k=wide[0], v=wide[1], scale=0.25, key_mask=key_mask
        )
        # Without pooling, whose averages would include the padding.
        scores = AdaSnapKV(kernel=1).scores(padded)
        assert torch.allclose(scores[..., 30:], AdaSnapKV(kernel=1).scores(observation), atol=1e-6)
        chosen = select_across_heads(scores, 120, 0.2)
        assert torch.equal(chosen, key_mask)


def test_budget():
    assert resolve_budget(10, 100) == 10 and resolve_budget(0.25, 100) == 25
    assert resolve_budget(500, 100) == 100 and resolve_budget(0.001, 100) == 1


def test_received_attention_sums_softmax_weights():
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    view = DenseKV(k, v)
    lse = attend(q, view, mask=Mask()).lse
    mass = received_attention(q, view, lse, 0.25)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.25
    hidden = torch.arange(30)[None] > torch.arange(21, 30)[:, None]
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1).sum((1, 2))
    assert torch.allclose(mass, expected, atol=1e-4)
    assert torch.allclose(mass.sum(-1), torch.full((2,), 36.0))
