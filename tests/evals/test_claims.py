"""The chapter's figures beside a run's: numbers and reasons follow from the rows."""

import pytest

from saccade.evals.claims import NOT_MEASURED, claims_of
from saccade.evals.rows import FLASH, GQA, MHA, MQA, SDPA, TEXTBOOK
from saccade.report.comparison import Curve, Report, Row, SweepPoint

MIB = 2**20
WINDOW = "window 256 + 4 sinks"


def report(**rows):
    made = {
        TEXTBOOK: Row(name=TEXTBOOK, group="g", peak_bytes=400 * MIB, prefill_tps=100.0),
        SDPA: Row(name=SDPA, group="g", peak_bytes=200 * MIB, prefill_tps=240.0, perplexity=10.0),
        FLASH: Row(name=FLASH, group="g", peak_bytes=100 * MIB, prefill_tps=300.0, kl=2e-9,
                   cache_bytes=40 * MIB, perplexity=10.0),
        MHA: Row(name=MHA, group="g", cache_bytes=120 * MIB, decode_tps=10.0),
        GQA: Row(name=GQA, group="g", cache_bytes=40 * MIB, decode_tps=12.5),
        MQA: Row(name=MQA, group="g", cache_bytes=15 * MIB, decode_tps=13.0, perplexity=900.0),
        WINDOW: Row(name=WINDOW, group="g", cache_bytes=10 * MIB, prefill_tps=330.0,
                    perplexity=11.0, options={"n_swa": 256, "n_sinks": 4}),
        "YaRN x2": Row(name="YaRN x2", group="g", peak_bytes=100 * MIB, prefill_tps=297.0),
    }  # fmt: skip
    made |= rows
    return Report(
        revision=None, command="", environment={}, date="",
        model={"query_heads": 9, "kv_heads": 3, "trained_length": 8192, "dtype": "float32",
               "weight_bytes": 500 * MIB},
        text={}, settings={"n_batch": 512, "n_context": 1024}, baseline=TEXTBOOK, reference=SDPA,
        rows=[row for row in made.values() if row is not None],
    )  # fmt: skip


def claims(made):
    return {(claim.technique, claim.quantity): claim for claim in claims_of(made)}


def test_the_chapters_figures_are_all_there():
    found = [(claim.quantity, claim.claimed) for claim in claims_of(report())]
    assert found == [
        ("memory saved", "50 %"), ("speed-up", "2-4x"), ("effect on quality", "none"),
        ("memory saved", "75 %"), ("speed-up", "1.5x"),
        ("memory saved", "97 %"), ("speed-up", "2x"), ("effect on quality", "moderate"),
        ("memory", "fixed size"), ("speed-up", "1.2x"),
        ("effect on quality", "depends on the window"),
        ("memory saved", "none"), ("speed-up", "none"),
        ("effect on quality", "better extrapolation"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("technique", "quantity", "measured"),
    [
        (FLASH, "memory saved", "75 % of the peak memory of transformers eager"),
        (FLASH, "speed-up", "3.00x transformers eager in prefill"),
        (GQA, "memory saved", "67 % of the cache of MHA (KV heads repeated)"),
        (GQA, "speed-up", "1.25x MHA (KV heads repeated) in decode"),
        (MQA, "memory saved", "88 % of the cache of MHA (KV heads repeated)"),
        (MQA, "effect on quality", "perplexity 90.0x that of transformers sdpa"),
        (WINDOW, "memory", "10.0 MiB"),
        (WINDOW, "speed-up", "3.30x transformers eager in prefill"),
        ("YaRN x2", "speed-up", "0.99x flash attention in prefill"),
    ],
)
def test_measurements_are_ratios_of_rows(technique, quantity, measured):
    assert claims(report())[technique, quantity].measured == measured


@pytest.mark.parametrize(
    ("technique", "quantity", "parts"),
    [
        (FLASH, "memory saved", ("9 heads x 512 x 1,024 = 18.0 MiB", "400 MiB", "100 MiB")),
        (FLASH, "speed-up", ("already 2.40x the textbook", "1.25x of that")),
        (GQA, "memory saved", ("9 query heads over 3 KV heads can save 67 %",)),
        (GQA, "speed-up", ("500 MiB of weights", "40.0 MiB instead of 120 MiB", "1.15x")),
        (MQA, "memory saved", ("9 query heads can save 89 %",)),
        (WINDOW, "speed-up", ("1.10x flash attention",)),
        (WINDOW, "memory", ("40.0 MiB at 1,024 tokens", "--sweep")),
        ("YaRN x2", "effect on quality", ("8,192", "--context")),
    ],
)
def test_reasons_are_made_of_measured_numbers(technique, quantity, parts):
    reason = claims(report())[technique, quantity].reason
    assert all(part in reason for part in parts), reason


def test_a_missing_row_is_said_to_be_missing():
    failed = Row(name=MQA, group="g", status="failed", note="no k_proj here")
    found = claims(report(**{MQA: failed, WINDOW: None}))
    assert found[MQA, "memory saved"].measured == NOT_MEASURED
    assert "no k_proj here" in found[MQA, "memory saved"].reason
    assert found["sliding window", "speed-up"].measured == NOT_MEASURED


def test_what_a_stopped_run_did_not_reach_is_said_so():
    late = {"status": "stopped", "note": "stopped before it was reached"}
    window = Row(name=WINDOW, group="g", options={"n_swa": 256, "n_sinks": 4}, **late)
    made = report(**{WINDOW: window, "YaRN x2": Row(name="YaRN x2", group="g", **late)})
    made.settings["missing_curves"] = {"YaRN x2": late["note"]}
    found = claims(made)
    assert found[WINDOW, "memory"].reason == f"{WINDOW}: {late['note']}"
    assert found["YaRN x2", "memory saved"].reason == f"YaRN x2: {late['note']}"
    assert late["note"] in found["YaRN x2", "effect on quality"].reason


def test_the_sweep_shows_that_a_window_stays_as_it_is():
    made = report()
    made.sweep = [
        SweepPoint(name="window 1024 + 4 sinks", n_context=n, cache_bytes=10 * MIB)
        for n in (1024, 4096)
    ]
    assert "10.0 MiB at 1,024, 10.0 MiB at 4,096" in claims(made)[WINDOW, "memory"].reason


def test_extrapolation_from_the_curves_or_from_rows_past_the_trained_length():
    made = report()
    made.curves = [
        Curve(name="plain", block=1024, positions=[0], perplexity=[300.0]),
        Curve(name="YaRN x2", block=1024, positions=[0], perplexity=[12.0]),
    ]
    key = "YaRN x2", "effect on quality"
    assert claims(made)[key].measured == "perplexity 12.0 instead of 300"
    past = report()
    past.settings["scaling"] = "YaRN x2"
    past.row("YaRN x2").perplexity = 11.0
    past.row(FLASH).perplexity = 200.0
    assert claims(past)[key].measured == "perplexity 11.0 instead of 200"
