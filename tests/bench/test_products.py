"""Torch's matrix product, the rate whose samples alternate with attention in bfloat16."""

import pytest
import torch

from saccade.bench import bars
from saccade.bench.cases import Bar
from saccade.bench.products import PRODUCT, product
from saccade.bench.table import cells, heading, title
from tests.bench import sample

NAME = "prefill 9/3 D64 N2048 bf16"


def test_a_product_of_bfloat16_matrices():
    row, call = product(sample.row(NAME, 0.03), size=64)
    out = call()
    assert (out.shape, out.dtype) == ((64, 64), torch.bfloat16)
    assert (row.backend, row.ours, row.case) == (PRODUCT, False, NAME)
    assert row.flops == 2 * 64**3 and title(row) == "torch matrix product"


def test_attention_is_compared_with_the_product_of_its_turns():
    record = sample.record()
    ours = next(r for r in record.rows if r.case == NAME and r.ours)
    bar = Bar(measure="product", limit=0.5)
    assert bars.value_of(bar, ours, record) is None
    row, _ = product(ours, size=64)
    row.seconds = row.flops / 1e12
    record.rows.append(row)
    assert bars.value_of(bar, ours, record) == pytest.approx(ours.flops / ours.seconds / 1e12)


def test_prefill_in_bfloat16_is_a_share_of_the_rate_of_its_products():
    record = sample.record()
    ours = next(r for r in record.rows if r.case == NAME and r.ours)
    assert cells(ours, record)[2].endswith("% FMA") and "bf16" not in heading(record)[1]
    record.ceilings.pair_samples.append(2 * sample.PEAK)
    share = ours.flops / ours.seconds / (2 * sample.PEAK)
    assert cells(ours, record)[2] == f"{100 * share:.0f} % bf16 products"
    assert "products of bf16 400 GF/s" in heading(record)[1]
