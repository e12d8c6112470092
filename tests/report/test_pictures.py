"""SVG pictures: where points lie, which are best, that names neither collide nor are cut."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from itertools import combinations

import pytest

from saccade.report.labels import Box, around, free, spread
from saccade.report.line_chart import Chart, Series, line_chart
from saccade.report.pareto import Point, best, pareto_svg, points_of
from saccade.report.positions import positions_chart
from saccade.report.svg import Scale
from saccade.report.sweep import sweep_charts, sweep_tables
from tests.report import sample

SVG = "{http://www.w3.org/2000/svg}"
MIB = 1024**2


def _texts(picture):
    return [text.text for text in ET.fromstring(picture).iter(f"{SVG}text")]


def _chart(series, **more):
    plain = {"label": "a picture", "x": "x", "y": "y", "show_x": str, "show_y": str}
    return line_chart(Chart(**{**plain, **more}, series=series))


def test_a_logarithmic_scale_puts_the_geometric_mean_in_the_middle():
    scale = Scale(1.0, 100.0, 0.0, 200.0, log=True)
    assert scale(10.0) == pytest.approx(100.0) and scale(100.0) == pytest.approx(200.0)
    assert Scale(0.0, 4.0, 100.0, 0.0)(1.0) == 75.0  # pixels may run downwards


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("low_high", [(1, 3), (1024, 65536), (0.00001, 8), (5e8, 6e8), (0.2, 0.2)])
def test_ticks_lie_inside_and_are_few(log, binary, low_high):
    scale = Scale.over(low_high, 0.0, 300.0, log=log)
    ticks = scale.ticks(binary=binary)
    assert 1 <= len(ticks) <= 5
    assert all(scale.low <= tick <= scale.high for tick in ticks) and ticks == sorted(ticks)
    if log and binary:
        assert all(math.log2(tick).is_integer() for tick in ticks)


def test_points_lie_where_their_values_say():
    picture = _chart([Series("a", [(1, 1), (10, 10), (100, 100)])])
    points = ET.fromstring(picture).find(f"{SVG}polyline").get("points").split()
    (x1, y1), (x2, y2), (x3, y3) = (tuple(map(float, p.split(","))) for p in points)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2) and y3 < y1  # up is more


def test_values_that_cannot_be_drawn_are_left_out():
    nothing = [Series("a", [(1, math.nan), (2, math.inf), (3, 0.0), (4, -1.0), (0, 5.0)])]
    assert _chart(nothing) == "" and _chart([]) == ""
    assert _chart([*nothing, Series("b", [(1, 2.0)])]).count("<polyline") == 1


def test_names_in_pictures_are_escaped():
    name = '<script>"&'
    for picture in (_chart([Series(name, [(1, 1)])]), pareto_svg([Point(name, 1, 1.0, None)])):
        assert "<script" not in picture and name in _texts(picture)


def test_the_best_points_are_those_that_none_beats_at_the_same_quality():
    exact = Point("exact", 100, 10.0, 0.0)
    worse = Point("worse", 120, 9.0, 0.0)
    near = Point("near", 50, 12.0, 0.05)
    far = Point("far", 60, 11.0, 0.5)
    broken = Point("broken", 10, 99.0, 5.0)
    unknown = Point("unknown", 200, 1.0, None)
    assert best([exact, worse, near, far, broken, unknown]) == [exact, near]
    assert best([worse, far]) == [worse, far]  # smaller and faster, but not as near
    assert best([exact, exact]) == [exact, exact]


def test_the_pareto_picture_names_every_point_once():
    points = [Point(f"row {n}", (100 + n % 3) * MIB, 10 + n % 4, 0.02 * n) for n in range(16)]
    texts = _texts(pareto_svg(points))
    assert sorted(t for t in texts if t.startswith("row")) == sorted(p.name for p in points)
    assert {"KL < 0.01", "< 0.1", "< 1"} <= set(texts)
    assert pareto_svg([]) == "" and pareto_svg([Point("x", 0, 1.0, None)]) == ""
    assert "not measured" in _texts(pareto_svg([Point("x", 1, 1.0, None)]))


def test_rows_with_memory_and_speed_are_points():
    report = sample.report()
    names = {point.name for point in points_of(report)}
    assert sample.BROKEN in names and "int4 KV" not in names
    assert "YaRN + SnapKV 25 %" not in names  # stopped before its speed was measured


def test_labels_find_a_free_place_or_none():
    inside = Box(0, 0, 100, 100)
    taken = [Box(45, 45, 55, 55)]
    placed = []
    while (box := free(around(50, 50, 30, 10, 8), taken, inside)) is not None:
        placed.append(box)
        taken.append(box)
    assert len(placed) >= 4 and all(box.lies_in(inside) for box in placed)
    assert not any(a.meets(b) for a, b in combinations(taken, 2))


def test_heights_are_spread_between_other_limits_too():
    heights = spread([10.0, 10.0, 95.0], 12.0, 0.0, 90.0)
    assert heights == [10.0, 22.0, 90.0]


def test_a_sweep_has_four_pictures_and_a_table_for_each_quantity():
    report = sample.report()
    pictures = sweep_charts(report)
    assert len(pictures) == 4
    for picture in pictures:
        texts = _texts(picture)
        assert {"1k", "4k", "16k", "64k", "trained length"} <= set(texts)
        assert {point.name for point in report.sweep} <= set(texts)
    tables = dict(sweep_tables(report))
    lines = {line.name: line for line in tables["Time to first token"].lines}
    assert [cell.text for cell in lines["transformers eager"].cells] == [
        "7.74 s", "37.8 s", "261 s", "failed",
    ]  # fmt: skip
    report.sweep.clear()
    assert sweep_charts(report) == [] and sweep_tables(report) == []


def test_curves_by_position_show_where_training_ended():
    report = sample.report()
    assert "trained length" in _texts(positions_chart(report))
    assert 'class="shade"' in positions_chart(report)
    report.curves[0].perplexity[2] = math.nan
    assert ET.fromstring(positions_chart(report)) is not None
    report.curves.clear()
    assert positions_chart(report) == ""


def test_pictures_follow_the_colour_scheme_and_fetch_nothing():
    picture = pareto_svg([Point("x", MIB, 1.0, 0.0)])
    assert "prefers-color-scheme:dark" in picture and 'role="img"' in picture
    assert not re.search(r"url\(|href|@import", picture)
