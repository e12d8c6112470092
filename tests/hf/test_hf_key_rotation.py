"""Context shift of models that rotate keys in different ways, and of some that do not."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING

import saccade
from saccade.core import Unsupported
from saccade.hf import HFModel
from saccade.hf.key_rotation import Cached, KeyRotation, find_rotations
from saccade.rope import Unscaled, apply, inverse_frequencies, tables
from saccade.runtime.params import ContextParams
from tests.tiny_models import COMMON, tiny_config, tiny_model

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "glm": {},  # neighbouring pairs of half a head
    "glm4": {},
    "helium": {},
    "ernie4_5": {},
    "cohere": {},
    "nanochat": {},  # backwards
    "phi": {},  # partial, halves
    "stablelm": {},
    "nemotron": {},
    "gpt_neox": {},
    "olmo2": {},
    "ministral3": {},  # queries scaled by their position
    "smollm3": {"no_rope_layers": [0]},  # no positions
    "cohere2": {"layer_types": ["full_attention"]},
    "exaone4": {"layer_types": ["full_attention"], "sliding_window": 8},
    "afmoe": {"layer_types": ["full_attention"], **EXPERTS},
    "flint": EXPERTS,
    "gpt_oss": EXPERTS,
    "hunyuan_v1_dense": {},
    "persimmon": {},
    "lfm2": {"layer_types": ["full_attention"]},
}
IDS = list(range(3, 60))


def one_layer(family, **changes):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    options = {**COMMON, "num_hidden_layers": 1, **changes}
    return tiny_model(CONFIG_MAPPING[family](**options))


def gap_after_a_shift(model, params, count=40):
    """Largest difference of the next logits between a shifted context and a new one."""
    with saccade.Context(model, params) as ctx:
        before = ctx.logits(ctx.append(IDS[:count]))
        ctx.shift(4)
        kept = ctx.tokens
        shifted = ctx.logits(ctx.append([9]))
    with saccade.Context(model, params) as ctx:
        fresh = ctx.logits(ctx.append([*kept, 9]))
    assert not torch.allclose(fresh, before, atol=1e-4)
    return float((shifted - fresh).abs().max() / fresh.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shifted_layer_equals_a_new_reading(family):
    model = one_layer(family, **FAMILIES[family])
    before = copy.deepcopy(model.state_dict())
    assert gap_after_a_shift(model, ContextParams(n_ctx=64)) < 1e-5
    assert all(torch.equal(before[name], held) for name, held in model.state_dict().items())


@pytest.mark.parametrize("kind", ["linear", "yarn", "ntk"])
@pytest.mark.parametrize("family", ["glm4", "cohere", "llama"])
def test_scaled_positions(family, kind):
    params = ContextParams(n_ctx=64, rope_scaling_type=kind, rope_freq_scale=0.25)
    assert gap_after_a_shift(one_layer(family), params) < 1e-5


def test_layers_with_tables_of_their_own():
    """Gemma 3's sliding layers have another base: each layer gets its own rotation."""
    model = HFModel(tiny_model(tiny_config("gemma3"), "saccade"))
    found = [model.shift_keys(layer) for layer in range(4)]
    rotary = model.model.model.rotary_emb
    for rotation in found[:3]:
        assert torch.equal(rotation.inv_freq.float(), rotary.sliding_attention_inv_freq)
    assert torch.equal(found[3].inv_freq.float(), rotary.full_attention_inv_freq)


def test_only_some_layers_have_positions():
    config = CONFIG_MAPPING["smollm3"](**COMMON, no_rope_layers=[1, 0, 1, 0])
    model = HFModel(tiny_model(config, "saccade"))
    assert [len(model.shift_keys(layer).inv_freq) for layer in range(4)] == [8, 0, 8, 0]


@pytest.mark.parametrize("family", ["glm4", "cohere", "qwen2", "nanochat"])
def test_half_precision_and_large_biases(family):
    """A bias of a hundred in one dimension does not hide how the others are rotated."""
    model = one_layer(family)
    projection = model.model.layers[0].self_attn.k_proj
    if projection.bias is not None:
        with torch.no_grad():
            projection.bias[15] += 100
    model.bfloat16()
    with saccade.Context(model, ContextParams(n_ctx=64, n_keep=4)) as ctx:
        found = ctx.model.shift_keys(0, ctx.n_ctx)
        assert found.interleaved == (family in ("glm4", "cohere")) and len(found.inv_freq)
        assert found.sign == (-1 if family == "nanochat" else 1)


@pytest.mark.parametrize("family", ["gpt2", "opt", "biogpt"])
def test_learned_positions_are_refused_before_anything_is_read(family):
    options = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
    sizes = {"ffn_dim": 96, "word_embed_proj_dim": 64} if family == "opt" else {}
    config = CONFIG_MAPPING[family](**options, **sizes, vocab_size=128, max_position_embeddings=64)
    model = tiny_model(config)
    with pytest.raises(Unsupported, match="cached keys cannot be moved: the keys of layer 0"):
        saccade.Context(model, ContextParams(n_ctx=48, n_keep=2))
    with saccade.Context(model, ContextParams(n_ctx=48)) as ctx:
        ctx.append(IDS[:20])
        with pytest.raises(Unsupported, match="Leave n_keep unset"):
            ctx.shift(2)
        assert ctx.tokens == IDS[:20] and ctx.seen == 20


FREQUENCIES = [inverse_frequencies(Unscaled(), base=b, rotary_dim=8)[0] for b in (1e4, 1e6)]
RAW = torch.randn(4, 2, 1, 16, generator=torch.Generator().manual_seed(0))


class Layer:
    """One layer that rotates the same raw keys for every position it is asked for."""

    def __init__(self, inv_freq, first=0, interleaved=False, sign=1):
        self.inv_freq, self.first, self.interleaved, self.sign = inv_freq, first, interleaved, sign

    def keys(self, positions):
        cos, sin = tables(self.inv_freq, positions, dtype=torch.float32)
        raw = RAW.expand(-1, -1, positions.shape[1], -1)
        rotated = apply(raw[..., self.first :], cos, self.sign * sin, interleaved=self.interleaved)
        return torch.cat((raw[..., : self.first], rotated), dim=-1)

    def __call__(self, tokens, positions):
        count = tokens.shape[1]
        where = torch.arange(count).expand(len(tokens), -1) if positions is None else positions
        return [Cached(self.keys(where), RAW.expand(-1, -1, count, -1))]


@pytest.mark.parametrize("inv_freq", FREQUENCIES)
@pytest.mark.parametrize("first", [0, 8])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_every_form_is_found(inv_freq, first, interleaved, sign):
    layer = Layer(inv_freq, first, interleaved, sign)
    (found,) = find_rotations(layer, FREQUENCIES, vocab_size=99, longest=4096)
    moved = found(layer.keys(torch.full((4, 1), 3000)), -1234)
    torch.testing.assert_close(moved, layer.keys(torch.full((4, 1), 1766)), atol=1e-4, rtol=0)


def test_other_frequencies_are_not_taken_for_known_ones():
    with pytest.raises(Unsupported, match="do not follow from those of other positions"):
        find_rotations(Layer(FREQUENCIES[0]), FREQUENCIES[1:], vocab_size=99, longest=4096)


def test_values_that_change_with_the_position():
    def read(tokens, positions):
        (cached,) = Layer(FREQUENCIES[0])(tokens, positions)
        return [Cached(cached.k, cached.k)]

    with pytest.raises(Unsupported, match="keys of layer 0"):
        find_rotations(read, FREQUENCIES, vocab_size=99, longest=4096)


def test_a_model_that_counts_by_itself():
    """It ignores the positions it is given, so that its keys seem to have none."""
    layer = Layer(FREQUENCIES[0])

    def read(tokens, positions):
        return layer(tokens, None)

    with pytest.raises(Unsupported, match="does not take the positions it is given"):
        find_rotations(read, FREQUENCIES, vocab_size=99, longest=4096)


def test_keys_without_positions_are_copied():
    """The cache writes the result over the same memory."""
    moved = KeyRotation(torch.zeros(0, dtype=torch.float64))(RAW, -3)
    assert torch.equal(moved, RAW) and moved.data_ptr() != RAW.data_ptr()
