"""Choosing a pattern: recall against softmax weights in float64, crossovers of made-up numbers."""

import pytest
import torch

from saccade.core import DenseKV, Mask
from saccade.ops import attend, make_call
from saccade.sparse import BlockTopK, FromLength, Quest
from saccade.sparse.choice import choose
from saccade.sparse.probe import Measured, Probe

FAST, SLOW = BlockTopK(block=8, top=2), Quest(block=8, top=4)


def test_recall_is_the_share_of_the_softmax_weights():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 16, 16), torch.randn(1, 2, 200, 16)
    view = DenseKV(k, torch.randn_like(k))
    probe = Probe({"fast": FAST})
    assert not probe.found
    probe.listen(listening=True)
    selection = probe.select(q, view, 184)
    dense = attend(make_call(q, view, mask=Mask()))
    assert torch.equal(attend(make_call(q, view, mask=Mask(), blocks=selection)).out, dense.out)
    at = torch.arange(184, 200)
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) / 4
    weights = scores.masked_fill(torch.arange(200) > at[:, None], -torch.inf).softmax(-1)
    seen = FAST.select(q, view, 184).visible(torch.arange(16), torch.arange(200))
    expected = float((weights * seen.repeat_interleave(2, 1)).sum(-1).mean())
    assert probe.found["fast", "prefill", 200].mean_recall == pytest.approx(expected, abs=1e-4)
    assert set(probe.found) == {("fast", "prefill", 200), ("fast", "decode", 200)}


def probed(rows):
    """A probe that found {(name, keys): (recall, ratio)}, the same in both phases."""
    probe = Probe({"fast": FAST, "slow": SLOW})
    for (name, keys), (recall, ratio) in rows.items():
        for phase in ("prefill", "decode"):
            probe.found[name, phase, keys] = Measured(recall * 2, ratio, 1.0, layers=2)
    return probe


ROWS = {
    ("fast", 1024): (0.99, 1.5), ("slow", 1024): (1.0, 1.2),
    ("fast", 2048): (0.96, 0.5), ("slow", 2048): (0.99, 0.8),
    ("fast", 4096): (0.93, 0.2), ("slow", 4096): (0.97, 0.4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("recall", "pattern", "least"), [(0.9, FAST, 2048), (0.95, SLOW, 2048), (0.98, None, None)]
)
def test_the_fastest_that_keeps_the_recall_is_taken_from_its_crossover_on(recall, pattern, least):
    choice = choose(probed(ROWS), recall)
    assert choice.pattern == (pattern and FromLength(pattern=pattern, least=least))
    assert ("keys on" in choice.why) == (pattern is not None)


def test_dense_where_no_pattern_pays():
    rows = {key: (recall, 1.0) for key, (recall, _) in ROWS.items()}
    choice = choose(probed(rows), 0.9)
    assert choice.pattern is None
    assert "is the most that pays" in choice.why
    assert choose(Probe({}), 0.9).pattern is None


@pytest.mark.parametrize("q_len", [1, 20])
def test_below_its_length_all_is_read(q_len):
    q, k = torch.randn(1, 4, q_len, 16), torch.randn(1, 2, 120, 16)
    view = DenseKV(k, k)
    above = FromLength(pattern=FAST, least=120).select(q, view, 120 - q_len).allowed
    assert torch.equal(above, FAST.select(q, view, 120 - q_len).allowed)
    below = FromLength(pattern=FAST, least=121).select(q, view, 120 - q_len)
    dense = attend(make_call(q, view, mask=Mask()))
    assert torch.equal(attend(make_call(q, view, mask=Mask(), blocks=below)).out, dense.out)


def test_errors():
    with pytest.raises(TypeError, match="must be a RulePattern, got 'quest'"):
        FromLength(pattern="quest", least=1)
    with pytest.raises(ValueError, match="least must be at least 0"):
        FromLength(pattern=FAST, least=-1)
