"""What no model has to be loaded for is refused before one is, and before transformers comes."""

import errno
import json
import os
import signal

import pytest
import torch

from saccade.cli import main
from saccade.core import BadInput
from saccade.core.writing import writing_to
from saccade.evals.kept import Finished, KeptSamples, Place
from saccade.hf.convert_save import check_folder, save_folder

CONFIG = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 8192, "rope_theta": 10000.0, "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def refused(tmp_path, capsys, stand_in):
    """`refused(command, *words)`: what a command says that exits with 2 and loads nothing."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    stand_in("saccade.hf.load", load_model=loaded)

    def run(command, *words, model=tmp_path):
        assert main.main([command, "-m", str(model), *words]) == 2
        said = capsys.readouterr()
        assert "Loading" not in said.err and said.out == ""
        return said.err

    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--rope-scaling linear", "--rope-scaling linear needs to know how far to stretch"),
        (
            "--yarn-beta-fast 8",
            "yarn options need --rope-scaling yarn, but positions are not scale",
        ),
        (
            "--rope-scale 2 --yarn-beta-fast 8",
            "need --rope-scaling yarn, but the rule in force is L",
        ),
        (
            "--rope-scaling yarn -c 9000 --yarn-beta-fast 1 --yarn-beta-slow 5",
            "--yarn-beta-fast must not be below --yarn-beta-slow, got --yarn-beta-fast 1.0",
        ),
        ("--draft 4", "--draft 4 drafts by a pattern that reads few keys while decoding"),
        ("--draft 4 --sparse quest --swa 64", "--draft 4 does not go with --swa 64, whose"),
        ("--device cuda:99", "--device cuda:99 needs a CUDA GPU"),
        ("--weights bf16 --dtype f32", "--weights bf16 goes with"),
    ],
)
def test_options_that_the_files_alone_exclude(refused, words, expected):
    assert expected in refused("generate", "-p", "hi", *words.split())
    assert expected in refused("chat", *words.split())


def test_drafts_need_a_pattern_with_a_name(refused):
    said = refused("generate", "-p", "hi", "--sparse", "auto", "--draft", "4")
    assert "--draft needs the pattern that it drafts by, and --sparse auto measures" in said


def test_a_text_that_may_be_long_may_name_its_scaling_alone(refused):
    with pytest.raises(AssertionError, match="a model was loaded"):
        main.main(["generate", "-m", "x", "-p", "a" * 9000, "--rope-scaling", "ntk", "--traceback"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU could run it")
def test_a_backend_that_can_run_nothing_here(refused):
    said = refused("generate", "-p", "hi", "--backend", "gluon")
    assert "--backend gluon cannot run here: tensors are on cpu" in said


def test_a_model_that_is_none(refused, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"hello")
    for command in ("generate", "plan", "compare", "check"):
        words = ("-p", "hi") if command == "generate" else ()
        said = refused(command, *words, model=folder)
        assert "has no config.json" in said and "It holds a.gguf: name the file." in said
    assert "starts with b'hell'" in refused("chat", model=folder / "a.gguf")
    (folder / "a.gguf").write_bytes(b"")
    assert "it is empty" in refused("chat", model=folder / "a.gguf")
    os.mkfifo(folder / "fifo")
    assert "no model at" in refused("chat", model=folder / "fifo")


def test_a_file_that_keeps_no_samples(refused, tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("mine\n")
    assert "which --keep of `saccade eval` writes" in refused("eval", "ruler", "--keep", str(other))
    assert other.read_text() == "mine\n"


def test_a_full_disk_is_named_and_a_sample_is_whole_or_absent(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="No space .*s.json"), writing_to(tmp_path / "s.json"):
        raise OSError(28, "No space left on device")
    kept = KeptSamples(tmp_path / "k", {"seed": 1})
    before, write = (tmp_path / "k").read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:9]))
    sample = Finished(prompt="p", answers=["a"], scores=[1.0], cache_bytes=1, seconds=1.0)
    with pytest.raises(OSError, match="No space .*k"):
        kept.add(Place("r", "after", "t", 64, 0), sample)
    assert (tmp_path / "k").read_bytes() == before


def test_a_converted_model_on_a_full_disk(tmp_path):
    class Model:
        def save_pretrained(self, *_, **__):
            raise RuntimeError("Error while serializing: I/O error: No space left (os error 28)")

    with pytest.raises(OSError, match="No space .*new") as found:
        save_folder(Model(), None, tmp_path / "new")
    assert found.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match="takes at least .* has room for"):
        check_folder(tmp_path / "new", 2**60)


def test_a_stop_that_other_packages_make_an_error_of_their_own(monkeypatch, capsys):
    def run(words):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except KeyboardInterrupt as stop:
            raise ModuleNotFoundError("Could not import module") from stop

    monkeypatch.setattr(main, "_run", run)
    assert main.main(["doctor"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "Stopped.\n"
