"""The README's claims: its tree exists, it is short, its options exist, its versions are tested."""

import re
import tomllib
from dataclasses import fields

from saccade.runtime import ContextParams
from tests.docs.pages import PAGES, ROOT, blocks

README = PAGES["README.md"]


def test_the_tree_exists():
    tree = next(block for block in blocks(README, "") if block.startswith("saccade/core"))
    named = [line.split()[0] for line in tree.splitlines()]
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    folders = {f"saccade/{init.parent.name}" for init in (ROOT / "saccade").glob("*/__init__.py")}
    told = set(re.findall(r"saccade/\w+", tree))
    assert folders <= told, folders - told


def test_short_and_the_first_command_comes_early():
    lines = README.splitlines()
    assert len(lines) < 150
    assert lines.index("make demo") < 15


def test_every_context_option_of_the_table_exists():
    known = {field.name for field in fields(ContextParams)}
    rows = re.findall(r"^\| (`[^|]*`) \|", README, re.MULTILINE)
    assert rows
    for name in re.findall(r"`(\w+)(\*?)`", " ".join(rows)):
        assert any(field.startswith(name[0]) for field in known), name


def test_its_versions_are_the_oldest_and_the_newest_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    lowest = dict(need.split(">=") for need in needed if ">=" in need)
    lowest = {name: version.split(",")[0] for name, version in lowest.items()}
    pinned = re.search(r"^transformers==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert f"transformers {lowest['transformers']} to {pinned[1]}" in README
    assert f"torch from {lowest['torch']} on" in README
