"""Pairs, operations and bytes against counting; the table against the tensors it makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saccade.bench.cases import CASES, Case, batches, prefill, selected
from saccade.bench.inputs import make
from saccade.core import DenseKV, QuantizedKV

SMALL = Case(
    group="small", work="prefill", heads=6, kv_heads=2, head_dim=32, q_len=200, kv_len=200,
    storage="fp32",
)  # fmt: skip
SHAPES = [
    SMALL,
    replace(SMALL, window=17),
    replace(SMALL, q_len=1),
    replace(SMALL, q_len=50, window=300),
    replace(SMALL, work="backward"),
]


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: f"{case.work}-{case.q_len}-{case.window}")
def test_pairs_and_operations_by_counting(case):
    pairs = 0
    for q in range(case.kv_len - case.q_len, case.kv_len):
        for k in range(case.kv_len):
            pairs += k <= q and (case.window is None or q - k < case.window)
    assert case.num_pairs == pairs
    # q.k is D products and D sums, weights times v the same; backward has five products for two.
    products = 5 if case.work == "backward" else 2
    assert case.flops == case.heads * pairs * products * 2 * case.head_dim


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp16", "int8", "int4"])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_bytes_are_those_of_the_tensors(storage, head_dim):
    case = replace(SMALL, storage=storage, head_dim=head_dim, q_type="bf16")
    inputs = make(case)
    (view,) = inputs.views
    assert view.shape == (1, 2, 200, head_dim, head_dim)
    if isinstance(view, QuantizedKV):
        assert view.num_quantized == 128
        tensors = [*view.k, *view.v, view.recent_k, view.recent_v]
    else:
        assert isinstance(view, DenseKV)
        tensors = [view.k, view.v]
    assert case.kv_bytes == sum(x.nbytes for x in tensors)
    assert case.nbytes == case.kv_bytes + 2 * inputs.q.nbytes


def test_backward_reads_five_tensors_and_writes_three():
    case = replace(SMALL, work="backward")
    inputs = make(case)
    view = inputs.views[0]
    assert case.nbytes == 4 * inputs.q.nbytes + 2 * (view.k.nbytes + view.v.nbytes)
    assert inputs.grad is not None and view.k.requires_grad and view.v.requires_grad


def test_decoding_walks_through_more_memory_than_caches_hold():
    case = replace(SMALL, work="decode", q_len=1, kv_len=4096, heads=32, kv_heads=8, head_dim=128)
    views = make(case).views
    assert len({view.k.data_ptr() for view in views}) == len(views)
    assert sum(view.k.nbytes + view.v.nbytes for view in views) >= 256 << 20
    assert torch.equal(views[0].k, views[-1].k)


def test_inputs_are_the_same_in_every_run():
    assert torch.equal(make(SMALL).q, make(SMALL).q)


def test_the_table_names_what_its_bars_refer_to():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {bar.against for case in CASES for bar in case.bars} - {""} <= set(names)


def test_every_bar_of_the_issue_is_there():
    bars = {(c.work, c.storage, b.measure, b.limit) for c in CASES for b in c.bars}
    assert bars == {
        ("prefill", "fp32", "peak", 0.75), ("prefill", "fp32", "torch", 3.0),
        ("prefill", "bf16", "rate", 1.5), ("prefill", "bf16", "torch", 1.5),
        ("prefill", "bf16", "product", 0.5), ("prefill", "fp16", "time", 1.15),
        ("prefill", "int8", "time", 1.0), ("prefill", "int4", "time", 1.0),
        ("decode", "bf16", "bandwidth", 0.8), ("decode", "fp16", "bandwidth", 0.8),
        ("decode", "int8", "rate", 1.6), ("decode", "int4", "rate", 2.5),
        ("window", "fp32", "pairs", 1.2),
        ("backward", "fp32", "peak", 0.55), ("backward", "fp32", "torch", 2.0),
    }  # fmt: skip


def test_window_and_its_dense_case_do_about_the_same_work():
    dense, narrow = (c for c in CASES if "8/2" in c.name)
    assert abs(dense.flops / narrow.flops - 1) < 0.02


def test_selection_brings_the_cases_that_bars_refer_to():
    assert [case.label for case in selected(CASES, words=["9/3 D64 N2048 int8"])] == [
        "fp32",
        "bf16",
        "int8",
    ]
    assert [case.name[:6] for case in selected(CASES, words=["window"])] == ["dense ", "window"]
    for case in selected(CASES, quick=True):
        assert case.quick and {b.against for b in case.bars} - {""} <= {
            c.name for c in CASES if c.quick
        }


def test_a_word_in_no_name():
    with pytest.raises(ValueError, match=r"no case has 'prefil9'.*prefill 9/3"):
        selected(CASES, words=["prefil9"])


def test_what_a_bar_compares_is_timed_in_turns():
    for batch in batches(CASES):
        names = {case.name for case in batch}
        assert {bar.against for case in batch for bar in case.bars} - {""} <= names
    assert sum(len(batch) for batch in batches(CASES)) == len(CASES)
    assert len(batches(prefill(4, 2, 64, 256, quick=True))) == 1
