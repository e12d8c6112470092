"""The Gluon quantized decode kernel: results on a Hopper GPU; elsewhere its PTX and refusals."""

import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Gluon has no interpreter", allow_module_level=True)

from saccade.bench.inputs import KINDS, quantized_view
from saccade.core import BlockSelection, DenseKV, GrowingKV, Mask, QuantizedKV, Unsupported
from saccade.core.formats import QuantizedTensor
from saccade.core.kv import dense
from saccade.ops import attend
from saccade.ops.attention.api import make_call
from saccade.ops.attention.nvidia.gluon.quantized_decode import support as gluon_quantized
from tests.support.gpu import assert_a_graph_replays, on_gpu
from tests.support.random_inputs import normal
from tests.support.tolerance import assert_output


def random(*shape, dtype=torch.float16, device="cuda"):
    return normal(*shape, dtype=dtype, device=device)


# (heads, KV heads), batch, keys, recent keys, queries, head_dim, group of values, mask
SHAPES = [
    ((32, 8), 2, 2048, 0, 1, 128, 64, Mask()),
    ((8, 2), 1, 64, 0, 1, 128, 64, Mask()),
    ((8, 2), 3, 1088, 70, 3, 128, 128, Mask()),
    ((6, 1), 2, 4096, 64, 2, 128, 64, Mask(window=300)),
    ((9, 3), 2, 1088, 70, 5, 64, 64, Mask(window=100, sinks=3)),
    ((6, 1), 2, 1088, 1, 16, 64, 32, Mask(window=777)),
    ((8, 8), 1, 1088, 0, 8, 64, 64, Mask(causal=False)),
]


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_equals_the_reference(self, kind, shape, dtype):
        """At most twice the error of an eager run over the dequantized keys."""
        heads, batch, keys, recent, queries, dim, v_group, mask = shape
        k, v = (random(batch, heads[1], keys + recent, dim, dtype=dtype) for _ in range(2))
        k += 3 * random(1, heads[1], 1, dim, dtype=dtype)  # channels have offsets of their own
        q = random(batch, heads[0], queries, dim, dtype=dtype)
        view = quantized_view(k, v, kind, recent, v_group)
        wide = QuantizedKV(
            view.k, view.v, view.recent_k.double(), view.recent_v.double(), view.bits_k,
            view.bits_v, 64,
        )  # fmt: skip
        exact, low = dense(wide), dense(view)
        truth = attend(
            make_call(q.double(), DenseKV(exact.k, exact.v), mask=mask), backend="reference"
        )
        eager = attend(make_call(q, DenseKV(low.k, low.v), mask=mask), backend="reference")
        ours = attend(make_call(q, view, mask=mask), backend="gluon")
        assert_output(ours, eager, truth, lse_allowance=1e-3)

    @pytest.mark.parametrize("recent", [0, 64])
    def test_learned_sinks(self, recent):
        """They count once, whichever kernel reads the first keys."""
        k, v, q = random(2, 2, 512, 128), random(2, 2, 512, 128), random(2, 8, 1, 128)
        view, sinks = quantized_view(k, v, "int8", recent), torch.randn(8).cuda()
        truth = attend(make_call(q, view, mask=Mask(), sink_logits=sinks), backend="tiled")
        ours = attend(make_call(q, view, mask=Mask(), sink_logits=sinks), backend="gluon")
        assert torch.allclose(ours.out, truth.out, atol=4e-3)
        assert torch.allclose(ours.lse, truth.lse, atol=4e-3)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("packed", [0, 64, 320, 448])
    def test_growing_views(self, kind, packed):
        """Counts on the device; storage behind them is NaN."""
        k, v, q = random(2, 2, 512, 128), random(2, 2, 512, 128), random(2, 8, 2, 128)
        view = quantized_view(k, v, kind, 64)
        alone = QuantizedKV(
            QuantizedTensor(
                view.k.qdata[:, :, :packed], *(x[:, :, : packed // 64] for x in view.k[1:])
            ),
            QuantizedTensor(*(x[:, :, :packed] for x in view.v)),
            view.recent_k[:, :, :33], view.recent_v[:, :, :33], view.bits_k, view.bits_v, 64,
        )  # fmt: skip
        truth = attend(make_call(q, alone, mask=Mask()), backend="tiled")
        for x in view.v[1:]:
            x[:, :, packed:] = torch.nan
        for x in view.k[1:]:
            x[:, :, packed // 64 :] = torch.nan
        stop = torch.tensor([packed + 33] * 2, device="cuda")
        grown = GrowingKV(view, torch.tensor([packed], device="cuda"))
        where = {"kv_lens": stop, "q_offset": stop - 2, "mask": Mask()}
        ours = attend(make_call(q, grown, **where), backend="gluon")
        assert torch.allclose(ours.out, truth.out, atol=4e-3)
        assert torch.allclose(ours.lse, truth.lse, atol=4e-3)

    @pytest.mark.parametrize("kind", KINDS)
    def test_sequences_of_different_length(self, kind):
        k, v, q = random(2, 2, 512, 128), random(2, 2, 512, 128), random(2, 8, 2, 128)
        view, kv_lens = quantized_view(k, v, kind), torch.tensor([300, 77], device="cuda")
        where = {"kv_lens": kv_lens, "q_offset": kv_lens - 2, "mask": Mask()}
        truth = attend(make_call(q, view, **where), backend="tiled")
        for row, length in enumerate(kv_lens.tolist()):
            for x in view.v[1:]:
                x[row, :, length:] = torch.nan
            view.v.qdata.view(torch.uint8)[row, :, length:] = 0x7F  # nan in fp8
        ours = attend(make_call(q, view, **where), backend="gluon")
        assert torch.allclose(ours.out, truth.out, atol=4e-3)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("queries", "recent", "q_block", "k_block"),
        [(1, 0, 64, 64), (1, 70, 32, 32), (3, 70, 2, 128), (9, 1, 8, 24), (1, 0, 8, 8)],
    )
    @pytest.mark.parametrize("on_device", [False, True])
    def test_selected_blocks(self, kind, queries, recent, q_block, k_block, on_device):
        """Of every key's own position; a head without a selected block among them."""
        length = 1088 + recent
        k, v = (random(2, 2, length, 128) for _ in range(2))
        q, view = random(2, 8, queries, 128), quantized_view(k, v, kind, recent)
        shape = 2, 2, -(-queries // q_block), -(-length // k_block)
        allowed = torch.rand(shape, device="cuda") > 0.7
        allowed[1, 0] = False
        blocks = BlockSelection(allowed=allowed, q_block=q_block, k_block=k_block)
        where = {"mask": Mask(), "blocks": blocks}
        if on_device:
            lengths = torch.tensor([length, length - 100], device="cuda")
            where |= {"kv_lens": lengths, "q_offset": lengths - queries}
        call = make_call(q, view, **where)
        assert gluon_quantized.refusal(call) is None
        truth, ours = attend(call, backend="tiled"), attend(call, backend="gluon")
        assert torch.allclose(ours.out, truth.out, atol=4e-3)
        assert torch.allclose(ours.lse, truth.lse, atol=4e-3)

    def test_inside_a_cuda_graph(self):
        k, v, q = random(1, 2, 2048, 128), random(1, 2, 2048, 128), random(1, 8, 1, 128)
        assert_a_graph_replays(q, quantized_view(k, v, "int4"))


BLOCKS = BlockSelection(allowed=torch.ones(1, 1, 1, 6, dtype=torch.bool), q_block=1, k_block=12)
REFUSALS = [
    ({"softcap": 5.0}, {}, "no softcap"),
    ({"key_padding": torch.ones(1, 64, dtype=torch.bool)}, {}, "no key_padding"),
    ({"blocks": BLOCKS}, {}, "blocks of 8 n keys, got 12"),
    ({"scale": -1.0}, {}, "scale must be positive"),
    ({}, {"queries": 65}, "1 to 128 queries x heads of a group, got 130"),
    ({}, {"dim": 96}, "head_dim 96 is not one of 64, 128"),
    ({}, {"dtype": torch.float32}, "float32 is not one of bfloat16, float16"),
    ({}, {"v_group": 16}, "values one or two groups, got 64 and 4"),
]


@pytest.mark.parametrize(("options", "how", "reason"), REFUSALS, ids=[row[2] for row in REFUSALS])
def test_refuses_in_a_sentence(options, how, reason):
    dim, dtype = how.get("dim", 64), how.get("dtype", torch.float16)
    k = random(1, 2, 64, dim, dtype=dtype, device="cpu")
    q = random(1, 4, how.get("queries", 1), dim, dtype=dtype, device="cpu")
    view = quantized_view(k, k, "int8", v_group=how.get("v_group", 32))
    call = make_call(q, view, **({"mask": Mask()} | options))
    assert reason in str(gluon_quantized.refusal(call))


def test_accepts_quantized_keys_and_nothing_runs_without_a_gpu():
    k, q = random(1, 2, 128, 128, device="cpu"), random(1, 8, 1, 128, device="cpu")
    for kind in KINDS:
        view = quantized_view(k, k, kind, 64)
        assert gluon_quantized.refusal(make_call(q, view, mask=Mask())) is None
        with pytest.raises(Unsupported, match="tensors are on cpu, not on an NVIDIA GPU"):
            attend(make_call(q, view, mask=Mask()), backend="gluon")


@pytest.mark.parametrize(
    ("batch", "keys", "mask", "splits"),
    [
        (1, 8192, Mask(), 64),  # at least two tiles of 64 keys each
        (1, 32768, Mask(), 132),
        (1, 32768, Mask(window=1000), 9),
        (16, 8192, Mask(), 8),
        (64, 2048, Mask(), 2),
        (512, 2048, Mask(), 1),
    ],
)
def test_number_of_splits(monkeypatch, batch, keys, mask, splits):
    from saccade.ops.attention.nvidia.gluon.quantized_decode import launch
    from saccade.ops.attention.nvidia.problem import dense_problem

    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    k = torch.empty(1, 8, 1, 128, device="meta").expand(batch, 8, keys, 128)
    q = torch.empty(batch, 32, 1, 128, device="meta")
    problem = dense_problem(make_call(q, DenseKV(k, k), mask=mask))
    assert launch.splits_of(problem, SimpleNamespace(recent_k=k, num_quantized=keys)) == splits


@pytest.mark.parametrize(
    ("kinds", "dim", "k_block"),
    [
        (("int4", "int4"), 128, 0),
        (("int4", "int4"), 128, 32),
        (("fp8", "fp8"), 128, 64),
        (("int8", "int4"), 64, 0),
    ],
)
def test_quantized_keys_reach_tensor_cores_without_shuffles(kinds, dim, k_block, tmp_path):
    """Copied by cp.async, synchronized within one warp, no ldmatrix; nothing spills."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    from tests.ops.compiled import compile_quantized_decode

    ptx = compile_quantized_decode(*kinds, dim, k_block).asm["ptx"]
    assert "mma.sync.aligned.m16n8k16" in ptx and "movmatrix" in ptx
    assert "cp.async.cg.shared.global" in ptx and "ldmatrix" not in ptx
    assert "bar.sync" not in ptx and "cvt.rn.f16.u" not in ptx
    wait = ptx.index("griddepcontrol.wait")  # prefetches may come before it, loads may not
    assert wait < ptx.index("cp.async.cg.shared.global")
    assert ("cp.async.bulk.prefetch.L2" in ptx[:wait]) == (not k_block)
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    command = [get_ptxas(90).path, "-v", f"--gpu-name={sm_arch_from_capability(90)}", source]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernel"], capture_output=True, text=True, check=True
    )
    assert "0 bytes spill stores" in done.stderr
    assert ".maxnreg 192" in ptx  # two warps on a quarter of an SM, and room for one more
