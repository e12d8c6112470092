"""PyTorch's kernels on a GPU: which one is chosen, why not, and that each computes the call."""

import pytest
import torch

from saccade.core import BlockSelection, DenseKV, Mask, Unsupported
from saccade.ops import attend, attention, explain
from saccade.ops.attention.api import make_call
from saccade.ops.attention.sdpa import backend as sdpa
from saccade.ops.attention.sdpa import gpu as sdpa_gpu
from tests.support.cases import Case, on
from tests.support.gpu import on_ampere, pretend_hopper
from tests.support.random_inputs import normal
from tests.support.reference import check_case
from tests.support.tolerance import assert_lse


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that is not there."""
    pretend_hopper(monkeypatch)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def chosen(
    q_len=64, k_len=64, dim=128, value_dim=None, kind="square", dtype=torch.bfloat16, **more
):
    q, k = meta(1, 8, q_len, dim, dtype=dtype), meta(1, 2, k_len, dim, dtype=dtype)
    v = meta(1, 2, k_len, value_dim or dim, dtype=dtype)
    return sdpa_gpu.choose(q, k, v, kind, **{"needs_grad": False} | more)


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ({}, "cudnn", ""),
        ({"dim": 256}, "cudnn", ""),
        ({"dim": 64, "value_dim": 128}, "cudnn", ""),
        ({"kind": "end"}, "flash", "cudnn: its causal mask is aligned to the first key"),
        ({"dtype": torch.float32}, "efficient", "float32 is not one of bfloat16, float16"),
        ({"dim": 512}, "efficient", "head_dim 512 is not a multiple of 8 up to 256"),
        ({"dim": 100}, None, "efficient: head_dim 100 is not a multiple of 8"),
        ({"dtype": torch.float64}, None, "efficient: no fused kernel takes torch.float64"),
        ({"k_len": 1, "kind": "all"}, "flash", "no single key"),
    ],
    ids=str,
)
def test_which_kernel_on_a_hopper(hopper, options, name, reason):
    assert chosen(**options)[0] == name
    assert reason in chosen(**options)[1]


def test_versions_known_to_be_wrong(hopper, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91001)
    assert chosen()[0] == "cudnn"
    name, reason = chosen(needs_grad=True)
    assert name == "flash" and "known for wrong gradients" in reason
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90800)
    assert chosen(dim=256)[0] == "flash" and chosen(dim=128)[0] == "cudnn"


def test_gradients_that_have_to_be_the_same_again(hopper):
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in chosen(needs_grad=True)[1]
        assert chosen()[0] == "cudnn"
    finally:
        torch.use_deterministic_algorithms(False)


def test_flash_first_where_cudnn_is_not_made_for_the_gpu(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert chosen() == ("flash", "")
    assert chosen(dim=256, needs_grad=True)[0] == "efficient"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert chosen(dtype=torch.float16)[0] == "efficient"
    assert chosen(dtype=torch.bfloat16)[0] is None


@pytest.mark.parametrize(
    ("mask", "q_len", "k_len", "kind"),
    [
        ({}, 6, 6, "square"),
        ({"window": 6}, 6, 6, "square"),
        ({"window": 5}, 6, 6, None),
        ({}, 1, 6, "all"),
        ({}, 3, 6, "end"),
        ({"causal": False}, 3, 6, "all"),
        ({"causal": False}, 6, 3, "all"),
        ({}, 6, 3, None),
        ({}, 0, 3, None),
    ],
)
def test_what_needs_no_mask(mask, q_len, k_len, kind):
    q, k = torch.empty(1, 2, q_len, 16), torch.empty(1, 1, k_len, 16)
    assert sdpa.plain_kind(make_call(q, DenseKV(k, k), mask=Mask(**mask))) == kind


class TestOnGPU:
    pytestmark = on_ampere

    @pytest.mark.parametrize("dim", [64, 96, 128, 256])
    @pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
    @pytest.mark.parametrize(
        ("mask", "kv_lens"),
        [
            ({}, (130, 130)), ({}, (1, 70)), ({}, (65, 130)), ({"causal": False}, (65, 130)),
            ({"causal": False}, (513, 513)), ({"window": 20, "sinks": 3}, (65, 130)),
        ],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_equals_the_reference(self, mask, kv_lens, heads, dim, dtype):
        case = Case(heads, kv_lens, mask, "plain", head_dim=dim)
        allowance = 1e-5 if dtype == torch.float32 else None
        check_case(case, "sdpa", dtype, "cuda", allowance=allowance, lse_allowance=1e-3)

    @pytest.mark.parametrize("extra", ["padding", "alibi", "blocks", "sink_logits"])
    def test_masks_and_sinks(self, extra):
        q, k, v, options = Case((6, 2), (40, 70), {}, extra, head_dim=64).inputs()
        truth = attention(q, k, v, **options, return_lse=True, backend="reference")
        ours = attention(
            *on("cuda", q, k, v), **on("cuda", options), return_lse=True, backend="sdpa"
        )
        assert torch.allclose(ours.out.cpu(), truth.out, atol=1e-4)
        assert_lse(ours.lse, truth.lse)

    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2)])
    def test_gradients(self, heads, kv_heads, dim):
        shapes = [(2, h, 300, dim) for h in (heads, kv_heads, kv_heads)]
        leaves = [normal(*s, dtype=torch.bfloat16, device="cuda").requires_grad_() for s in shapes]
        wide = [x.detach().double().requires_grad_() for x in leaves]
        dout = normal(2, heads, 300, dim, dtype=torch.bfloat16, device="cuda")
        for tensors, backend in ((leaves, "sdpa"), (wide, "reference")):
            out = attention(*tensors, backend=backend)
            out.backward(dout.to(out.dtype))
        for ours, truth in zip(leaves, wide, strict=True):
            error = (ours.grad.double() - truth.grad).norm() / truth.grad.norm()
            assert error < 2e-2

    def test_never_the_path_that_materializes_scores(self):
        q = torch.randn(1, 8, 8192, 100, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(Unsupported, match=r"no fused kernel .* head_dim 100"):
            attention(q, q, q, backend="sdpa")
        q, k = (torch.randn(1, h, 8192, 64, device="cuda").bfloat16() for h in (32, 8))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for options in ({}, {"window": 500}, {"causal": False}):
            attention(q, k, k, **options, backend="sdpa")
        scores = 32 * 8192 * 8192 * 2
        assert torch.cuda.max_memory_allocated() - before < scores / 4

    def test_refuses_in_a_sentence(self):
        x = torch.randn(1, 2, 40, 64, device="cuda", dtype=torch.bfloat16)
        cu = torch.tensor([0, 20, 40], device="cuda")
        verdict = dict(explain(x, x, x, cu_seqlens=cu))["sdpa"]
        assert verdict == (
            "cannot: PyTorch's GPU kernels take plain dense keys and no cu_seqlens here"
        )
        y = x.clone().requires_grad_()
        assert "gradients under a mask" in dict(explain(y, x, x, window=8))["sdpa"]

    def test_a_block_that_no_query_may_read(self):
        x = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
        allowed = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device="cuda")
        blocks = BlockSelection(allowed=allowed, q_block=16, k_block=16)
        ours = attend(make_call(x, DenseKV(x, x), mask=Mask(), blocks=blocks), backend="sdpa")
        assert not ours.out.any() and ours.lse.isneginf().all()
