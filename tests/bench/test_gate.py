"""The gate lets the right kernels through and none of the planted wrong ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saccade.bench import gate
from saccade.bench.cases import Case
from saccade.bench.gate import Gate
from saccade.bench.inputs import make
from saccade.core import Mask
from saccade.ops import attend

SMALL = Case(
    group="small", work="prefill", heads=4, kv_heads=2, head_dim=64, q_len=320, kv_len=320,
    storage="fp32",
)  # fmt: skip
CASES = {
    "fp32": SMALL,
    "bf16": replace(SMALL, storage="bf16"),
    "fp16": replace(SMALL, storage="fp16"),
    "int8": replace(SMALL, storage="int8"),
    "int4": replace(SMALL, storage="int4", q_type="bf16"),
    "int4 hadamard": replace(SMALL, storage="int4", q_type="bf16", hadamard=True),
    "window": replace(SMALL, window=100),
    "window bf16": replace(SMALL, window=100, storage="bf16"),
    "decode": replace(SMALL, work="window", q_len=1, storage="bf16"),
}
BACKWARD = replace(SMALL, work="backward")


def result(case, inputs, *, backend="tiled", scale=1.0, mask=None):
    """A backend's output, made wrong on request."""
    mask = mask or case.mask
    scale *= case.head_dim**-0.5
    return attend(inputs.q, inputs.views[0], mask=mask, scale=scale, backend=backend).out


def gradients(case, inputs, *, scale=1.0):
    out = result(case, inputs, backend="reference", scale=scale)
    view = inputs.views[0]
    return torch.autograd.grad(out, (inputs.q, view.k, view.v), inputs.grad)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_right_kernels_pass(case, backend):
    inputs = make(case)
    verdict = Gate(case, inputs).check(result(case, inputs, backend=backend))
    assert verdict.passed, verdict.reason
    assert verdict.error < 1


def test_sdpa_passes():
    for storage in ("fp32", "bf16", "fp16"):
        case = replace(SMALL, storage=storage)
        inputs = make(case)
        assert Gate(case, inputs).check(result(case, inputs, backend="sdpa")).passed


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "int8", "int4", "window bf16"])
def test_a_scale_wrong_by_two_per_cent(name):
    inputs = make(CASES[name])
    verdict = Gate(CASES[name], inputs).check(result(CASES[name], inputs, scale=1.02))
    assert not verdict.passed and verdict.error > 1


@pytest.mark.parametrize("name", ["window", "window bf16"])
@pytest.mark.parametrize("window", [99, 101])
def test_a_window_off_by_one(name, window):
    inputs = make(CASES[name])
    assert inputs.views[0].shape[2] == 320
    got = result(CASES[name], inputs, mask=Mask(window=window))
    assert not Gate(CASES[name], inputs).check(got).passed


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_one_row_of_one_head(name):
    inputs = make(CASES[name])
    got = result(CASES[name], inputs)
    got[0, 2, 307] = got[0, 1, 307]
    verdict = Gate(CASES[name], inputs).check(got)
    assert not verdict.passed
    assert "head 2, row 307" in verdict.reason


def test_the_last_key_of_a_tile_forgotten():
    inputs = make(SMALL)
    view = inputs.views[0]
    seen = torch.ones(1, 320, dtype=torch.bool)
    seen[:, 255] = False
    got = attend(inputs.q, view, mask=SMALL.mask, key_padding=seen, backend="tiled").out
    assert not Gate(SMALL, inputs).check(got).passed


def test_nonsense():
    inputs = make(SMALL)
    checker = Gate(SMALL, inputs)
    right = result(SMALL, inputs)
    assert not checker.check(torch.zeros_like(right)).passed
    broken = right.clone()
    broken[0, 0, 5, 3] = torch.nan
    assert "not finite" in checker.check(broken).reason
    assert "beyond every value" in checker.check(right * 100).reason


def test_large_problems_are_checked_on_some_rows(monkeypatch):
    monkeypatch.setattr(gate, "ALL_ROWS", 1e6)
    case = replace(SMALL, window=100)
    rows = gate.rows_to_check(case, 0)
    assert {0, 1, 99, 100, 319} <= set(rows.tolist())
    assert len(rows) < case.q_len
    assert int(rows.diff().max()) <= 2 * -(-case.q_len // gate.NUM_ROWS)
    inputs = make(case)
    checker = Gate(case, inputs)
    assert checker.check(result(case, inputs)).passed
    assert not checker.check(result(case, inputs, mask=Mask(window=99))).passed
    # A row that is not looked at still has to lie between the smallest and largest value.
    unseen = next(row for row in range(case.q_len) if row not in rows)
    got = result(case, inputs)
    got[0, 0, unseen] = 1e3
    assert not checker.check(got).passed


def test_gradients():
    inputs = make(BACKWARD)
    checker = Gate(BACKWARD, inputs)
    right = gradients(BACKWARD, inputs)
    assert checker.check(right).passed, checker.check(right).reason
    assert not checker.check(gradients(BACKWARD, inputs, scale=1.001)).passed
    for at, name in enumerate(("dq", "dk", "dv")):
        parts = [part.clone() for part in right]
        parts[at][0, 1, 200] *= 1.01
        verdict = checker.check(tuple(parts))
        assert not verdict.passed and verdict.reason.startswith(f"{name}, head 1, row 200")
