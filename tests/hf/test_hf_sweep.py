"""Families with a mask, window or call of their own, attached against eager attention."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, DynamicCache

from saccade.core import Unsupported
from saccade.hf import Context, attach
from saccade.runtime import ContextParams
from tests.tiny_models import COMMON, tiny_model

SMALL = {name: value for name, value in COMMON.items() if name != "head_dim"} | {
    "num_hidden_layers": 2
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "qwen2_moe": MIXTURE | {"shared_expert_intermediate_size": 32},
    "qwen2": {"use_sliding_window": False, "sliding_window": 4},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "cohere2": {"sliding_window": 4},
    "exaone4": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {
        "attention_chunk_size": 5,
        "num_local_experts": 2,
        "intermediate_size_mlp": 96,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "granite": {"attention_multiplier": 0.2},
    "gpt2": {"n_inner": 96},
    "gpt_neox": {},
    "stablelm": {},
    "deepseek_v4": {  # appends compressed keys, and numbers to the mask for them
        "num_key_value_heads": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "q_lora_rank": 24,
        "o_lora_rank": 16,
        "o_groups": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 3,
    },
}
IDS = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))
LEFT, RIGHT = torch.ones_like(IDS), torch.ones_like(IDS)
LEFT[0, :5], RIGHT[0, -5:] = 0, 0
VISIBLE = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(1)) > 0.4
VISIBLE = VISIBLE.tril() | torch.eye(24, dtype=torch.bool)
ADDED = torch.zeros(VISIBLE.shape).masked_fill(~VISIBLE, torch.finfo(torch.float32).min)


@cache
def model_of(family):
    fields = CONFIG_MAPPING[family]
    return tiny_model(fields(**(SMALL | FAMILIES[family])))


def in_parts(model):
    cache, seen, parts = DynamicCache(config=model.config), 0, []
    for part in IDS.split([9, 7, 7, 1], dim=1):
        seen += part.shape[1]
        output = model(part, attention_mask=LEFT[:, :seen], past_key_values=cache)
        parts.append(output.logits)
    return torch.cat(parts, dim=1)[LEFT.bool()]


def gradients(model):
    labels = IDS.masked_fill(RIGHT == 0, -100)
    model.zero_grad()
    model(IDS, attention_mask=RIGHT, labels=labels).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def generated(model, **options):
    return model.generate(
        IDS, attention_mask=LEFT, max_new_tokens=4, do_sample=False, **options
    ).float()


CASES = {
    "no mask": lambda model: model(IDS).logits,
    "left padding": lambda model: model(IDS, attention_mask=LEFT).logits[LEFT.bool()],
    "right padding": lambda model: model(IDS, attention_mask=RIGHT).logits[RIGHT.bool()],
    "4-D mask": lambda model: model(IDS, attention_mask=ADDED).logits,
    "in parts": in_parts,
    "beams": lambda model: generated(model, num_beams=2),
    "static": lambda model: generated(model, cache_implementation="static"),
    "lookup": lambda model: model.generate(
        IDS[:1].repeat(1, 2), max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3
    ).float(),
    "weights": lambda model: torch.stack(model(IDS, output_attentions=True).attentions[:1]),
    "gradients": gradients,
}
NOT_EAGER = {("deepseek_v4", "lookup"), ("deepseek_v4", "static")}
if transformers.__version__.startswith("5.16."):  # chunked masks of a static cache fail there
    NOT_EAGER.add(("llama4_text", "static"))
"""What transformers itself cannot do with its own eager attention."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_it_computes_without(family, case):
    if (family, case) in NOT_EAGER:
        pytest.skip("transformers' own eager attention does not run this")
    model, run = model_of(family), CASES[case]
    with torch.set_grad_enabled(case == "gradients"):
        expected = run(model)
        with attach(model):
            found = run(model)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}),
        ("codegen", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}),
    ],
)
def test_families_without_the_interface_are_refused(family, fields):
    model = tiny_model(CONFIG_MAPPING[family](vocab_size=128, **fields))
    with pytest.raises(Unsupported, match="does not call transformers' attention interface"):
        attach(model).__enter__()


def test_what_a_module_of_attention_holds_may_use_softmax():
    """DeepSeek-V4 compresses keys by a softmax: attended as it is, but never with our caches."""
    model = model_of("deepseek_v4")
    for params in (ContextParams(n_swa=8), ContextParams(type_k="int8", type_v="int8")):
        with pytest.raises(Unsupported, match="layer 0 of deepseek_v4"):
            with attach(model, params) as attached:
                attached.new_cache()
    with pytest.raises(Unsupported, match="layer 0 of deepseek_v4"), Context(model) as ctx:
        ctx.append(IDS[0])
