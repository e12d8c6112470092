"""`saccade convert` as a user runs it, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from saccade import load_model
from saccade.cli.main import main
from saccade.evals import converting
from saccade.evals.conversion import Judge, other_text, parts_of, spread_rows
from saccade.evals.quality import divergence, losses, perplexity
from tests.hf.test_convert_save import tokenizer
from tests.tiny_models import tiny_config, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    tiny_model(tiny_config("llama", vocab_size=256)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A saccade is the jump of the eye from one thing to the next. " * 24)
    return path


def arguments(folder: Path, text: Path, out: Path, *more: str) -> list[str]:
    named = ["-m", str(folder), "--text", str(text), "--out", str(out)]
    return ["convert", *named, "--device", "cpu", *more]


def test_a_converted_model_is_saved_and_judged(
    folder: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    wanted = arguments(folder, text, out, "--kv-heads", "1", "--distill", "6", "--json")
    assert main(wanted) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["kv_heads"], record["complete"]) == ([2, 1], True)
    assert record["cache_bytes"] == [4 * 2 * 2 * 16 * 4, 4 * 2 * 1 * 16 * 4]
    assert list(record["quality"]) == ["original", "aligned", "aligned, 6 steps"]
    original = record["quality"]["original"]["held-out"]
    assert original["kl"] == 0 and original["same_top"] == 1
    assert record["quality"]["aligned, 6 steps"]["held-out"]["kl"] > 0
    assert load_model(out).model.config.num_key_value_heads == 1
    assert AutoModelForCausalLM.from_pretrained(out).config.num_key_value_heads == 1
    assert record["bytes_on_disk"] == sum(file.stat().st_size for file in out.iterdir())


def test_more_heads_are_exact_copies(folder: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(arguments(folder, text, tmp_path / "mha", "--kv-heads", "4")) == 0
    said = capsys.readouterr().out
    assert "2 -> 4 KV heads; cache of a token 1,024 -> 2,048 bytes (200%)" in said
    copied = next(line for line in said.splitlines() if line.startswith("copied"))
    assert "0.000 +- 0.000" in copied and copied.endswith("100.0%")


def test_wrong_requests_end_with_a_sentence_and_nothing_written(
    folder: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    for out, more, said in (
        ("out", ["--kv-heads", "3"], "can have 1, 2, 4 KV heads, got 3"),
        ("out", ["--kv-heads", "0"], "--kv-heads"),
        ("out", ["--kv-heads", "1", "--method", "best"], "expected one of aligned, mean"),
        ("full", ["--kv-heads", "1"], "is not empty"),
        ("no/out", ["--kv-heads", "1"], "there is no folder"),
    ):
        assert main(arguments(folder, text, tmp_path / out, *more)) == 2
        assert said in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert main(arguments(folder, short, tmp_path / "out", "--kv-heads", "1")) == 2
    assert "the text has 8 tokens" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "short.txt", "text.txt"]
    assert (tmp_path / "full" / "mine").read_text() == "kept"


def test_an_interrupt_in_training_saves_what_was_learned(
    folder: Path, text: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = converting.distill

    def interrupted(*args: Any, on_progress: Any, **options: Any) -> Any:
        def stop(*state: Any) -> None:
            raise KeyboardInterrupt

        return real(*args, on_progress=stop, **options)

    monkeypatch.setattr(converting, "distill", interrupted)
    wanted = arguments(folder, text, tmp_path / "out", "--kv-heads", "1", "--distill", "2")
    assert main(wanted) == 130
    assert "layers that were trained by then are in it" in capsys.readouterr().err
    assert load_model(tmp_path / "out").model.config.num_key_value_heads == 1


def test_an_interrupt_at_another_moment_writes_nothing(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "save_folder", stop)
    assert main(arguments(folder, text, tmp_path / "out", "--kv-heads", "1")) == 130
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_judge_measures_as_the_comparison_does() -> None:
    model = tiny_model(tiny_config("llama"))
    tokens = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(0))
    judge = Judge(model, {"text": tokens})
    exact = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    ours = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    expected, found = divergence(ours, exact), judge.judge()["text"]
    assert found.tokens == 39 and expected.kl > 0.01
    for name in ("kl", "kl_se", "same_top"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4)
    of_text = perplexity(losses(ours, tokens[1:]))
    assert (found.perplexity, found.perplexity_se) == pytest.approx(of_text, rel=1e-4)


def test_text_to_judge_by_is_not_learned_from() -> None:
    learned, held = parts_of(torch.arange(1000))
    assert torch.equal(torch.cat((learned, held)), torch.arange(1000)) and len(held) == 100
    rows = spread_rows(learned, 4, 200)
    assert rows.flatten().unique().numel() == 800 and rows.max() == 899
    assert spread_rows(learned, 40, 200).shape == (4, 200)
    assert len(other_text()) > 20_000
