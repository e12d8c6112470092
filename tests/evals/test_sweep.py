"""The same configurations at several lengths."""

import pytest

from saccade.evals import sweep
from saccade.evals.rows import FLASH, INT4, INT8, SDPA
from saccade.hf.model import HFModel
from saccade.report.comparison import Report
from tests.evals.test_run import TEXT, Tokenizer, loaded
from tests.tiny_models import tiny_config

LENGTHS = (256, 384)


def swept(n_ctx, lengths=LENGTHS, family="llama"):
    layers = {"num_hidden_layers": 2} if family == "llama" else {}
    model = loaded(tiny_config(family, max_position_embeddings=n_ctx, **layers))
    tokens, runner = Tokenizer()(TEXT).input_ids, HFModel(model.model)
    swept = sweep.Sweep(model, runner, tokens, lengths, n_batch=128)
    origin = {"revision": None, "command": "", "environment": {}, "date": ""}
    report = Report(model={}, text={}, settings={}, baseline="", **origin)
    labels = []
    swept.run(report, labels.append, lambda: False)
    assert len(labels) == len(report.sweep) == swept.steps
    return report


@pytest.fixture(autouse=True, scope="module")
def short_window():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "WINDOW", 64)
        yield


@pytest.fixture(scope="module")
def report(short_window):
    return swept(1024)


def test_every_configuration_at_every_length(report):
    assert [point.n_context for point in report.sweep] == sorted(
        point.n_context for point in report.sweep
    )
    for name in (SDPA, FLASH, INT8):
        points = [point for point in report.sweep if point.name == name]
        assert [point.n_context for point in points] == list(LENGTHS)
        for point in points:
            assert point.status == "ok", point.note
            assert point.peak_bytes and point.ttft_seconds and point.decode_tps
            assert point.perplexity and point.kl is not None


def test_caches_grow_with_the_length_but_a_window(report):
    def caches(name):
        return [point.cache_bytes for point in report.sweep if point.name.startswith(name)]

    assert all(caches("window"))
    assert caches(SDPA)[1] == 1.5 * caches(SDPA)[0]
    assert len(set(caches("window"))) == 1


def test_a_model_without_sdpa_is_compared_with_flash_attention():
    points = {point.name: point for point in swept(1024, (256,), "gemma2").sweep}
    assert points[SDPA].status == "failed" and points[FLASH].kl == 0
    # Steps of 8 bits are 17 times as fine, KL is about their square: it may vanish in rounding.
    assert 0 <= points[INT8].kl < points[INT4].kl / 17 and 0 < points[INT4].kl < 1e-4
    assert points[INT4].cache_bytes < points[INT8].cache_bytes < points[FLASH].cache_bytes


def test_a_window_that_holds_the_whole_text_does_not_apply(monkeypatch):
    monkeypatch.setattr(sweep, "WINDOW", 512)
    window = swept(1024, (256,)).sweep[-1]
    assert window.status == "not applicable" and "holds all" in window.note


def test_past_the_trained_length_there_is_no_kl_and_yarn_joins():
    report = swept(300, (384,))
    past = [point for point in report.sweep if point.n_context == 384]
    assert {point.name for point in past} >= {SDPA, FLASH, "YaRN"}
    assert all(point.kl is None and point.perplexity for point in past if point.status == "ok")


def test_points_that_would_take_too_long_say_so(monkeypatch):
    monkeypatch.setattr(sweep, "LONGEST_SECONDS", 0.0)
    report = swept(1024)
    first, second = (
        {point.status for point in report.sweep if point.n_context == length} for length in LENGTHS
    )
    assert first == {"ok"} and second == {"stopped"}
    assert "expected" in report.sweep[-1].note and report.sweep[-1].peak_bytes is None


def test_points_that_would_not_fit_say_so(monkeypatch):
    monkeypatch.setattr(sweep, "free_memory", lambda _: 1000)
    report = swept(1024, (256,))
    assert {point.status for point in report.sweep} == {"stopped"}
    assert "caches need about" in report.sweep[0].note
