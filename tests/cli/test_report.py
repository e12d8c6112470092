"""`saccade report`: stored records again, or side by side; wrong files are one sentence."""

from __future__ import annotations

import json

import pytest

from saccade.cli import main
from tests.report import sample


@pytest.fixture
def records(tmp_path):
    old, new = sample.report(), sample.report()
    new.environment["threads"] = 4
    new.row("flash attention").peak_bytes *= 2
    for name, report in (("old", old), ("new", new)):
        report.write(tmp_path / f"{name}.json")
    return [str(tmp_path / "old.json"), str(tmp_path / "new.json")]


def test_a_difference_says_first_what_is_unfair(records, capsys):
    assert main.main(["report", "diff", *records]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "These records were not made alike:"
    assert "threads was 2 and is 4" in lines[1]
    assert any("246 MiB → 492 MiB (2.00x worse)" in line for line in lines)


def test_the_last_line_is_json(records, capsys, tmp_path):
    assert main.main(["report", "diff", *records, "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert data["unfair"] == ["Machine: threads was 2 and is 4."]
    assert main.main(["report", "diff", *records, "--json", str(tmp_path / "d.json")]) == 0
    assert json.loads((tmp_path / "d.json").read_text()) == data


def test_a_page_is_drawn_again(records, tmp_path):
    out = tmp_path / "page.html"
    assert main.main(["report", "html", records[0], "-o", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"schema": "saccade.bench/1"}', '{"schema": "saccade.compare/2"}',
     "\xff", '{"schema": "saccade.compare/2", "rows": 5}'],
)  # fmt: skip
def test_files_that_are_no_record(records, tmp_path, capsys, content):
    bad = tmp_path / "bad.json"
    bad.write_text(content, encoding="latin-1")
    for words in (["diff", records[0], str(bad)], ["html", str(bad), "-o", str(tmp_path / "x")]):
        assert main.main(["report", *words]) == 2
        err = capsys.readouterr().err
        assert "bad.json is not a saccade.compare/2 record" in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["diff", "a.json"], "report diff"),
        (["diff", "/nowhere/a.json", "/nowhere/b.json"], "No such file"),
        (["html", "/nowhere/a.json"], "-o"),
        (["html", "/nowhere/a.json", "-o", "/nowhere/x.html"], "no folder /nowhere"),
        (["tables"], "There are diff, html."),
    ],
)
def test_wrong_words_are_one_sentence(words, said, capsys):
    assert main.main(["report", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
