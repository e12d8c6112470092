"""The scripts of benchmarks/: each imports and reads its options; small versions run on the CPU."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import (
    gpu_attention,
    gpu_latent,
    gpu_peers,
    gpu_problems,
    gpu_rules,
    gpu_run,
    gpu_tables,
    gpu_visit,
)
from benchmarks.gpu_problems import Problem
from saccade.bench.gate import stored
from saccade.ops.tuning import rules as tuning

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = [p.stem for p in FOLDER.glob("*.py") if '__name__ == "__main__"' in p.read_text()]
LISTS = ("gpu_attention", "gpu_latent", "gpu_rules")  # of rows, without a main of their own
CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a CPU")


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_benchmark_can_be_imported(name):
    assert import_module(f"benchmarks.{name}").__doc__


@pytest.mark.parametrize("name", [n for n in SCRIPTS if n not in LISTS])
def test_options_are_read(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        import_module(f"benchmarks.{name}").main()
    assert left.value.code == 0 and "usage:" in capsys.readouterr().out


def different(rows):
    """One row of each kind."""
    kinds = {}
    for row in rows:
        p = row.problem
        key = (
            row.case,
            p.storage,
            p.window,
            p.causal,
            p.training,
            bool(p.sequences),
            p.queries > 1,
        )
        kinds.setdefault((*key, bool(p.kv_lens)), row)
    return list(kinds.values())


@CPU
@pytest.mark.parametrize("module", [gpu_attention, gpu_rules, gpu_peers, gpu_latent])
def test_every_kind_of_row_can_be_measured(module, tmp_path, capsys):
    rows = different(module.rows())
    path = tmp_path / "record.json"
    record = gpu_run.main("what", rows, ["--tiny", "--out", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(record)) and record["complete"]
    assert {"revision", "command", "environment", "date", "schema"} <= set(record)
    for row in record["rows"]:
        failed = {name for name in row.get("failed", {}) if name != "flex"}
        assert not failed, row
        assert "plan_ms" in row or "host_us" in row or row["ms"]["tiled"] > 0
    tables = {gpu_peers: ("peers", "peers_decode"), gpu_latent: ("mla_decode",)}
    for case in tables.get(module, ("forward", "decode")):
        table = gpu_tables.to_markdown(record, case)
        assert table.startswith("| ") and table.endswith("|\n")


@CPU
def test_a_wrong_result_is_not_timed(monkeypatch):
    right = gpu_problems.run
    monkeypatch.setattr(
        "benchmarks.gpu_measure.run", lambda call, name: right(call, name) * (1 + (name == "tiled"))
    )
    row = gpu_run._measured(gpu_run.Row("forward", Problem(queries=64, keys=64)), True)
    assert "WrongResult: relative error" in row["failed"]["tiled"] and row["ms"] == {}


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu_run, "on_gpu", lambda: False)
    with pytest.raises(SystemExit, match="There is no GPU here"):
        gpu_run.main("what", [], [])


def test_time_that_is_up_ends_a_run(tmp_path, monkeypatch):
    rows = [gpu_run.Row("forward", Problem(queries=8, keys=8))]
    record = gpu_run.main("what", rows, ["--tiny", "--seconds", "-1"])
    assert not record["complete"] and record["rows"] == []


def test_a_record_that_stopped_is_gone_on_with(tmp_path):
    rows = [gpu_run.Row(name, Problem(queries=8, keys=8)) for name in "ab"]
    first, path = ["--tiny", "--out"], tmp_path / "record.json"
    begun = gpu_run.main("what", rows[:1], [*first, str(path)])
    record = gpu_run.main("what", rows, [*first, str(path), "--resume", str(path)])
    assert record["complete"] and [row["case"] for row in record["rows"]] == ["a", "b"]
    assert record["rows"][0] == json.loads(json.dumps(begun["rows"][0]))
    assert [part["rows"] for part in record["resumed"]] == [1]
    path.write_text(json.dumps(record | {"rows": [None, record["rows"][1]]}))
    again = gpu_run.main("what", rows, [*first, str(path), "--resume", str(path)])
    assert again["complete"] and again["rows"][0]["case"] == "a" and again["rows"][0]["ms"]
    assert [part["rows"] for part in again["resumed"]] == [1, 1]
    with pytest.raises(SystemExit, match="is no record of this benchmark"):
        gpu_run.main("something else", rows, [*first, str(path), "--resume", str(path)])


def test_every_rule_is_measured_at_its_smallest_sizes():
    rows = list(gpu_rules.rule_rows())
    rules, read = gpu_rules.rules(), tuning.read(gpu_rules.RULES / "sm_90.json")
    assert {dict(row.notes)["rule"] for row in rows} == set(range(1, len(rules) + 1))
    for row in rows:
        rule, p = rules[dict(row.notes)["rule"] - 1], row.problem
        average = p.keys // max(1, len(p.sequences))
        assert average >= gpu_rules.least(rule, "keys")
        assert rule["head_dim"][0] <= p.head_dim <= rule["head_dim"][1]
        assert p.training == rule.get("training", False)
        assert rule["order"][0] in row.backends and len(row.backends) > 1
        if dict(row.notes)["size"] == "smallest":
            reach = p.batch * p.heads * p.queries / gpu_rules.least(rule, "rows")
            assert read[dict(row.notes)["rule"] - 1].fits(gpu_rules.facts_of(p.facts()))
            assert reach >= 1 and (reach < 4 or gpu_rules.is_decoding(rule)), rule


def test_gains_are_of_forward_and_backward_together(monkeypatch):
    def measured(*_):
        forward = {"gluon": 1.0, "triton": 1.5, "fa3": 1.0}
        return {"ms": {"gluon": 2.0, "triton": 3.0, "fa3": 1.0}, "forward_ms": forward}

    monkeypatch.setattr(gpu_rules, "measure", measured)
    problem = Problem(queries=1, keys=1)
    row = gpu_rules.measure_rule(["gluon"], problem, (), ())
    assert row["total_ms"] == {"gluon": 3.0, "triton": 4.5, "fa3": 2.0} and row["gain"] == 1.5
    assert row["peer_gain"] == {"fa3": 1.5}
    assert gpu_rules.measure_rule(["fa3"], problem, (), ())["gain"] == 1.5
    assert gpu_rules.measure_rule(["sdpa"], problem, (), ())["gain"] is None


def test_a_ring_holds_what_its_window_reaches():
    problem = Problem(
        queries=32, keys=300, window=100, sinks=4, storage="ring", heads=4, kv_heads=2, head_dim=16
    )
    view = gpu_problems.build(problem).calls[0].kv
    held = [p for span in view.spans for p in range(span.position, span.position + span.length)]
    assert held == [*range(4), *range(168, 300)] and len(view.spans) == 4


def test_quantized_probe_is_what_the_cache_holds():
    problem = Problem(queries=1, keys=192, storage="int8", heads=4, kv_heads=2, head_dim=64)
    made = gpu_problems.build(problem)
    assert torch.equal(made.probe.kv.k, stored(made.calls[0].kv)[0][:1, :1].double())
    bytes_of = sum(x.nbytes for part in (made.calls[0].kv.k, made.calls[0].kv.v) for x in part)
    assert made.gbytes == pytest.approx(bytes_of / 1e9)


def test_the_visit_names_modules_and_options_that_exist(tmp_path):
    for part in gpu_visit.PARTS.values():
        assert (FOLDER / f"{part.module}.py").exists()
        text = (FOLDER / f"{part.module}.py").read_text() + (FOLDER / "gpu_run.py").read_text()
        for option in ("--out", "--seconds", "--tiny", *part.options):
            assert f'"{option}"' in text, (part, option)


def test_the_visit_goes_on_after_a_part_that_fails(tmp_path, monkeypatch, capsys):
    broken = gpu_visit.Part("a", "no_such_module")
    monkeypatch.setattr(gpu_visit, "PARTS", {"a": broken, "b": broken})
    monkeypatch.setattr(
        sys, "argv", ["visit", "--tiny", "--out", str(tmp_path), "--only", "a", "b"]
    )
    assert gpu_visit.main() == 2
    assert capsys.readouterr().out.count("exit 1") == 2


def peer_row(keys, gain, **more):
    fields = {"case": "peers", "queries": keys, "keys": keys, "head_dim": 128, "total_ms": {"x": 1}}
    return fields | {"peer_gain": {"fa3": gain, "fa4": 1.2}} | more


def test_a_package_is_proposed_from_the_length_on_where_it_wins(tmp_path):
    gains = ((1024, 1.5), (2048, 0.9), (4096, 1.3), (8192, 1.4))
    rows = [peer_row(keys, gain) for keys, gain in reversed(gains)]
    step = peer_row(8192, 1.5, case="peers_decode") | {"queries": 1}
    (rule, decoding) = gpu_peers.proposed({"rows": [*rows, step]}, "h200_peers")
    path = tmp_path / "sm_1.json"
    path.write_text(json.dumps({"schema": tuning.SCHEMA, "rules": [rule, decoding]}))
    made = tuning.read(path)
    assert made[0].order == made[1].order == ("fa3",) and "1.30 to 1.40 times" in made[0].why
    assert made[0].keys[0] == 4096 and made[0].rows[0] == 32 * 4096
    assert made[0].pattern == ("causal",) and made[0].dtype == ("bfloat16",)
    assert made[1].queries == (1, 1) and made[1].group_rows == (1, 4)
    lost = [peer_row(1024, 1.5), peer_row(2048, 1.0, peer_gain={"fa3": 1.01})]
    assert gpu_peers.proposed({"rows": lost}, "h200_peers") == []
    for at in rule, decoding:
        problem = gpu_rules.problem_of(at, 128, "causal", "dense", "smallest")
        assert problem.keys >= gpu_rules.least(at, "keys")
