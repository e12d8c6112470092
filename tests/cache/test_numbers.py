"""Quantized caches and numbers that are none: NaN in padding, NaN in tokens, inf, the largest."""

import pytest
import torch

from saccade.cache import QuantizedCache
from saccade.core import Mask
from saccade.ops import attend, attention, make_call
from tests.cache.test_contract import qkv

KINDS = {
    "int8": {},
    "int4": {"bits_k": 4, "bits_v": 4},
    "fp8": {"fp8": True},
    "int8, not transformed": {"hadamard": False},
}
BOUND = {"int8": 0.05, "int4": 0.5, "fp8": 0.3, "int8, not transformed": 0.05}
BACKENDS = ("reference", "tiled", "auto")
PAD = 11


def filled(kind, k, v, chunk=20):
    cache = QuantizedCache(group=16, recent=8, **KINDS[kind])
    for at in range(0, k.shape[2], chunk):
        view = cache.append(k[:, :, at : at + chunk], v[:, :, at : at + chunk])
    return cache, view


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_may_hold_anything(kind, backend, bad):
    """Padded slots share a group with real keys; NaN in them changes no real key."""
    q, k, v = qkv(dim=32)
    padding = torch.arange(60)[None] >= torch.tensor([[PAD], [0]])
    v[0, :, :PAD] = bad
    if bad is torch.nan:  # a number does take part in its group of keys
        k[0, :, :PAD] = bad
    _, view = filled(kind, k, v)
    call = make_call(q[:, :, -20:], view, mask=Mask(), key_padding=padding)
    ours = attend(call, backend=backend).out
    for row, pad in ((0, PAD), (1, 0)):
        alone = (x[row : row + 1, :, pad:] for x in (k, v))
        exact = attention(q[row : row + 1, :, -20:], *alone, backend="reference")
        assert (ours[row : row + 1] - exact).abs().max() < BOUND[kind]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_without_a_number_reaches_those_who_attend_to_it(kind, where, backend):
    """As on dense keys: NaN for queries that see token 5, and no trace of it for others."""
    q, k, v = qkv(dim=32)
    (k if where == "key" else v)[0, 1, 5, 3] = torch.nan
    cache, view = filled(kind, k, v)
    ours = attend(make_call(q[:, :, -20:], view, mask=Mask()), backend=backend).out
    assert ours[0, 2:].isnan().any(-1).all()
    assert ours[0, :2].isfinite().all() and ours[1].isfinite().all()
    later = attend(make_call(q[:, :, -20:], view, mask=Mask(window=50)), backend="reference").out
    exact = attention(q[:, :, -20:], k.nan_to_num(), v.nan_to_num(), window=50)
    assert (later[:, :, 15:] - exact[:, :, 15:]).abs().max() < BOUND[kind]
    cache.truncate(9)
    view = cache.append(k[:, :, 9:30], v[:, :, 9:30])
    again = attend(make_call(q[:, :, 9:30], view, mask=Mask()), backend="reference").out
    assert again[0, 2:].isnan().any(-1).all(), "a cut group keeps its mark"


@pytest.mark.parametrize("value", [7e5, -1e30, torch.inf, 1e-5, 1e-30])
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_beyond_float16_are_refused_and_the_cache_goes_on(kind, name, value):
    q, k, v = qkv(dim=32)
    cache = QuantizedCache(group=16, recent=8, **KINDS[kind])
    bad = torch.full_like(k, value) if abs(value) < 1 else torch.zeros_like(k)
    bad[:, :, 4, 2] = value
    pair = (bad, v) if name == "keys" else (k, bad)
    with pytest.raises(ValueError, match=f"takes {name} of magnitudes between 6.1e-05 and 65504"):
        cache.append(*pair)
    assert cache.seen == 0
    cache.append(k[:, :, :30], v[:, :, :30])
    if abs(value) > 1:
        with pytest.raises(ValueError, match="Leave out type_k and type_v"):
            cache.append(*pair)
    view = cache.append(k[:, :, 30:], v[:, :, 30:])
    ours = attend(make_call(q[:, :, 30:], view, mask=Mask())).out
    assert (ours - attention(q[:, :, 30:], k, v)).abs().max() < BOUND[kind]


def test_float16_that_the_transform_would_overflow_is_refused():
    """A key of 64 channels of 3e4 becomes 2.4e5 in one channel, which float16 does not hold."""
    _, k, v = (x.half() for x in qkv(dim=64))
    k[:, :, 3] = 3e4
    cache = QuantizedCache()
    with pytest.raises(ValueError, match="takes keys of magnitudes between .* got inf"):
        cache.append(k, v)
    assert cache.seen == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_any_magnitude_keeps_its_relative_error(dtype, factor):
    q, k, v = (x.to(dtype) for x in qkv(300, dim=64))
    cache, _ = filled("int8", k[:, :, :-1], v[:, :, :-1] * factor, chunk=299)
    view = cache.append(k[:, :, -1:], v[:, :, -1:] * factor)
    ours = attend(make_call(q[:, :, -1:], view, mask=Mask())).out.float()
    exact = attention(q[:, :, -1:].double(), k.double(), v.double() * factor).float()
    assert (ours - exact).norm() / exact.norm() < 0.02
