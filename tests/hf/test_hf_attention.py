"""The attention function itself, called as transformers calls it."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import saccade
from saccade.core import Unsupported
from saccade.hf.attention import saccade_attention
from saccade.hf.extra_arguments import HARMLESS
from saccade.hf.mask import saccade_mask
from saccade.hf.register import KEY
from tests.tiny_models import tiny_config, tiny_model

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


@pytest.mark.parametrize("window", [None, 0, -1, [4, 4]])
def test_windows_that_are_no_number_of_keys_are_none(window):
    """Configs without a window say so in all of these ways."""
    found, _ = call(sliding_window=window)
    torch.testing.assert_close(found, call()[0])


@pytest.mark.parametrize("name", ["foo", "head_mask", "sinks", "cache", "logits_bias"])
def test_arguments_of_unknown_meaning_are_refused_by_name(name):
    with pytest.raises(Unsupported, match=f"{name}|single heads|continuous batching"):
        call(**{name: torch.zeros(1)})
    call(**{name: None})
    call(**{name: False})


def test_arguments_known_not_to_matter_change_nothing():
    given = {name: torch.ones(1) for name in HARMLESS}
    assert torch.equal(call(**given)[0], call()[0])


LOW = torch.finfo(torch.float32).min
VISIBLE = (torch.rand(1, 4, 12, 12, generator=torch.Generator().manual_seed(3)) > 0.3) | torch.eye(
    12, dtype=torch.bool
)
DENSE = {
    "bool of each head": VISIBLE,
    "bool of all heads": VISIBLE[:, :1],
    "one row for all queries": VISIBLE[:, :1, :1],
    "minimum": torch.zeros(VISIBLE.shape).masked_fill(~VISIBLE, LOW),
    "-inf": torch.zeros(VISIBLE.shape).masked_fill(~VISIBLE, -torch.inf),
    "minimum twice": torch.zeros(VISIBLE.shape).masked_fill(~VISIBLE, LOW) * 2,
    "float16": torch.zeros(VISIBLE.shape, dtype=torch.float16).masked_fill(~VISIBLE, -65504),
}


@pytest.mark.parametrize("name", DENSE)
def test_4d_masks_mean_what_they_add_to_the_scores(name):
    mask = DENSE[name]
    k, v = (x.double().repeat_interleave(2, dim=1) for x in (K, V))
    added = (
        torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    )
    scores = Q.double() @ k.mT * 0.3 + added.double()
    expected = (scores.softmax(-1) @ v).transpose(1, 2).float()
    torch.testing.assert_close(call(attention_mask=mask)[0], expected)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, 12, 12, dtype=torch.int64),
        torch.ones(1, 1, 12, 12),
        torch.full((1, 1, 12, 12), -10000.0),
        torch.full((1, 1, 12, 12), torch.nan),
        torch.ones(1, 1, 12, 13, dtype=torch.bool),
        torch.ones(1, 1, 11, 12, dtype=torch.bool),
        torch.ones(1, 2, 12, 12, dtype=torch.bool),
        torch.ones(2, 1, 12, 12, dtype=torch.bool),
        torch.ones(1, 13, dtype=torch.bool),
        torch.full((1, 12), 0.5),
        torch.full((1, 12), -torch.inf),
        torch.ones(12, dtype=torch.bool),
    ],
    ids=lambda mask: f"{mask.dtype} {list(mask.shape)} {mask.flatten()[0].item()}",
)
def test_masks_that_are_none_are_refused(mask):
    with pytest.raises(Unsupported, match="attention_mask"):
        call(attention_mask=mask)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"s_aux": torch.ones(4)}], ids=str)
def test_weights_are_made_when_asked_for(options):
    padding = torch.ones(1, 12, dtype=torch.int64)
    padding[:, 9:] = 0
    output, weights = call(attention_mask=padding, output_attentions=True, **options)
    scores = Q @ K.repeat_interleave(2, dim=1).mT * 0.3
    if "softcap" in options:
        scores = 2 * torch.tanh(scores / 2)
    visible = torch.ones(12, 12, dtype=torch.bool).tril() & padding.bool()
    scores = scores.masked_fill(~visible, -torch.inf)
    sinks = torch.full((1, 4, 12, 1), 1.0 if "s_aux" in options else -torch.inf)
    expected = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    torch.testing.assert_close(weights, expected)
    again = (weights @ V.repeat_interleave(2, dim=1)).transpose(1, 2)
    torch.testing.assert_close(output, again)


@pytest.mark.parametrize("config", ["GraniteSWAConfig", "GptOssConfig"])
def test_weights_of_layers_with_sinks_are_those_that_the_model_itself_returns(config):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    tokens = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    widths = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "sliding_window": 6}
    made = getattr(transformers, config)(**sizes, **tokens, **widths)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
        with saccade.attach(model):
            ours = model(ids, output_attentions=True).attentions
    for weights, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(weights, wanted)


def test_arguments_of_the_loss_are_not_of_attention(ids):
    model = tiny_model(tiny_config("llama"), KEY)
    eager = tiny_model(tiny_config("llama"), "eager")
    for options in ({"shift_labels": ids}, {"ignore_index": 5}):
        found = model(ids, labels=ids, **options).loss
        assert torch.allclose(found, eager(ids, labels=ids, **options).loss, atol=1e-5)
