"""Run a group of kernels once on small problems, for scripts/sanitize_gpu.sh.

    python scripts/sanitize_kernels.py forward

Small, because every access is watched: a few tiles, odd lengths, several programs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from saccade.bench.tune_work import paged
from saccade.core import BlockSelection, DenseKV, Mask, QuantizedKV
from saccade.core.formats import quantize_keys, quantize_values
from saccade.ops import attend, attention
from saccade.ops.append import Slots, Turn, append


def normal(*shape: int) -> torch.Tensor:
    """Random numbers, made on the host so that no other kernel is watched."""
    return torch.randn(*shape).bfloat16().cuda()


def qkv(queries: int, keys: int, dim: int) -> list[torch.Tensor]:
    """Two query heads on one of the keys."""
    return [normal(1, 2, queries, dim), normal(1, 1, keys, dim), normal(1, 1, keys, dim)]


def forward(backend: str = "triton", dims: tuple[int, ...] = (64, 128)) -> None:
    """Prefill: causal with an offset, all keys, window with sinks, by the given kernels."""
    for dim in dims:
        for options in ({}, {"causal": False}, {"window": 100, "sinks": 3}):
            attention(*qkv(150, 290, dim), **options, return_lse=True, backend=backend)


def listed() -> None:
    """Prefill over selected blocks."""
    allowed = (torch.rand(1, 1, 2, 3) < 0.6).cuda()
    blocks = BlockSelection(allowed=allowed, q_block=128, k_block=128)
    attention(*qkv(150, 290, 128), blocks=blocks, backend="triton")


def backward() -> None:
    """Gradients of everything."""
    for dim in (64, 128):
        leaves = [x.requires_grad_() for x in qkv(150, 290, dim)]
        out = attention(*leaves, backend="triton")
        torch.autograd.grad(out, leaves, normal(*out.shape))


def decode() -> None:
    """One token over dense keys and pages, with a merge of the splits."""
    q, k, v = qkv(1, 700, 128)
    for view in (DenseKV(k, v), paged(k, v, 16)):
        attend(q, view, mask=Mask(), backend="triton")


def codes() -> None:
    """One token over int8 and int4 codes and a recent part."""
    q, k, v = qkv(1, 700, 128)
    for bits in (8, 4):
        coded = [make(x[:, :, :640].float(), bits=bits, group=64)
                 for make, x in ((quantize_keys, k), (quantize_values, v))]  # fmt: skip
        recent = (k[:, :, 640:].contiguous(), v[:, :, 640:].contiguous())
        view = QuantizedKV(*coded, *recent, bits, bits, 64)
        attend(q, view, mask=Mask(), backend="triton")


def storing() -> None:
    """Turn, rotate and store a token."""
    q, k, v = qkv(1, 1, 128)
    cos, sin = torch.rand(1, 1, 128).cuda(), torch.rand(1, 1, 128).cuda()
    for hadamard in (False, True):
        store = [torch.zeros(1, 1, 64, 128, dtype=torch.bfloat16).cuda() for _ in range(2)]
        at = torch.tensor([5]).cuda()
        append(Slots(*store, at, hadamard=hadamard), k, v, Turn(q, cos, sin))


GROUPS = {
    "forward": forward,
    "listed": listed,
    "backward": backward,
    "decode": decode,
    "codes": codes,
    "storing": storing,
    "gluon": lambda: forward("gluon", (64, 128, 256)),
}

if __name__ == "__main__":
    torch.manual_seed(0)
    GROUPS[sys.argv[1]]()
    torch.cuda.synchronize()
    print(f"ran {sys.argv[1]}")
