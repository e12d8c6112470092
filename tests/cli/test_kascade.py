"""`--sparse kascade`: the plan in a file, or calibrated on the prompt."""

import re

import pytest

from saccade.cli import main, shared_options
from saccade.cli.failure import UsageError
from saccade.hf.load import LoadedModel
from saccade.runtime.params import ContextParams
from saccade.sparse import Kascade, KascadePlan
from saccade.sparse.kascade_plan import Reuse
from tests.cli.byte_tokenizer import Bytes
from tests.tiny_models import tiny_config, tiny_model


def params(*words):
    found = main.parse(["generate", "--model", "m", "--prompt", "p", *words]).params
    return shared_options.context_params({o.field: found[o.field] for o in shared_options.CONTEXT})


@pytest.fixture
def tiny(monkeypatch):
    model = tiny_model(tiny_config("llama"))
    loaded = LoadedModel(model=model, tokenizer=Bytes(), name="tiny", n_ctx_train=512)
    monkeypatch.setattr("saccade.hf.load.load_model", lambda *_, **__: loaded)


def call(capsys, *words):
    code = main.main(["generate", "--model", "m", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_plan_of_kascade_is_read_from_its_file(tmp_path):
    plan = KascadePlan(
        model="M", weights="w", layers=(None, Reuse(1, (0,), 1.0)), tokens=1024, block=64, top=16
    )
    plan.save(tmp_path / "plan.json")
    found = params("--sparse", "kascade", "--sparse-plan", str(tmp_path / "plan.json"))
    assert found == ContextParams(sparse=Kascade(plan=plan))
    (tmp_path / "other.json").write_text("[]")
    for words, says in (
        (["--sparse", "kascade"], "needs --sparse-plan FILE here"),
        (
            ["--sparse", "kascade", "--sparse-plan", "none.json"],
            "none.json cannot be read: No such",
        ),
        (["--sparse", "quest", "--sparse-plan", "plan.json"], "is a plan of --sparse kascade"),
        (["--sparse", "kascade", "--sparse-plan", str(tmp_path / "other.json")], "is no plan of"),
    ):
        with pytest.raises(UsageError, match=says):
            params(*words)


def test_kascade_is_calibrated_on_the_prompt_and_kept(capsys, tmp_path, tiny):
    file, words = str(tmp_path / "plan.json"), ("--sparse", "kascade", "-n", "3", "--raw")
    prompt = ("--prompt", "a text of some words, " * 50)
    code, first, err = call(capsys, *prompt, *words, "--sparse-plan", file)
    assert code == 0 and "Calibrating Kascade on 1,100 tokens of the prompt" in err
    assert re.search(rf"layers 1 of 4 choose for the others, .*; the plan is in {file}\.", err), err
    code, second, err = call(capsys, *prompt, *words, "--sparse-plan", file)
    assert code == 0 and second == first and "Calibrating" not in err
    code, third, err = call(capsys, *prompt, *words)
    assert code == 0 and third == first and "--sparse-plan FILE keeps the plan" in err
    code, _, err = call(capsys, "--prompt", "short", *words)
    assert code == 2 and "text of 1,024 tokens or more, got 5" in err
    session = ("--session", str(tmp_path / "s"))
    code, _, err = call(capsys, "--prompt", "short", *words, *session)
    assert code == 2 and "does not go with --session" in err
