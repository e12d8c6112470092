"""Received attention against a dense float64 softmax written here, whatever the mask."""

import pytest
import torch

from saccade.cache import QuantizedCache, RingCache
from saccade.compress import received_attention, received_by_heads
from saccade.core import BlockSelection, DenseKV, Mask
from saccade.ops import attend, make_call

LENGTH, NEW = 70, 23


def qkv(scale=1.0):
    torch.manual_seed(3)
    q = torch.randn(2, 4, NEW, 16, dtype=torch.float64) * scale
    k, v = torch.randn(2, 2, 2, LENGTH, 16, dtype=torch.float64)
    return q, k * scale, v


def softmax(
    q, k, *, window=None, sinks=0, softcap=None, sink_logits=None, slopes=None, hidden=None
):
    """Weights `[B, H, t, L]` of the newest queries, in float64."""
    scores = q @ k.repeat_interleave(2, 1).mT * 0.25
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    distance = torch.arange(LENGTH - NEW, LENGTH)[:, None] - torch.arange(LENGTH)[None]
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    unseen = distance < 0
    if window:
        unseen = unseen | ((distance >= window) & (torch.arange(LENGTH) >= sinks))
    if hidden is not None:
        unseen = unseen | hidden
    scores = scores.masked_fill(unseen, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.view(1, -1, 1, 1).expand(2, 4, NEW, 1)
        scores = torch.cat((scores, column), -1)
    return scores.softmax(-1).nan_to_num(0)[..., :LENGTH]


BLOCKS = torch.rand(2, 2, 6, 9, generator=torch.Generator().manual_seed(1)) < 0.5
BLOCKS[..., -1] = True
HEADS = BLOCKS.repeat_interleave(2, 1)
READ = HEADS.repeat_interleave(4, 2)[:, :, :NEW].repeat_interleave(8, 3)[..., :LENGTH]
PADDING = torch.arange(LENGTH)[None] >= torch.tensor([[11], [0]])
CASES = {
    "causal": ({}, {}),
    "window": ({"mask": Mask(window=9)}, {"window": 9}),
    "window of one": ({"mask": Mask(window=1)}, {"window": 1}),
    "window and sinks": ({"mask": Mask(window=9, sinks=3)}, {"window": 9, "sinks": 3}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "learned sinks": ({"sink_logits": torch.tensor([0.0, 1, 2, 9])}, {}),
    "alibi": ({"alibi_slopes": torch.tensor([0.5, 0.1, 0.0, 2.0])}, {}),
    "padding": ({"key_padding": PADDING}, {"hidden": ~PADDING[:, None, None]}),
    "blocks": ({"blocks": BlockSelection(allowed=BLOCKS, q_block=4, k_block=8)}, {"hidden": ~READ}),
}


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("name", CASES)
def test_mass_is_that_of_a_dense_softmax(name, scale):
    """With large scores too, where a key outside the window would weigh more than e^30."""
    q, k, v = qkv(scale)
    options, formula = CASES[name]
    formula = dict(formula)
    if "sink_logits" in options:
        formula["sink_logits"] = options["sink_logits"].double()
    if "alibi_slopes" in options:
        formula["slopes"] = options["alibi_slopes"].double()
    call = make_call(q, DenseKV(k, v), **{"mask": Mask(), **options})
    received = received_attention(call, attend(call, backend="reference").lse)
    expected = softmax(q, k, **formula)
    assert torch.allclose(received.mass.double(), expected.sum((1, 2)), atol=2e-4, rtol=1e-4)
    groups, lse = expected.unflatten(1, (2, 2)), attend(call, backend="reference").lse
    for largest, by_head in ((False, groups.sum(3).mean(2)), (True, groups.amax((2, 3)))):
        found = received_by_heads(call, lse, largest=largest)
        assert torch.allclose(found.double(), by_head, atol=2e-4, rtol=1e-4)
    if name != "learned sinks":
        rows = (expected.sum(-1) > 0.5).sum((1, 2)).double()
        assert torch.allclose(received.mass.sum(-1).double(), rows, rtol=1e-4)


def test_queries_in_reach_follow_the_mask_and_not_the_blocks():
    q, k, v = qkv()
    mask, blocks = Mask(window=9, sinks=3), CASES["blocks"][0]["blocks"]
    call = make_call(q, DenseKV(k, v), mask=mask, blocks=blocks, key_padding=PADDING)
    found = received_attention(call, attend(call).lse).queries
    q_pos, k_pos = torch.arange(LENGTH - NEW, LENGTH)[:, None], torch.arange(LENGTH)[None]
    expected = (mask.allows(q_pos, k_pos)[None] & PADDING[:, None]).sum(1)
    assert torch.equal(found, expected.float())


def test_views_of_rings_and_transformed_keys():
    """Keys of a ring lie in any order; those of an int8 cache are stored transformed."""
    q, k, v = (x.float() for x in qkv())
    ring, quantized = RingCache(window=30, sinks=2, chunk=NEW), QuantizedCache(group=16, recent=16)
    for cache, window, sinks, bound in ((ring, 30, 2, 1e-4), (quantized, None, 0, 0.05)):
        cache.append(k[:, :, :-NEW], v[:, :, :-NEW])
        view = cache.append(k[:, :, -NEW:], v[:, :, -NEW:])
        call = make_call(q, view, mask=Mask(window=window, sinks=sinks))
        mass = received_attention(call, attend(call).lse).mass
        expected = softmax(q.double(), k.double(), window=window, sinks=sinks).sum((1, 2))
        assert (mass - expected).abs().max() < bound
