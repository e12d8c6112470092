"""Files are complete or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saccade.core import BadInput
from saccade.report.comparison import SCHEMA, read
from saccade.report.files import write_whole
from saccade.report.positions import position_table, positions_chart
from tests.report import sample


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")

    def full_disk(self, _):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_whole(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_missing_folder_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(OSError):
        write_whole(tmp_path / "no" / "x.json", "{}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "other/1"}', '{"schema": "saccade'])
def test_what_is_not_a_record_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(BadInput, match="is not a saccade"):
        read(path)


def test_a_record_of_the_first_schema_is_read(tmp_path):
    """It has no reference, sweep or claims, and no errors of speeds."""
    row = {"name": "standard attention", "group": "Attention", "prefill_tps": 137.0, "needle": 1.0}
    data = {
        "schema": "saccade.compare/1", "revision": None, "command": "saccade compare",
        "environment": {}, "date": "2026-01-01", "model": {}, "text": {}, "settings": {},
        "baseline": "standard attention", "rows": [row], "curves": [],
    }  # fmt: skip
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    found = read(path)
    assert found.baseline_row().prefill_tps == 137.0 and found.reference == ""
    assert found.sweep == [] and found.schema == SCHEMA


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prefill_tps", "fast"), ("prefill_tps", True), ("prefill_tps", float("inf")),
        ("name", None), ("parts", "flash"), ("options", []), ("speed", 1.0),
    ],
)  # fmt: skip
def test_fields_of_another_kind_are_refused(tmp_path, field, value):
    path = tmp_path / "x.json"
    sample.report().write(path)
    data = json.loads(path.read_text())
    data["rows"][1][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(BadInput, match=field):
        read(path)


def test_a_number_that_is_not_finite_does_not_cost_the_record(tmp_path):
    report = sample.report()
    report.rows[4].perplexity = float("inf")
    report.curves[0].perplexity[2] = float("nan")
    report.write(tmp_path / "x.json")
    found = read(tmp_path / "x.json")
    assert found.rows[4].perplexity is None and found.curves[0].perplexity[2] is None
    assert position_table(found) and positions_chart(found)
