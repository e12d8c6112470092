"""Softcap and ALiBi in the Gluon prefill kernel: results on a Hopper GPU; elsewhere its formulas.

The kernel's own functions run as plain Python over tensors, and the PTX of the cap line by line.
"""

import math
import os
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon has no interpreter", allow_module_level=True)

from saccade.core import BlockSelection, DenseKV, Mask
from saccade.ops import attend, attention
from saccade.ops.attention.api import make_call
from saccade.ops.attention.nvidia.gluon.prefill import consumer, scores, softmax
from tests.ops.gluon_emulator import as_python
from tests.support import views
from tests.support.cases import Case
from tests.support.gpu import on_gpu
from tests.support.random_inputs import normal
from tests.support.reference import check_case
from tests.support.tolerance import assert_as_exact

SLOPES = torch.tensor([0.7, 0.0039, 0.25, 1.0, -0.1, 0.03])
WAYS = {"softcap": {"softcap": 2.0}, "alibi": {"alibi_slopes": SLOPES},
        "both": {"softcap": 30.0, "alibi_slopes": SLOPES, "sink_logits": SLOPES}}  # fmt: skip
MASKS = {"causal": {}, "all": {"causal": False}, "window": {"window": 130, "sinks": 140}}
CASES = [(128, "softcap", "causal"), (128, "alibi", "causal"), (128, "alibi", "all"),
         (128, "both", "window"), (64, "both", "causal"), (64, "alibi", "window"),
         (256, "alibi", "causal"), (256, "both", "all"), (96, "softcap", "all")]  # fmt: skip


def random(*shape):
    return normal(*shape, dtype=torch.bfloat16, device="cuda")


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize(("dim", "way", "mask"), CASES)
    def test_equals_the_reference(self, dim, way, mask):
        for lengths in ((65, 130), (300, 300), (513, 700)):
            case = Case((6, 2), lengths, MASKS[mask], "plain", head_dim=dim, options=WAYS[way])
            check_case(case, "gluon", torch.bfloat16, "cuda")

    @pytest.mark.parametrize("rows", [1, 2])
    def test_slopes_of_every_row_in_float16(self, rows):
        slopes = torch.rand(rows, 6)
        case = Case((6, 2), (300, 400), {}, "plain", head_dim=64, options={"alibi_slopes": slopes})
        check_case(case, "gluon", torch.float16, "cuda")

    @pytest.mark.parametrize("heads", [(8, 2), (5, 1)], ids=str)
    @pytest.mark.parametrize("mask", [{}, {"window": 1300}], ids=str)
    def test_heads_that_share_tiles_have_slopes_of_their_own(self, mask, heads):
        """Few queries over many keys, which are divided; four heads of eight fill a tile."""
        options = {"alibi_slopes": torch.rand(2, heads[0]) / 20, "softcap": 3.0}
        for queries in (17, 70, 200):
            case = Case(heads, (queries, 4100), mask, "plain", head_dim=128, options=options)
            check_case(case, "gluon", torch.bfloat16, "cuda")

    def test_shared_tiles_over_key_lengths_per_row(self):
        options = {"alibi_slopes": torch.rand(3, 8) / 20}
        case = Case((8, 2), (40, 4100), {}, "lengths", head_dim=256, batch=3, options=options)
        check_case(case, "gluon", torch.bfloat16, "cuda")

    @pytest.mark.parametrize("extra", ["packed", "lengths"])
    def test_sequences_of_different_length(self, extra):
        """Packed ones, one without queries; and rows of a batch, behind whose keys NaN lies."""
        case = Case((6, 2), (378, 720), {}, extra, head_dim=128, batch=3, options=WAYS["both"])
        check_case(case, "gluon", torch.bfloat16, "cuda")

    @pytest.mark.parametrize(("q_block", "k_block"), [(128, 128), (64, 64)])
    @pytest.mark.parametrize("causal", [True, False])
    def test_selected_blocks(self, causal, q_block, k_block):
        """Two heads share the rows of a block of 64 queries, a tile holds two blocks of keys."""
        torch.manual_seed(1)
        allowed = torch.rand(2, 2, -(-512 // q_block), -(-700 // k_block)) < 0.5
        blocks = BlockSelection(allowed=allowed, q_block=q_block, k_block=k_block)
        options = {"blocks": blocks, "softcap": 3.0, "alibi_slopes": torch.rand(8) / 20}
        case = Case((8, 2), (512, 700), {"causal": causal}, "plain", head_dim=128, options=options)
        check_case(case, "gluon", torch.bfloat16, "cuda")

    @pytest.mark.parametrize("kind", ["ring", "int8", "paged"])
    def test_a_chunk_of_a_prompt_over_a_cache(self, kind):
        """The reference reads the same view: what quantizing costs is no error of the kernel."""
        q, k, v = random(2, 6, 200, 128), random(2, 2, 700, 128), random(2, 2, 700, 128)
        make = {"ring": views.ring, "paged": lambda k, v: views.paged(k, v, 64),
                "int8": lambda k, v: views.quantized(k, v, recent=60, bits=8)}[kind]  # fmt: skip
        options = {"softcap": 2.0, "alibi_slopes": SLOPES.cuda()}
        call = make_call(q, make(k, v), mask=Mask(), q_offset=450, **options)
        truth, ours = (attend(call, backend=name) for name in ("tiled", "gluon"))
        assert (ours.out.double() - truth.out.double()).abs().max() < 2.5e-2
        assert (ours.lse - truth.lse).abs().max() < 1e-3

    @pytest.mark.parametrize("offset", [-50, 5, 30_000])
    def test_queries_before_or_past_the_keys(self, offset):
        q, k, v = random(1, 4, 100, 128), random(1, 4, 200, 128), random(1, 4, 200, 128)
        options = {"mask": Mask(), "q_offset": offset, "alibi_slopes": SLOPES[:4].cuda()}
        truth = attend(
            make_call(q.double(), DenseKV(k.double(), v.double()), **options), backend="reference"
        )
        ours = attend(make_call(q, DenseKV(k, v), **options), backend="gluon")
        assert (ours.out - truth.out).abs().max() < 3e-2
        assert torch.allclose(ours.lse, truth.lse.float(), rtol=1e-6, atol=1e-3)

    def test_many_work_tiles_per_cta(self):
        q, k, v = random(1, 66, 1536, 128), random(1, 2, 1536, 128), random(1, 2, 1536, 128)
        options = {"softcap": 2.0, "alibi_slopes": SLOPES.repeat(11).cuda()}
        truth, eager = (
            attention(*(x.to(dtype) for x in (q, k, v)), **options, backend="reference")
            for dtype in (torch.float64, torch.bfloat16)
        )
        assert_as_exact(attention(q, k, v, **options, backend="gluon"), eager, truth)

    def test_training_with_the_gradients_of_triton(self):
        leaves = [random(1, h, 700, 128).requires_grad_() for h in (4, 2, 2)]
        wide = [x.detach().double().requires_grad_() for x in leaves]
        options = {"softcap": 5.0, "alibi_slopes": SLOPES[:4].cuda()}
        found, truth = (
            torch.autograd.grad(attention(*x, **options, backend=name).square().sum(), x)
            for x, name in ((leaves, "gluon_triton"), (wide, "reference"))
        )
        for ours, true in zip(found, truth, strict=True):
            assert (ours - true).norm() < 2e-2 * true.norm()


class Tile(torch.Tensor):
    """A tensor with the attributes of a kernel's: there is no layout."""

    type = SimpleNamespace(layout=None)  # pyright: ignore[reportAssignmentType]


def tile(x):
    return x.as_subclass(Tile)


LANGUAGE = SimpleNamespace(
    arange=lambda first, stop, layout: tile(torch.arange(first, stop)),
    convert_layout=lambda x, layout: x,
    SliceLayout=lambda dim, parent: None,
    fma=lambda x, y, z: x * y + z,
    sum=lambda x, dim: x.sum(dim),
    where=torch.where, abs=torch.abs, maximum=torch.maximum, exp2=torch.exp2, log2=torch.log2,
    float32=torch.float64, int64=torch.int64, static_range=range,
)  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("slopes", [None, (0.3, 0.3), (-0.02, 0.5)])
@pytest.mark.parametrize("starts", [(128,), (256, 192)], ids=str)
def test_a_tile_of_scores(starts, slopes, cap, causal):
    """The kernel's weights and lse are those of softcap * tanh and -slope * |distance|.

    A tile holds 32 queries of each of two heads, in the second of a batch's rows of 6 heads, and
    128 keys, or two selected blocks of 64.
    """
    named = {"gl": LANGUAGE, "LN2": math.log(2), "LOG2E": 1 / math.log(2)}
    table = torch.full((12,), torch.nan, dtype=torch.float64)
    table[[8, 9]] = torch.tensor(slopes or (0.0, 0.0), dtype=torch.float64)
    LANGUAGE.load = lambda at: table[at]
    named["_capped"] = lambda x: -1 / (2**x + 1)
    consumers, adjusted, softmaxes = as_python((consumer, scores, softmax), named)
    torch.manual_seed(0)
    products, scale, origin = torch.randn(64, 128).double(), 0.4, 200
    q_pos, width = origin + torch.arange(32).repeat(2), 128 // len(starts)
    k_pos = torch.cat([start + torch.arange(width) for start in starts])
    truth = scale * products
    if cap is not None:
        truth = cap * (truth / cap).tanh()
    if slopes is not None:
        each = table[[8, 9]].repeat_interleave(32)[:, None]
        truth = truth - each * (q_pos[:, None] - k_pos).abs()
    unit = scale / math.log(2) if cap is None else 2 * cap / math.log(2)
    factor, slope = None if cap is None else 2 * scale / cap / math.log(2), None
    head, query = consumers.packed_rows(64, 2, None)
    assert torch.equal(origin + query, q_pos)
    if slopes is not None:
        slope = tile(adjusted.slope_of_rows((0, 6), torch.tensor(1), 2, head, unit))
    args = factor, slope, origin
    s = adjusted.adjust(tile(products), args, tile(q_pos), starts, causal, len(starts))
    if causal:
        hidden = k_pos > q_pos[:, None]
        s, truth = s.masked_fill(hidden, -torch.inf), truth.masked_fill(hidden, -torch.inf)
    row_max = s.max(1).values
    weights = 2 ** ((s - row_max[:, None]) * unit)
    sums = weights.reshape(64, -1, 8).sum(1)  # of columns n, n + 8, ..., as threads keep them
    out, lse = softmaxes.normalize(weights, row_max, sums, unit, args, tile(q_pos), None, 0, causal)
    assert torch.allclose(out, truth.softmax(1), atol=1e-12)
    assert torch.allclose(lse, truth.logsumexp(1), atol=1e-9)


def test_the_cap_in_ptx():
    """Two scores by one reciprocal are exact to a few roundings, up to the cap and for -inf."""
    x = torch.cat([30 * torch.randn(4000), torch.tensor([0.0, 1e30, -1e30, torch.inf])])
    registers = dict(zip(("$2", "$3"), x.view(2, -1), strict=True))
    for line in filter(None, map(str.strip, scores._CAPPED.value.strip("{} ").split(";"))):
        if line.startswith(".reg"):
            continue
        operation, to, *given = re.split(r"[ ,]+", line)
        values = [
            torch.frombuffer(bytearray.fromhex(g[2:])[::-1], dtype=torch.float32)
            if g.startswith("0f") else registers[g]
            for g in given
        ]  # fmt: skip
        registers[to] = PTX[operation.split(".")[0]](*values)
    found = torch.cat([registers["$0"], registers["$1"]])
    truth = -1 / (2 ** x.double() + 1)
    assert (found - truth).abs().max() < 1e-6 and found.isfinite().all()


PTX = {
    "min": torch.minimum, "add": torch.add, "mul": torch.mul, "neg": torch.neg,
    "ex2": torch.exp2, "rcp": torch.reciprocal,
}  # fmt: skip
