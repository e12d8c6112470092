"""What stays plain numbers under `load_model(weights="int8" | "int4")` is said."""

import pytest
import torch
from transformers import MixtralConfig

from saccade.hf import load_model
from tests.hf.gguf_files import write_gguf
from tests.tiny_models import tiny_config, tiny_model


def experts():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return tiny_model(MixtralConfig(vocab_size=288, **sizes, **heads))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("source", ["folder", "file"])
def test_experts_that_stay_plain_are_named(tmp_path, weights, source):
    model, path = experts(), tmp_path / "m.gguf"
    if source == "file":
        write_gguf(model, path, "llama")
    else:
        model.save_pretrained(path := tmp_path / "m")
    (note,) = [n for n in load_model(path, weights=weights).notes if "stay" in n]
    numbers = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 3)
    assert f"{weights} rounds" in note and "mlp.experts.down_proj" in note
    assert note.startswith(f"4 matrices ({numbers * 4 / 2**10:.3g} KiB: ") and "float32" in note
    assert not [n for n in load_model(path, weights="f32").notes if "stay" in n]
    assert source == "file" or not [n for n in load_model(path).notes if "weights" in n]


def test_rows_of_no_whole_groups_are_named_and_a_model_without_any_says_nothing(tmp_path):
    for width, expected in ((96, 0), (72, 4)):
        config = tiny_config("llama", intermediate_size=width)
        tiny_model(config).save_pretrained(path := tmp_path / str(width))
        loaded = load_model(path, weights="int4", dtype=torch.float32)
        notes = [n for n in loaded.notes if "stay float32" in n]
        assert len(notes) == bool(expected)
        assert not expected or "4 matrices" in notes[0]
