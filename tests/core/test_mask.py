"""Mask: visibility, key ranges, slots and pair counts all agree with brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.core import Mask
from saccade.core.mask import KeyRange

masks = st.one_of(
    st.just(Mask()),
    st.just(Mask(causal=False)),
    st.builds(Mask, window=st.integers(1, 20), sinks=st.integers(0, 8)),
)


def brute(mask, q_len, num_keys, offset):
    q = torch.arange(offset, offset + q_len)[:, None]
    return mask.allows(q, torch.arange(num_keys)[None]).expand(q_len, num_keys)


@given(masks, st.integers(1, 12), st.integers(0, 40), st.integers(0, 40))
def test_pair_count_is_exact(mask, q_len, num_keys, offset):
    expected = int(brute(mask, q_len, num_keys, offset).sum())
    assert mask.num_pairs(q_len, num_keys, offset) == expected


@given(masks, st.integers(1, 12), st.integers(0, 40), st.integers(0, 40))
def test_key_ranges_are_the_union_over_the_queries(mask, q_len, num_keys, offset):
    needed = brute(mask, q_len, num_keys, offset).any(0)
    inside = torch.zeros(num_keys, dtype=torch.bool)
    last = 0
    for start, stop in mask.key_ranges(offset, offset + q_len - 1, num_keys):
        assert last <= start < stop <= num_keys
        inside[start:stop] = True
        last = stop
    assert not (needed & ~inside).any()
    # With a window the union over neighbouring queries has no holes, so no extra key is read.
    assert torch.equal(inside, needed)


@given(masks, st.integers(1, 12), st.integers(0, 40), st.integers(0, 20), st.integers(1, 20))
def test_full_means_every_pair_is_visible(mask, q_len, offset, start, count):
    visible = mask.allows(
        torch.arange(offset, offset + q_len)[:, None], torch.arange(start, start + count)[None]
    )
    keys = KeyRange(start, start + count)
    assert not mask.is_full(offset, offset + q_len - 1, keys) or visible.all()
    if mask.sinks == 0:
        assert mask.is_full(offset, offset + q_len - 1, keys) == bool(visible.all())


def test_window_example():
    """Token 1500 attends to 477..1500 with a window of 1024: 1024 keys, itself counted."""
    mask = Mask(window=1024)
    assert mask.key_ranges(1500, 1500, 3000) == (KeyRange(477, 1501),)
    assert mask.key_ranges(2000, 2000, 3000) == (KeyRange(977, 2001),)
    assert mask.num_pairs(1, 3000, 1500) == 1024


def test_slots():
    assert Mask().num_slots(5000, 512) == 5000
    assert Mask(window=1024, sinks=4).num_slots(5000, 512) == 4 + 1023 + 512
    assert Mask(window=1024).num_slots(100, 512) == 100


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": 0}, "window must be at least 1 key"),
        ({"window": 4, "causal": False}, "window needs causal=True"),
        ({"sinks": -1, "window": 4}, "sinks must be 0 or more"),
        ({"sinks": 4}, "sinks=4 needs a window"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        Mask(**options)
