"""Run one group of kernels on small problems, for scripts/sanitize_gpu.sh.

    python scripts/sanitize_kernels.py forward

Small, because every memory access is checked: a few tiles, odd lengths, several programs.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from saccade.bench.inputs import quantized_view
from saccade.bench.tune_work import paged
from saccade.core import BlockSelection, DenseKV, Mask, quantize_fp8_per_head
from saccade.ops import attend, attention, gemv
from saccade.ops.attention.api import make_call
from saccade.ops.attention.nvidia.problem import dense_problem
from saccade.ops.kv_write.append import append
from saccade.ops.kv_write.quantize import dequantize_range, quantize_keys_into, quantize_values_into
from saccade.ops.kv_write.records import KVSlots, PendingRope

RECENT = 60  # full-precision keys after the quantized ones


def normal(*shape: int) -> torch.Tensor:
    """Random numbers, made on the host so that the tool checks no other kernel."""
    return torch.randn(*shape).bfloat16().cuda()


def qkv(queries: int, keys: int, dim: int) -> list[torch.Tensor]:
    """Two query heads and one KV head."""
    return [normal(1, 2, queries, dim), normal(1, 1, keys, dim), normal(1, 1, keys, dim)]


def forward(backend: str, dims: tuple[int, ...]) -> None:
    """Prefill: causal with an offset, all keys, window with sinks, by the given kernels."""
    for dim in dims:
        for options in ({}, {"causal": False}, {"window": 100, "sinks": 3}):
            attention(*qkv(150, 290, dim), **options, return_lse=True, backend=backend)


def block_sparse(backend: str, dims: tuple[int, ...] = (128,)) -> None:
    """Prefill over selected blocks."""
    allowed = (torch.rand(1, 1, 2, 3) < 0.6).cuda()
    blocks = BlockSelection(allowed=allowed, q_block=128, k_block=128)
    for dim in dims:
        attention(*qkv(150, 290, dim), blocks=blocks, backend=backend)


def varlen(backend: str) -> None:
    """Prefill over packed sequences, rows with their own lengths, and pages."""
    ends = torch.tensor([0, 70, 150], dtype=torch.int32).cuda()
    attention(*qkv(150, 150, 128), cu_seqlens=(ends, ends), backend=backend)
    kv_lens = torch.tensor([200]).cuda()
    attention(*qkv(150, 290, 128), kv_lens=kv_lens, backend=backend)
    q, k, v = qkv(150, 290, 128)
    for page in (16, 128):
        attend(make_call(q, paged(k, v, page), mask=Mask()), backend=backend)


def backward() -> None:
    """Gradients of everything."""
    for dim in (64, 128):
        leaves = [x.requires_grad_() for x in qkv(150, 290, dim)]
        out = attention(*leaves, backend="triton")
        assert isinstance(out, torch.Tensor)
        torch.autograd.grad(out, leaves, normal(*out.shape))


def gluon_backward() -> None:
    """Gradients by the kernel that `auto` takes from 512 keys on; with GQA groups split too."""
    from saccade.ops.attention.nvidia.gluon.backward import launch as backward_launch
    from saccade.ops.attention.nvidia.gluon.prefill import launch

    for dim in (64, 128):
        for mask in (Mask(), Mask(causal=False), Mask(window=100, sinks=3)):
            q, k, v = qkv(150, 290, dim)
            problem = dense_problem(make_call(q, DenseKV(k, v), mask=mask))
            out, lse = launch.forward(problem)
            dout, dlse = normal(*out.shape), torch.zeros_like(lse)
            for splits in (1, 2):
                backward_launch.backward(problem, out, lse, dout, dlse, gqa_splits=splits)


def decode(backend: str, dims: tuple[int, ...] = (128,)) -> None:
    """A few tokens over dense keys and pages, and the combination of the splits."""
    for dim in dims:
        for queries in (1, 3):
            q, k, v = qkv(queries, 700, dim)
            for view in (DenseKV(k, v), paged(k, v, 16)):
                for mask in (Mask(), Mask(window=100, sinks=3)):
                    attend(make_call(q, view, mask=mask), backend=backend)


def quantized_decode(backend: str, dims: tuple[int, ...] = (128,)) -> None:
    """A few tokens over int8, fp8 and int4 keys and a recent part."""
    for dim in dims:
        for kind in ("int8", "fp8", "int4"):
            for queries in (1, 3):
                q, k, v = qkv(queries, 700, dim)
                attend(
                    make_call(q, quantized_view(k, v, kind, RECENT), mask=Mask()), backend=backend
                )


def fp8() -> None:
    """Prefill over per-head-scaled FP8 queries, keys and values."""
    for dim in (64, 128):
        scaled = [quantize_fp8_per_head(x) for x in qkv(150, 290, dim)]
        for options in ({}, {"causal": False}, {"window": 100, "sinks": 3}):
            attention(*scaled, **options, return_lse=True, backend="gluon_fp8")


def kv_write() -> None:
    """RoPE, Hadamard and write of a token; quantize groups of tokens and dequantize a range."""
    q, k, v = qkv(1, 1, 128)
    cos, sin = torch.rand(1, 1, 128).cuda(), torch.rand(1, 1, 128).cuda()
    for hadamard in (False, True):
        k_store, v_store = torch.zeros(2, 1, 1, 64, 128, dtype=torch.bfloat16).cuda()
        slots = KVSlots(k_store, v_store, torch.tensor([5]).cuda(), hadamard=hadamard)
        append(slots, k, v, PendingRope(q, cos, sin))
    _, k, v = qkv(1, 700, 128)
    for kind in ("int8", "fp8", "int4"):
        view = quantized_view(k, v, kind, RECENT)
        quantize_keys_into(k[:, :, :640], view.k, bits=view.bits_k, group=64)
        quantize_values_into(v[:, :, :640], view.v, bits=view.bits_v, group=64)
        dequantize_range(view, 64, 320)


def batch_1_layers() -> None:
    """The batch-1 linear layers and norms of a decoding step, with and without biases."""
    x, weights = normal(1, 1, 320), [normal(n, 320) for n in (96, 33, 40)]
    gemv.linears(x, weights, [None, normal(33), None])
    gemv.linears(x, weights[:1], [normal(96)])
    gemv.gated_mlp(x, weights[0], normal(96, 320))
    gemv.add_rms_norm(x, normal(1, 1, 320), normal(320), 1e-6)
    gemv.rms_norm(x, normal(320), 1e-6)


GROUPS: dict[str, Callable[[], None]] = {
    "forward": lambda: forward("triton", (64, 128)),
    "block_sparse": lambda: block_sparse("triton"),
    "varlen": lambda: varlen("triton"),
    "backward": backward,
    "decode": lambda: decode("triton"),
    "quantized": lambda: quantized_decode("triton"),
    "kv_write": kv_write,
    "gemv": batch_1_layers,
    "gluon_forward": lambda: forward("gluon", (64, 128, 256)),
    "gluon_block_sparse": lambda: block_sparse("gluon"),
    "gluon_varlen": lambda: varlen("gluon"),
    "gluon_backward": gluon_backward,
    "gluon_decode": lambda: decode("gluon", (64, 128)),
    "gluon_quantized": lambda: quantized_decode("gluon", (64, 128)),
    "gluon_fp8": fp8,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    GROUPS[sys.argv[1]]()
    torch.cuda.synchronize()
    print(f"ran {sys.argv[1]}")
