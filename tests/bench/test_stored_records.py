"""The records under benchmarks/results: each is cited, and says which tree made it and how."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
RULES = ROOT / "saccade/ops/tuning/measured/backends"
NAMES = sorted(path.stem for path in RESULTS.glob("*.json"))


def record(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def says_all(data):
    """Whether a record has its revision, command, environment and date."""
    written = re.fullmatch(r"[0-9a-f]{7,40}(\+changes)?", data.get("revision") or "")
    facts = data.get("environment", {})
    known = {"cpu", "torch", "saccade"} <= set(facts) and bool(data.get("date"))
    return bool(written) and known and exists(data.get("command", ""))


def exists(command):
    """Whether what a command runs is in the tree: a script, a module or a `saccade` command."""
    words = command.split()
    if words[:2] == ["python", "-m"]:
        return (ROOT / (words[2].replace(".", "/") + ".py")).exists()
    if words[:1] == ["python"]:
        return (ROOT / words[1]).exists()
    return words[:1] == ["saccade"] and (ROOT / f"saccade/cli/{words[1]}.py").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_record_says_which_tree_made_it_and_how(name):
    assert says_all(record(name))


def test_every_record_is_cited():
    """By docs, code or the rules; the logs of lab cite an earlier tree (lab/README.md)."""
    places = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "saccade").rglob("*.json"),
    ]
    places += [*(ROOT / "saccade").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    text = "\n".join(path.read_text() for path in places)
    assert [name for name in NAMES if not re.search(rf"\b{name}\b", text)] == []


def test_every_rule_has_its_record():
    sources = {
        rule["source"]
        for path in RULES.glob("*.json")
        for rule in json.loads(path.read_text())["rules"]
    }
    assert sources and sources <= set(NAMES)


def test_docs_cite_records_that_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        cited = set(re.findall(r"\b((?:h100|h200)_\w+)\.json", page.read_text()))
        cited |= set(re.findall(r"benchmarks/results/([\w-]+)\.json", page.read_text()))
        assert cited <= set(NAMES), page


def test_a_deleted_script_is_noticed():
    assert exists("python -m benchmarks.gpu_rules --out x") and exists("saccade bench cpu")
    assert exists("python benchmarks/caches.py")
    assert not exists("python lab/no_such_script.py rows") and not exists("")
    whole = {"revision": "0123456789ab", "command": "saccade compare --quick", "date": "2026"}
    whole["environment"] = {"cpu": "x", "torch": "x", "saccade": "x"}
    assert says_all(whole)
    for name, value in whole.items():
        assert not says_all({**whole, name: type(value)()})
