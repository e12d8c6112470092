"""Attention repeated from recorded launches on a GPU: every kind of call, new tensors each time."""

import pytest
import torch

from saccade.core import BlockSelection, DenseKV, Mask, PagedKV, QuantizedKV
from saccade.core.formats import quantize_keys, quantize_values
from saccade.ops import attend, make_call
from saccade.ops.attention import dispatch, known
from saccade.ops.gpu.replay import Replay
from tests.support.gpu import on_gpu

pytestmark = on_gpu
BATCH, HEADS, KV_HEADS, DIM = 2, 8, 2, 64

OPTIONS = {
    "prefill": (160, 160, {}),
    "all keys": (160, 160, {"mask": Mask(causal=False)}),
    "window": (160, 400, {"mask": Mask(window=100, sinks=4)}),
    "decode": (1, 400, {}),
    "decode, one split": (1, 20, {}),
    "few queries": (5, 333, {}),
    "softcap": (160, 160, {"softcap": 20.0}),
    "lengths": (1, 400, {"kv_lens": [300, 400]}),
    "padding": (70, 140, {"key_padding": "holes"}),
    "blocks": (256, 512, {"blocks": "half"}),
    "few queries, blocks": (5, 512, {"blocks": "half"}),
}


@pytest.fixture(autouse=True)
def _nothing_is_known():
    known.clear()
    yield
    known.clear()


def normal(heads, length):
    return torch.randn(BATCH, heads, length, DIM, device="cuda", dtype=torch.bfloat16)


def call_of(name):
    queries, keys, options = OPTIONS[name]
    options = {"mask": Mask(), **options}
    if "kv_lens" in options:
        options["kv_lens"] = torch.tensor(options["kv_lens"], device="cuda")
    if "key_padding" in options:
        options["key_padding"] = torch.rand(BATCH, keys, device="cuda") > 0.3
    if "blocks" in options:
        shape = BATCH, KV_HEADS, -(-queries // 128), keys // 128
        allowed = torch.rand(shape, device="cuda") > 0.5
        options["blocks"] = BlockSelection(allowed=allowed, q_block=128, k_block=128)
    k, v = normal(KV_HEADS, keys), normal(KV_HEADS, keys)
    return make_call(normal(HEADS, queries), DenseKV(k, v), **options)


def check(call, backend):
    ours, truth = attend(call, backend=backend), attend(call, backend="reference")
    assert (ours.out.float() - truth.out.float()).abs().max() < 3e-2
    finite = truth.lse.isfinite()
    assert (ours.lse - truth.lse)[finite].abs().max() < 1e-2


@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_of_later_tensors(name, backend):
    if dispatch.refusal(call_of(name), backend) is not None:
        pytest.skip(f"{backend} does not compute this call")
    for _ in range(3):
        call = call_of(name)
        check(call, backend)
    assert isinstance(call.known.prepared[backend], Replay)


@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_keys_of_later_tensors(bits, backend):
    for _ in range(3):
        k, v, recent = normal(KV_HEADS, 256), normal(KV_HEADS, 256), normal(KV_HEADS, 9)
        kv = QuantizedKV(
            k=quantize_keys(k, bits=bits, group=64), v=quantize_values(v, bits=bits, group=64),
            recent_k=recent, recent_v=recent.flip(1), bits_k=bits, bits_v=bits, k_group=64,
        )  # fmt: skip
        call = make_call(normal(HEADS, 1), kv, mask=Mask())
        check(call, backend)
    assert isinstance(call.known.prepared[backend], Replay)


@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_pages_of_later_tensors(backend):
    for _ in range(3):
        k, v = (torch.randn(16, KV_HEADS, 32, DIM, device="cuda").bfloat16() for _ in range(2))
        table = torch.randperm(16, device="cuda").to(torch.int32).view(BATCH, 8)
        lens = torch.tensor([256, 256], dtype=torch.int32, device="cuda")
        call = make_call(normal(HEADS, 1), PagedKV(k, v, table, lens, 256), mask=Mask())
        check(call, backend)
    assert isinstance(call.known.prepared[backend], Replay)


def test_a_captured_graph_and_another_stream():
    """A replay launches on the stream that is current, also while a graph is captured."""
    calls = [call_of("decode") for _ in range(3)]
    expected = [attend(call, backend="triton").out.clone() for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend(calls[2], backend="triton").out
    graph.replay()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = attend(calls[1], backend="triton").out
    torch.cuda.synchronize()
    assert torch.equal(found, expected[2]) and torch.equal(aside, expected[1])
