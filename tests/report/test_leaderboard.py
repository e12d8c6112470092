"""The export is what kvpress' evaluation would have written for the same answers."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from types import SimpleNamespace

import pytest

from saccade.report.evaluation import Evaluation, Score, read, score_table
from saccade.report.leaderboard import Prediction, export

ROWS = {
    "dense": {},
    "ada_snapkv 25 %": {"kv_policy": "ada_snapkv", "kv_budget": 0.25},
    "snapkv 100 tokens": {"kv_policy": "snapkv", "kv_budget": 100},
    "int8/int4": {"type_k": "int8", "type_v": "int4"},
}
ANSWERS = {  # row, asked -> what was written to two questions with two answers each
    ("dense", ""): ("11 and 22", "33, 44"),
    ("ada_snapkv 25 %", "after"): ("11", "nothing"),
    ("ada_snapkv 25 %", "before"): ("22 11", '4"4, 33\n'),
    ("snapkv 100 tokens", "after"): ("", "44"),
    ("int8/int4", ""): ("11, 22", "33"),
}
RIGHT = (("11", "22"), ("33", "44"))
SCORES = {  # by hand
    ("dense", ""): [1.0, 1.0],
    ("ada_snapkv 25 %", "after"): [0.5, 0.0],
    ("ada_snapkv 25 %", "before"): [1.0, 0.5],
    ("snapkv 100 tokens", "after"): [0.0, 0.5],
    ("int8/int4", ""): [1.0, 0.5],
}


@pytest.fixture
def made():
    results, predictions = [], []
    for (row, asked), scores in SCORES.items():
        result = Score(task="vt", context=4096, row=row, asked=asked)
        result.fill(scores, None if row == "dense" else results[0])
        result.cache_bytes = 400.0 if row.startswith("snapkv") else 1000.0
        results.append(result)
        place = SimpleNamespace(row=row, asked=asked, task="vt", context=4096)
        for text, right in zip(ANSWERS[row, asked], RIGHT, strict=True):
            turn = SimpleNamespace(question="Q?", prefix="A: ", answers=right, n_predict=30)
            predictions.append(Prediction(place=place, turn=turn, text=text))
    results.append(Score(task="qa_fact", context=4096, row="dense", scores=[1.0], mean=1.0))
    results.append(Score(task="cwe", context=4096, row="dense", status="stopped", scores=[1.0]))
    report = Evaluation(
        revision=None, command="saccade eval vt", environment={"cpu": "c", "gpu": None}, date="d",
        model={"name": "org/model"},
        settings={"rows": ROWS, "seed": 42, "gate": 0.8, "samples": 2, "device": "cpu"},
        results=results,
    )  # fmt: skip
    return report, predictions


NAMES = {  # dataset__length__model__press__ratio, as get_results_dir of kvpress joins them
    "ruler__4096__org--model__no_press__0.00": ("dense", ""),
    "ruler__4096__org--model__adakv_snapkv__0.75": ("ada_snapkv 25 %", "after"),
    "ruler__4096__org--model__adakv_snapkv__0.75__query_aware": ("ada_snapkv 25 %", "before"),
    "ruler__4096__org--model__snapkv__0.60": ("snapkv 100 tokens", "after"),  # 400 of 1000 bytes
    "ruler__4096__org--model__no_press-int8-int4__0.00": ("int8/int4", ""),
}


def string_match_all(predictions, references):
    """RULER's formula, from the files that were written."""
    control = re.compile(r"[\x00-\x1f]")
    texts = [control.sub("", text.strip()).strip() for text in predictions]
    found = [
        sum(r.lower() in text.lower() for r in refs) / len(refs)
        for text, refs in zip(texts, references, strict=True)
    ]
    return round(100 * sum(found) / len(found), 2)


def test_folders_files_and_scores(made, tmp_path):
    folders = export(*made, tmp_path)
    expected = {*NAMES, "saccade__4096__org--model__no_press__0.00"}
    assert {folder.name for folder in folders} == expected
    for name, key in NAMES.items():
        rows = list(csv.DictReader(io.StringIO((tmp_path / name / "predictions.csv").read_text())))
        assert list(rows[0]) == [
            "question", "answer_prefix", "answer", "task", "max_new_tokens", "predicted_answer",
            "compression_ratio",
        ]  # fmt: skip
        assert tuple(row["predicted_answer"] for row in rows) == ANSWERS[key]
        right = [ast.literal_eval(row["answer"]) for row in rows]
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        score = string_match_all(ANSWERS[key], right)
        assert metrics == {"vt": {"string_match": score}}
        assert score == pytest.approx(50 * sum(SCORES[key]))


def test_of_a_budget_in_bytes_the_share_was_measured(made, tmp_path):
    report, predictions = made
    rows = ROWS | {"snapkv 100 tokens": {"kv_policy": "snapkv", "kv_budget": "2GiB"}}
    report.settings = report.settings | {"rows": rows}
    names = {folder.name for folder in export(report, predictions, tmp_path)}
    assert "ruler__4096__org--model__snapkv__0.60" in names


def test_the_config_is_yaml(made, tmp_path):
    yaml = pytest.importorskip("yaml")
    export(*made, tmp_path)
    name = "ruler__4096__org--model__adakv_snapkv__0.75__query_aware"
    config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
    assert config["press_name"] == "adakv_snapkv" and config["compression_ratio"] == 0.75
    assert config["query_aware"] is True and config["data_dir"] == "4096"


def test_nothing_is_written_over(made, tmp_path):
    export(*made, tmp_path)
    again = export(*made, tmp_path)
    assert {folder.name for folder in again} == {"1"}
    assert {folder.name for folder in export(*made, tmp_path)} == {"2"}


def test_the_record_comes_back_and_its_table_says_what_it_holds(made, tmp_path):
    report, _ = made
    report.write(tmp_path / "r.json")
    assert read(tmp_path / "r.json") == report
    table = score_table(report, 4096)
    assert [str(heading) for heading in table.headings][:3] == [
        "dense", "ada_snapkv 25 %, question after", "ada_snapkv 25 %, question before",
    ]  # fmt: skip
    first, *_, mean, cache = table.lines
    # Two of two: 2 / (2 + z^2). A quarter of two: 0.4144 -+ 0.3877, with z^2 = 3.8415.
    assert [str(cell) for cell in first.cells][:2] == ["100 % (34-100)", "25 % (3-80)"]
    assert mean.name == "mean of the tasks that dense solves (2)"
    assert [str(cell) for cell in mean.cells][1:] == ["–"] * 4  # one of the two tasks alone
    assert [str(cell) for cell in cache.cells][3] == "0.40x"
