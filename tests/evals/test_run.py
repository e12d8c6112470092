"""A whole comparison of tiny random models, against transformers itself where that can tell."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

from saccade.core import BadInput
from saccade.evals import compare, gpu_failure, rounds
from saccade.evals.compare import run
from saccade.evals.needle import hide, make_needles
from saccade.evals.rows import FLASH, INT4, INT8, MHA, MQA, SDPA, TEXTBOOK
from saccade.hf.load import LoadedModel
from tests.tiny_models import tiny_config, tiny_model

TEXT = "".join(f"line {i} says that {i * i % 97} is {i % 13}.\n" for i in range(200))


class Tokenizer:
    """Bytes as tokens."""

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[byte % 128 for byte in text.encode()])


def loaded(config, tokenizer=True):
    length = getattr(config, "n_positions", None) or config.max_position_embeddings
    return LoadedModel(
        model=tiny_model(config), tokenizer=Tokenizer() if tokenizer else None, name="tiny",
        n_ctx_train=length,
    )  # fmt: skip


def compared(config, rows, **options):
    return run(loaded(config), TEXT, quick=True, context=256, rows=rows, **options)


@pytest.fixture(scope="module")
def llama():
    model = loaded(tiny_config("llama", max_position_embeddings=1024))
    before = dict(vars(model.model.config))
    report = run(model, TEXT, quick=True, context=256, rows=["flash", "int8", "GQA"])
    assert dict(vars(model.model.config)) == before
    return model, report


def test_the_rows_of_transformers_are_its_own_numbers(llama):
    model, report = llama
    tokens = Tokenizer()(TEXT).input_ids
    needles = make_needles(report.settings["needles"])
    encode = lambda text: Tokenizer()(text).input_ids  # noqa: E731
    context = hide(tokens, needles, encode, 256)
    rest = 256 - sum(len(encode(needle.sentence)) for needle in needles)
    scored = tokens[rest : rest + report.settings["n_scored"]]
    with torch.inference_mode():
        logits = model.model(torch.tensor([context + scored])).logits[0, 255:-1].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(scored)).exp().item()
    for name in (TEXTBOOK, SDPA, FLASH):
        assert report.row(name).perplexity == pytest.approx(expected, rel=1e-5), name
    config = model.model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert report.row(SDPA).cache_bytes == report.row(TEXTBOOK).cache_bytes == 256 * per_token


def test_every_measured_cell_is_filled(llama):
    _, report = llama
    measured = [row for row in report.rows if row.status == "ok"]
    assert {row.name for row in measured} >= {TEXTBOOK, SDPA, FLASH, INT8}
    for row in measured:
        numbers = (row.peak_bytes, row.prefill_tps, row.prefill_tps_se, row.decode_tps)
        assert all(numbers) and row.kl is not None and row.ttft_seconds > 0
        assert (row.perplexity_ratio_se is None) == (row.name == SDPA)
    assert (report.baseline, report.reference) == (TEXTBOOK, SDPA)
    assert report.row(TEXTBOOK).peak_bytes > report.row(FLASH).peak_bytes
    assert json.loads(report.to_json())["reference"] == SDPA


def test_gqa_is_the_run_of_flash_attention(llama):
    _, report = llama
    gqa, flash = report.row("GQA (the model as it is)"), report.row(FLASH)
    assert (gqa.decode_tps, gqa.peak_bytes, gqa.kl) == (
        flash.decode_tps, flash.peak_bytes, flash.kl,
    )  # fmt: skip
    assert FLASH in gqa.note


def test_peaks_are_the_same_in_every_run(llama):
    model, report = llama
    again = run(model, TEXT, quick=True, context=256, rows=["flash", "int8"])
    for name in (TEXTBOOK, SDPA, FLASH, INT8):
        peaks = [each.row(name).peak_bytes for each in (report, again)]
        assert peaks[0] == pytest.approx(peaks[1], rel=0.03), name


def test_a_row_that_fails_leaves_the_others():
    ends = {"bos_token_id": 1, "eos_token_id": 0}
    config = GPT2Config(vocab_size=128, n_positions=1024, n_embd=64, n_layer=2, n_head=4, **ends)
    report = compared(config, ["MQA", "MHA", "int8"])
    status = {row.name: row.status for row in report.rows}
    assert status[MQA] == "failed" and status[MHA] == "not applicable"
    assert status[INT8] == status[SDPA] == status[TEXTBOOK] == "ok"
    assert all(row.note for row in report.rows if row.status != "ok")


def test_a_model_without_sdpa_is_compared_with_eager():
    report = compared(tiny_config("gemma2", max_position_embeddings=1024), ["flash"])
    assert report.reference == TEXTBOOK
    assert report.settings["divergence_from"] == TEXTBOOK
    sdpa = next(row for row in report.rows if row.name == SDPA)
    assert sdpa.status == "failed" and "no sdpa attention" in sdpa.note
    assert report.row(FLASH).kl < 1e-6


def test_past_the_trained_length_with_and_without_scaling():
    report = compared(tiny_config("llama", max_position_embeddings=300), ["flash", "linear"])
    yarn = next(row for row in report.rows if row.name.startswith("YaRN"))
    assert yarn.kl == 0 and report.settings["divergence_from"] == yarn.name
    assert report.row(FLASH).kl > 1e-5
    assert report.row(FLASH).perplexity == pytest.approx(report.row(SDPA).perplexity, rel=1e-4)
    assert "300" in report.settings["scaling"]
    linear = next(row for row in report.rows if row.name.startswith("linear"))
    assert linear.status == "ok" and linear.kl > 0


def assert_compared_with_the_first(report):
    """Where the exact row was not reached: sdpa then differs from eager attention by rounding."""
    assert report.settings["divergence_from"] == TEXTBOOK and report.row(TEXTBOOK).kl == 0
    assert report.row(SDPA).kl < 1e-6 and report.row(SDPA).prefill_tps


def test_an_interrupt_keeps_finished_rows(monkeypatch):
    def interrupted(spec, *rest):
        if spec.name == FLASH:
            raise KeyboardInterrupt
        return measure(spec, *rest)

    measure = rounds.measure
    monkeypatch.setattr(rounds, "measure", interrupted)
    report = compared(tiny_config("llama"), ["flash", "int8"], sweep=[256])
    assert not report.complete
    assert [(row.name, row.status) for row in report.rows[:3]] == [
        (TEXTBOOK, "ok"), (SDPA, "ok"), (FLASH, "stopped"),
    ]  # fmt: skip
    unreached = {row.name: (row.status, row.note) for row in report.rows[3:]}
    assert unreached[INT8] == ("stopped", "stopped before it was reached")
    assert {point.status for point in report.sweep} == {"stopped"}
    assert report.claims[0].reason == f"{FLASH}: stopped before it was measured"
    assert_compared_with_the_first(report)


def failing_at(name, monkeypatch, *, for_good):
    """From the row of that name on the GPU reports an error: at every call, or once."""
    measure, broken = rounds.measure, []

    def measured(spec, *rest):
        if spec.name == name:
            broken.append(for_good)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return measure(spec, *rest)

    def synchronized(device):
        if any(broken):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(rounds, "measure", measured)
    monkeypatch.setattr(gpu_failure, "wait", synchronized)


def test_a_gpu_that_failed_ends_the_run_and_keeps_finished_rows(monkeypatch):
    failing_at(FLASH, monkeypatch, for_good=True)
    report = compared(tiny_config("llama"), ["flash", "int8", "int4"])
    notes = {row.name: (row.status, row.note) for row in report.rows}
    assert notes[FLASH] == (
        "failed", "RuntimeError: CUDA error: an illegal memory access was encountered",
    )  # fmt: skip
    assert notes[INT8] == notes[INT4] == ("stopped", "the GPU failed in the row before")
    assert_compared_with_the_first(report)
    assert not report.complete and "illegal memory access" in report.settings["stopped_by"]


def test_an_error_that_the_gpu_survives_costs_one_row(monkeypatch):
    failing_at(FLASH, monkeypatch, for_good=False)
    report = compared(tiny_config("llama"), ["flash", "int8"])
    assert report.complete and report.row(INT8).status == "ok"
    assert next(row for row in report.rows if row.name == FLASH).status == "failed"


def test_a_curve_that_fails_keeps_the_rows(monkeypatch):
    def fails(*args):
        raise ValueError("no positions here")

    monkeypatch.setattr(compare, "measure_curve", fails)
    monkeypatch.setattr(compare, "FULL", replace(compare.QUICK, curve=1200, rounds=1, scored=64))
    model = loaded(tiny_config("llama", max_position_embeddings=600))
    monkeypatch.setattr(compare, "_chosen", lambda known, *_: known.specs[:2])
    report = run(model, TEXT, context=256)
    assert report.complete and [row.status for row in report.rows] == ["ok", "ok"]
    assert report.settings["missing_curves"]["plain"] == "no positions here"


def test_token_ids_in_place_of_a_tokenizer():
    model = loaded(tiny_config("llama", max_position_embeddings=1024), tokenizer=False)
    with pytest.raises(BadInput, match="has no tokenizer"):
        run(model, TEXT, quick=True, context=256)
    ids = Tokenizer()(TEXT).input_ids
    report = run(model, tokens=ids, quick=True, context=256, rows=["int8"], scored=False)
    row = report.row(INT8)
    assert row.prefill_tps and row.peak_bytes
    assert row.perplexity is None and row.kl is None and row.needle is None


def test_eager_is_left_out_where_its_scores_do_not_fit(monkeypatch):
    monkeypatch.setattr(rounds, "free_memory", lambda _: 1000)
    report = compared(tiny_config("llama", max_position_embeddings=1024), ["flash"])
    assert report.rows[0].status == "not applicable" and "scores need" in report.rows[0].note
    assert report.reference == SDPA and report.row(FLASH).kl < 1e-6


def test_no_time_left():
    report = compared(tiny_config("llama"), ["flash"], seconds=0.0)
    assert {row.status for row in report.rows} == {"stopped"}
    assert report.complete


def test_of_a_long_text_only_what_is_used_is_read():
    sizes = compare.QUICK
    report = compared(tiny_config("llama"), ["flash"], seconds=0.0, sweep=[600])
    used = max(256 + sizes.scored, 600 + compare.SCORED)
    assert report.text["tokens"] == used + compare.CALIBRATION < len(TEXT)


def test_bad_requests():
    model = loaded(tiny_config("llama"))
    with pytest.raises(BadInput, match="no row is called 'magic'; expected one of: transformers"):
        run(model, TEXT, context=256, quick=True, rows=["magic"])
    with pytest.raises(BadInput, match="context of at least 256 tokens, got 5"):
        run(model, TEXT, context=5)
    with pytest.raises(BadInput, match="text has 10 tokens.*Give a longer text or a smaller"):
        run(model, "short text", context=400, quick=True)
    with pytest.raises(BadInput, match="text has .* tokens, but a length of 9,000"):
        run(model, TEXT, context=256, quick=True, sweep=[512, 9000])
    with pytest.raises(BadInput, match="lengths of at least 256"):
        run(model, TEXT, context=256, quick=True, sweep=[10])
