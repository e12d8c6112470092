"""The attention function itself, called as transformers calls it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import saccade
from saccade.core import Unsupported
from saccade.hf.attention import saccade_attention
from saccade.hf.mask import saccade_mask

MODULE = nn.Module()
Q, K, V = (
    torch.randn(1, heads, 12, dim, generator=torch.Generator().manual_seed(heads + dim))
    for heads, dim in ((4, 16), (2, 16), (2, 24))
)


def call(**options):
    arguments = {"query": Q, "key": K, "value": V, "attention_mask": None, "scaling": 0.3}
    return saccade_attention(MODULE, **{**arguments, **options})


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask(causal):
    """Grouped heads, a value_dim of its own, output [B, Lq, Hq, Dv] contiguous."""
    output, weights = call(is_causal=causal)
    expected = saccade.attention(Q, K, V, causal=causal, scale=0.3, backend="reference")
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert output.shape == (1, 12, 4, 24) and output.is_contiguous() and weights is None


def test_window_counts_the_query_itself():
    expected = saccade.attention(Q, K, V, window=3, scale=0.3, backend="reference")
    torch.testing.assert_close(call(sliding_window=3)[0], expected.transpose(1, 2))


def test_2d_padding_mask_is_understood():
    padding = torch.ones(1, 12, dtype=torch.int64)
    padding[:, :4] = 0
    expected = saccade.attention(
        Q, K, V, scale=0.3, key_padding=padding.bool(), backend="reference"
    )
    torch.testing.assert_close(call(attention_mask=padding)[0], expected.transpose(1, 2))


def test_empty_slots_of_a_static_cache_never_matter():
    """The buffer behind the newest token may hold anything."""
    k, v = (torch.cat([x, torch.full_like(x, torch.nan)], dim=2) for x in (K, V))
    mask = saccade_mask(batch_size=1, q_length=12, kv_length=24)
    output, _ = call(key=k, value=v, attention_mask=mask)
    torch.testing.assert_close(output, call()[0])


@pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices", "block_table"])
def test_other_kinds_of_attention_are_refused(name):
    with pytest.raises(Unsupported, match=r'cannot run Module: it .* Use attn_implementation="e'):
        call(**{name: torch.zeros(1)})


def test_a_mask_of_another_length_is_refused():
    mask = saccade_mask(batch_size=1, q_length=12, kv_length=14, q_offset=2)
    with pytest.raises(Unsupported, match="made for 14 keys, but this layer holds 12"):
        call(attention_mask=mask)


def test_masks_of_a_strange_shape_are_refused():
    with pytest.raises(Unsupported, match=r"got \[1, 12, 12\]"):
        call(attention_mask=torch.ones(1, 12, 12, dtype=torch.bool))
