"""SpecMask: which patterns it tells, and that any operation on it finds the real matrix."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    eager_mask,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from saccade.core import Mask
from saccade.hf.mask import SpecMask, saccade_mask, stock_pattern

PADDING = torch.tensor([[False, True, True, True, True, True], [True] * 6])


def made(**changes):
    options = {
        "batch_size": 2,
        "q_length": 3,
        "kv_length": 6,
        "q_offset": 3,
        "kv_offset": 0,
        "mask_function": causal_mask_function,
    }
    return saccade_mask(**{**options, **changes})


def test_stock_patterns_are_recognized():
    """Private closures of transformers: if they change, masks become dense, slower but right."""
    window = sliding_window_causal_mask_function(4)
    assert stock_pattern(causal_mask_function, None) == Mask()
    assert stock_pattern(window, 4) == Mask(window=4)
    assert stock_pattern(masking_utils.bidirectional_mask_function, None) == Mask(causal=False)
    for other in (
        chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)),
        or_masks(causal_mask_function, causal_mask_function),
        and_masks(causal_mask_function, window),
        lambda batch, head, q, kv: kv <= q,
    ):
        assert stock_pattern(other, 4) is None


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("kv_offset", [0, 2])
def test_dense_equals_transformers(window, padding, kv_offset):
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(4)
    options = {
        "kv_offset": kv_offset,
        "kv_length": 6 - kv_offset,
        "mask_function": function,
        "local_size": window,
        "attention_mask": padding,
    }
    mask = made(**options)
    assert isinstance(mask, SpecMask) and mask.shape == (2, 1, 3, 6 - kv_offset)
    theirs = sdpa_mask(batch_size=2, q_length=3, q_offset=3, allow_is_causal_skip=False, **options)
    assert torch.equal(mask.dense(), theirs)


def test_operations_find_the_real_mask():
    mask = made(attention_mask=PADDING)
    dense = mask.dense()
    assert type(dense) is torch.Tensor
    for operation in (
        lambda m: m[:, :, :, :4],
        lambda m: m & True,
        lambda m: ~m,
        lambda m: torch.cat([m, m], dim=-1),
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: m.float(),
        lambda m: m.clone(),
    ):
        found = operation(mask)
        assert not isinstance(found, SpecMask) and torch.equal(found, operation(dense))
    assert mask.contiguous() is mask and mask.to("cpu") is mask
    assert (mask.ndim, mask.dtype, mask.device.type) == (4, torch.bool, "cpu")
    assert "False" in repr(mask)


def test_full_padding_mask_costs_nothing():
    assert made(attention_mask=torch.ones(2, 6, dtype=torch.bool)).spec.padding is None
    # Slots of a static cache that were not written yet are masked by causality.
    seen = torch.ones(2, 4, dtype=torch.bool)
    assert made(q_length=1, attention_mask=seen).spec.padding is None
    short = made(attention_mask=seen)
    assert torch.equal(short.spec.padding, torch.tensor([[True] * 4 + [False] * 2] * 2))


def test_live_counters_are_read_at_once():
    counter = torch.tensor([3])
    mask = made(q_offset=counter)
    counter += 3
    assert mask.spec.q_offset == 3


def test_other_patterns_become_real_masks():
    function = chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.int64))
    mask = made(mask_function=function, attention_mask=PADDING)
    theirs = eager_mask(
        batch_size=2,
        q_length=3,
        kv_length=6,
        q_offset=3,
        mask_function=function,
        attention_mask=PADDING,
    )
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, theirs == 0)
