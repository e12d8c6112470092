"""`load_model(weights=...)`: each form holds what the file says, and the model still works."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, MixtralConfig

import saccade
from saccade.core import BadInput, Unsupported
from saccade.hf import LoadedModel, load_model, packed_layers
from saccade.hf.convert import converted_heads
from saccade.hf.identity import weights_fingerprint
from saccade.hf.packed_experts import PackedExperts
from saccade.hf.packed_layers import HalfLinear, PackedEmbedding, PackedLinear, is_packed
from saccade.ops.linear import PackedWeight
from tests.hf.converter import converted, stacked
from tests.hf.gguf_files import write_gguf
from tests.tiny_models import tiny_config, tiny_model

IDS = torch.arange(3, 43)[None]
Kind = gguf.GGMLQuantizationType


def matrices(model: Any, architecture: str, kind: Kind) -> dict[str, Kind]:
    """Every matrix of a GGUF file whose rows are whole blocks, in this kind."""
    found = stacked(converted(model, architecture)[1])
    return {n: kind for n, a in found.items() if np.ndim(a) >= 2 and np.shape(a)[-1] % 32 == 0}


def quantized_file(folder: Path, kind: Kind, name: str = "llama", **settings: Any) -> Path:
    model = tiny_model(tiny_config(name, vocab_size=288, **settings))
    path = folder / f"{kind.name}.gguf"
    architecture = "gemma3" if name.startswith("gemma3") else name
    write_gguf(model, path, architecture, quantized=matrices(model, architecture, kind))
    return path


@pytest.fixture(scope="session")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_file(tmp_path_factory.mktemp("q4"), Kind.Q4_1, tie_word_embeddings=True)


def logits(loaded: Any) -> torch.Tensor:
    model = loaded.model if isinstance(loaded, LoadedModel) else loaded
    with torch.no_grad():
        return model(IDS).logits


def kl(wanted: torch.Tensor, got: torch.Tensor) -> float:
    p, q = wanted.double().log_softmax(-1), got.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_blocks_of_a_file_stay_packed_and_mean_the_same(kind, tmp_path):
    path = quantized_file(tmp_path, kind)
    exact, packed = load_model(path, weights="f32"), load_model(path)
    assert packed.weights == f"{kind.name} as in the file" and exact.weights == "float32"
    assert packed.weights_bytes < 0.45 * exact.weights_bytes and packed.notes == []
    layers = dict(packed.model.named_modules())
    for name, layer in exact.model.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            own = layers[name]
            assert isinstance(own, PackedLinear | PackedEmbedding)
            assert isinstance(own.packed, PackedWeight)
            torch.testing.assert_close(own.weight, layer.weight, rtol=1e-3, atol=1e-6)
    assert kl(logits(exact), logits(packed)) < 1e-4


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16])
def test_halves_of_a_file_take_16_bits_and_are_computed_exactly(kind, tmp_path):
    path = quantized_file(tmp_path, kind)
    exact, halves = load_model(path, weights="f32"), load_model(path)
    assert isinstance(halves.model.model.layers[0].mlp.up_proj, HalfLinear)
    assert halves.weights_bytes < 0.55 * exact.weights_bytes
    torch.testing.assert_close(logits(halves), logits(exact), atol=1e-5, rtol=1e-5)


def test_kinds_without_a_packed_form_are_held_in_16_bits_and_named(tmp_path, monkeypatch):
    path = quantized_file(tmp_path, Kind.Q4_0)
    monkeypatch.setattr("saccade.hf.gguf.weights.packed_blocks", lambda *_: None)
    loaded = load_model(path)
    assert [note for note in loaded.notes if "16 bits a number" in note and "Q4_0" in note]
    assert loaded.weights == "Q4_0 in 16 bits"
    assert kl(logits(load_model(path, weights="f32")), logits(loaded)) < 1e-5


@pytest.mark.parametrize(("weights", "dtype"), [("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_plain_weights_are_parameters_of_that_dtype(q4, weights, dtype):
    model = load_model(q4, weights=weights).model
    assert {each.dtype for each in model.parameters()} == {dtype}
    assert type(model.lm_head) is nn.Linear and not is_packed(model)


@pytest.mark.parametrize(("weights", "levels"), [("int8", 254), ("int4", 15)])
@pytest.mark.parametrize("source", ["file", "folder"])
def test_rounding_errs_by_half_a_level_of_each_group(weights, levels, source, tmp_path):
    path = quantized_file(tmp_path, Kind.F32, tie_word_embeddings=True)
    exact = load_model(path, weights="f32")
    if source == "folder":
        exact.model.save_pretrained(path := tmp_path / "folder")
    loaded = load_model(path, weights=weights)
    assert loaded.weights == weights and is_packed(loaded.model)
    for name in ("q_proj", "k_proj", "o_proj"):
        wanted = getattr(exact.model.model.layers[1].self_attn, name).weight.detach()
        got = getattr(loaded.model.model.layers[1].self_attn, name).weight
        groups = wanted.unflatten(1, (-1, 32))
        span = groups.amax(-1) - groups.amin(-1) if levels == 15 else 2 * groups.abs().amax(-1)
        error = (got - wanted).abs().unflatten(1, (-1, 32)).amax(-1)
        assert (error <= 0.51 * span / levels + 2e-3 * groups.abs().amax(-1)).all()
        assert error.max() > 0
    assert loaded.model.lm_head.packed.bits == 8  # in either form
    assert loaded.model.lm_head.store is loaded.model.model.embed_tokens.store


def test_large_matrices_are_rounded_some_rows_at_a_time_to_the_same_numbers(q4, monkeypatch):
    whole = load_model(q4, weights="int4").model
    monkeypatch.setattr("saccade.hf.rounded_weights._AT_ONCE", 64)
    parts = load_model(q4, weights="int4").model
    assert torch.equal(whole.lm_head.weight, parts.lm_head.weight)
    assert torch.equal(logits(whole), logits(parts))


def test_a_folder_keeps_its_dtype_unless_told_otherwise(tmp_path):
    model = tiny_model(tiny_config("llama")).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).model.dtype == torch.bfloat16
    wide = load_model(tmp_path, weights="f32")
    assert wide.weights == "float32" and wide.model.config.name_or_path == str(tmp_path)
    for name, weight in wide.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].float())


@pytest.mark.parametrize("form", ["f32", "int8"])
def test_a_folder_without_safetensors_has_the_same_forms(form, tmp_path):
    model = tiny_model(tiny_config("llama"))
    model.save_pretrained(tmp_path)
    wanted = logits(load_model(tmp_path, weights=form))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(logits(load_model(tmp_path, weights=form)), wanted)


def test_two_weights_are_not_taken_for_one_because_both_are_packed(tmp_path):
    """A config that ties what the files hold twice, with other numbers."""
    model = tiny_model(tiny_config("llama", tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded = load_model(tmp_path, weights="int8").model
    torch.testing.assert_close(
        loaded.lm_head.weight, model.lm_head.weight.detach(), atol=2e-3, rtol=0.05
    )
    torch.testing.assert_close(
        loaded.model.embed_tokens.weight,
        model.model.embed_tokens.weight.detach(),
        atol=2e-3,
        rtol=0.05,
    )


def test_embeddings_that_scale_their_rows_still_do(tmp_path):
    model = tiny_model(tiny_config("gemma3"))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, weights="int8")
    embedding = loaded.model.get_input_embeddings()
    assert (
        isinstance(embedding, PackedEmbedding) and embedding.factor == model.config.hidden_size**0.5
    )
    assert kl(logits(model), logits(loaded)) < 1e-3


def test_layers_that_store_their_weight_transposed_are_packed_too(tmp_path):
    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, weights="int8")
    assert isinstance(loaded.model.transformer.h[0].attn.c_attn, PackedLinear)
    assert isinstance(loaded.model.transformer.wpe, nn.Embedding)  # positions stay plain
    assert kl(logits(model), logits(loaded)) < 1e-3


def test_weights_that_are_quantized_already_are_not_rounded_again(tmp_path):
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="quantized already, and cannot be rounded to int4"):
        load_model(tmp_path, weights="int4")


def test_copies_pickles_and_casts_keep_the_packed_weight_and_what_shares_it(q4):
    model = load_model(q4).model
    wanted, half = logits(model), copy.deepcopy(model).to(torch.bfloat16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), wanted)
        assert other.lm_head.store is other.model.embed_tokens.store
    assert half.dtype == logits(half).dtype == torch.bfloat16
    assert half.lm_head.packed.scale.dtype == torch.float16
    assert torch.equal(half.lm_head.packed.qdata, model.lm_head.packed.qdata)
    assert kl(wanted, logits(half)) < 1e-3
    back = half.float()
    assert back.dtype == torch.float32 and kl(wanted, logits(back)) < 1e-3


def test_a_state_dict_goes_from_one_packed_model_into_another(q4, tmp_path):
    model, other = load_model(q4).model, load_model(q4).model
    with torch.no_grad():
        other.lm_head.packed.qdata.zero_()
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(logits(other), logits(model))


def test_a_packed_model_counts_its_weights_as_a_plain_one(q4):
    plain, packed = (load_model(q4, weights=form).model for form in ("f32", "file"))
    assert packed.num_parameters() == plain.num_parameters()
    for option in ({"exclude_embeddings": True}, {"only_trainable": False}):
        assert packed.num_parameters(**option) == plain.num_parameters(**option)
    assert packed.num_parameters(only_trainable=True) == 0
    packed.tie_weights()
    embedding = packed.get_input_embeddings()
    assert packed.get_output_embeddings().store is embedding.store
    assert packed.resize_token_embeddings(embedding.num_embeddings) is embedding


def test_what_needs_plain_weights_is_refused_in_one_sentence(q4, tmp_path):
    model = load_model(q4).model

    def train() -> None:
        model.train()(IDS)

    def gradients() -> None:
        embedded = model.get_input_embeddings()(IDS).requires_grad_()
        model.eval()(inputs_embeds=embedded)

    for refused in (
        train,
        gradients,
        lambda: model.save_pretrained(tmp_path),
        lambda: model.resize_token_embeddings(999),
    ):
        with pytest.raises(Unsupported, match='weights="(f32|bf16)"') as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_heads_of_a_packed_model_are_converted_as_those_of_a_plain_one(q4):
    plain, packed = (load_model(q4, weights=form).model for form in ("f32", "file"))
    before, answers = logits(packed), []
    for model in (plain, packed):
        with converted_heads(model, 1):
            answers.append(logits(model))
    assert (answers[1] - answers[0]).norm() < 0.02 * answers[0].norm()
    assert (answers[0] - before).norm() > 0.05 * before.norm()
    assert torch.equal(logits(packed), before)


def test_fingerprints_tell_forms_apart_and_read_no_packed_weight(q4, monkeypatch):
    models = [
        load_model(q4, weights=form).model for form in ("file", "f32", "int4", "int8", "file")
    ]

    def fail(*_: Any) -> None:
        raise AssertionError("dequantized")

    monkeypatch.setattr(packed_layers, "dequantized", fail)
    seen = [weights_fingerprint(model) for model in models]
    assert len(set(seen)) == 4 and seen[0] == seen[-1]


def test_a_session_of_one_form_is_refused_by_another(q4, tmp_path):
    contexts = [saccade.Context(load_model(q4, weights=form)) for form in ("file", "int4", "file")]
    contexts[0].append(IDS[0])
    saccade.save_session(tmp_path / "s", contexts[0])
    with pytest.raises((BadInput, ValueError), match="weights"):
        saccade.load_session(tmp_path / "s", contexts[1])
    saccade.load_session(tmp_path / "s", contexts[2])
    assert contexts[2].seen == IDS.numel()


_MEASURE = """
import gc, sys, torch, transformers, gguf
import saccade
from saccade.hf.load import load_model
from transformers import LlamaForCausalLM
def kib(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name))
for form in sys.argv[2:]:
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    before = kib("VmRSS")
    loaded = load_model(sys.argv[1], weights=form)
    print(before, kib("VmHWM"), kib("VmRSS"), loaded.weights_bytes // 1024)
    del loaded
"""


def large_file(path: Path) -> None:
    """A llama of 120 MB in Q4_0, whose numbers are a hole in the file: all zero."""
    hidden, inner, vocab, layers = 1024, 4096, 49152, 10
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "context_length": 512,
        "embedding_length": hidden,
        "feed_forward_length": inner,
        "block_count": layers,
        "attention.head_count": 16,
        "attention.head_count_kv": 16,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    squares = {f"attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    block = squares | {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    block["ffn_down"] = hidden, inner
    shapes = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= {f"blk.{layer}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
    total = 0
    for name, shape in shapes.items():
        kind = Kind.F32 if len(shape) == 1 else Kind.Q4_0
        per, size = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = int(np.prod(shape)) // per * size
        row = (*shape[:-1], shape[-1] // per * size)
        given = shape if kind == Kind.F32 else row
        dtype = np.dtype(np.float32 if kind == Kind.F32 else np.uint8)
        writer.add_tensor_info(f"{name}.weight", given, dtype, n_bytes, raw_dtype=kind)
        total += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    os.truncate(path, start + total)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_needs_little_more_memory_than_the_model_keeps(tmp_path):
    large_file(path := tmp_path / "large.gguf")
    assert path.stat().st_size > 100e6
    ran = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path), "file", "bf16"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in ran.stdout.splitlines():
        before, peak, after, weights = map(int, line.split())
        assert peak - before <= 1.2 * (after - before), line
        assert after - before <= 1.2 * weights, line
    packed = int(ran.stdout.splitlines()[0].split()[3])
    assert packed * 1024 <= 1.02 * path.stat().st_size


def test_experts_of_a_file_stay_packed_one_by_one(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = tiny_model(MixtralConfig(vocab_size=288, **sizes, **heads))
    path = tmp_path / "m.gguf"
    kinds = matrices(model, "llama", Kind.Q8_0)
    routers = {name: kind for name, kind in kinds.items() if "gate_inp" in name}
    write_gguf(model, path, "llama", quantized={n: kinds[n] for n in kinds.keys() - routers})
    exact, packed = load_model(path, weights="f32"), load_model(path)
    assert packed.notes == exact.notes and packed.weights_bytes < 0.4 * exact.weights_bytes
    experts, plain = (each.model.model.layers[0].mlp.experts for each in (packed, exact))
    assert isinstance(experts.gate_up_proj, PackedExperts)
    assert experts.down_proj.shape == plain.down_proj.shape
    for name in ("gate_up_proj", "down_proj"):
        for i in (0, 1):
            torch.testing.assert_close(getattr(experts, name)[i].T, getattr(plain, name)[i].T)
    assert kl(logits(exact), logits(packed)) < 1e-3
    assert packed.model.num_parameters() == exact.model.num_parameters()
    assert torch.equal(logits(copy.deepcopy(packed.model)), logits(packed))
    x = torch.ones(1, model.config.hidden_size, requires_grad=True)
    with pytest.raises(Unsupported, match="no gradient goes"):
        nn.functional.linear(x, experts.gate_up_proj[0])
