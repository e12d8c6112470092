"""The Gluon kernel: the contract of backends on a Hopper card; elsewhere that it compiles."""

import os
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon has no interpreter", allow_module_level=True)

from saccade.core import BlockSelection, DenseKV, Mask, Unsupported
from saccade.ops import attend, attention, explain
from saccade.ops.attend import gluon
from tests.ops.cases import MASKS, Case, on
from tests.ops.hopper import BOUND, on_the_card

SMALL_BLOCKS = BlockSelection(allowed=torch.ones(1, 1, 1, 1).bool(), q_block=64, k_block=64)
LENGTHS = [(33, 33), (1, 70), (65, 130), (300, 300), (200, 1000), (513, 700)]


def check(case, dtype):
    """At most twice the error of an eager run in the same precision, as every backend."""
    q, k, v, options = case.inputs()
    q, k, v = (x.to(dtype) for x in (q, k, v))
    wide = [x.double() for x in (q, k, v)]
    truth = attention(*wide, **options, return_lse=True, backend="reference")
    eager = attention(q, k, v, **options, return_lse=True, backend="reference")
    ours = attention(*on("cuda", q, k, v), **on("cuda", options), return_lse=True, backend="gluon")
    allowed = 2 * (eager.out - truth.out).abs().max() + BOUND[dtype]
    assert ours.out.dtype == dtype and ours.lse.dtype == torch.float32
    assert (ours.out.cpu() - truth.out).abs().max() <= allowed
    assert torch.equal(ours.lse.cpu().isneginf(), truth.lse.isneginf())
    lse, expected = (x.nan_to_num(neginf=0) for x in (ours.lse.cpu(), truth.lse))
    assert (lse - expected).abs().max() <= 1e-4


class TestOnTheCard:
    pytestmark = on_the_card

    @pytest.mark.parametrize("dim", gluon.DIMS)
    @pytest.mark.parametrize("lengths", LENGTHS, ids=str)
    @pytest.mark.parametrize("mask", [*MASKS, {"window": 130, "sinks": 140}], ids=str)
    def test_equals_the_reference(self, mask, lengths, dim):
        check(Case((6, 2), lengths, mask, "plain", head_dim=dim), torch.bfloat16)

    @pytest.mark.parametrize("heads", [(4, 4), (5, 1), (8, 2)], ids=str)
    @pytest.mark.parametrize("mask", [{}, {"window": 200, "sinks": 3}], ids=str)
    def test_learned_sinks_in_float16(self, heads, mask):
        check(Case(heads, (300, 400), mask, "sink_logits", head_dim=64), torch.float16)

    @pytest.mark.parametrize("dim", gluon.DIMS)
    @pytest.mark.parametrize("lengths", [(300, 300), (513, 700), (128, 1024)], ids=str)
    @pytest.mark.parametrize(
        "mask", [{}, {"causal": False}, {"window": 300}, {"window": 300, "sinks": 5}], ids=str
    )
    def test_selected_blocks(self, mask, lengths, dim):
        """A third of the blocks; some rows see nothing at all."""
        torch.manual_seed(1)
        allowed = torch.rand(2, 2, -(-lengths[0] // 128), -(-lengths[1] // 128)) < 0.33
        blocks = BlockSelection(allowed=allowed, q_block=128, k_block=128)
        case = Case((6, 2), lengths, mask, "plain", head_dim=dim, options={"blocks": blocks})
        check(case, torch.bfloat16)

    @pytest.mark.parametrize("offset", [-50, 5, 300])
    @pytest.mark.parametrize("mask", [Mask(), Mask(window=40), Mask(causal=False)], ids=str)
    def test_queries_without_keys_of_their_own(self, mask, offset):
        q, k, v = (torch.randn(1, 4, n, 64) for n in (100, 200, 200))
        call = {"mask": mask, "q_offset": offset}
        truth = attend(*(q.double(), DenseKV(k.double(), v.double())), **call, backend="reference")
        moved = on("cuda", *(x.bfloat16() for x in (q, k, v)))
        ours = attend(moved[0], DenseKV(*moved[1:]), **call, backend="gluon")
        assert (ours.out.cpu() - truth.out).abs().max() < 3e-2
        assert torch.equal(ours.lse.cpu().isneginf(), truth.lse.isneginf())

    def test_tensors_of_other_layouts(self):
        base = torch.randn(2, 300, 8, 128, device="cuda", dtype=torch.bfloat16)
        q, k, v = (base.transpose(1, 2)[:, part] for part in (slice(0, 4), [4, 5], slice(6, 8)))
        truth = attention(*(x.double() for x in (q, k, v)), backend="reference")
        ours = attention(q, k, v, backend="gluon")
        assert (ours - truth).abs().max() < 2e-2

    def test_many_tiles_a_program_and_the_same_bits_again(self):
        q, k, v = (torch.randn(1, h, 3000, 64, device="cuda").half() for h in (16, 4, 4))
        truth = attention(*(x.float() for x in (q, k, v)), backend="reference")
        first, second = (attention(q, k, v, backend="gluon") for _ in range(2))
        assert torch.equal(first, second)
        assert (first - truth).abs().max() < 5e-3

    def test_inside_a_cuda_graph(self):
        q, k, v = (torch.randn(1, h, 500, 128, device="cuda").bfloat16() for h in (4, 2, 2))
        attention(q, k, v, backend="gluon")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(q, k, v, backend="gluon")
        q.copy_(q.flip(2))
        graph.replay()
        assert torch.equal(out, attention(q, k, v, backend="gluon"))

    def test_more_than_two_to_the_31_elements(self):
        length = 2**31 // (128 * 16) + 4096
        k = torch.empty(1, 16, length, 128, device="cuda", dtype=torch.bfloat16).normal_()
        q = torch.randn(1, 16, 200, 128, device="cuda", dtype=torch.bfloat16)
        ours = attention(q, k, k, window=256, backend="gluon")[:, 15:]
        part = k[:, 15:, -456:]
        truth = attention(q[:, 15:], part, part, window=256, backend="reference")
        assert torch.allclose(ours, truth, atol=2e-2)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"softcap": 5.0}, "no softcap"),
            ({"lengths": torch.tensor([40])}, "plain dense keys"),
            ({"scale": -1.0}, "scale must be positive"),
            (
                {"blocks": SMALL_BLOCKS},
                "no multiples of its tiles",
            ),
        ],
        ids=["softcap", "lengths", "scale", "blocks"],
    )
    def test_refuses_in_a_sentence(self, options, reason):
        x = torch.randn(1, 2, 40, 64, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(Unsupported, match=reason):
            attention(x, x, x, **on("cuda", options), backend="gluon")

    def test_refuses_other_heads_types_and_places(self):
        x = torch.randn(1, 2, 40, 96, device="cuda", dtype=torch.bfloat16)
        for wrong, reason in (
            (x, "head_dim 96 is not one of 64, 128, 256"),
            (x[..., :64].float(), "float32 is not one of bfloat16, float16"),
            (torch.randn(1, 2, 40, 65, device="cuda").half()[..., 1:], "multiples of 16 bytes"),
        ):
            with pytest.raises(Unsupported, match=reason):
                attention(wrong, wrong, wrong, backend="gluon")


def test_refuses_cpu_tensors_in_a_sentence():
    x = torch.randn(1, 1, 4, 64, dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match="tensors are on cpu, not on an NVIDIA GPU"):
        attention(x, x, x, backend="gluon")
    assert dict(explain(x, x, x))["gluon"].startswith("cannot: tensors are on cpu")


@pytest.mark.parametrize("dim", gluon.DIMS)
def test_compiles_for_hopper_without_waiting_products(dim):
    from tests.ops.compiled import compile_gluon

    found = compile_gluon(dim)
    ptx = found.asm["ptx"]
    assert found.metadata.shared <= 227 * 1024
    assert "setmaxnreg" in ptx and "cp.async.bulk.tensor.4d" in ptx
    # The scores of a tile are asked for, then the product of the tile before, then one is awaited.
    order = re.findall(r"wgmma\.(commit_group|wait_group\.sync\.aligned (?:0|1))", ptx)
    asked = "commit_group"
    assert [asked, asked, "wait_group.sync.aligned 1"] in [order[i : i + 3] for i in range(9)]


@pytest.mark.parametrize("listed", [False, True])
def test_products_are_not_serialised_and_nothing_spills(tmp_path, listed):
    """What ptxas says about the kernel; with another order of issue it says the contrary."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    from tests.ops.compiled import compile_gluon

    source = tmp_path / "kernel.ptx"
    source.write_text(compile_gluon(128, listed=listed).asm["ptx"])
    command = [get_ptxas(90).path, "-v", f"--gpu-name={sm_arch_from_capability(90)}", source]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernel"], capture_output=True, text=True, check=True
    )
    assert "serialized" not in done.stderr
    assert "0 bytes spill stores" in done.stderr
