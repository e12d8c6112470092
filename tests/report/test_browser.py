"""The page in a real browser: every number is visible at every width, in light and dark."""

from __future__ import annotations

import re
from itertools import combinations, pairwise

import pytest

from saccade.report.columns import COLUMNS, comparison_table
from saccade.report.html import to_html
from tests.report import sample
from tests.report.browser import BROWSER, WIDTHS, contrast, measured

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed"),
]


@pytest.fixture(scope="module", params=["light", "dark"])
def pages(request, tmp_path_factory):
    """What the browser found at each width; one start of the browser for each colour scheme."""
    folder = tmp_path_factory.mktemp(request.param)
    found = measured(to_html(sample.report()), folder, dark=request.param == "dark")
    assert {page["dark"] for page in found.values()} == {request.param == "dark"}
    return found


@pytest.fixture(params=WIDTHS)
def page(request, pages):
    return pages[request.param]


def _table(page, name="table-comparison"):
    return next(table for table in page["tables"] if table["id"] == name)


def _parts(table):
    return [part for row in table["rows"] for cell in row["cells"] for part in cell["parts"]]


def test_nothing_makes_the_page_wider_than_the_window(page):
    assert page["page"] <= page["width"]
    assert all(picture["right"] <= page["width"] for picture in page["pictures"])


def test_every_number_of_the_comparison_is_in_the_window_and_uncovered(page):
    table = _table(page)
    assert table["scrollable"] <= table["width"]  # all columns without scrolling
    boxes = [*((row["name"], row["box"], row["shown"]) for row in table["rows"])]
    boxes += [(part["text"], part["box"], part["shown"]) for part in _parts(table)]
    assert len(boxes) > 200
    for text, box, shown in boxes:
        assert 0 <= box["left"] < box["right"] <= page["width"], text
        assert box["bottom"] > box["top"] and shown, text


def test_what_is_visible_is_what_was_measured(page):
    report = sample.report()
    lines = [line for line in comparison_table(report).lines if line.kind != "group"]
    rows = [row for row in _table(page)["rows"] if row["scope"] == "row"]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert row["name"].startswith(line.name)
        if line.spans:
            assert [part["text"] for part in row["cells"][0]["parts"]] == [line.cells[0].text]
            continue
        for cell, seen, column in zip(line.cells, row["cells"], COLUMNS, strict=True):
            sign = {True: "✓ better", False: "✗ worse", None: ""}[cell.better]
            wanted = [cell.text + (sign if not cell.ratio else "")]
            wanted += [cell.ratio + sign] if cell.ratio else []
            wanted += [f"expected {cell.expected}"] if cell.expected else []
            found = [part["text"] for part in seen["parts"]]
            assert [_plain(text) for text in found] == [_plain(text) for text in wanted]
            assert seen["label"].startswith(column.title)


def _plain(text):
    return re.sub(r"\s+", "", text)


def test_no_number_lies_on_another(page):
    """Rows stand below one another, so it is enough to compare within each row."""
    for row in _table(page)["rows"]:
        parts = [part for cell in row["cells"] for part in cell["parts"]]
        boxes = [(part["text"], part["box"]) for part in parts] + [(row["name"], row["box"])]
        for (one, a), (other, b) in combinations(boxes, 2):
            wide = min(a["right"], b["right"]) - max(a["left"], b["left"])
            tall = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
            assert wide <= 0.5 or tall <= 4, (one, other)  # boxes of lines of text touch


def test_other_tables_show_names_and_first_numbers_and_the_rest_by_scrolling(page):
    for table in page["tables"]:
        assert table["focusable"] and table["label"] and table["caption"]
        assert table["left"] >= 0 and table["left"] + table["width"] <= page["width"]
        for row in table["rows"]:
            assert 0 <= row["box"]["left"] and row["box"]["right"] <= page["width"]
            for cell in row["cells"][:2]:
                for part in cell["parts"]:
                    assert part["box"]["right"] <= page["width"] and part["shown"], part
        for part in _parts(table):
            assert part["box"]["right"] <= table["left"] + table["scrollable"] + 0.5


def test_text_has_contrast(page):
    low = {
        said: round(contrast(pair), 2)
        for pair, said in page["colours"].items()
        if contrast(pair) < 4.5
    }
    assert not low and len(page["colours"]) >= 6


def test_pictures_are_named_and_cut_no_text(page):
    assert len(page["pictures"]) == 6  # Pareto, four sweeps, positions
    for picture in page["pictures"]:
        assert picture["role"] == "img" and len(picture["label"]) > 20
        assert not picture["outside"]
        assert picture["width"] >= 0.75 * picture["viewbox"]  # text of 8 pixels or more


def test_the_structure_can_be_read_aloud(page):
    levels = [int(tag[1]) for tag in page["headings"]]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    for table in page["tables"]:
        assert set(table["headings"]) == {"col"}
        assert {row["scope"] for row in table["rows"]} <= {"row", "rowgroup"}


def test_contrast_is_that_of_the_guidelines():
    assert contrast("rgb(0, 0, 0)/rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)/rgb(255, 255, 255)") == pytest.approx(4.54, abs=0.01)
