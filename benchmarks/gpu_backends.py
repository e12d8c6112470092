"""Which backend is fastest for which call: the facts behind saccade/ops/measured/backends.

    python benchmarks/gpu_backends.py --out benchmarks/results/h100_backends.json

bf16 unless said, 32 query and 8 key/value heads, random data, medians of CUDA events after a check
of the last rows in float64; milliseconds.  cuDNN makes a plan for every new shape: what that costs
the host is measured with lengths that were never seen, and `pays_after` is the number of calls of
one shape after which the plan has paid against the fastest of our own kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu_attention import demand, last_rows
from saccade.bench.gpu import ceilings, seconds
from saccade.core import DenseKV, Mask
from saccade.ops import attention
from saccade.ops.attention import dispatch
from saccade.ops.attention.api import make_call
from saccade.ops.attention.sdpa import gpu as sdpa_gpu

HEADS, KV_HEADS = 32, 8
DIMS = (64, 96, 128, 192, 256, 80, 112)
SHAPES = ((1, 1024), (1, 2048), (1, 4096), (1, 16384), (1, 32768), (8, 1024), (8, 4096))
TRAINING = ((1, 2048), (1, 8192), (4, 4096))
PEERS = ("cudnn", "flash")
OURS = ("gluon", "triton")


def qkv(batch: int, length: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Normal random numbers on the card."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(batch, h, length, dim, device="cuda", dtype=dtype) for h in heads]


def candidates(tensors: list[Tensor], *, causal: bool) -> dict[str, Callable[[], Tensor]]:
    """Everything that can run the call, by name."""
    q, k, v = tensors
    call = make_call(q, DenseKV(k, v), mask=Mask(causal=causal), wants_lse=False)
    kind: sdpa_gpu.Kind = "square" if causal else "all"
    capability = torch.cuda.get_device_capability()
    found: dict[str, Callable[[], Tensor]] = {}
    for name in OURS:
        if dispatch.load(name).refusal(call) is None:
            found[name] = lambda name=name: attention(q, k, v, causal=causal, backend=name)
    for name in PEERS:
        if sdpa_gpu.REFUSALS[name](q, k, v, kind, capability, q.requires_grad) is None:
            found[name] = lambda name=name: (
                sdpa_gpu.unmasked(name, q, k, v, causal=causal, scale=call.scale).out
            )
    return found


def forward_row(batch: int, length: int, dim: int, *, causal: bool, dtype: torch.dtype) -> dict:
    """Milliseconds of each backend."""
    tensors = qkv(batch, length, dim, dtype)
    last = [x[-1:] for x in tensors]
    truth = last_rows(*last, causal=causal)
    row: dict[str, Any] = {
        "batch": batch, "length": length, "dim": dim, "causal": causal, "dtype": str(dtype)[6:],
    }  # fmt: skip
    for name, run in candidates(tensors, causal=causal).items():
        demand(run()[-1:, : truth.shape[1], -64:], truth, 1e-2, f"{name} {row}")
        row[name] = round(1e3 * seconds(run, 9, 3), 4)
    return row


def training_row(batch: int, length: int, dim: int) -> dict:
    """Milliseconds of a forward and of a backward pass, causal; gradients compared pairwise."""
    tensors = [x.requires_grad_() for x in qkv(batch, length, dim)]
    dout = torch.randn_like(tensors[0])
    row: dict[str, Any] = {"batch": batch, "length": length, "dim": dim}
    truth: list[Tensor] = []
    for name, run in candidates(tensors, causal=True).items():
        out = run()
        back = lambda out=out: torch.autograd.grad(out, tensors, dout, retain_graph=True)  # noqa: E731
        grads = back()
        for ours, theirs in zip(grads, truth, strict=False):
            demand(ours, theirs, 2e-2, f"gradients {name} {row}")
        truth = truth or [x.clone() for x in grads]
        with torch.no_grad():
            row[f"{name}_forward"] = round(1e3 * seconds(run, 9, 3), 4)
        row[f"{name}_backward"] = round(1e3 * seconds(back, 9, 3), 4)
    return row


def plan_row(dim: int, *, causal: bool, training: bool) -> dict:
    """Host milliseconds that the first call of a shape costs more than the second, cuDNN."""
    extra = []
    for length in range(1000, 1000 + 8 * 72, 72):
        tensors = [x.requires_grad_(training) for x in qkv(1, length, dim)]
        dout = torch.randn_like(tensors[0])
        run = candidates(tensors, causal=causal)["cudnn"]
        took = []
        for _ in range(2):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            out = run()
            if training:
                torch.autograd.grad(out, tensors, dout)
            torch.cuda.synchronize()
            took.append(time.perf_counter() - begin)
        extra.append(1e3 * (took[0] - took[1]))
    return {
        "dim": dim, "causal": causal, "training": training,
        "plan_ms": round(statistics.median(extra), 3), "most_ms": round(max(extra), 3),
    }  # fmt: skip


def warm(worker: int, workers: int) -> None:
    """Compile what the rows need, so that other processes find it in Triton's cache."""
    kinds = [(dim, causal, False) for dim in DIMS for causal in (True, False)]
    kinds += [(dim, True, True) for dim in DIMS]
    for dim, causal, training in kinds[worker::workers]:
        tensors = [x.requires_grad_(training) for x in qkv(1, 2048, dim)]
        for name in OURS:
            if name in candidates(tensors, causal=causal):
                out = candidates(tensors, causal=causal)[name]()
                if training:
                    out.backward(torch.randn_like(out))


def warm_up(workers: int) -> None:
    """`warm` in several processes."""
    command = [sys.executable, __file__, "--warm"]
    running = [subprocess.Popen([*command, str(i), str(workers)]) for i in range(workers)]
    for process in running:
        process.wait(120)


def with_breaks_even(rows: list[dict], plans: list[dict]) -> None:
    """Add `pays_after` where cuDNN is faster than our kernels."""
    for row in rows:
        ours = min((row[name] for name in OURS if name in row), default=None)
        plan = next((p for p in plans if p["dim"] == row["dim"] and not p["training"]), None)
        if ours and plan and row.get("cudnn", ours) < ours:
            row["pays_after"] = round(plan["plan_ms"] / (ours - row["cudnn"]), 1)


def main() -> None:
    """Measure, print one line a row, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--warm", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.warm:
        return warm(*arguments.warm)
    begin = time.perf_counter()
    warm_up(min(14, os.cpu_count() or 1))
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    record: dict[str, Any] = {
        "what": "milliseconds a call, 32 query and 8 key/value heads",
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(), "date": time.strftime("%Y-%m-%d"),
        "ceilings": ceilings(), "plans": [], "forward": [], "training": [], "failed": [],
    }  # fmt: skip
    print(json.dumps(record), flush=True)
    half, whole = torch.float16, torch.bfloat16
    todo: list[tuple[str, Callable[..., dict], tuple, dict]] = [
        ("plans", plan_row, (dim,), {"causal": causal, "training": training})
        for dim, causal, training in ((128, True, False), (128, False, False), (96, True, False),
                                      (64, True, False), (192, True, False), (256, True, False),
                                      (128, True, True), (64, True, True))
    ]  # fmt: skip
    todo += [
        ("forward", forward_row, (*shape, dim), {"causal": causal, "dtype": whole})
        for dim in DIMS for causal in (True, False) for shape in SHAPES
        if dim in (64, 96, 128, 192, 256) or shape in SHAPES[2:4]
    ]  # fmt: skip
    todo += [
        ("forward", forward_row, (1, 8192, dim), {"causal": True, "dtype": half})
        for dim in (64, 128, 256)
    ]
    todo += [("training", training_row, (*shape, d), {}) for d in (64, 96, 128, 192, 256)
             for shape in TRAINING]  # fmt: skip
    for kind, function, where, options in todo:
        try:
            row = function(*where, **options)
            record[kind].append(row)
        except Exception as error:  # one row that fails must not cost the others
            row = {"case": [kind, *map(str, where)], "error": f"{type(error).__name__}: {error}"}
            record["failed"].append(row)
        print(kind, " ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        with_breaks_even(record["forward"], record["plans"])
        if arguments.out:
            arguments.out.write_text(_text(record))
    print(f"{time.perf_counter() - begin:.0f} s in all")


def _text(record: dict[str, Any]) -> str:
    """JSON with one row a line."""
    parts = []
    for name, value in record.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            parts.append(f' "{name}": [\n{rows}\n ]')
        else:
            parts.append(f' "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
