"""Softcap and ALiBi in the Gluon prefill kernel: results on a Hopper GPU; elsewhere its formulas.

The kernel's own functions run as plain Python over tensors, and the PTX of the cap line by line.
"""

import math
import os
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon has no interpreter", allow_module_level=True)

from saccade.core import BlockSelection, DenseKV, Mask
from saccade.ops import attend, attention
from saccade.ops.attention.api import make_call
from saccade.ops.attention.nvidia.gluon.prefill import scores, softmax
from tests.ops.gluon_emulator import as_python
from tests.support import views
from tests.support.cases import Case
from tests.support.gpu import on_gpu
from tests.support.random_inputs import normal
from tests.support.reference import check_case
from tests.support.tolerance import assert_as_exact

MASKS = [{}, {"causal": False}, {"window": 200}, {"window": 130, "sinks": 140}]
SLOPES = torch.tensor([0.7, 0.0039, 0.25, 1.0, -0.1, 0.03])
WAYS = {"softcap": {"softcap": 2.0}, "alibi": {"alibi_slopes": SLOPES},
        "both": {"softcap": 30.0, "alibi_slopes": SLOPES, "sink_logits": SLOPES}}  # fmt: skip


def random(*shape):
    return normal(*shape, dtype=torch.bfloat16, device="cuda")


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dim", [64, 96, 128, 256])
    @pytest.mark.parametrize("lengths", [(65, 130), (300, 300), (200, 1000), (513, 700)], ids=str)
    @pytest.mark.parametrize("mask", MASKS, ids=str)
    @pytest.mark.parametrize("way", WAYS)
    def test_equals_the_reference(self, way, mask, lengths, dim):
        case = Case((6, 2), lengths, mask, "plain", head_dim=dim, options=WAYS[way])
        check_case(case, "gluon", torch.bfloat16, "cuda")

    @pytest.mark.parametrize("rows", [1, 2])
    def test_slopes_of_every_row_in_float16(self, rows):
        slopes = torch.rand(rows, 6)
        case = Case((6, 2), (300, 400), {}, "plain", head_dim=64, options={"alibi_slopes": slopes})
        check_case(case, "gluon", torch.float16, "cuda")

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("mask", MASKS[:3], ids=str)
    def test_sequences_of_different_length(self, mask, way):
        """Packed ones; and rows of a batch, behind whose keys NaN lies."""
        cu = tuple(torch.tensor([0, *n]).cumsum(0) for n in ([300, 0, 1, 77], [300, 3, 70, 200]))
        packed = {"cu_seqlens": cu, **WAYS[way]}
        case = Case((6, 2), (378, 573), mask, "plain", head_dim=128, batch=1, options=packed)
        check_case(case, "gluon", torch.bfloat16, "cuda")
        case = Case((6, 2), (200, 720), mask, "lengths", head_dim=128, batch=3, options=WAYS[way])
        check_case(case, "gluon", torch.bfloat16, "cuda")

    @pytest.mark.parametrize("way", WAYS)
    def test_selected_blocks(self, way):
        torch.manual_seed(1)
        allowed = torch.rand(2, 2, 4, 6) < 0.5
        blocks = BlockSelection(allowed=allowed, q_block=128, k_block=128)
        options = {"blocks": blocks, **WAYS[way]}
        case = Case((6, 2), (512, 700), {}, "plain", head_dim=128, options=options)
        check_case(case, "gluon", torch.bfloat16, "cuda")

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", ["ring", "int8", "paged"])
    def test_a_chunk_of_a_prompt_over_a_cache(self, kind, way):
        """The reference reads the same view: what quantizing costs is no error of the kernel."""
        q, k, v = random(2, 6, 200, 128), random(2, 2, 700, 128), random(2, 2, 700, 128)
        make = {"ring": views.ring, "paged": lambda k, v: views.paged(k, v, 64),
                "int8": lambda k, v: views.quantized(k, v, recent=64, bits=8)}[kind]  # fmt: skip
        options = {n: x.cuda() if torch.is_tensor(x) else x for n, x in WAYS[way].items()}
        call = make_call(q, make(k, v), mask=Mask(), q_offset=450, **options)
        truth, ours = (attend(call, backend=name) for name in ("tiled", "gluon"))
        assert (ours.out.double() - truth.out.double()).abs().max() < 2.5e-2
        assert (ours.lse - truth.lse).abs().max() < 1e-3

    @pytest.mark.parametrize("offset", [-50, 5, 30_000])
    def test_queries_before_or_past_the_keys(self, offset):
        q, k, v = random(1, 4, 100, 64), random(1, 4, 200, 64), random(1, 4, 200, 64)
        options = {"mask": Mask(), "q_offset": offset, "alibi_slopes": SLOPES[:4].cuda()}
        truth = attend(
            make_call(q.double(), DenseKV(k.double(), v.double()), **options), backend="reference"
        )
        ours = attend(make_call(q, DenseKV(k, v), **options), backend="gluon")
        assert (ours.out - truth.out).abs().max() < 3e-2
        assert torch.allclose(ours.lse, truth.lse.float(), rtol=1e-6, atol=1e-3)

    @pytest.mark.parametrize("way", WAYS)
    def test_many_work_tiles_per_cta(self, way):
        q, k, v = random(1, 66, 1536, 128), random(1, 2, 1536, 128), random(1, 2, 1536, 128)
        options = {
            n: x.repeat(11).cuda() if torch.is_tensor(x) else x for n, x in WAYS[way].items()
        }
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
    load=lambda at: at, float32=torch.float64,
)  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("slope", [None, 0.3, -0.02])
def test_a_tile_of_scores(slope, cap, causal):
    """The kernel's weights and lse are those of softcap * tanh and -slope * |distance|."""
    names = {"gl": LANGUAGE, "LN2": math.log(2), "_capped": lambda x: -1 / (2**x + 1)}
    adjusted, softmaxes = as_python((scores, softmax), names)
    torch.manual_seed(0)
    products, scale, k_start, origin = torch.randn(64, 128).double(), 0.4, 128, 200
    log2e = 1 / math.log(2)
    q_pos, k_pos = origin + torch.arange(64), k_start + torch.arange(128)
    truth = scale * products
    if cap is not None:
        truth = cap * (truth / cap).tanh()
    if slope is not None:
        truth = truth - slope * (q_pos[:, None] - k_pos).abs()
    unit = scale * log2e if cap is None else 2 * cap * log2e
    factor = None if cap is None else 2 * log2e * scale / cap
    args = factor, None if slope is None else slope * log2e / unit, origin
    s = adjusted.adjust(tile(products), args, tile(q_pos), k_start, causal)
    if causal:
        hidden = k_pos > q_pos[:, None]
        s, truth = s.masked_fill(hidden, -torch.inf), truth.masked_fill(hidden, -torch.inf)
    row_max = s.max(1).values
    weights = 2 ** ((s - row_max[:, None]) * unit)
    sums = scores_by_eights(weights)
    out, lse = softmaxes.normalize(weights, row_max, sums, unit, args, tile(q_pos), None, 0, causal)
    assert torch.allclose(out, truth.softmax(1), atol=1e-12)
    assert torch.allclose(lse, truth.logsumexp(1), atol=1e-9)


def scores_by_eights(x):
    """Row sums of the columns n, n + 8, ..., as threads keep them."""
    return x.reshape(len(x), -1, 8).sum(1)


def test_the_cap_in_ptx():
    """Four scores by one reciprocal are exact to a few roundings, up to the cap and for -inf."""
    asm = scores._capped_asm.fn() if hasattr(scores._capped_asm, "fn") else scores._capped_asm()
    x = torch.cat([30 * torch.randn(4000), torch.tensor([0.0, 1e30, -1e30, torch.inf])])
    columns = x.view(4, -1)
    registers = {f"${4 + i}": column for i, column in enumerate(columns)}
    for line in filter(None, map(str.strip, asm.strip("{} ").split(";"))):
        if line.startswith(".reg"):
            continue
        operation, to, *given = re.split(r"[ ,]+", line)
        values = [
            torch.frombuffer(bytearray.fromhex(g[2:])[::-1], dtype=torch.float32)
            if g.startswith("0f") else registers[g]
            for g in given
        ]  # fmt: skip
        registers[to] = PTX[operation.split(".")[0]](*values)
    found = torch.cat([registers[f"${i}"] for i in range(4)])
    truth = -1 / (2 ** x.double() + 1)
    assert (found - truth).abs().max() < 1e-6 and found.isfinite().all()


PTX = {
    "min": torch.minimum, "add": torch.add, "mul": torch.mul, "neg": torch.neg,
    "ex2": torch.exp2, "rcp": torch.reciprocal,
}  # fmt: skip


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("variant", [{}, {"causal": False}, {"varlen": "kv_lens"}], ids=str)
@pytest.mark.parametrize("way", [{"softcap": 50.0}, {"alibi": True}], ids=["softcap", "alibi"])
def test_products_are_not_serialized_and_nothing_spills(tmp_path, way, variant, dim):
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    from tests.ops.compiled import compile_gluon

    source = tmp_path / "kernel.ptx"
    source.write_text(compile_gluon(dim, **way, **variant).asm["ptx"])
    command = [get_ptxas(90).path, "-v", f"--gpu-name={sm_arch_from_capability(90)}", source]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernel"], capture_output=True, text=True, check=True
    )
    assert "serialized" not in done.stderr
    assert "0 bytes spill stores" in done.stderr
