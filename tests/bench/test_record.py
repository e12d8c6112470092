"""Bars, the record and its renderings, from invented numbers."""

from __future__ import annotations

import io
import json
import struct

import pytest
from rich.console import Console

from saccade.bench import bars, roofline, table
from saccade.bench.cases import Bar
from saccade.bench.ceilings import Ceilings
from saccade.bench.record import read
from saccade.bench.table import to_markdown
from saccade.core import BadInput
from tests.bench import sample


def shown(record, width=180):
    console = Console(width=width, record=True, file=io.StringIO())
    table.print_record(record, console)
    return console.export_text()


def found(record, name, backend="cpu"):
    return next(r for r in record.rows if r.case == name and r.backend == backend)


def values(record, name):
    return {bar.measure: (bar.value, bar.met) for bar in found(record, name).bars}


def test_bars():
    record = sample.record()
    fp32 = values(record, "prefill 9/3 D64 N2048 fp32")
    flops = 4 * 64 * 9 * 2048 * 2049 / 2
    assert fp32["peak"] == (pytest.approx(flops / 0.030 / sample.PEAK), True)
    assert fp32["torch"] == (pytest.approx(4.0), True)
    assert values(record, "prefill 9/3 D64 N2048 bf16")["rate"] == (pytest.approx(1 / 1.1), False)
    assert values(record, "prefill 9/3 D64 N2048 int8")["time"] == (pytest.approx(40 / 33), False)
    read = 16.793600e6 / 0.001 / sample.BANDWIDTH
    assert values(record, "decode 32/8 D128 4k keys bf16") == {
        "bandwidth": (pytest.approx(read), True)
    }
    assert values(record, "decode 32/8 D128 4k keys int4")["rate"] == (pytest.approx(2.5), True)
    value, met = values(record, "window 1024 8/2 D64 N32768 fp32")["pairs"]
    pairs = 1024 * 1025 / 2 + (32768 - 1024) * 1024
    predicted = 0.42 * pairs / (8192 * 8193 / 2)
    assert value == pytest.approx(0.43 / predicted) and met
    assert values(record, "backward 8/8 D64 N2048 fp32")["peak"][1] is True
    assert found(record, "prefill 9/3 D64 N2048 fp32", "torch").bars == []


def test_bars_at_the_limit_are_met():
    assert bars._result(Bar(measure="peak", limit=0.75), 0.75).met is True
    assert bars._result(Bar(measure="peak", limit=0.75), 0.7499).met is False
    assert bars._result(Bar(measure="time", limit=1.2), 1.2).met is True
    assert bars._result(Bar(measure="time", limit=1.2), 1.2001).met is False
    assert bars._result(Bar(measure="time", limit=1.2), None).met is None


def test_bars_without_what_they_need():
    record = sample.record()
    record.rows = [r for r in record.rows if r.backend != "torch" and r.storage != "fp32"]
    for row in record.rows:
        for bar in sample.case(row.case).bars:
            if bar.measure in ("torch", "product", "pairs") or bar.against.endswith("fp32"):
                assert bars.value_of(bar, row, record) is None
    assert values(sample.record(), "decode 32/8 D128 4k keys int8")["rate"] == (None, None)


def test_the_best_ceiling_counts_and_a_busy_machine_shows():
    quiet = Ceilings(threads=2, source="x", peak_samples=[9.0, 10.0], bandwidth_samples=[5.0])
    assert (quiet.fma_peak, quiet.read_bandwidth, quiet.was_busy) == (10, 5, False)
    quiet.bandwidth_samples.append(4.0)
    assert quiet.was_busy


def test_round_trip(tmp_path):
    record = sample.record()
    record.write(tmp_path / "record.json")
    again = read(tmp_path / "record.json")
    assert again.to_json() == record.to_json()
    assert "\n" not in record.to_json()
    data = json.loads(record.to_json())
    assert data["ceilings"]["fma_peak"] == sample.PEAK and data["rows"][0]["seconds"] == 0.030
    assert again.is_wrong and again.find("prefill 9/3 D64 N2048 fp32", "torch") is not None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": "saccade.compare/1"}', "nonsense"])
def test_not_a_record(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"x\.json is not a saccade\.bench\.cpu/1 record"):
        read(path)


def test_card():
    text = shown(sample.record())
    assert "Test CPU, 2 threads, kernels for avx2, torch 2.13.0" in text
    assert "FMA 200 GF/s, reads 20.0 GB/s" in text
    assert "✓ 4.00x torch's speed (bar ≥ 3x)" in text
    assert "✗ 1.21x time of bf16 (bar ≤ 1x)" in text
    assert "2.50x tokens/s" in text
    assert "WRONG  decode 32/8 D128 4k keys int8, saccade cpu: out has [bold] elements" in text
    assert "cannot  decode 32/8 D128 32k keys int8" in text
    assert "7 of 13 bars met, 4 not measured; 1 min 01 s." in text
    assert "busy" not in text


def test_share_of_the_nearer_ceiling():
    record = sample.record()
    row = found(record, "decode 32/8 D128 4k keys int4")
    # 13.6 operations a byte: this decoding is limited by arithmetic, not by reads
    share = row.flops / row.seconds / sample.PEAK
    assert table.cells(row, record)[2] == f"{100 * share:.0f} % FMA"
    assert table.cells(found(record, "decode 32/8 D128 4k keys bf16"), record)[2] == "84 % reads"


def test_card_of_a_run_that_stopped_on_a_busy_machine():
    record = sample.record()
    record.complete = False
    record.ceilings.peak_samples.append(1e9)
    text = shown(record, width=100)
    assert "Stopped early" in text and "The machine was busy" in text


def test_markdown():
    text = to_markdown(sample.record())
    lines = text.splitlines()
    assert text.endswith("\n") and "FMA 200 GF/s" in text
    rows = [line for line in lines if line.startswith("|")]
    assert {line.replace(r"\|", "").count("|") for line in rows} == {len(table.COLUMNS) + 2}
    assert any("✓ 4.00x torch's speed (bar ≥ 3x)" in line for line in rows)
    assert (
        "- WRONG: decode 32/8 D128 4k keys int8, saccade cpu: out has \\[bold\\] elements" in lines
    )


def test_roofline():
    record = sample.record()
    assert len(roofline.points(record)) == 11  # neither the wrong one nor the refused one
    png = roofline.to_png(record)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 1400 and height > 800


def test_roofline_of_nothing():
    record = sample.record()
    record.rows = []
    with pytest.raises(ValueError, match="no timed row"):
        roofline.to_png(record)
