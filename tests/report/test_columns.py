"""The columns, and which positions are shown."""

from __future__ import annotations

from dataclasses import fields

import pytest

from saccade.report.columns import COLUMNS, COST, QUALITY, cells, comparison_table, groups
from saccade.report.comparison import Row
from saccade.report.notes import key, notes, summary
from saccade.report.positions import position_table
from tests.report import sample


def _row(report, name):
    return next(row for row in report.rows if row.name == name)


def test_every_measured_field_has_a_column():
    words = {"name", "group", "options", "status", "note", "needle_trials", "parts"}
    measured = {f.name for f in fields(Row) if f.name not in words and not f.name.endswith("_se")}
    assert {column.key for column in COLUMNS} == measured


def _cells(report, name):
    line = cells(_row(report, name), report)
    return {column.key: cell for column, cell in zip(COLUMNS, line, strict=True)}


def test_a_cell_carries_value_and_both_ratios():
    found = _cells(sample.report(), "flash attention")
    assert str(found["peak_bytes"]) == "246 MiB (0.30x, 0.61x)"
    assert str(found["prefill_tps"]) == "373 (3.01x, 1.06x)"
    assert str(found["ttft_seconds"]) == "11.0 s (0.33x, 0.94x)"
    assert str(found["cache_bytes"]) == "184 MiB (1.00x, 1.00x)"
    assert found["needle"].text == "24/24" and not found["kl"].ratio


def test_colours_follow_the_reference_and_not_the_textbook():
    report = sample.report()
    found = _cells(report, "flash attention")
    assert found["peak_bytes"].better is True and found["cache_bytes"].better is None
    assert found["prefill_tps"].better is True and found["decode_tps"].better is None  # 1.02x
    eager = _cells(report, "transformers eager")
    assert eager["prefill_tps"].better is False and eager["ttft_seconds"].better is False
    assert {cell.better for cell in _cells(report, "transformers sdpa").values()} == {None}


def test_a_speed_without_an_interval_has_no_colour():
    report = sample.report()
    _row(report, "flash attention").prefill_tps_se = None
    assert _cells(report, "flash attention")["prefill_tps"].better is None
    _row(report, "transformers sdpa").decode_tps_se = None
    assert {_cells(report, row.name)["decode_tps"].better for row in report.rows} == {None}


def test_a_broken_row_saves_nothing_and_its_quality_is_red():
    report = sample.report()
    found = _cells(report, sample.BROKEN)
    assert found["peak_bytes"].ratio == "0.15x, 0.30x"
    assert {found[column.key].better for column in COST} == {None}
    assert {found[column.key].better for column in QUALITY} == {False}
    assert any(
        "quality is broken" in note for names, note in notes(report) if sample.BROKEN in names
    )
    lines = {line.name: line for line in comparison_table(report).lines}
    assert lines[sample.BROKEN].note and not lines["window 1024 + 4 sinks"].note


def test_a_row_is_once_itself_and_a_missing_baseline_is_a_dash():
    report = sample.report()
    assert _cells(report, "transformers eager")["prefill_tps"].ratio == "1x, 0.35x"
    assert _cells(report, "transformers sdpa")["prefill_tps"].ratio == "2.84x, 1x"
    report.baseline_row().status = "failed"  # too large for the score matrices
    assert _cells(report, "flash attention")["prefill_tps"].ratio == "–, 1.06x"


def test_the_row_that_kl_compares_with_is_named():
    found = sample.report()
    assert "compare with the predictions" not in key(found)
    found.settings["divergence_from"] = "transformers eager"
    assert key(found).endswith(
        "KL and Same top compare with the predictions of transformers eager."
    )


def test_without_a_reference_there_is_one_ratio_and_no_colour():
    report = sample.report()
    report.rows = [row for row in report.rows if row.name != report.reference]
    found = _cells(report, "flash attention")
    assert found["prefill_tps"].ratio == "3.01x"
    whole = [r for r in report.rows if r.status == "ok" and r.name != sample.BROKEN]
    assert {cell.better for row in whole for cell in cells(row, report)} == {None}
    assert "transformers sdpa was not measured" in key(report)
    report.rows.remove(report.baseline_row())
    assert key(report).startswith("Nothing is compared")
    assert not any(cell.ratio for row in report.rows for cell in cells(row, report))


def test_combinations_show_what_their_parts_multiply_to():
    report = sample.report()
    found = _cells(report, sample.TOGETHER)
    assert found["peak_bytes"].expected == "0.009x"  # 246 * 132 * 142 / 812**3
    parts = [_row(report, name) for name in _row(report, sample.TOGETHER).parts]
    eager = report.baseline_row()
    for column in COLUMNS:
        if column.key not in ("peak_bytes", "cache_bytes", "prefill_tps", "decode_tps"):
            assert not found[column.key].expected
            continue
        product = 1.0
        for part in parts:
            product *= getattr(part, column.key) / getattr(eager, column.key)
        assert float(found[column.key].expected.rstrip("x")) == pytest.approx(product, rel=0.06)
    assert "expected" in str(found["cache_bytes"]) and '"expected"' in key(report)
    _row(report, "int8 KV").status = "failed"
    assert not any(cell.expected for cell in _cells(report, sample.TOGETHER).values())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("int4 KV", "failed: float16 accumulation is not supported on this CPU…"),
        ("SnapKV, KV kept 25 %", "not applicable: every layer already slides over 512 tokens…"),
    ],
)
def test_rows_that_did_not_run_say_why_in_short_and_the_notes_in_full(name, text):
    report = sample.report()
    line = cells(_row(report, name), report)
    assert [cell.text for cell in line] == [text] + ["–"] * (len(COLUMNS) - 1)
    assert _row(report, name).note in dict(notes(report))[name]


def test_a_stopped_row_keeps_what_it_measured():
    found = _cells(sample.report(), "YaRN + SnapKV 25 %")
    assert found["peak_bytes"].text == "90.0 MiB"
    assert found["cache_bytes"].text == "stopped: while its answers were written"
    assert ("dynamic", "stopped") in notes(sample.report())


def test_numbers_that_are_not_finite_are_not_shown():
    row = Row(name="x", group="y", perplexity=float("inf"), kl=float("nan"))
    assert {cell.text for cell in cells(row, sample.report())} == {"–"}


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


def test_memory_with_weights_is_left_out_of_records_that_do_not_count_them():
    report = sample.report()
    assert comparison_table(report).headings[0].title == "Memory"
    for row in report.rows:
        row.total_bytes = None
    assert comparison_table(report).headings[0].title == "Peak memory"


def test_weights_stand_in_the_summary():
    report = sample.report()
    assert "weights" not in summary(report)
    report.model |= {"weights": "Q4_1 as in the file", "weight_bytes": 103 * sample.MIB}
    assert "(Q4_1 as in the file, 103 MiB of weights)" in summary(report)
