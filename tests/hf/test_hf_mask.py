"""SpecMask: which patterns it tells, and that any operation on it finds the real matrix."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from transformers import GptOssForCausalLM, masking_utils
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
    assert mask.to("cpu") is mask
    assert (mask.ndim, mask.dtype, mask.device.type) == (4, torch.bool, "cpu")
    assert "False" in repr(mask)


def assigned(mask):
    mask[0, 0, 0, 0] = 1
    mask[:, :, -1] = 0
    return mask


def through_a_view(mask):
    """What is written into a slice is written into the mask."""
    mask[:, :, 1:].squeeze(1).fill_(1)
    return mask


def pickled(mask):
    return pickle.loads(pickle.dumps(mask))


def copied_into(mask):
    mask.copy_(torch.zeros(mask.shape))
    return mask


OPERATIONS = {
    "slice": lambda m: m[:, :, :, :4],
    "index with tensors": lambda m: m[torch.tensor([1, 0]), :, torch.tensor([0, 2])],
    "and": lambda m: m.bool() & True,
    "not": lambda m: ~m.bool(),
    "add": lambda m: torch.ones(2, 4, 3, 6) + m,
    "subtract from": lambda m: 1.0 - m.float(),
    "equal": lambda m: m == 0,
    "cat list": lambda m: torch.cat([m, m], dim=-1),
    "cat tuple": lambda m: torch.cat((m, torch.zeros(2, 1, 3, 2, dtype=m.dtype)), dim=-1),
    "stack tuple": lambda m: torch.stack((m, m)),
    "stack dict": lambda m: torch.stack([*{"a": m, "b": m}.values()], dim=1),
    "broadcast_tensors": lambda m: torch.broadcast_tensors(m, torch.ones(2, 2, 3, 6))[0],
    "pad": lambda m: F.pad(m, (0, 2), value=0.0),
    "where": lambda m: torch.where(m.bool(), 0.0, -1.0),
    "expand": lambda m: m.expand(2, 4, 3, 6),
    "repeat": lambda m: m.repeat(1, 4, 1, 1),
    "repeat_interleave": lambda m: m.repeat_interleave(2, dim=1),
    "masked_fill": lambda m: m.masked_fill(torch.eye(3, 6, dtype=torch.bool), 1),
    "masked_fill_": lambda m: m.masked_fill_(torch.eye(3, 6, dtype=torch.bool), 1),
    "logical_or_": lambda m: m.logical_or_(torch.eye(3, 6, dtype=torch.bool)),
    "fill_ through a view": through_a_view,
    "copy_": copied_into,
    "index assignment": assigned,
    "float": lambda m: m.float(),
    "to dtype": lambda m: m.to(torch.float64),
    "to dtype by name": lambda m: m.to(dtype=torch.int64),
    "to like": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "to copy": lambda m: m.to(torch.float32, copy=True),
    "type": lambda m: m.type(torch.int32),
    "sum": lambda m: m.sum(-1),
    "min": lambda m: m.float().min(),
    "amax": lambda m: m.float().amax((1, 3)),
    "all": lambda m: m.all(),
    "nonzero": lambda m: m.nonzero(),
    "split": lambda m: torch.cat(m.split(2, dim=-1)[1:], dim=-1),
    "unbind": lambda m: torch.stack(list(m)),
    "transpose": lambda m: m.transpose(2, 3),
    "squeeze": lambda m: m.squeeze(1),
    "clone": lambda m: m.clone(),
    "detach": lambda m: m.detach(),
    "data": lambda m: m.data,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickled,
    "numpy": lambda m: torch.from_numpy(m.numpy()),
    "tolist": lambda m: torch.tensor(m.tolist()),
    "zeros_like": torch.zeros_like,
    "out=": lambda m: torch.eq(torch.arange(36).view(2, 1, 3, 6) % 5, 0, out=m.bool()),
    "contiguous": lambda m: m.contiguous(),
    "to device": lambda m: m.to("cpu"),
    "to device and dtype": lambda m: m.to("cpu", torch.float32, non_blocking=True),
}


@pytest.mark.parametrize(
    "config", [None, GptOssForCausalLM.config_class()], ids=["boolean", "additive"]
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_that_of_the_real_mask(name, config):
    """The result, and what attention would be given afterwards."""
    theirs = (sdpa_mask if config is None else eager_mask)(
        batch_size=2,
        q_length=3,
        kv_length=6,
        q_offset=3,
        attention_mask=PADDING,
        allow_is_causal_skip=False,
    ).contiguous()
    mask = made(attention_mask=PADDING, config=config)
    assert isinstance(mask, SpecMask) and (mask.shape, mask.dtype) == (theirs.shape, theirs.dtype)
    found, expected = OPERATIONS[name](mask), OPERATIONS[name](theirs)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(real(found), expected, rtol=0, atol=0)
    torch.testing.assert_close(real(mask.in_force()), theirs, rtol=0, atol=0)


def real(mask):
    return mask.dense() if isinstance(mask, SpecMask) else mask


def test_what_needs_no_matrix_makes_none():
    mask = made(attention_mask=PADDING)
    assert (mask.ndim, mask.dim(), len(mask), mask.numel()) == (4, 4, 2, 36)
    assert mask.to("cpu") is mask and mask.to(torch.bool) is mask
    assert mask.size(-1) == 6 and not mask.is_floating_point() and mask.in_force() is mask
    moved = mask.to("meta")
    assert isinstance(moved, SpecMask) and moved.device.type == "meta"


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
