"""The claims of docs/caches.md: its commands parse, its figures are stored records."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

from saccade.cli.main import parse

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/caches.md").read_text()


def benchmark():
    """benchmarks/caches.py as a module."""
    spec = importlib.util.spec_from_file_location("caches", ROOT / "benchmarks/caches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_parse():
    lines = re.findall(r"saccade ((?:plan|chat) --[^`\n]*)", TEXT)
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line)
        assert parse(words).info_name == f"saccade {words[0]}"


def test_figures_are_the_stored_records():
    caches = benchmark()
    record, kills = caches.read_record(), json.loads(caches.KILLS.read_text())
    assert caches.published(TEXT, record, kills) == TEXT
    assert TEXT.count("dense fp32 |") == len(caches.LENGTHS)


def test_the_record_is_what_the_text_says():
    """Bars of the record: no session lost, int8 within 1e-3 of keys in float32."""
    caches = benchmark()
    rows = {(row["length"], row["name"]): row for row in caches.read_record()["rows"]}
    assert all(rows[length, "int8"]["kl"] <= 1e-3 for length in caches.LENGTHS)
    assert json.loads(caches.KILLS.read_text())["sessions_lost"] == 0
