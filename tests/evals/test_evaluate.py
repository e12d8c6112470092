"""A whole evaluation of a tiny model: the gate, both columns, stopping and going on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import saccade
from saccade.core import BadInput
from saccade.evals import answering, evaluate
from saccade.evals.evaluate import Plan, run
from saccade.evals.grid import rows_of
from saccade.report.evaluation import DENSE, score_table
from tests.cli.byte_tokenizer import Bytes
from tests.tiny_models import tiny_config, tiny_model

TASK, LENGTH = "aggregate_compare", 2500


@pytest.fixture(scope="module")
def model():
    inner = tiny_model(tiny_config("llama", vocab_size=256, max_position_embeddings=4096))
    inner.generation_config.eos_token_id = None
    return SimpleNamespace(
        model=inner, tokenizer=Bytes(), name="tiny", n_ctx_train=4096, weights="f32"
    )


def plan(**changes):
    made = {"tasks": [TASK], "contexts": [LENGTH], "samples": 2, "gate": 0.0}
    return Plan(**{**made, **changes})


SNAPKV = rows_of(["snapkv"], [0.5])


def answers(predictions):
    return {(p.place, p.turn.question): p.text for p in predictions}


@pytest.fixture
def logits(monkeypatch):
    """Logits behind every prompt, in the order in which they were computed."""
    found: list[torch.Tensor] = []
    real = answering._written

    def watched(ctx, *args):
        found.append(ctx.text.next_logits().clone())
        return real(ctx, *args)

    monkeypatch.setattr(answering, "_written", watched)
    return found


def test_a_budget_of_everything_is_the_dense_model(model, logits):
    """Ratio 0: the same bits, whenever the question is read."""
    report, predictions = run(model, plan(rows=rows_of(["snapkv"], [1.0])))
    dense, *others = report.results
    assert dense.row == DENSE and [o.asked for o in others] == ["after", "before"]
    texts = [p.text for p in predictions]
    assert texts == texts[:2] * 3 and all(o.status == "ok" for o in others)
    assert all(o.change == 0.0 and o.scores == dense.scores for o in others)
    assert len(logits) == 6 and not torch.equal(logits[0], logits[1])
    assert all(torch.equal(each, logits[at % 2]) for at, each in enumerate(logits))


def test_caches_are_smaller_and_both_columns_differ(model, logits):
    report, _ = run(model, plan(rows=SNAPKV))
    dense, after, before = report.results
    assert (after.asked, before.asked) == ("after", "before")
    assert after.cache_bytes < 0.6 * dense.cache_bytes
    assert before.cache_bytes > after.cache_bytes  # half of the question is in it too
    pairs = [(logits[a], logits[b]) for a in range(6) for b in range(a)]
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_the_gate(model):
    report, predictions = run(model, plan(rows=SNAPKV, gate=0.8))
    dense, *others = report.results
    assert dense.status == "ok" and dense.mean < 0.8 and len(predictions) == 2
    assert [o.status for o in others] == ["gated"] * 2
    assert others[0].note.startswith(f"the model itself solves {dense.mean:.2f} of {TASK} at 2,500")
    assert others[0].note.endswith("less than the gate of 0.8, so no policy is scored on it.")
    assert [cell.text for cell in score_table(report, LENGTH).lines[0].cells][1:] == ["gated"] * 2


def test_stopped_at_any_sample_it_goes_on_from_there(model, tmp_path, monkeypatch):
    whole, expected = run(model, plan(rows=SNAPKV))
    computed = []
    real = evaluate.answer

    def counted(*args, **options):
        computed.append(1)
        if len(computed) in (2, 5):
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(evaluate, "answer", counted)
    keep = tmp_path / "k.jsonl"
    stopped, _ = run(model, plan(rows=SNAPKV), keep=keep)
    assert not stopped.complete and stopped.results[-1].status == "stopped"
    assert len(stopped.results[-1].scores) == 1 and stopped.results[-1].mean is not None
    assert not run(model, plan(rows=SNAPKV), keep=keep)[0].complete
    report, predictions = run(model, plan(rows=SNAPKV), keep=keep)
    assert report.complete and len(computed) == 2 * 3 + 2  # each sample once, and two stops
    assert answers(predictions) == answers(expected)
    assert [r.scores for r in report.results] == [r.scores for r in whole.results]
    run(model, plan(rows=SNAPKV), keep=keep)
    assert len(computed) == 8  # nothing is computed again


def test_progress_ends_at_all(model):
    seen = []
    run(model, plan(rows=SNAPKV), on_progress=lambda *state: seen.append(state))
    done = [state[0] for state in seen]
    assert done == sorted(done) and seen[-1] == (6, 6, "done")
    assert any("question before" in state[2] for state in seen)


def test_a_row_that_fails_leaves_the_others(model, monkeypatch):
    real = evaluate.answer

    def failing(runner, params, *args, **options):
        if params.kv_policy and options["asked"] == "after":
            raise RuntimeError("kernel")
        return real(runner, params, *args, **options)

    monkeypatch.setattr(evaluate, "answer", failing)
    report, _ = run(model, plan(rows=SNAPKV))
    assert [r.status for r in report.results] == ["ok", "failed", "ok"]
    assert "RuntimeError: kernel" in report.results[1].note


def test_several_turns_are_scored_apart(model):
    report, predictions = run(model, plan(tasks=["multiturn"], contexts=[2500], samples=1))
    assert len(report.results[0].turns) == 4 and len(predictions) == 4


def test_what_cannot_run(model):
    with pytest.raises(BadInput, match="vt needs at least .* got a context of 100"):
        run(model, plan(tasks=["vt"], contexts=[100]))
    with pytest.raises(BadInput, match="tiny has no tokenizer"):
        run(SimpleNamespace(**{**vars(model), "tokenizer": None}), plan())
    report, _ = run(model, plan(tasks=["vt", TASK], contexts=[1500], samples=1))
    assert [r.status for r in report.results] == ["does not fit", "ok"]
    names = [line.name for line in score_table(report, 1500).lines]
    assert names == ["vt", TASK, "cache"]


def test_the_grid():
    rows = rows_of(["none", "snapkv"], [0.5, 64], ["none"], ["none", "block_topk"])
    assert [row.name for row in rows] == [
        "block_topk", "snapkv 50 %", "snapkv 50 %, block_topk", "snapkv 64 tokens",
        "snapkv 64 tokens, block_topk",
    ]  # fmt: skip
    (row,) = rows_of(cache_types=["int8/int4"])
    assert row.name == "int8/int4" and row.options == {"type_k": "int8", "type_v": "int4"}
    (row,) = rows_of(["snapkv"], [saccade.Bytes("2GiB")])
    assert row.name == "snapkv 2GiB"
    assert row.options == {"kv_policy": "snapkv", "kv_budget": "2GiB"}  # as JSON has it
    assert rows_of() == [] == rows_of(["none"])


def test_too_few_bytes_are_refused_before_anything_is_read(model):
    def progress(*state):
        raise AssertionError(f"reads: {state}")

    few = rows_of(["snapkv"], [saccade.Bytes("9KiB")])
    with pytest.raises(BadInput, match="kv_budget=9KiB is too small"):
        run(model, plan(rows=few), on_progress=progress)


@pytest.mark.parametrize(
    ("grid", "said"),
    [((["snapkv"],), "go together"), (([], [0.5]), "go together"),
     ((["nope"], [0.5]), "unknown kv_policy 'nope'"), (([], [], ["int9"]), "unknown type_k"),
     (([], [], ["f32/int8"]), "Set both"), (([], [], [], ["nope"]), "no pattern is called")],
)  # fmt: skip
def test_grids_that_contradict_themselves(grid, said):
    with pytest.raises(BadInput, match=said):
        rows_of(*grid)
