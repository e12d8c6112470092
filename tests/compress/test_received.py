"""Received attention against a dense float64 softmax written here, whatever the mask."""

import pytest
import torch

from saccade.cache import QuantizedCache, RingCache
from saccade.compress import received_attention
from saccade.core import BlockSelection, DenseKV, Mask, Unsupported
from saccade.ops import attend, attend_received, make_call
from tests.support import views

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


def single(call):
    """The call in float32, as kernels take it."""
    kv = DenseKV(call.kv.k.float(), call.kv.v.float())
    return call.with_(q=call.q.float(), kv=kv)


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
    received = received_attention(call, attend_received(call, backend="reference")[1])
    expected = softmax(q, k, **formula)
    assert torch.allclose(received.mass.double(), expected.sum((1, 2)), atol=2e-4, rtol=1e-4)
    groups = expected.unflatten(1, (2, 2))
    for largest, by_head in ((False, groups.sum(3).mean(2)), (True, groups.amax((2, 3)))):
        for backend in ("reference", "cpu"):
            plain = call if backend == "reference" else single(call)
            found = attend_received(plain, backend=backend, largest=largest)[1]
            assert torch.allclose(found.double(), by_head, atol=2e-4, rtol=1e-4)
    if name != "learned sinks":
        rows = (expected.sum(-1) > 0.5).sum((1, 2)).double()
        assert torch.allclose(received.mass.sum(-1).double(), rows, rtol=1e-4)


def test_queries_in_reach_follow_the_mask_and_not_the_blocks():
    q, k, v = qkv()
    mask, blocks = Mask(window=9, sinks=3), CASES["blocks"][0]["blocks"]
    call = make_call(q, DenseKV(k, v), mask=mask, blocks=blocks, key_padding=PADDING)
    found = received_attention(call, attend_received(call)[1]).queries
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
        mass = received_attention(call, attend_received(call)[1]).mass
        expected = softmax(q.double(), k.double(), window=window, sinks=sinks).sum((1, 2))
        assert (mass - expected).abs().max() < bound


def formula(q, k, scale, offset):
    """Weights `[B, Hkv, G, t, L]` in float64 of causal queries at `offset` and later."""
    grouped = q.double().unflatten(1, (k.shape[1], -1))
    scores = scale * grouped @ k.double()[:, :, None].mT
    at = torch.arange(offset, offset + q.shape[2])[:, None]
    return scores.masked_fill(torch.arange(k.shape[2]) > at, -torch.inf).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rows", "keys"),
    [(9, 3, 64, 300, 300), (4, 4, 37, 5, 150), (5, 1, 136, 1, 131), (8, 2, 16, 140, 400)],
)
def test_kernels_follow_the_formula(dtype, heads, kv_heads, dim, rows, keys):
    """Every ratio of heads, odd head dims, few rows and many, on one thread and on three."""
    torch.manual_seed(dim)
    q = torch.randn(2, heads, rows, dim).mul(2).to(dtype)
    k, v = (torch.randn(2, kv_heads, keys, dim).to(dtype) for _ in range(2))
    call = make_call(q, DenseKV(k, v), mask=Mask(), scale=0.2)
    weights = formula(q, k, 0.2, keys - rows)
    bound = 1e-4 if dtype == torch.float32 else 1e-3  # products of 16-bit numbers are exact
    threads = torch.get_num_threads()
    for largest, right in ((False, weights.sum(3).mean(2)), (True, weights.amax((2, 3)))):
        results = []
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            try:
                results.append(attend_received(call, backend="cpu", largest=largest))
            finally:
                torch.set_num_threads(threads)
            out, received = results[-1]
            assert torch.allclose(received.double(), right, rtol=bound, atol=1e-6)
            assert torch.allclose(out.lse, attend(call, backend="cpu").lse, rtol=1e-5, atol=1e-5)
        assert torch.equal(results[1][1], results[2][1])  # in whatever order threads add
        again = attend(call, backend="cpu").out
        assert torch.allclose(results[0][0].out.float(), again.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["ring", "paged", "ragged", "quantized"])
def test_kernels_read_every_view_of_keys(kind):
    """Keys of a view are those of the formula, by their positions; some heads have fewer."""
    q, k, v = (x.float() for x in qkv())
    kept = torch.rand(2, 2, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.7
    view = {
        "ring": lambda: views.ring(k, v),
        "paged": lambda: views.paged(k, v, 16),
        "ragged": lambda: views.ragged(k, v, kept),
        "quantized": lambda: views.quantized(k, v, 6),
    }[kind]()
    hidden = ~kept.repeat_interleave(2, 1)[:, :, None] if kind == "ragged" else None
    call = make_call(q, view, mask=Mask())
    right = softmax(q.double(), k.double(), hidden=hidden).unflatten(1, (2, 2)).sum(3).mean(2)
    found = attend_received(call, backend="cpu")[1]
    assert (found - right).abs().max() < (0.05 if kind == "quantized" else 1e-5)


def test_packed_sequences_are_refused():
    q, k, v = (x.float() for x in qkv())
    bounds = torch.tensor([0, 10, NEW], dtype=torch.int32)
    kv = DenseKV(k[:1, :, :NEW], v[:1, :, :NEW])
    packed = make_call(q[:1], kv, mask=Mask(), cu_seqlens=bounds)
    with pytest.raises(Unsupported, match="packed"):
        attend_received(packed)
