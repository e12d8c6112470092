"""The columns, and which positions are shown."""

from __future__ import annotations

from dataclasses import fields

from saccade.report.columns import COLUMNS, cells, groups, notes, summary
from saccade.report.comparison import Row
from saccade.report.positions import position_table
from tests.report import sample


def _row(report, name):
    return next(row for row in report.rows if row.name == name)


def test_every_measured_field_has_a_column():
    words = {"name", "group", "options", "status", "note", "needle_trials", "parts"} | {
        "ttft_seconds"
    }
    measured = {f.name for f in fields(Row) if f.name not in words and not f.name.endswith("_se")}
    assert {column.key for column in COLUMNS} == measured


def test_a_cell_carries_value_and_ratio():
    report = sample.report()
    line = cells(_row(report, "flash attention"), report.baseline_row())
    assert str(line[0]) == "246 MiB (0.30x)" and line[0].better is True
    assert str(line[1]) == "184 MiB (1.00x)" and line[1].better is None
    assert line[-1].text == "4/4"
    expansion = cells(_row(report, "MHA, exact expansion (9)"), report.baseline_row())
    assert expansion[3].better is False  # slower to decode


def test_the_baseline_has_no_ratio_and_nothing_has_one_without_it():
    report = sample.report()
    baseline = report.baseline_row()
    assert not any(cell.ratio for cell in cells(baseline, baseline))
    report.rows.remove(baseline)
    assert report.baseline_row() is None
    assert not any(cell.ratio for row in report.rows for cell in cells(row, None))


def test_rows_that_did_not_run_say_so():
    report = sample.report()
    failed = cells(_row(report, "int4 cache"), report.baseline_row())
    assert [cell.text for cell in failed] == ["failed"] + ["–"] * (len(COLUMNS) - 1)
    assert ("dynamic", "stopped") in notes(report)
    assert dict(notes(report))["int4 cache"].startswith("failed: float16")


def test_numbers_that_are_not_finite_are_not_shown():
    row = Row(name="x", group="y", perplexity=float("inf"), kl=float("nan"))
    assert {cell.text for cell in cells(row, None)} == {"–"}


def test_groups_keep_the_order_and_gather_their_rows():
    report = sample.report()
    report.rows.append(Row(name="late", group="Heads"))
    found = groups(report)
    assert [name for name, _ in found][:3] == ["Attention", "Heads", "Sliding window"]
    assert found[1][1][-1].name == "late"


def test_summary_says_what_where_and_how_long():
    said = summary(sample.report())
    for part in ("SmolLM2", "pydoc_data.topics", "4,096", "2 threads", "2 min 31 s", "stopped"):
        assert part in said


def test_positions_keep_both_sides_of_the_trained_length():
    found = position_table(sample.report(), most=9)
    assert found.starts[0] == 0 and found.starts[-1] == 15360 and len(found.starts) == 9
    assert {7168, 8192} <= set(found.starts)
    assert found.past_training == [start >= 8192 for start in found.starts]
    plain = dict(found.lines)["plain"]
    assert found.verdict(len(plain) - 1, plain[-1]) is False
    yarn = dict(found.lines)["YaRN x2"]
    assert found.verdict(len(yarn) - 1, yarn[-1]) is True
    assert found.verdict(0, yarn[0]) is None  # inside the trained length there is no verdict


def test_no_curves_no_table():
    report = sample.report()
    report.curves.clear()
    assert position_table(report) is None
