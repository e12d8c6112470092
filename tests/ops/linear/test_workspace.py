"""What products with packed weights allocate: plans from shapes against what is really taken."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from saccade.ops.allocated import AllocatedPeak
from saccade.ops.attention.cpu.binding import extension
from saccade.ops.linear import PackedWeight, forward, gated, linear, linears, rows
from saccade.ops.linear.packed import empty
from saccade.ops.planning import PeakBytes, without_memory
from tests.ops.linear.weights import FORMS, random_weight

KERNELS = extension()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="built without the C++ kernels")
ROWS = [1, 5, 12, 13, 40, 1032, 1033, 2500]
KINDS = {
    "4 bits": [(4, 32, True)],
    "8 bits": [(8, 16, False)],
    "several": [(4, 32, True), (8, 32, True), (4, 32, False)],
    "gated": [(4, 32, True), (8, 32, True)],
}


@pytest.fixture(params=[] if KERNELS is None else KERNELS.targets())
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for module in ("native", "forward"):
        monkeypatch.setattr(f"saccade.ops.linear.{module}.target", lambda: request.param)
    caches = forward.product_dtype, forward.multiplies_bfloat16
    for each in caches:
        each.cache_clear()
    yield request.param
    for each in caches:
        each.cache_clear()


def weights_of(kind: str, width: int = 96) -> list[PackedWeight]:
    sizes = (70, 70, 33) if kind == "gated" else (70, 33, 170)
    return [random_weight(n, width, form)[0] for n, form in zip(sizes, KINDS[kind], strict=False)]


def product(kind: str, x: torch.Tensor, weights: list[PackedWeight]) -> list[torch.Tensor]:
    return [gated(x, *weights, "silu")] if kind == "gated" else linears(x, weights)


def planned_bytes(kind: str, x: torch.Tensor, weights: list[PackedWeight]) -> int:
    """The peak of the same product on tensors without memory."""
    with without_memory():
        x = torch.empty(x.shape, dtype=x.dtype)
        same = [
            empty(*w.shape, bits=w.bits, group=w.group, with_minimum=w.minimum is not None)
            for w in weights
        ]
        with PeakBytes() as planned:
            product(kind, x, same)
    return planned.peak


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_what_the_kernels_take_is_what_is_said(target: str, kind: str, rows: int):
    """By a new thread, which has no workspace yet; few rows are not told of by their weights."""
    weights, x = weights_of(kind), torch.randn(rows, 96)

    def compute() -> tuple[int, int]:
        torch.set_num_threads(1)
        product(kind, x, weights)
        said = forward.workspace_bytes(
            rows, 96, [w.shape[0] for w in weights], "silu" if kind == "gated" else "none"
        )
        return said, KERNELS.workspace_bytes_of_thread()

    with ThreadPoolExecutor(1) as pool:
        said, taken = pool.submit(compute).result()
    if rows > forward.FEW_ROWS:
        assert taken == (said if forward.multiplies_bfloat16() else 0)
    elif target == "avx512_bf16" and len(weights) > 1:
        assert taken == said
    else:
        assert said / 2.1 - 4096 < taken <= said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plan_takes_what_a_product_takes(target: str, kind: str, rows: int, dtype: torch.dtype):
    weights, x = weights_of(kind), torch.randn(rows, 96).to(dtype)
    planned = planned_bytes(kind, x, weights)
    forward._buffers.of.clear()
    with AllocatedPeak(torch.device("cpu")) as taken:
        product(kind, x, weights)
    if rows > forward.FEW_ROWS and forward.product_dtype() is torch.bfloat16 and "amx" in target:
        inside = taken.bytes - planned  # blocks of PyTorch's own bfloat16 product
        assert 0 <= inside <= torch.get_num_threads() * 2**18
    else:
        assert taken.bytes == planned > 0


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_alone_say_the_same(target: str, rows: int, dtype: torch.dtype):
    """Of a single weight, of which the product of the first 1,344 or 704 rows is one tile."""
    weight, _ = random_weight(1500, 1536, FORMS[1])
    planned = planned_bytes("", torch.empty(rows, 1536, dtype=dtype), [weight])
    said = forward.product_bytes(rows, (1500, 1536), dtype, "cpu")
    assert planned == sum(said) + rows * 1500 * dtype.itemsize


@pytest.mark.parametrize("most", [2**24, 96 * 16, 1])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_without_kernels_a_bounded_part_is_plain(
    monkeypatch: pytest.MonkeyPatch, form: tuple[int, int, bool], most: int
):
    monkeypatch.setattr("saccade.ops.linear.native.BUILT", False)
    monkeypatch.setattr(forward, "_PLAIN_NUMBERS", most)
    (weight, exact), x, bias = random_weight(70, 96, form), torch.randn(3, 96), torch.randn(70)
    planned = planned_bytes("", x, [weight])
    with AllocatedPeak(torch.device("cpu")) as taken:
        linear(x, weight)
    assert taken.bytes == pytest.approx(planned, rel=0.1)
    said, kept = forward.product_bytes(3, (70, 96), torch.float32, "cpu")
    assert not kept
    assert said == (80 * 96 * 9 if most == 2**24 else 16 * 96 * 9 + 3 * 16 * 4)
    assert planned <= said + 3 * 70 * 4
    expected = x.double() @ exact.T + bias.double()
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-4, atol=1e-2)
    index = torch.tensor([69, 0, 33, 33, 16])
    with AllocatedPeak(torch.device("cpu")) as taken:
        looked_up = rows(weight, index, torch.float32)
    torch.testing.assert_close(looked_up.double(), exact[index], rtol=1e-3, atol=1e-2)
    rest = 2 * looked_up.nbytes + 1024  # the parts and the whole; indices
    assert taken.bytes <= forward.plain_bytes(min(80, forward.plain_at_once(96)), 96) + rest


def test_more_rows_take_no_more_and_give_the_same(target: str):
    weight, _ = random_weight(70, 96, FORMS[1])
    x = torch.randn(5000, 96)
    taken = {n: forward.workspace_bytes(n, 96, [70], "none") for n in (1000, 1032, 5000)}
    assert max(taken.values()) == taken[1032]
    out = linear(x, weight)
    assert all(
        torch.equal(out[i : i + 500], linear(x[i : i + 500], weight)) for i in (0, 800, 4500)
    )


@pytest.mark.parametrize("rows", [*range(13, 5000, 37), 10**6])
def test_pieces_are_whole_strips_and_about_equal(rows: int):
    size = forward.piece(rows)
    count = -(-rows // size)
    assert size % 12 == 0 and size <= 1032 and count == -(-rows // 1032)


THREADS = """
import torch
from saccade import _cpu
from saccade.ops.linear import forward, linears
from tests.ops.linear.test_workspace import weights_of
torch.set_num_threads(3)
_cpu.share_threads(False)  # torch's threads, when late, are left out: both kinds would have one
weights, x = weights_of("several"), torch.randn(200, 96)
planned = forward.workspace_bytes(200, 96, [w.shape[0] for w in weights], "none")
for _ in range(500):  # until each thread has had a work item
    linears(x, weights)
    if _cpu.workspace_bytes_of_all() >= planned:
        break
print(planned, _cpu.workspace_bytes_of_all())
"""


def test_workspace_of_several_threads_in_a_fresh_process():
    if not forward.multiplies_bfloat16():
        pytest.skip("this CPU does not multiply bfloat16 by panels")
    call, root = [sys.executable, "-c", THREADS], Path(__file__).parents[3]
    found = subprocess.run(call, capture_output=True, text=True, check=True, cwd=root).stdout
    planned, allocated = map(int, found.split())
    assert planned == allocated > 0
