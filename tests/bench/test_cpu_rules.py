"""Measuring rules of a CPU: what is timed, which rules the figures make, where they go."""

import json
import os
import subprocess
import sys

import pytest
import torch

from saccade.bench import cpu_rules, rule_cases, rule_options
from saccade.bench.cpu_rules import Figures, measure, rules_of
from saccade.bench.rule_cases import KINDS, Series, all_series, dims_around
from saccade.bench.rule_table import as_table
from saccade.cli import main as cli
from saccade.core.hardware import processor_family
from saccade.ops.attention.cpu.binding import BUILT
from saccade.ops.attention.rules import facts_of
from saccade.ops.attention.sdpa import backend as sdpa
from saccade.ops.tuning import rules as tuning

needs_kernels = pytest.mark.skipif(not BUILT, reason="needs the C++ kernels")
PROMPT = next(each for each in all_series((64,)) if each.name == "prompt, float32, D 64")


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Rules go into a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.clear_cache()
    yield
    monkeypatch.undo()
    tuning.clear_cache()


@pytest.fixture
def short(monkeypatch):
    """Every kind at lengths that take no time."""
    tiny = [with_sizes(kind, tuple((min(q, 24), 24) for q, _ in kind.sizes[:1])) for kind in KINDS]
    monkeypatch.setattr(rule_cases, "KINDS", tuple(tiny))


def with_sizes(kind, sizes):
    parts = {name: getattr(kind, name) for name in kind.__slots__} | {"sizes": sizes, "quick": (0,)}
    return type(kind)(**parts)


def figures(ours, theirs, sizes=PROMPT.sizes):
    made = [Figures(queries=q, keys=k) for q, k in sizes]
    for each, a, b in zip(made, ours, theirs, strict=True):
        each.seconds = {"cpu": a, "sdpa": b}
    return made


def test_a_rule_for_each_run_of_sizes_with_one_winner():
    made = rules_of(PROMPT, figures([1, 1, 4, 8], [2, 1.5, 2, 2]), "here")
    assert [(rule.order, rule.keys) for rule in made] == [
        (("cpu", "sdpa"), (128, 2047)), (("sdpa", "cpu"), (2048, tuning.LARGEST)),
    ]  # fmt: skip
    assert made[0].why.startswith(
        "saccade's kernels, 1.50 to 2.00 times the speed of PyTorch's SDPA (1,000 ms against 1,500"
    )
    assert "2.00 to 4.00 times" in made[1].why and "8192 queries, 8192 keys" in made[1].why
    for rule in made:
        assert rule.square and rule.dtype == ("float32",) and rule.extras == ("none",)
        assert rule.head_dim == (48, 80) and rule.pattern == ("causal",) and rule.source == "here"


def test_timings_that_move_change_nothing():
    for ours, first in ((1.04, "cpu"), (1.06, "sdpa")):
        made = rules_of(PROMPT, figures([ours] * 4, [1] * 4), "x")
        assert {rule.order[0] for rule in made} == {first}


def test_what_could_not_be_compared_makes_no_rule():
    found = figures([1, 1, 1, 1], [2, 2, 2, 2])
    found[1].seconds.pop("sdpa")
    assert [rule.keys for rule in rules_of(PROMPT, found, "x")] == [
        (128, 511), (2048, tuning.LARGEST),
    ]  # fmt: skip


def test_head_dimensions_stand_for_those_around_them():
    assert dims_around((128, 64)) == {64: (48, 80), 128: (96, 160)}
    assert dims_around((64, 80)) == {64: (48, 72), 80: (73, 100)}


def test_a_measured_call_meets_the_rule_that_was_made_of_it():
    """In the order of the file, in which the first one counts: no series hides another."""
    series = [each for each in all_series((64,)) if each.dtype == "bfloat16"]
    made = [
        (each, rule)
        for each in series
        for rule in rules_of(each, figures(*[[1] * len(each.sizes)] * 2, each.sizes), "x")
    ]
    for each in series:
        for queries, keys in each.sizes:
            facts = facts_of(call_of_size(each, queries, keys))
            assert next(owner for owner, rule in made if rule.fits(facts)) is each


def call_of_size(series, queries, keys):
    """The call of a series at full size, in which a small one's tensors are expanded."""
    small = series.call(min(queries, 8), 8 if queries == keys else 16)
    x = torch.empty(small.q.shape[0], 3, 1, series.dim, dtype=small.q.dtype, device="cpu")
    x.requires_grad_(small.needs_grad)
    q, k = x.expand(-1, -1, queries, -1), x[:, :1].expand(-1, -1, keys, -1)
    kv = type(small.kv)(k, k)
    options = {"q_offset": keys - queries}
    if small.attn_mask is not None:
        one = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cpu")
        options["attn_mask"] = one.expand(1, 1, queries, keys)
    if small.key_padding is not None:
        one = torch.ones(small.q.shape[0], 1, dtype=torch.bool, device="cpu")
        options["key_padding"] = one.expand(-1, keys)
    return small.with_(q=q, kv=kv, attn_mask=None, key_padding=None).with_(**options)


@needs_kernels
@pytest.mark.parametrize("name", [f"{kind.name}, float32, D 64" for kind in KINDS])
def test_every_kind_is_right_in_both_backends(short, name):
    each = next(each for each in rule_cases.all_series((64,)) if each.name == name)
    timed = []
    (found,) = measure(each, budget=0, timer=lambda runs, _: timed.append(runs) or [1.0, 2.0])
    assert found.refused == {} and found.winner == "cpu" and len(timed[0]) == 2


@needs_kernels
def test_pytorchs_kernels_have_to_win_twice(short):
    each = next(each for each in rule_cases.all_series((64,)) if each.name == PROMPT.name)
    rounds = [[3.0, 1.0], [1.0, 1.5]]
    (found,) = measure(each, budget=0, timer=lambda runs, _: rounds.pop(0))
    assert found.winner == "cpu" and found.seconds == {"cpu": 1.0, "sdpa": 1.0} and not rounds


@needs_kernels
def test_a_wrong_backend_is_never_timed(short, monkeypatch):
    right = sdpa.run
    monkeypatch.setattr(sdpa, "run", lambda call: right(call.with_(scale=call.scale * 1.1)))
    asked = []
    each = next(each for each in rule_cases.all_series((64,)) if each.name == PROMPT.name)
    (found,) = measure(each, budget=0, timer=lambda runs, _: asked.append(len(runs)) or [1.0])
    assert asked == [1] and found.winner is None
    assert found.refused["sdpa"].startswith("WRONG: result, head ")


@needs_kernels
def test_a_backend_that_breaks_down_does_not_end_the_run(short, monkeypatch):
    def broken(call):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(sdpa, "run", broken)
    each = next(each for each in rule_cases.all_series((64,)) if each.name == PROMPT.name)
    (found,) = measure(each, budget=0, timer=lambda runs, _: [1.0])
    assert found.refused == {"sdpa": "failed: RuntimeError: out of luck"}


def tuned(timer=lambda runs, _: [2.0, 1.0][: len(runs)], **options):
    return rule_options.execute(rule_options.Options(dims=(64,), **options), timer)


@needs_kernels
def test_rules_go_where_auto_reads_them(short, capsys):
    family = processor_family()
    assert tuned() == 0
    said = capsys.readouterr()
    path = tuning.user_path(family)
    assert f"rules for {family} to {path}. auto uses them from now on." in said.out
    assert "2.00x" in said.out and "[1/20] gradients, float32, D 64" in said.err
    file = tuning.user_file(family)
    assert len(file.rules) == len(file.trials) == 20
    assert {rule.order[0] for rule in file.rules} == {"sdpa"}
    assert {"revision", "command", "environment", "date"} <= set(file.measured)
    assert tuning.rules(family).rules[:20] == file.rules
    again = tuning.to_json(file)
    path.write_text(again)
    assert tuning.to_json(tuning.read_file(path)) == again


@needs_kernels
def test_a_record_holds_the_figures_and_is_cited(short, tmp_path, capsys):
    out, record = tmp_path / "r.json", tmp_path / "my_rules.json"
    assert tuned(out=str(out), json=str(record), cases=("mask", "one token")) == 0
    assert f"export SACCADE_RULES={out}" in capsys.readouterr().out
    data = json.loads(record.read_text())
    assert data["complete"] and data["family"] == processor_family() and len(data["rows"]) == 6
    assert data["rows"][0]["ms"] == {"cpu": 2000.0, "sdpa": 1000.0}
    file = tuning.read_file(out)
    assert {rule.source for rule in file.rules} == {"my_rules"} and not file.trials
    assert not tuning.user_path(processor_family()).exists()


@needs_kernels
def test_stopping_keeps_what_was_measured(short, capsys):
    asked = []

    def timer(runs, _):
        asked.append(runs)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [2.0, 1.0]

    assert tuned(timer) == 130
    assert "Stopped early" in capsys.readouterr().err
    assert len(tuning.user_file(processor_family()).rules) == 1


def test_without_kernels_there_is_nothing_to_compare(short, monkeypatch, capsys):
    real = cpu_rules.dispatch.refusal

    def refusal(call, name):
        return "it was not built" if name == "cpu" else real(call, name)

    monkeypatch.setattr(cpu_rules.dispatch, "refusal", refusal)
    assert tuned(cases=("mask",)) == 1
    said = capsys.readouterr().out
    assert "No rules: nothing could be compared here (cannot: it was not built)." in said
    assert not tuning.user_path(processor_family()).exists()


def test_a_folder_that_cannot_be_written_is_said(short, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    if BUILT:
        with pytest.raises(tuning.BadInput, match=r"cannot be written .* Choose a file with --out"):
            tuned(cases=("mask",))


def test_tables_name_kinds_once():
    rows = [
        {"case": case, "dtype": "float32", "heads": 9, "kv_heads": 3, "head_dim": 64, "queries": q,
         "keys": 512, "ms": ms, "winner": winner, "cannot": {"sdpa": "no"}}
        for case, q, ms, winner in (
            ("prompt", 512, {"cpu": 1.0, "sdpa": 3.0}, "cpu"), ("prompt", 512, {"cpu": 1.0}, None),
            ("one token", 1, {"cpu": 2.0, "sdpa": 1.0}, "sdpa"),
        )
    ]  # fmt: skip
    lines = as_table(rows).lines
    assert [line.name for line in lines] == [
        "prompt", "float32, 9/3 D64, 512 queries and keys",
        "float32, 9/3 D64, 512 queries and keys", "one token", "float32, 9/3 D64, 512 keys",
    ]  # fmt: skip
    assert [cell.text for cell in lines[1].cells] == ["1.00 ms", "3.00 ms", "cpu", "3.00x"]
    assert lines[2].cells[1].text == "no" and lines[4].cells[2].text == "sdpa"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kernels", "forward", "--device", "cpu"], "--kernels is an option of a GPU"),
        (["--device", "cpu", "--again"], "--again is an option of a GPU"),
        (["--device", "cuda", "--threads", "2"], "--threads is an option of a CPU"),
        (["--device", "tpu"], "expected one of auto, cpu, cuda, got 'tpu'"),
        (["--device", "cpu", "--cases", "mask"], "name a file for them with --out"),
        (["--device", "cpu", "--cases", "x", "--out", "o"], "no call has 'x' in its name; there"),
        (["--device", "cpu", "--json", "no/folder/r.json"], "there is no folder no/folder"),
    ],
    ids=" ".join,
)
def test_bad_command_lines(capsys, words, said):
    assert cli.main(["bench", "tune", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""


@needs_kernels
def test_the_command_measures_and_writes(tmp_path):
    out = tmp_path / "r.json"
    command = [sys.executable, "-m", "saccade", "bench", "tune", "--device", "cpu", "--quick"]
    command += ["--threads", "1", "--dims", "64", "--cases", "one token", "--out", str(out)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    file = tuning.read_file(out)
    assert len(file.rules) == 3 and all(row["ms"]["cpu"] > 0 for row in file.trials)
    assert file.measured["environment"]["threads"] == 1


def test_series_take_their_names_and_sizes_from_kinds():
    each = Series(kind=KINDS[1], dtype="bfloat16", dim=128, dims=(96, 160), quick=True)
    assert each.name == "prompt, bfloat16, D 128"
    assert each.sizes == ((512, 512), (2048, 2048)) and each.heads == (8, 2)
