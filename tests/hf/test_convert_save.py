"""Saving a converted model: a whole folder that transformers and saccade load, or nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from saccade import load_model
from saccade.core import BadInput
from saccade.hf import converted_heads
from saccade.hf.convert_save import check_folder, save_folder
from tests.cli.byte_tokenizer import backend
from tests.tiny_models import tiny_config, tiny_model


def tokenizer() -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=backend())
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_saved_folder_gives_the_same_logits_in_transformers_and_here(tmp_path, ids, family):
    model = tiny_model(tiny_config(family))
    with converted_heads(model, 1, method="aligned", calibration=ids):
        expected = model(ids).logits
        size = save_folder(model, tokenizer(), tmp_path / "out")
    assert size == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert loaded.config.num_key_value_heads == 1 and loaded.dtype == torch.float32
    assert torch.equal(loaded(ids).logits, expected)
    ours = load_model(tmp_path / "out")
    torch.testing.assert_close(ours.model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer().chat_template
    assert again("heads").input_ids == tokenizer()("heads").input_ids


def test_an_interrupt_leaves_nothing(tmp_path, llama, monkeypatch):
    def stop(folder, **options):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(llama, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        save_folder(llama, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path, llama):
    (tmp_path / "out").mkdir()
    save_folder(llama, None, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for name, said in (
        ("full", "is not empty, and is not overwritten"),
        ("full/file", "is a file; expected the name of a new folder"),
        ("none/out", "there is no folder"),
    ):
        with pytest.raises(BadInput, match=said):
            check_folder(tmp_path / name)
