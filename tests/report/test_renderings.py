"""Every rendering of one record: structure, escaping, and nothing that breaks on missing cells."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from rich.console import Console

from saccade.report.columns import COLUMNS
from saccade.report.comparison import Row, read
from saccade.report.figures import to_png
from saccade.report.html import to_html
from saccade.report.labels import spread
from saccade.report.markdown import to_markdown
from saccade.report.terminal import print_report
from tests.report import sample


def _terminal(report, width):
    out = io.StringIO()
    print_report(report, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def _empty():
    """A run stopped before anything was finished."""
    report = sample.report()
    report.rows.clear()
    report.curves.clear()
    report.sweep.clear()
    report.claims.clear()
    return report


def test_json_round_trip(tmp_path):
    report = sample.report()
    report.write(tmp_path / "record.json")
    assert read(tmp_path / "record.json") == report


def test_terminal_wide_is_one_table():
    text = _terminal(sample.report(), 260)
    line = next(line for line in text.splitlines() if "flash attention" in line)
    assert "246 MiB (0.30x, 0.61x)" in line and "8.41 ±0.24 (1.00x, 1.00x)" in line
    assert "24/24" in line and "373 (3.01x, 1.06x)" in line
    for part in ("Perplexity by position", "past the trained length", "expected 0.009x"):
        assert part in text
    assert "use <int8> or _f32_" in text and "not applicable: every" in text
    assert "on a CPU sdpa already computes tile by tile" in text
    assert "By length of the context: Time to first token" in text


@pytest.mark.parametrize("width", [140, 80])
def test_terminal_narrow_cuts_nothing(width):
    report = sample.report()
    text = _terminal(report, width)
    assert max(map(len, text.splitlines())) <= width
    for part in ("246 MiB", "0.30x, 0.61x", "0.094 ±0.006", "Same top", "not applicable:"):
        assert part in text
    assert "sa…" not in text


def test_names_are_not_markup():
    report = sample.report()
    report.rows[1].name = "[bold]not markup[/nothing]"
    assert "[bold]not markup[/nothing]" in _terminal(report, 260)


@pytest.mark.parametrize("render", [to_markdown, to_html, to_png, lambda r: _terminal(r, 100)])
def test_an_empty_record_can_be_shown(render):
    assert render(_empty())


@pytest.mark.parametrize("render", [to_markdown, to_html, to_png, lambda r: _terminal(r, 100)])
def test_a_record_without_facts_or_baseline_can_be_shown(render):
    report = sample.report()
    report.model, report.text, report.environment, report.settings = {}, {}, {}, {}
    report.rows = [Row(name="only", group="one"), Row(name="$x_1$", group="$", status="failed")]
    assert render(report)


def test_markdown_is_one_rectangular_table():
    text = to_markdown(sample.report())
    table = text.split("\n\n")[1].splitlines()
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert bars == {len(COLUMNS) + 2}
    assert table[1].startswith("| --- | ---:")
    assert "| *1.29 GiB (1x, 1.45x)* | *812 MiB (1x, 2.02x)* | 184 MiB (1x, 1.00x) |" in text
    assert "sinks \\| window \\| strided" in text
    assert len(table) == 2 + len(sample.report().rows)
    assert "| **246 MiB (0.30x, 0.61x)** | 184 MiB (1.00x, 1.00x) |" in text
    assert "**Better** and *worse*" in text
    assert "\\<int8\\> or \\_f32\\_" in text
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_markdown_has_a_part_for_each_page_that_shows_one():
    report = sample.report()
    sweep, claims = to_markdown(report, "sweep"), to_markdown(report, "claims")
    assert "Time to first token:" in sweep and "| transformers eager | 7.74 s |" in sweep
    assert claims.count("\n") == 2 + len(report.claims) and "| 2-4x | 3.01x" in claims
    assert to_markdown(report, "positions").startswith("Perplexity by position")
    whole = to_markdown(report, "all")
    for part in (sweep, claims, to_markdown(report)):
        assert part.strip() in whole


def test_markdown_notes_stay_on_one_line():
    report = sample.report()
    report.rows[0].note = "two\nlines"
    assert "two lines" in to_markdown(report)


class _Page(HTMLParser):
    """Collects what the tests look at."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.text, self.record, self._stack = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]
        self._stack.append((tag, attrs.get("id")))

    def handle_endtag(self, tag):
        while self._stack and self._stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if ("script", "record") in self._stack:
            self.record += data
        elif not any(tag == "style" for tag, _ in self._stack):
            self.text.append(data)


def test_html_is_self_contained():
    page = to_html(sample.report())
    found = _Page(page)
    assert not found.addresses
    assert set(re.findall(r"https?:[^\"]*", page)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in page and "url(" not in page


def test_html_holds_table_facts_explanations_and_the_record():
    report = sample.report()
    found = _Page(to_html(report))
    text = " ".join(" ".join(found.text).split())
    for row in report.rows:
        assert row.name in text
    for column in COLUMNS:
        assert column.meaning in text and column.measured in text
    for part in ("Example CPU <9000> & co", "24.0 GiB", "112,874", "stopped before the end"):
        assert part in text
    assert json.loads(found.record) == json.loads(report.to_json())


def test_html_escapes_what_comes_from_outside():
    report = sample.report()
    report.rows[1].name = "</script><script>alert(1)</script>"
    report.model["name"] = "<img src=x onerror=alert(1)>"
    page = to_html(report)
    assert page.count("<script") == 1 and "<img src=x" not in page
    assert json.loads(_Page(page).record)["rows"][1]["name"] == report.rows[1].name


def test_picture_grows_with_the_rows():
    from PIL import Image

    report = sample.report()
    sizes = []
    for rows in (report.rows, report.rows * 2):
        report.rows = rows
        with Image.open(io.BytesIO(to_png(report))) as image:
            sizes.append(image.size)
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1]


def test_picture_survives_odd_names_and_numbers():
    report = sample.report()
    report.rows[1].name = "名前 $\\alpha$ " + "long " * 20
    report.curves[0].perplexity[3] = float("inf")
    report.rows[2].perplexity = float("nan")
    assert to_png(report).startswith(b"\x89PNG")


def test_labels_are_pushed_apart_and_stay_inside():
    heights = spread([0.1, 0.11, 0.12, 0.97, 0.99], 0.1)
    gaps = [b - a for a, b in pairwise(heights)]
    assert min(gaps) > 0.0999 and max(heights) <= 1 and min(heights) >= 0
