"""`saccade compare` around a run that is made up."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from saccade.cli import main
from saccade.cli.progress import TimeLeft, progress
from saccade.report.comparison import read


def test_the_last_line_of_stdout_is_the_record(capsys, fake):
    assert main.main(["compare", "--quick", "--rows", "flash,int8", "--json", "-"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1]) == json.loads(fake.report.to_json())
    assert any("flash attention" in line for line in out[:-1])
    assert fake.calls[0].quick and fake.calls[0].rows == ["flash", "int8"]


def test_lengths_are_written_as_people_do(fake):
    assert main.main("compare --context 2k --sweep 1k,4k,96,1.5K,1M".split()) == 0
    assert fake.calls[0].context == 2048
    assert fake.calls[0].sweep == [1024, 4096, 96, 1536, 1024**2]


def test_a_run_without_a_sweep_asks_for_none(fake):
    assert main.main(["compare"]) == 0
    assert list(fake.calls[0].sweep) == [] and fake.calls[0].context is None


@pytest.mark.parametrize("text", ["4q", "-1", "0", "1.3", "k", "", "1e3", "9" * 50, "nan"])
@pytest.mark.parametrize("option", ["--context", "--sweep"])
def test_lengths_that_are_none(capsys, fake, option, text):
    assert main.main(["compare", f"{option}={text}"]) == 2
    err = capsys.readouterr().err
    assert option in err and "expected" in err and "Traceback" not in err
    assert not fake.calls


def test_all_files_are_written(tmp_path, monkeypatch, capsys, fake):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("Call me Ishmael.")
    words = "compare --text book.txt --json r.json --html r.html --png r.png --markdown r.md"
    assert main.main(words.split()) == 0
    assert fake.calls[0].text == "Call me Ishmael."
    assert read(Path("r.json")).text["source"] == "book.txt"
    assert Path("r.html").read_text().startswith("<!doctype html>")
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")
    assert "| transformers eager (baseline) |" in Path("r.md").read_text()
    assert sorted(path.name for path in Path().iterdir()) == [
        "book.txt", "r.html", "r.json", "r.md", "r.png",
    ]  # fmt: skip
    assert "Wrote r.html" in capsys.readouterr().err


def test_a_stopped_run_replaces_neither_a_whole_one_nor_another_part(tmp_path, capsys, fake):
    target = tmp_path / "r.json"
    assert main.main(["compare", "--json", str(target)]) == 0
    fake.report.complete = False
    for part in ("r.stopped-1.json", "r.stopped-2.json"):
        assert main.main(["compare", "--json", str(target)]) == 130
        captured = capsys.readouterr()
        assert "flash attention" in captured.out and f"{part}\n" in captured.err
        assert "the same call begins with the first again" in captured.err
        assert read(tmp_path / part).complete is False
    assert read(target).complete
    assert main.main(["compare"]) == 130
    assert "The finished rows are above." in capsys.readouterr().err


def test_a_file_that_fails_leaves_no_half_and_spares_the_others(
    tmp_path, monkeypatch, capsys, fake
):
    from saccade.report import markdown

    def broken(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(markdown, "to_markdown", broken)
    old = tmp_path / "r.md"
    old.write_text("old")
    code = main.main(["compare", "--markdown", str(old), "--json", str(tmp_path / "r.json")])
    err = capsys.readouterr().err
    assert code == 2 and "r.md was not written: No space left on device." in err
    assert old.read_text() == "old" and read(tmp_path / "r.json").rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md"]


@pytest.mark.parametrize("content", [b"", b"  \n", b"\xff\xfe\x00binary"])
def test_texts_that_cannot_be_read(tmp_path, capsys, fake, content):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert main.main(["compare", "--text", str(path)]) == 2
    assert str(path) in capsys.readouterr().err and not fake.calls


def test_a_folder_without_permission(tmp_path, monkeypatch, capsys, fake):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    assert main.main(["compare", "--json", str(tmp_path / "r.json")]) == 2
    assert "no permission" in capsys.readouterr().err and not fake.calls


def test_a_missing_package_is_found_before_the_run(tmp_path, monkeypatch, capsys, fake):
    from saccade.cli import failure

    monkeypatch.setattr(failure, "find_spec", lambda name: None if name == "jinja2" else object())
    assert main.main(["compare", "--html", str(tmp_path / "r.html")]) == 2
    err = capsys.readouterr().err
    assert "--html needs the package jinja2" in err and 'pip install ".[hf,report]"' in err
    assert not fake.calls


def test_progress_in_a_file_is_plain_lines(capsys, fake):
    assert main.main(["compare"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "[  0 %] step 0"
    assert lines[2].startswith("[ 50 %] step 1, about ") and lines[2].endswith(" left")
    assert lines[3] == "[100 %] step 2"
    assert not any("\x1b" in line for line in lines)


def test_progress_in_a_terminal_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress(stream) as show:
        show(0, 4, "[not markup]")
        show(3, 4, "[not markup]")
    assert "[not markup]" in stream.getvalue() and "75 %" in stream.getvalue()


def test_time_left_counts_down():
    clock = iter([0.0, 10.0, 10.0, 14.0, 99.0])
    left = TimeLeft(lambda: next(clock))
    assert left.seconds() is None
    left.update(1, 3)
    assert [left.seconds() for _ in range(3)] == [20.0, 16.0, 0.0]
