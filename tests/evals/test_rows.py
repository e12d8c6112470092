"""Which rows there are for a model and a length, and which of them say that they do not apply."""

from dataclasses import replace

import pytest
import torch

from saccade.evals.applies import inapplicable
from saccade.evals.rows import FLASH, GQA, INT8, KVZIP, MHA, MQA, SDPA, SNAPKV, TEXTBOOK, rows_for
from saccade.runtime.model import ModelFacts
from saccade.runtime.positions import Positions

FACTS = ModelFacts(
    name="made up", num_layers=2, num_heads=8, num_kv_heads=2, head_dim=16, vocab_size=99,
    n_ctx_train=4096, dtype=torch.float32, windows=(None, None),
)  # fmt: skip


def specs(facts=FACTS, n_context=1024, total=1400):
    rows = rows_for(facts, n_context=n_context, total=total, n_batch=512)
    return rows, {spec.name: spec for spec in rows.specs}


def test_the_model_as_its_user_has_it_comes_first():
    rows, named = specs()
    assert [spec.name for spec in rows.specs[:3]] == [TEXTBOOK, SDPA, FLASH]
    assert len(named) == len(rows.specs)
    assert (named[TEXTBOOK].theirs, named[SDPA].theirs, named[FLASH].theirs) == (
        "eager", "sdpa", None,
    )  # fmt: skip
    assert rows.exact == SDPA and not rows.scaling


def test_all_rows_read_in_the_same_chunks():
    for total in (1400, 6000):
        assert {spec.params.n_batch for spec in specs(total=total)[0].specs} == {512}


def test_a_combination_names_rows_that_there_are():
    for total in (1400, 6000):
        rows, named = specs(total=total)
        combined = [spec for spec in rows.specs if spec.parts]
        assert combined
        for spec in combined:
            assert set(spec.parts) <= set(named), spec.name


def test_past_the_trained_length_all_but_the_plain_rows_are_scaled():
    rows, named = specs(n_context=5600, total=6000)
    assert rows.exact.startswith("YaRN x1.46") and rows.scaling
    assert named[FLASH].params.rope_scaling_type is None and "past" in named[FLASH].note
    assert named[FLASH].params.n_ctx == 6000
    for name in (rows.exact, INT8, SNAPKV, KVZIP, MHA):
        assert named[name].params.rope_scaling_type == "yarn", name
        assert named[name].params.n_ctx >= 6000
    assert named[GQA].same_as == rows.exact


def test_a_window_with_sinks_needs_no_scaling():
    window = specs(n_context=5600, total=6000)[1]["window 1400 + 4 sinks"]
    assert window.params.rope_scaling_type is None and window.params.n_sinks == 4


def test_positions_that_cannot_be_scaled_are_read_as_they_are():
    table = replace(FACTS, positions=Positions(rule=None))
    rows, named = specs(table, n_context=5600, total=6000)
    assert rows.exact == SDPA and "no rotary positions" in rows.scaling
    assert named[INT8].params.rope_scaling_type is None


def test_scaling_inside_the_trained_length_says_that_it_can_only_cost():
    _, named = specs()
    assert "can only cost" in named["YaRN x2"].note


def reason(facts, name, n_context=1024):
    return inapplicable(specs(facts)[1][name], facts, n_context)


def test_heads_that_are_there_already():
    equal, one = replace(FACTS, num_kv_heads=8), replace(FACTS, num_kv_heads=1)
    assert "8 query heads has keys" in reason(equal, MHA) and reason(equal, GQA)
    assert reason(one, MQA) and reason(one, GQA) and reason(one, MHA) is None
    assert [reason(FACTS, name) for name in (MHA, GQA, MQA)] == [None] * 3


def test_scaling_of_a_model_without_rotary_positions():
    table = replace(FACTS, positions=Positions(rule=None))
    assert "no rotary positions" in reason(table, "YaRN x2")
    assert reason(FACTS, "YaRN x2") is None


@pytest.mark.parametrize("name", [INT8, SNAPKV, "sparse: block top-k"])
def test_options_of_layers_that_all_slide(name):
    slides = replace(FACTS, windows=(64, 64))
    assert reason(slides, name).startswith("every layer")
    assert reason(replace(FACTS, windows=(64, None)), name) is None


def test_a_pattern_that_selects_everything_is_not_measured():
    spec = specs()[1]["sparse: block top-k"]
    assert "blocks cover all of 300" in inapplicable(spec, FACTS, 300)
    assert inapplicable(spec, FACTS, 4096) is None
