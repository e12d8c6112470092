"""The contract of policies, and the behaviour of each."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.compress import (
    POLICIES,
    RKV,
    AdaSnapKV,
    ExpectedQueries,
    LayerObservation,
    ObservedQueries,
    SnapKV,
    resolve_budget,
    select,
    select_across_heads,
)
from saccade.compress.window_attention import observed_received


def observed(length=200, width=64, heads=4, kv_heads=2, **options):
    torch.manual_seed(0)
    queries = ObservedQueries(torch.randn(2, heads, width, 16), 0.25, **options)
    k, v = torch.randn(2, 2, kv_heads, length, 16)
    half = torch.randn(2, heads, 16, 16)
    return LayerObservation(
        queries=queries,
        k=k,
        v=v,
        expected=ExpectedQueries(torch.randn(2, heads, 16), half @ half.mT / 16),
        output=torch.randn(heads, 16, 24),
        received=torch.rand(2, kv_heads, length),
    )


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("length", [3, 64, 65, 200])
def test_scores_every_key_of_every_kv_head(name, length):
    policy = POLICIES[name]()
    observation = observed(length, min(length, max(1, policy.observes.queries)))
    scores = policy.scores(observation, 20)
    assert scores.shape == (2, 2, length) and not scores.isnan().any()


@pytest.mark.parametrize("name", POLICIES)
def test_selection_is_in_order_and_distinct(name):
    index = select(POLICIES[name]().scores(observed(), 80), 80)
    assert index.shape == (2, 2, 80)
    assert (index.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("name", POLICIES)
def test_keeping_all_keeps_all(name):
    index = select(POLICIES[name]().scores(observed(), 200), resolve_budget(1.0, 200))
    assert torch.equal(index, torch.arange(200).expand(2, 2, 200))


def test_snapkv_keeps_its_window_and_the_keys_it_attends_to():
    observation = observed()
    needle = torch.randn(16)
    observation.k[:, :, 50] = needle * 4
    observation.queries.q[:] += needle
    kept = select(SnapKV().scores(observation, 140), 140)
    assert (kept[..., -64:] == torch.arange(136, 200)).all()
    assert (kept == 50).any(-1).all()


def test_snapkv_averages_the_heads_of_a_group():
    observation = observed(heads=2, kv_heads=1)
    alone = [
        replace(observation, queries=ObservedQueries(observation.queries.q[:, h : h + 1], 0.25))
        for h in range(2)
    ]
    first, second = (SnapKV(kernel=1).scores(one, 100) for one in alone)
    together = SnapKV(kernel=1).scores(observation, 100)
    finite = together.isfinite()
    assert torch.allclose(together[finite], ((first + second) / 2)[finite])


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 150),
    width=st.integers(1, 64),
    kept=st.integers(1, 150),
    ties=st.booleans(),
)
def test_budgets_of_any_size(length, width, kept, ties):
    """Exactly the budget, in order, sinks first, then new keys, and more keys for more budget."""
    kept, policy = min(kept, length), SnapKV()
    observation = observed(length, min(width, length))
    if ties:
        observation.k[:] = 0
    index = select(policy.scores(observation, kept), kept)
    assert index.shape == (2, 2, kept) and (index.diff(dim=-1) > 0).all()
    assert (index[..., : min(4, kept)] == torch.arange(min(4, kept))).all()
    newest = min(64, observation.queries.q.shape[2], (kept - min(4, kept) + 1) // 2)
    assert (index[..., kept - newest :] == torch.arange(length - newest, length)).all()
    if kept > 1:
        fewer = select(policy.scores(observation, kept - 1), kept - 1)
        held = torch.zeros(2, 2, length, dtype=torch.bool)
        assert held.scatter(-1, index, True).gather(-1, fewer).all()


@pytest.mark.parametrize("kept", [14, 30, 64, 70])
def test_a_budget_below_the_window_keeps_the_best_scored_key(kept):
    observation = observed()
    needle = torch.randn(16)
    observation.k[:, :, 50] = needle * 4
    observation.queries.q[:] += needle
    index = select(SnapKV().scores(observation, kept), kept)
    assert (index == 50).any(-1).all() and (index[..., -1] == 199).all()


def dense_weights(observation, *, softcap=None, sink_logits=None, read=None):
    """Weights `[B, H, w, L]` in float64, as a formula."""
    q, k = observation.queries.q.double(), observation.k.double()
    width, length = q.shape[2], k.shape[2]
    scores = q @ k.repeat_interleave(2, 1).mT * 0.25
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    unseen = torch.arange(length)[None] > torch.arange(length - width, length)[:, None]
    unseen = unseen if read is None else unseen | ~read
    scores = scores.masked_fill(unseen, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.double().view(1, -1, 1, 1).expand(2, -1, width, 1)
        scores = torch.cat((scores, column), -1)
    return scores.softmax(-1)[..., :length]


def test_scores_are_those_of_the_layers_own_attention():
    """Softcap, learned sinks and the blocks that each query read."""
    sinks, blocks = torch.tensor([0.0, 3, -2, 5]), torch.rand(2, 2, 20, 13) < 0.5
    blocks[..., -1] = blocks[..., -2] = blocks[..., -3] = True
    read = blocks.repeat_interleave(8, 3)[..., :100].repeat_interleave(2, 1)
    cases = [
        ({"softcap": 1.5}, {"softcap": 1.5}),
        ({"sink_logits": sinks}, {"sink_logits": sinks}),
        ({"blocks": blocks, "k_block": 8}, {"read": read}),
    ]
    for options, formula in cases:
        observation = observed(100, 20, **options)
        expected = dense_weights(observation, **formula)
        expected = expected.mean(2).unflatten(1, (2, -1)).mean(2)
        assert torch.allclose(observed_received(observation).double(), expected, atol=1e-5)


class TestAdaSnapKV:
    @pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
    @pytest.mark.parametrize("kept", [1, 10, 80, 200])
    def test_the_layer_keeps_its_budget(self, kept, floor):
        chosen = select_across_heads(AdaSnapKV().scores(observed(), kept), kept, floor)
        assert (chosen.sum((1, 2)) == kept * 2).all()
        assert (chosen.sum(-1) >= max(1, round(floor * kept))).all()

    def test_with_a_floor_of_one_it_is_snapkv(self):
        chosen = select_across_heads(AdaSnapKV().scores(observed(), 80), 80, 1.0)
        index = select(SnapKV().scores(observed(), 80), 80)
        alike = torch.zeros_like(chosen).scatter(-1, index, True)
        assert torch.equal(chosen, alike)

    def test_a_head_with_one_important_key_keeps_fewer(self):
        """A flat head keeps more than a sharp one, but never all."""
        observation = observed()
        needle = torch.randn(16)
        observation.k[:, 0, 50] = needle * 8
        observation.queries.q[:, :2] += needle
        counts = select_across_heads(AdaSnapKV().scores(observation, 90), 90, 0.2).sum(-1)
        assert (counts[:, 0] < 80).all() and (counts[:, 1] > 100).all()

    def test_masked_keys_are_never_chosen(self):
        """Heads with fewer keys, right-aligned: the same scores as without padding."""
        observation = observed(100, 20)
        positions = (torch.arange(130) - 30).expand(2, 2, -1).clamp_min(-1)
        wide = [
            torch.cat((torch.full((2, 2, 30, 16), 9.0), x), 2)
            for x in (observation.k, observation.v)
        ]
        padded = LayerObservation(
            queries=observation.queries, k=wide[0], v=wide[1], positions=positions
        )
        # Without pooling, whose averages would include the padding.
        scores = AdaSnapKV(kernel=1).scores(padded, 50)
        expected = AdaSnapKV(kernel=1).scores(observation, 50)
        assert torch.allclose(scores[..., 30:], expected, atol=1e-6)
        chosen = select_across_heads(scores, 120, 0.2)
        assert torch.equal(chosen, positions >= 0)

    @settings(max_examples=30, deadline=None)
    @given(lens=st.lists(st.integers(1, 60), min_size=2, max_size=2), kept=st.integers(1, 60))
    def test_heads_with_different_numbers_of_keys(self, lens, kept):
        """A second prompt: the budget of the layer is met exactly, each head keeps its sinks."""
        kept, longest = min(kept, sum(lens) // 2), max(lens)
        first = longest - torch.tensor(lens)
        column = torch.arange(longest).expand(2, 2, -1)
        positions = column.where(column >= first[:, None], -1)
        observation = replace(observed(longest, min(8, *lens)), positions=positions)
        chosen = select_across_heads(AdaSnapKV().scores(observation, kept), kept, 0.2)
        assert (chosen.sum((1, 2)) == 2 * kept).all() and not (chosen & (positions < 0)).any()
        sinks = (positions >= 0) & (column < first[:, None] + min(4, kept))
        assert (chosen | ~sinks).all()


def test_budget():
    assert resolve_budget(10, 100) == 10 and resolve_budget(0.25, 100) == 25
    assert resolve_budget(500, 100) == 100 and resolve_budget(0.001, 100) == 1


def test_rkv_is_its_formula():
    """Attention less likeness by the authors' formula, with whole matrices in float64."""
    torch.manual_seed(1)
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 90, 16)
    k[:, :, 40:70] = k[:, :, 10:40] + 0.2 * torch.randn(1, 2, 30, 16)  # a passage that returns
    queries = ObservedQueries(q, 0.25)
    scores = RKV().scores(LayerObservation(queries=queries, k=k, v=k), 40)
    logits = (q.double().unflatten(1, (2, 2)) @ k.double()[:, :, None].mT * 0.25).amax(2)
    weights = logits[..., :82].softmax(-1).mean(2)
    for head in range(2):
        unit = k[0, head].double() / k[0, head].double().norm(dim=-1, keepdim=True)
        cosines = unit @ unit.T
        cosines.fill_diagonal_(0)
        for row in range(90):
            alike = (cosines[row] > 0.5).nonzero().flatten().tolist()
            cosines[row, max(alike, default=0)] = 0
        likeness = cosines.mean(0).softmax(-1)
        for key in range(82):
            attention = weights[0, head, max(0, key - 3) : key + 4].max()
            expected = 0.07 * attention - 0.93 * likeness[key]
            assert abs(scores[0, head, key] - expected) < 1e-6
    assert (scores[..., 82:] == torch.inf).all()
