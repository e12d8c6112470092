"""Two records side by side."""

from __future__ import annotations

import json

import pytest

from saccade.report.comparison import Row
from saccade.report.diff import difference, difference_table, status_changes, unfair
from tests.report import sample


@pytest.fixture
def two():
    return sample.report(), sample.report()


def _change(old, new, name, key):
    found = difference(old, new)
    return next(row for row in found.rows if row.name == name).changes[key]


def test_the_same_record_twice_differs_in_nothing(two):
    found = difference(*two)
    assert not found.unfair and not found.old_only and not found.new_only
    assert {c.better for row in found.rows for c in row.changes.values()} == {None}
    assert len(found.rows) == len(two[0].rows) + len(two[0].sweep)


@pytest.mark.parametrize(
    ("key", "factor", "better"),
    [
        ("peak_bytes", 1.3, False),
        ("peak_bytes", 0.9, True),
        ("peak_bytes", 1.02, None),
        ("prefill_tps", 1.2, True),
        ("decode_tps", 0.8, False),
        ("ttft_seconds", 0.8, True),
        ("perplexity", 1.06, False),
        ("kl", 0.5, True),
        ("kl", 1.5, False),
        ("kl", 1.1, None),  # each is known to 6 %
    ],
)
def test_values_ratios_and_verdicts(two, key, factor, better):
    old, new = two
    row = new.row("window 1024 + 4 sinks")
    setattr(row, key, type(getattr(row, key))(getattr(row, key) * factor))
    change = _change(old, new, row.name, key)
    assert change.new == getattr(row, key) and change.ratio == pytest.approx(factor, rel=5e-3)
    assert change.better is better


def test_noise_beyond_the_change_gives_no_verdict(two):
    old, new = two
    row = new.row("int8 KV")
    row.prefill_tps *= 1.2
    row.prefill_tps_se = 0.2 * row.prefill_tps
    assert _change(old, new, row.name, "prefill_tps").better is None
    row.prefill_tps_se = None
    assert _change(old, new, row.name, "prefill_tps").better is None


def test_perplexity_of_other_texts_is_judged_by_its_own_wide_error(two):
    old, new = two
    new.row("int8 KV").perplexity *= 1.06
    assert _change(old, new, "int8 KV", "perplexity").better is False
    new.reference_row().perplexity *= 1.06  # so it read another text
    assert _change(old, new, "int8 KV", "perplexity").better is None


def test_what_makes_it_unfair_is_said_but_not_the_code_that_is_compared(two):
    old, new = two
    new.environment |= {"threads": 4, "saccade": "0.2.0"}
    new.settings["n_context"] = 8192
    new.model["name"] = "another"
    new.row("int8 KV").options["n_batch"] = 64
    new.reference = "flash attention"
    said = "\n".join(unfair(old, new))
    for part in ("threads was 2 and is 4", "n context was 4,096 and is 8,192", "name was SmolLM2",
                 "int8 KV was run with other options (n_batch – to 64)",
                 "reference was transformers sdpa"):  # fmt: skip
        assert part in said
    assert "0.2.0" not in said and len(said.splitlines()) == 5


def test_rows_of_one_record_and_rows_that_failed(two):
    old, new = two
    new.rows = [row for row in new.rows if row.name != "YaRN x2"]
    new.rows.append(Row(name="new row", group="x"))
    new.row("int8 KV").status = "failed"
    found = difference(old, new)
    assert found.old_only == ["YaRN x2"] and found.new_only == ["new row"]
    said = "\n".join(status_changes(found))
    assert "int8 KV: measured → failed" in said and "flash" not in said


def test_the_table_shows_old_and_new_only_where_they_differ(two):
    old, new = two
    new.row("flash attention").peak_bytes = 300 * sample.MIB
    lines = {line.name: line for line in difference_table(difference(old, new)).lines}
    cells = [str(cell) for cell in lines["flash attention"].cells]
    assert cells[1] == "246 MiB → 300 MiB (1.22x worse)" and cells[2] == "184 MiB"
    assert str(lines["int4 KV"].cells[0]) == "–"


def test_it_is_json(two):
    data = json.loads(json.dumps(difference(*two).to_dict(), allow_nan=False))
    assert data["schema"] == "saccade.report-diff/1" and data["unfair"] == []
    assert data["rows"][2]["columns"]["prefill_tps"] == {
        "old": 373, "new": 373, "ratio": 1.0, "better": None,
    }  # fmt: skip
