"""Attention on one GPU: ours against PyTorch's kernels, with the card's ceilings in the same run.

    python benchmarks/gpu_attention.py --out benchmarks/results/h200_attention.json

Random data; the median over CUDA events; for decoding, one CUDA graph over several caches that
together exceed the L2 cache.  A result that is wrong is not timed: it raises.  FlexAttention is a
peer for windows and selections (gpu_flex.py); its compilations take a minute (--no-flex).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
import saccade
from benchmarks import gpu_flex, gpu_fp8
from saccade.bench.gpu import ceilings, graph_seconds, random, seconds
from saccade.bench.inputs import coded
from saccade.bench.tune_work import paged
from saccade.core import BlockSelection, DenseKV, Mask
from saccade.ops import attention
from saccade.ops.attention.api import make_call
from saccade.ops.attention.dispatch import choose, load

KERNELS = ("triton", "gluon")
CALLS = 12  # of a step in one graph: where a graph starts is no part of a step
FLEX = "--no-flex" not in sys.argv
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}


def host_seconds(run: Callable[[], Any], repeats: int = 200) -> float:
    """What one call costs the host before the card has work, for short kernels."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    took = (time.perf_counter() - begin) / repeats
    torch.cuda.synchronize()
    return took


def relative(ours: Tensor, truth: Tensor) -> float:
    """||ours - truth|| / ||truth||."""
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def demand(ours: Tensor, truth: Tensor, limit: float, what: str) -> float:
    """The error, or RuntimeError: a speed of a wrong result means nothing."""
    error = relative(ours, truth)
    if not error < limit:
        raise RuntimeError(f"{what}: relative error {error:.2e} exceeds {limit:.0e}; not timed.")
    return error


def last_rows(q: Tensor, k: Tensor, v: Tensor, rows: int = 64, **options: Any) -> Tensor:
    """Attention of the last rows in float64, four query heads only."""
    groups = q.shape[1] // k.shape[1]
    heads = max(4, groups)
    kv_heads = heads // groups
    wide = [q[:, :heads, -rows:].double()]
    wide += [x[:, :kv_heads].double() for x in (k, v)]
    return attention(*wide, **options, backend="reference")  # type: ignore[return-value]


def _call(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Any:
    """What backends are asked about before a case is timed."""
    return make_call(q, DenseKV(k, v), mask=Mask(causal=causal, window=window))


def forward_case(length: int, dim: int, *, causal: bool = True, window: int | None = None) -> dict:
    """One row of the forward table; TFLOP/s counts visible pairs only."""
    heads, kv_heads = 32, 8
    q, k, v = random(1, heads, length, dim), random(1, kv_heads, length, dim), None
    v = random(1, kv_heads, length, dim)
    options: dict[str, Any] = {"causal": causal, "window": window}
    pairs = Mask(causal=causal, window=window).num_pairs(length, length)
    work = 4 * heads * dim * pairs / 1e12

    truth = last_rows(q, k, v, **options)
    row = {"case": "forward", "length": length, "dim": dim, **options, "error": 0.0}
    for backend in KERNELS:
        if load(backend).refusal(_call(q, k, v, causal, window)) is not None:
            continue

        def ours(backend: str = backend) -> Tensor:
            return attention(q, k, v, **options, backend=backend)  # type: ignore[return-value]

        what = f"forward {backend} {length} {dim}"
        error = demand(ours()[:, : truth.shape[1], -64:], truth, 1e-2, what)
        row |= {"error": max(row["error"], error), backend: work / seconds(ours)}
    if window is None:
        row |= {name: work / _peer(name, q, k, v, causal) for name in PEERS}
    elif FLEX:
        row |= _flex(work, q, k, v, gpu_flex.window_mask(window, length), truth)
    return row


def _flex(work: float, q: Tensor, k: Tensor, v: Tensor, mask: Any, truth: Tensor) -> dict:
    """FlexAttention's rate with the best of its options, and what became of the others."""

    def check(out: Tensor) -> float:
        return demand(out[:, : truth.shape[1], -64:], truth, 1e-2, "flex")

    took, options, failed = gpu_flex.fastest(q, k, v, mask, check)
    found: dict[str, Any] = {"flex": work / took, "flex_options": options}
    return found | ({"flex_failed": failed} if failed else {})


def _peer(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    with sdpa_kernel(PEERS[name]):
        try:
            return seconds(
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
            )
        except RuntimeError:
            return float("inf")


def blocks_case(length: int, density: float) -> dict:
    """Block-sparse attention: TFLOP/s on the visited pairs."""
    heads, kv_heads, dim, block = 32, 8, 128, 128
    q, k, v = (random(1, h, length, dim) for h in (heads, kv_heads, kv_heads))
    count = length // block
    allowed = torch.rand(1, kv_heads, count, count, device="cuda") < density
    allowed |= torch.eye(count, device="cuda", dtype=torch.bool)
    blocks = BlockSelection(allowed=allowed, q_block=block, k_block=block)
    below = torch.ones(count, count, device="cuda").tril(-1)
    visited = (allowed * below).sum().item() * block * block
    visited += kv_heads * count * block * (block + 1) / 2
    work = 4 * (heads // kv_heads) * dim * visited / 1e12

    row_blocks = BlockSelection(
        allowed=allowed[:, :1, -1:].expand(1, 1, 1, count), q_block=block, k_block=block
    )
    truth = last_rows(q, k, v, blocks=row_blocks)
    share = visited / (kv_heads * length * (length + 1) / 2)
    row: dict[str, Any] = {"case": "blocks", "length": length, "density": share, "error": 0.0}
    for backend in KERNELS:

        def ours(backend: str = backend) -> Tensor:
            return attention(q, k, v, blocks=blocks, backend=backend)  # type: ignore[return-value]

        error = demand(ours()[:, : truth.shape[1], -64:], truth, 1e-2, f"blocks {backend}")
        row |= {"error": max(row["error"], error), backend: work / seconds(ours)}
    if FLEX:
        row |= _flex(work, q, k, v, gpu_flex.selection_mask(allowed, heads // kv_heads), truth)
    return row


def backward_case(length: int, dim: int) -> dict:
    """TFLOP/s of the backward pass, counted as 2.5 forwards as everybody does.

    "triton" are the gradients under PyTorch's switch for determinism, "auto" those without it.
    """
    heads, kv_heads = 32, 8
    q, k, v = (
        random(1, h, length, dim).requires_grad_() for h in (heads, kv_heads, kv_heads)
    )  # fmt: skip
    dout = random(1, heads, length, dim)
    work = 10 * heads * dim * Mask().num_pairs(length, length) / 1e12
    small = [x.detach()[:, :n, :1024].requires_grad_() for x, n in ((q, 4), (k, 1), (v, 1))]
    wide = [x.detach().double().requires_grad_() for x in small]
    grads = []
    for leaves, backend in ((small, "triton"), (wide, "reference")):
        out = attention(*leaves, backend=backend)
        out.backward(dout[:, :4, :1024].to(out.dtype))
        grads.append([x.grad for x in leaves])
    error = max(demand(a, b, 2e-2, "backward") for a, b in zip(*grads, strict=True))
    row = {"case": "backward", "length": length, "dim": dim, "error": error}
    out = attention(q, k, v)

    def gradients(deterministic: bool = False) -> tuple[Tensor, ...]:
        torch.use_deterministic_algorithms(deterministic)
        found = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        torch.use_deterministic_algorithms(False)
        return found

    for ours, truth in zip(gradients(), gradients(True), strict=True):
        demand(ours, truth, 2e-2, "backward, auto against triton")
    row |= {"auto": work / seconds(gradients), "triton": work / seconds(lambda: gradients(True))}
    for name, kernel in PEERS.items():
        with sdpa_kernel(kernel):
            peer = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            row[name] = work / seconds(
                lambda peer=peer: torch.autograd.grad(peer, (q, k, v), dout, retain_graph=True)
            )
    return row


def decode_case(batch: int, length: int, kind: str = "dense", *, window: int | None = None) -> dict:
    """GB/s (of the bytes that storage really holds) and microseconds of one decoding step.

    Every kernel of ours that can, and by "us" and "gbs" the one that `auto` takes.
    """
    heads, kv_heads, dim = 32, 8, 128
    size = batch * kv_heads * length * dim * 2 * 2
    sets = max(2, min(8, 400_000_000 // size + 1))
    mask = Mask(window=window)
    queries = [random(batch, heads, 1, dim) for _ in range(sets)]
    stores = [[random(batch, kv_heads, length, dim) for _ in range(2)] for _ in range(sets)]
    views = [_view(kind, k, v) for k, v in stores]
    calls = [
        make_call(q, view, mask=mask) for q, (view, _) in zip(queries, views, strict=True)
    ]  # fmt: skip
    first = [x[:1].double() for x in (queries[0], *stores[0])]
    truth = attention(*first, window=window, backend="reference")
    limit = {"int4": 0.2, "int8": 2e-2, "fp8": 6e-2}.get(kind, 1e-2)
    loops = max(1, CALLS // sets)
    bytes_read = views[0][1] if window is None else size * min(1, window / length)
    row: dict[str, Any] = {
        "case": "decode", "kind": kind, "batch": batch, "length": length, "window": window,
        "error": 0.0,
    }  # fmt: skip
    for backend in KERNELS:
        kernel = load(backend)
        if kernel.refusal(calls[0]) is not None:
            continue
        steps = [lambda call=call, kernel=kernel: kernel.run(call).out for call in calls]
        error = demand(steps[0]()[:1], truth, limit, f"decode {backend} {kind}")
        row["error"] = max(row["error"], error)
        took = graph_seconds(steps, loops)
        row |= {f"{backend}_us": took * 1e6, f"{backend}_gbs": bytes_read / took / 1e9}
        if choose(calls[0], "auto") is kernel:
            row |= {"auto": backend, "us": took * 1e6, "gbs": bytes_read / took / 1e9}
    if kind == "dense" and window is None:
        for name in PEERS:
            peer = _peer_decode(name, queries, stores, loops)
            row |= {f"{name}_us": peer * 1e6, f"{name}_gbs": size / peer / 1e9}
    return row


def _peer_decode(name: str, queries: list[Tensor], stores: list, loops: int) -> float:
    with sdpa_kernel(PEERS[name]):
        runs = [
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            for q, (k, v) in zip(queries, stores, strict=True)
        ]
        return graph_seconds(runs, loops)


def _view(kind: str, k: Tensor, v: Tensor) -> tuple[Any, int]:
    """A view of that kind over the same keys and values, and the bytes a step has to read."""
    if kind == "dense":
        return DenseKV(k, v), 2 * k.numel() * 2
    if kind.startswith("page"):
        return paged(k, v, int(kind.removeprefix("page"))), 2 * k.numel() * 2
    view = coded(k, v, kind)
    return view, sum(part.nbytes for qdata in (view.k, view.v) for part in qdata)


def cases() -> list[tuple[str, Callable[..., dict], tuple, dict]]:
    """Everything the table holds, in order: (name, function, arguments, options)."""
    forward = [((n, 128), {}) for n in (4096, 8192, 16384, 32768)]
    forward += [((16384, 128), {"causal": False}), ((16384, 64), {}), ((16384, 256), {})]
    forward += [((n, 128), {"window": w}) for n, w in ((16384, 1024), (32768, 1024), (32768, 4096))]
    forward += [((16384, dim), {"window": 1024}) for dim in (64, 256)]
    eight = [((n, 128), {}) for n in (4096, 8192, 16384, 32768)]
    eight += [((16384, 128), {"causal": False}), ((16384, 64), {})]
    dense = [(1, 8192), (1, 32768), (1, 131072), (16, 8192), (64, 8192)]
    kinds = ("page16", "page64", "int8", "fp8", "int4")
    return [
        *(("forward", forward_case, where, options) for where, options in forward),
        ("blocks", blocks_case, (32768, 0.25), {}),
        *(("fp8", gpu_fp8.fp8_case, where, options) for where, options in eight),
        *(
            ("backward", backward_case, where, {})
            for where in ((8192, 128), (8192, 64), (32768, 128))
        ),
        *(("decode", decode_case, shape, {}) for shape in dense),
        *(("decode", decode_case, (*shape, kind), {}) for kind in kinds for shape in dense[1:4]),
        ("decode", decode_case, (16, 32768), {"window": 4096}),
    ]


def main() -> None:
    """Measure, print one line a case, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", help="names of cases, e.g. forward decode")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--contains", default="", help="only cases with this in their arguments")
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "what": "attention on one GPU, bf16, 32 query and 8 key/value heads; TFLOP/s, GB/s",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "saccade": saccade.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "ceilings": ceilings(),
        "rows": [],
    }
    q, k, v = (random(1, h, 32, 128) for h in (32, 8, 8))
    record["host_us"] = {
        "prefill": host_seconds(lambda: attention(q, k, v)) * 1e6,
        "decode": host_seconds(lambda: attention(q[:, :, :1], k, v)) * 1e6,
        "sdpa": host_seconds(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        ) * 1e6,
    }  # fmt: skip
    print(json.dumps(record["ceilings"] | record["host_us"]), flush=True)
    for name, case, where, options in cases():
        if arguments.only and name not in arguments.only:
            continue
        if arguments.contains not in f"{where} {options}":
            continue
        torch.cuda.empty_cache()
        try:
            row = case(*where, **options)
        except Exception as error:  # one case that fails must not cost the others
            row = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        record["rows"].append(row)
        print({k: round(x, 4) if isinstance(x, float) else x for k, x in row.items()}, flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
