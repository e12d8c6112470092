"""Planned speeds of a GPU against records, at lengths that the plan's shares do not come from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.plan_check import SETTINGS, blueprint_of_shape
from saccade.advice import gpu_fit
from saccade.advice.gpu_speed import FILE, RECORDED, SHARES, gpu_speed
from saccade.runtime import ContextParams

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
ROOF = RECORDED["NVIDIA H200"]
BLUEPRINT = blueprint_of_shape(tiny=False)
LLAMA = json.loads((RESULTS / "h200_llama.json").read_text())["ours"]
ROWS = json.loads((RESULTS / "plan-h200.json").read_text())["rows"]
HELD_OUT = [row for row in ROWS if row["tokens"] != gpu_fit.FITTED]


def planned(tokens, blueprint=BLUEPRINT, **options):
    return gpu_speed(blueprint, ContextParams(**{"n_batch": 8192, **options}), tokens, ROOF)


def near(found, measured):
    return abs(found / measured - 1) < 0.25


def test_shares_are_what_the_records_say():
    assert json.loads(FILE.read_text()) == gpu_fit.fitted(RESULTS, BLUEPRINT)
    revisions = json.loads(FILE.read_text())["records"]
    for name in gpu_fit.RECORDS:
        assert revisions[name] == json.loads((RESULTS / name).read_text())["revision"]


@pytest.mark.parametrize("row", HELD_OUT, ids=lambda row: f"{row['name']} {row['tokens']}")
def test_prompts_and_captured_steps_at_lengths_left_out(row):
    found, measured = planned(row["tokens"], **row["options"]), row["measured"]
    assert near(found.first_token, measured["first_token"])
    captured = row["name"] in ("dense", "int8", "int4", "window 1024 + 4 sinks")
    if captured:
        assert near(found.tokens_per_second, measured["tokens_per_second"])


def test_every_setting_was_left_out_once():
    assert {row["name"] for row in HELD_OUT} == set(SETTINGS)


def test_a_middle_and_long_lengths_of_another_record():
    middle = LLAMA["decode"]["32768"]
    assert near(planned(32768).first_token, middle["first_token_s"])
    for tokens in ("32768", "130816"):
        found = planned(int(tokens)).tokens_per_second
        assert near(found, LLAMA["decode"][tokens]["tokens_per_s"])
    for kind in ("int8", "int4"):
        found = planned(130816, type_k=kind, type_v=kind).tokens_per_second
        assert near(found, LLAMA[kind]["tokens_per_s"])


def test_what_is_not_captured_waits_for_the_host():
    """And storage in the model's own dtype is captured."""
    captured = planned(8192).tokens_per_second
    assert planned(8192, type_k="bf16", type_v="bf16").tokens_per_second == captured
    host = 1 / (SHARES.host_layer * BLUEPRINT.facts.num_layers)
    for options in (
        {"kv_policy": "snapkv", "kv_budget": 0.5},
        {"type_k": "f16", "type_v": "f16"},
        {"flash_attn": "disabled"},
        {"page_size": 64},
    ):
        assert planned(8192, **options).tokens_per_second == pytest.approx(host)
        assert host < captured / 4
    wide = replace(BLUEPRINT, weights=BLUEPRINT.weights * 30)
    assert planned(8192, wide, page_size=64).tokens_per_second < host / 2
