"""The README's claims: its snippets run, its tree exists, its table is a stored record."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [code for name, code in fences if name == language]


@pytest.mark.real_model
def test_snippets_run(capsys):
    scope = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), scope)
    assert "Paris" in capsys.readouterr().out


def test_the_tree_exists():
    tree = next(block for block in blocks("") if block.startswith("saccade/core"))
    named = [line.split()[0] for line in tree.splitlines()]
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    folders = {f"saccade/{init.parent.name}" for init in (ROOT / "saccade").glob("*/__init__.py")}
    assert folders <= set(named), folders - set(named)


def test_short_and_the_first_command_comes_early():
    lines = README.splitlines()
    assert len(lines) < 150
    assert lines.index("make demo") < 15


def test_commands_parse():
    """Every `saccade ...` line of the README is a command line that the parser accepts."""
    from saccade.cli.main import parse

    commands = [
        line.split("#")[0].split()[1:]
        for block in blocks("")
        for line in block.splitlines()
        if line.startswith("saccade ")
    ]
    assert len(commands) >= 4
    for words in commands:
        assert parse(shlex.split(" ".join(words))).info_name == f"saccade {words[0]}"


def test_the_table_is_the_stored_record():
    from saccade.report.comparison import read
    from saccade.report.markdown import to_markdown

    path, table = re.search(
        r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->", README, re.DOTALL
    ).groups()
    assert table.strip() == to_markdown(read(ROOT / path)).strip()


def test_pictures_exist():
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / name).stat().st_size > 1000


def test_every_context_option_of_the_table_exists():
    from dataclasses import fields

    from saccade.runtime import ContextParams

    known = {field.name for field in fields(ContextParams)}
    rows = re.findall(r"^\| (`[^|]*`) \|", README, re.MULTILINE)
    for name in re.findall(r"`(\w+)(\*?)`", " ".join(rows)):
        assert any(field.startswith(name[0]) for field in known), name
