"""`saccade plan`: one command, its memory, speed and quality, as text and JSON; refusals."""

import json
import shlex

import pytest
from transformers import MambaConfig

import saccade
from saccade.cli import main
from tests.tiny_models import tiny_config, tiny_model

SIZES = {"vocab_size": 256, "max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_config("llama", **SIZES).save_pretrained(path)
    return str(path)


def call(capsys, *words):
    code = main.main(["plan", "--device", "cpu", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def planned(capsys, *words):
    code, out, said = call(capsys, *words, "--json")
    assert said == ""
    return code, json.loads(out)


def test_the_recommendation_as_text(capsys, folder):
    code, out, said = call(capsys, "-m", folder, "--context", "2k", "--memory", "64MiB")
    assert (code, said) == (0, "")
    assert "tiny, 2,048 tokens" in out and "64.0 MiB (as asked)" in out
    assert f"saccade generate -m {folder} --device cpu -f FILE" in out.replace(
        " --ctx-size 2048", ""
    )
    for word in (
        "setting ",
        "peak ",
        "first token ",
        "tokens/s",
        "quality ",
        "runner-up ",
        "rule ",
    ):
        assert word in out, word
    assert "If less were asked:" in out and "all it was trained for" in out


def test_the_command_is_one_that_generate_takes(capsys, folder):
    for extra in (
        (),
        ("-ctk", "int8", "-ctv", "int8"),
        ("--sparse", "strided"),
        ("--context", "9000"),
    ):
        _, found = planned(capsys, "-m", folder, "--memory", "1GiB", *extra)
        words = shlex.split(found["command"])
        assert words[:2] == ["saccade", "generate"]
        assert main.parse(words[1:]).command.name == "generate"
        assert all(word in words for word in extra[1::2] if not word.isdigit())


def test_json_adds_up(capsys, folder):
    code, found = planned(capsys, "-m", folder, "--context", "4k", "--memory", "32MiB")
    chosen = found["chosen"]
    assert code == 0 and found["memory"] == {"bytes": 32 << 20, "from": "as asked"}
    parts = ("weights_bytes", "reading_cache_bytes", "activation_bytes")
    assert chosen["peak_bytes"] == sum(chosen[part] for part in parts)
    weights = sum(p.nbytes for p in tiny_model(tiny_config("llama", **SIZES)).parameters())
    assert chosen["weights_bytes"] == weights
    with saccade.Context(tiny_model(tiny_config("llama", **SIZES))) as ctx:
        ctx.append([1] * 4096)
        assert chosen["cache_bytes"] == ctx.cache_bytes
    assert chosen["first_token_s"] > 0 and chosen["tokens_per_s"] > 0
    assert [each["fits"] for each in found["settings"]].count(True) >= 2
    assert found["runner_up"]["setting"] != chosen["setting"] and found["why_runner_up"]


def test_beyond_the_trained_length_is_said_and_scaled(capsys, folder):
    _, out, _ = call(capsys, "-m", folder, "--context", "16k", "--memory", "1GiB")
    assert "4.0 times the 4,096 it was trained for" in out and "--rope-scaling yarn" in out
    assert "positions    16,384 tokens are beyond the 4,096" in out
    assert "4,096 tokens, all it was trained for, fit; memory would hold" in out


def test_what_cannot_fit_ends_with_2(capsys, folder):
    code, out, said = call(capsys, "-m", folder, "--context", "4k", "--memory", "100KiB")
    assert (code, said) == (2, "") and out.count("Nothing fits") == 1
    assert "no context fits" in out and "the weights alone take" in out
    code, found = planned(capsys, "-m", folder, "--context", "4k", "--memory", "100KiB")
    assert code == 2 and found["command"] is None and found["chosen"] is None


def test_models_that_only_transformers_knows(capsys, tmp_path):
    tiny_config("gemma3").save_pretrained(tmp_path / "gemma")
    code, found = planned(capsys, "-m", str(tmp_path / "gemma"), "--memory", "1GiB")
    weights = sum(p.nbytes for p in tiny_model(tiny_config("gemma3")).parameters())
    assert code == 0 and found["chosen"]["weights_bytes"] == weights


def test_dtype_halves_weights(capsys, folder):
    _, full = planned(capsys, "-m", folder, "--memory", "1GiB")
    _, half = planned(capsys, "-m", folder, "--memory", "1GiB", "--dtype", "bf16")
    assert half["chosen"]["weights_bytes"] * 2 == full["chosen"]["weights_bytes"]
    assert "--dtype bf16" in half["command"] and half["dtype"] == "bfloat16"
    assert not any(each["setting"] == "bf16 cache" for each in half["settings"])


def test_without_memory_the_available_one_is_taken(capsys, folder):
    _, found = planned(capsys, "-m", folder)
    assert found["memory"]["from"] == "what is available now" and found["memory"]["bytes"] > 0
    assert found["context"] == found["trained_length"] == 4096


def test_trials_on_the_model(capsys, tmp_path):
    model = tiny_model(tiny_config("llama", **SIZES))
    model.save_pretrained(tmp_path / "model")
    words = ["--measure", "--context", "300", "--memory", "64MiB", "--svg", str(tmp_path / "p.svg")]
    code, found = (
        main.main(["plan", "--device", "cpu", "-m", str(tmp_path / "model"), "--json", *words]),
        json.loads(capsys.readouterr().out),
    )
    assert code == 0 and len(found["measured"]) >= 3
    peaks = {each["setting"]: each["peak_bytes"] for each in found["settings"]}
    for each in found["measured"]:
        assert each["tokens"] == 300 and each["tokens_per_second"] > 0
        # A toy: workspaces of kernels, which are added to whatever peak, are a tenth of it.
        assert abs(each["peak"] / peaks[each["name"]] - 1) < 0.15 or "weights" in each["name"], each
    assert (tmp_path / "p.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--memory", "4"], "--memory: expected a size with its unit, such as 4GiB, got '4'."),
        (["--context", "32q"], "--context: expected a number of tokens such as 4096 or 4k"),
        (["--context", "0"], "expected a number of tokens"),
        (["--device", "tpu"], "expected one of auto, cpu, cuda as --device, got 'tpu'"),
        (["--svg", "x.svg"], "Add --measure."),
        (["--context", "2k", "-c", "1000"], "--context 2048 and --ctx-size 1000 both say"),
        (["--dtype", "int3"], "expected one of auto, f32, bf16, f16"),
        (["--weights", "int3"], "expected one of file, int8, int4, bf16, f32, got 'int3'"),
        (["--sinks", "4"], "set --swa"),
        (
            ["--sparse", "quest", "--draft", "4"],
            "--draft changes no memory beyond that of --sparse",
        ),
    ],
)
def test_refusals_are_one_sentence(capsys, folder, words, said):
    code, out, error = call(capsys, "-m", folder, *words)
    assert (code, out) == (2, "") and error.count("\n") == 1 and said in error


def test_refused_models(capsys, tmp_path):
    code, out, said = call(capsys, "--model", "nowhere")
    assert (code, out) == (2, "") and said.count("\n") == 1 and "no model at 'nowhere'" in said
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2)
    config.save_pretrained(tmp_path / "recurrent")
    code, out, said = call(capsys, "--model", str(tmp_path / "recurrent"))
    assert (code, out) == (2, "") and "none with attention" in said


def test_a_plan_for_a_gpu_says_how_much_it_reads_at_once(capsys, folder):
    words = ["plan", "-m", folder, "--context", "2k", "-b", "512", "--memory", "8GiB"]
    assert main.main([*words, "--device", "cuda", "--json"]) == 0
    assert "--batch-size 512" in json.loads(capsys.readouterr().out)["command"]


def test_rounded_weights_are_offered_where_memory_is_short(capsys, tmp_path):
    tiny_config("llama", **SIZES, hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    words = ("-m", str(tmp_path), "--context", "256")
    _, found = planned(capsys, *words, "--memory", "1GiB")
    settings = {each["setting"]: each for each in found["settings"]}
    exact, int8, int4 = (settings[n] for n in ("exact", "int8 weights", "int4 weights"))
    assert exact["weights_bytes"] > int8["weights_bytes"] > int4["weights_bytes"]
    assert "--weights int4" in int4["command"] and "--weights" not in exact["command"]
    names = list(settings)
    before = [settings[name] for name in names[: names.index("int8 weights")]]
    short = min(each["peak_bytes"] for each in before) - 1
    _, found = planned(capsys, *words, "--memory", f"{short}B")
    assert found["chosen"]["weights"] == "int8" and "--weights int8" in found["command"]
    _, asked = planned(capsys, *words, "--memory", "1GiB", "--weights", "int4")
    assert {each["weights"] for each in asked["settings"]} == {"int4"}
    assert asked["chosen"]["weights_bytes"] == int4["weights_bytes"]
