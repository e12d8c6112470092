"""Kascade: layers that reuse blocks, its calibration against numpy and brute force, its file."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from saccade.core import BadInput, DenseKV, Mask, Unsupported
from saccade.ops import attend, make_call
from saccade.sparse import Kascade, KascadePlan
from saccade.sparse.calibration import Noted, best_reuse, best_starts, chosen
from saccade.sparse.kascade_plan import Reuse
from saccade.sparse.pattern import of_layers, selected

HEADS, KV_HEADS, DIM = 4, 2, 16
SIZES = {"block": 8, "top": 3, "window_blocks": 1}


def plan(*layers):
    return KascadePlan(model="M", weights="w", layers=(None, *layers), tokens=64, block=8, top=3)


PLAN = plan(Reuse(1, (0, 1), 0.9), Reuse(1, (1, 1), 0.8), Reuse(3, (0, 1), 1.0))


def draw(q_len, keys, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, HEADS, q_len, DIM, generator=generator)
    k = torch.randn(batch, KV_HEADS, keys, DIM, generator=generator)
    return q, DenseKV(k, k)


def best(q, k, top, block=8):
    """Blocks with the largest softmax weights of the queries of a group, sink and own left out."""
    keys, weights = len(k), np.zeros(-(-len(k) // block))
    for row in q:
        scores = k @ row / np.sqrt(DIM)
        shares = np.exp(scores - scores.max())
        shares = np.pad(shares / shares.sum(), (0, -keys % block))
        weights += shares.reshape(-1, block).sum(1)
    others = range(1, len(weights) - 1)
    return {0, len(weights) - 1, *sorted(others, key=lambda b: -weights[b])[:top]}


def test_layers_read_what_their_anchor_chose_in_this_call():
    layers = of_layers(Kascade(plan=PLAN, **SIZES), 4)
    assert layers[0] is None
    for keys in (200, 201):
        found = []
        for index, layer in enumerate(layers[1:]):
            q, kv = draw(1, keys, seed=index)
            found.append(layer.select(q, kv, keys - 1))
        first, follows, own = (each.allowed for each in found)
        assert torch.equal(follows, first[:, [1, 1]])
        for seed, each in ((0, first), (2, own)):
            q, kv = draw(1, keys, seed=seed)
            for h in range(KV_HEADS):
                group = q[0, 2 * h : 2 * h + 2, 0].double().numpy()
                expected = best(group, kv.k[0, h].double().numpy(), 3)
                assert set(each[0, h, 0].nonzero().flatten().tolist()) == expected


def test_blocks_of_another_call_are_not_reused():
    layers = of_layers(Kascade(plan=PLAN, **SIZES), 4)
    q, kv = draw(1, 200)
    layers[1].select(q, kv, 199)
    with pytest.raises(Unsupported, match="blocks of layer 1, which chose none for these"):
        layers[2].select(*draw(1, 201), 200)
    again = of_layers(Kascade(plan=PLAN, **SIZES), 4)
    with pytest.raises(Unsupported, match="chose none"):
        again[2].select(q, kv, 199)


def test_many_queries_read_all_keys():
    pattern = Kascade(**SIZES)
    assert selected(pattern, *draw(17, 90), 73) is None
    assert selected(pattern, *draw(16, 90), 74) is not None
    assert pattern.select(*draw(17, 90), 73).visible(torch.arange(17), torch.arange(74)).all()


def test_padding_is_never_chosen_and_a_padded_row_chooses_as_alone():
    room, keys = 24, 200
    q, kv = draw(2, keys, batch=2)
    kv.k[1, :, :room] = torch.nan
    real = torch.ones(2, keys, dtype=torch.bool)
    real[1, :room] = False
    pattern = Kascade(**SIZES)
    found = pattern.select(q, kv, keys - 2, real).allowed[1, ..., room // 8 :]
    alone = DenseKV(kv.k[1:, :, room:], kv.v[1:, :, room:])
    expected = pattern.select(q[1:], alone, keys - 2 - room).allowed[0]
    assert torch.equal(found, expected)


def test_attention_over_the_chosen_blocks():
    q, kv = draw(3, 120)
    blocks = Kascade(**SIZES).select(q, kv, 117)
    found = attend(make_call(q, kv, mask=Mask(), blocks=blocks)).out
    seen = torch.arange(120) <= torch.arange(117, 120)[:, None]
    seen = seen & blocks.visible(torch.arange(3), torch.arange(120))
    k, seen = (x.double().repeat_interleave(2, 1) for x in (kv.k, seen))
    weights = (q.double() @ k.mT * DIM**-0.5).masked_fill(seen == 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(found.double(), weights @ k, atol=1e-5, rtol=1e-5)


def noted(layers, queries=5, blocks=12):
    """Random weights of blocks, with what an anchor would read of them."""
    generator, found = torch.Generator().manual_seed(1), {}
    for index in layers:
        each = [torch.rand(KV_HEADS, blocks, generator=generator) ** 4 for _ in range(queries)]
        each = [x / x.sum(1, keepdim=True) for x in each]
        pattern = Kascade(**SIZES)
        found[index] = Noted(each, [chosen(x, pattern) for x in each])
    return found


def test_the_best_anchors_are_those_of_brute_force():
    found, layers = noted([0, 1, 2, 4, 5, 6]), [1, 2, 4, 5, 6]

    def kept(anchor, layer):
        shares = np.zeros((KV_HEADS, KV_HEADS))
        for w, c in zip(found[layer].weights, found[anchor].chosen, strict=True):
            shares += [[float(w[h][c[g]].sum()) for g in range(KV_HEADS)] for h in range(KV_HEADS)]
        return shares / len(found[layer].weights)

    def total(starts):
        runs = zip(starts, [*starts[1:], len(layers)], strict=True)
        return sum(kept(layers[a], i).max(1).mean() for a, b in runs for i in layers[a:b])

    for count in (1, 2, 3):
        options = [(0, *rest) for rest in combinations(range(1, len(layers)), count - 1)]
        expected = max(options, key=total)
        ours = best_reuse(found, count)
        assert [i for i, each in ours.items() if each.anchor == i] == [layers[a] for a in expected]
        for layer, (anchor, heads, recall) in ours.items():
            shares = kept(anchor, layer)
            assert recall == pytest.approx(shares.max(1).mean(), abs=1e-5)
            if layer != anchor:
                assert list(heads) == shares.argmax(1).tolist()


def test_more_anchors_than_layers():
    assert best_starts([[0.1, 0.5], [0.2]], 9) == [0, 1]


def test_a_plan_is_read_as_it_was_written(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    read = KascadePlan.load(tmp_path / "plan.json")
    assert read == PLAN and hash(read) == hash(PLAN)
    assert read.anchors == (1, 3) and read.recall == pytest.approx(0.9)
    other = plan(Reuse(1, (0, 1), 0.9), Reuse(1, (0, 1), 0.8), Reuse(3, (0, 1), 1.0))
    assert repr(read) == repr(PLAN) != repr(other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "is no plan of Kascade"),
        ({"layers": None}, "holds no whole plan"),
        ({"layers": [{"anchor": 0, "heads": ["x"], "recall": 1}]}, "holds no whole plan"),
        ({"layers": [{"anchor": 0, "heads": [0], "recall": "x"}]}, "holds no whole plan"),
        ({"layers": [{"anchor": 1, "heads": [0], "recall": 1}]}, "layer 0 of the plan has its"),
        ({"layers": [{"anchor": 0, "heads": [3], "recall": 1}]}, "from heads \\[3\\] of layer 0"),
        ({"layers": [None]}, "no layer that chooses"),
        ({"top": 1.5}, "expected a whole number, got 1.5"),
        ({"model": 3}, "expected a text, got 3"),
    ],
)
def test_files_that_are_no_plan(tmp_path, change, says):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(PLAN.as_json()) | change))
    with pytest.raises(BadInput, match=says) as error:
        KascadePlan.load(path)
    assert str(path) in str(error.value)
    path.write_text("{")
    with pytest.raises(BadInput, match="holds no whole plan"):
        KascadePlan.load(path)


def test_errors():
    with pytest.raises(TypeError, match="plan must be a KascadePlan or None, got 'plan.json'"):
        Kascade(plan="plan.json")
    with pytest.raises(ValueError, match="top must be at least 0 .*got -1"):
        Kascade(top=-1)
    with pytest.raises(BadInput, match="model of 4 layers, this one has 3"):
        of_layers(Kascade(plan=PLAN), 3)
