"""The recommendation: what fits comes first by exactness, with its memory, time and evidence."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from saccade.advice import calls, evidence, store
from saccade.advice import costs as timing
from saccade.advice import machine as machines
from saccade.advice.candidates import SETTINGS, candidates
from saccade.advice.costs import AttentionCosts, Costs
from saccade.advice.machine import CUDA_ITSELF, Machine, machine
from saccade.advice.peak import memory_of
from saccade.advice.recommend import advise
from saccade.advice.speed import Speed
from saccade.core import BadInput
from saccade.core.user_cache import user_cache
from saccade.runtime import ContextParams
from saccade.runtime.plan_files import from_config

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
MIB = 2**20
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip
SMALL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 8192, "dtype": "float32",
}  # fmt: skip


class Still(Machine):
    """A machine on which nothing has to be timed."""

    def speed(self, blueprint, params, tokens):
        return Speed(first_token=tokens / 100, tokens_per_second=10.0)


def small(**changes):
    return from_config({**SMALL, **changes}, "small", None)


def still(budget, kind="cpu"):
    return Still(kind=kind, name="still", budget=budget, said="as asked")


def peak_of(name, tokens=8192):
    params = ContextParams(**SETTINGS[name])
    return memory_of(small(), params, tokens, "cpu").peak


@pytest.mark.parametrize("name", ["exact", "bf16 cache", "int8 cache"])
def test_the_most_exact_setting_that_fits_is_chosen(name):
    found = advise(small(), ContextParams(), 8192, still(peak_of(name)))
    assert found.chosen.candidate.name == name and found.chosen.memory.peak == peak_of(name)
    assert found.second is not None and found.second.candidate.rank > found.chosen.candidate.rank
    assert found.second.fits and "further down in the rule" in found.why_second
    less = advise(small(), ContextParams(), 8192, still(peak_of(name) - 1))
    assert less.chosen is None or less.chosen.candidate.rank > found.chosen.candidate.rank


def test_nothing_fits_is_an_answer():
    found = advise(small(), ContextParams(), 8192, still(100_000))
    assert found.chosen is None and found.second is None and not any(o.fits for o in found.options)
    assert all(each.tokens == 0 for each in found.longest)
    assert "the weights alone take" in found.notes[0] and "--dtype bf16" in found.notes[1]


def test_a_longest_context_fits_and_a_longer_one_does_not():
    blueprint, budget = small(), peak_of("exact", 5000)
    found = {each.setting: each.tokens for each in
             advise(blueprint, ContextParams(), 8192, still(budget)).longest}  # fmt: skip
    longest = found["exact"]
    assert 4500 < longest <= 5100

    def peak(tokens):
        return memory_of(blueprint, ContextParams(), tokens, "cpu").peak

    assert peak(longest) <= budget < peak(longest * 9 // 8)


def test_a_window_has_no_longest_context():
    found = advise(small(), ContextParams(), 64_000, still(peak_of("exact")))
    assert found.chosen.candidate.name.startswith("window") and found.chosen.scaling is None
    assert {each.setting: each.tokens for each in found.longest}[found.chosen.name] is None


def test_beyond_the_trained_length_positions_are_scaled():
    found = advise(small(), ContextParams(), 16384, still(2**30))
    params = found.chosen.candidate.params
    assert params.rope_scaling_type == "yarn" and params.n_ctx == 16384
    assert "YaRN x2.0" in found.chosen.scaling
    inside = advise(small(), ContextParams(), 8192, still(2**30)).chosen
    assert inside.scaling is None and inside.candidate.params.rope_scaling_type is None


def test_settings_without_effect_are_left_out():
    def names(device="cpu", **changes):
        found = candidates(small(**changes).facts, ContextParams(), device, 8192)
        return [each.name for each in found]

    assert "bf16 cache" in names() and "bf16 cache" not in names(dtype="bfloat16")
    assert (
        "exact, keys in host memory" in names("cuda")
        and "exact, keys in host memory" not in names()
    )
    sliding = names(model_type="mistral", sliding_window=64)
    assert sliding == ["exact", "bf16 cache"]


def test_options_that_were_asked_for_stay():
    asked = ContextParams(type_k="int8", type_v="int8", n_batch=100)
    found = advise(small(), asked, 4096, still(2**30), chunk_is_asked=True)
    assert [each.name for each in found.options] == ["as asked, chunks of 100"]
    assert found.chosen.candidate.params.type_k == "int8"
    assert found.chosen.quality.startswith("KL ") and "measured on SmolLM2" in found.chosen.quality


def test_evidence_is_what_the_record_says():
    assert [asdict(each) for each in evidence.known()] == list(evidence.distilled(RESULTS))
    rows = json.loads((RESULTS / "caches-smollm2.json").read_text())["rows"]
    kl = next(r["kl"] for r in rows if r["name"] == "int4" and r["length"] == 8192)
    found = evidence.evidence_for(ContextParams(type_k="int4", type_v="int4"), 7000)
    assert (found.kl, found.tokens) == (kl, 8192)
    assert evidence.evidence_for(ContextParams(), 7000) is None
    assert evidence.evidence_for(ContextParams(type_k="fp8", type_v="fp8"), 7000) is None


def test_a_gpu_takes_the_largest_chunks_that_fit():
    blueprint = from_config(LLAMA_8B, "8b", None)
    sizes = {}
    for gib in (16.3, 60):
        found = advise(blueprint, ContextParams(), 8192, still(int(gib * 2**30), "cuda"))
        sizes[gib] = found.chosen.candidate.params.n_batch
    assert sizes[60] == 8192 and sizes[16.3] < 8192


def test_machines():
    here = machine("cpu", 10 * MIB)
    assert (here.kind, here.budget, here.said) == ("cpu", 10 * MIB, "as asked")
    assert machine("cpu", None).budget > 0
    away = machine("cuda", 24 << 30)
    assert away.kind == "cuda" and away.budget == (24 << 30) - CUDA_ITSELF
    with pytest.raises(BadInput, match="expected one of auto, cpu, cuda as device, got 'tpu'"):
        machine("tpu", None)
    with pytest.raises(BadInput, match="at least 1 token"):
        advise(small(), ContextParams(), 0, here)


def test_what_was_measured_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.recall("costs", "cpu", 1) is None
    store.remember("costs", {"flop": 1.0}, "cpu", 1)
    assert (
        store.recall("costs", "cpu", 1) == {"flop": 1.0} and store.recall("costs", "cpu", 2) is None
    )
    (file,) = user_cache("plan").iterdir()
    for damaged in ("{", "[]", '{"value"'):
        file.write_text(damaged)
        assert store.recall("costs", "cpu", 1) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    store.remember("costs", 1, "cpu")
    assert store.recall("costs", "cpu") is None


def costs(scale):
    return AttentionCosts(chunk=scale, chunk_key=scale / 1e4, step=scale, step_key=scale / 1e4)


@pytest.mark.parametrize(("second", "kept"), [(1.1, True), (1.5, False)])
def test_only_measurements_that_agree_are_remembered(tmp_path, monkeypatch, second, kept):
    """Of two the faster is taken; where another program disturbed them the plan says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        machines,
        "measured_costs",
        lambda *_: Costs(flop=1e-9, weight=1e-9, head=1e-9, op=1e-6, elementwise=0.0),
    )
    scales = [second, 1.0, 1.0, 1.0]
    monkeypatch.setattr(machines, "measured_attention", lambda *_: costs(scales.pop(0)))
    here, params = machine("cpu", 2**30), ContextParams(n_batch=64)
    first = here.speed(small(), params, 64)
    assert len(scales) == 2 and bool(here.busy) is not kept
    again = machine("cpu", 2**30)
    assert again.speed(small(), params, 64) == first and not again.busy
    assert len(scales) == (2 if kept else 0)
    said = advise(small(), ContextParams(), 64, replace(still(2**30), busy=list(here.busy))).notes
    assert any("this machine was busy" in note for note in said) is not kept


def test_what_python_takes_is_what_the_record_says():
    known = json.loads(calls.FILE.read_text())
    if known["record"] is not None:
        record = json.loads((RESULTS / known["record"]).read_text())
        assert known["calls"] == record["calls"] and known["revision"] == record["revision"]
    assert 0 < calls.recorded().layer < 5000 < 1000 * calls.recorded().model


def test_what_python_takes_is_the_difference_of_two_depths(monkeypatch):
    """Real steps of the toys, with clocks of known times."""
    real, order = calls._step_seconds, []

    def step(toy):
        assert real(toy) > 0
        order.append(toy.config.num_hidden_layers)
        return 50e-6 + 140e-6 * order[-1]

    monkeypatch.setattr(calls, "_step_seconds", step)
    monkeypatch.setattr(calls, "_op_seconds", lambda: 1e-6)
    measured = calls.measured_calls()
    assert measured.layer == pytest.approx(140) and measured.model == pytest.approx(50)
    assert order == [2, 8] * 4


def test_what_a_call_of_attention_takes_is_counted_once(monkeypatch):
    """It is in the steps of the toys: 40 us a call are no part of what heads and keys take."""

    def best(timed, count, behind):
        heads = timed._facts.num_heads
        return 40e-6 + heads * count * (2e-6 + behind * 1e-9)

    monkeypatch.setattr(timing._TimedAttention, "best", best)
    facts = small().facts
    found = timing.measured_attention(facts, ContextParams(n_batch=64), 256)
    assert found.step_key == pytest.approx(facts.num_heads * 1e-9)
    assert found.step == pytest.approx((facts.num_heads - 1) * 2e-6 - 128e-9)


def test_longer_prompts_take_longer_on_this_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here, params = machine("cpu", 2**30), ContextParams(n_batch=64)
    first = here.speed(small(), params, 256)
    assert first.first_token > 0 and first.tokens_per_second > 0
    assert here.speed(small(), params, 2560).first_token > 3 * first.first_token
