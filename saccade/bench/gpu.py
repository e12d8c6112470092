"""Timing on a GPU by CUDA events, and what the GPU could do at best.

Random data always: zeros run faster.  The host is kept ahead of the GPU, so that its own time is
not counted; short kernels, over several caches alternately, are captured in one CUDA graph.
Without a GPU a call is timed once by the host's clock, so that benchmarks can be tried on a CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
WARM_SECONDS = 0.1  # of work before the first sample: a GPU that idled is slow to reach its clocks
AHEAD = 2_000_000  # cycles the GPU waits before a sample, while the host queues it


def on_gpu() -> bool:
    """Whether there is a GPU to measure."""
    return torch.cuda.is_available()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if on_gpu():
        torch.cuda.synchronize()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal random numbers on the GPU, or on the CPU where there is none."""
    return torch.randn(*shape, device="cuda" if on_gpu() else "cpu", dtype=dtype)


def seconds(run: Run, repeats: int = 15, warmup: int = 4) -> float:
    """Median time of one call by CUDA events."""
    begun = time.perf_counter()
    if not on_gpu():
        run()
        return time.perf_counter() - begun
    while warmup > 0 or time.perf_counter() - begun < WARM_SECONDS:
        run()
        torch.cuda.synchronize()
        warmup -= 1
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def graph_seconds(runs: Sequence[Run], loops: int = 1, repeats: int = 15) -> float:
    """Median time of one of `runs`, captured one after the other in a CUDA graph."""
    if not on_gpu():
        return sum(map(seconds, runs)) / len(runs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(loops):
            for run in runs:
                run()
    return seconds(graph.replay, repeats) / (len(runs) * loops)


def ceilings() -> dict[str, float]:
    """A large matrix product in TFLOP/s, and reading and copying memory in GB/s."""
    a, b = random(8192, 8192), random(8192, 8192)
    matmul = 2 * 8192**3 / seconds(lambda: a @ b) / 1e12
    count = 2**30 if torch.cuda.mem_get_info()[0] > 12 * 2**30 else 2**28
    big = torch.randn(count, device="cuda")
    read = big.numel() * 4 / seconds(big.sum) / 1e9
    other = torch.empty_like(big)
    copy = 2 * big.numel() * 4 / seconds(lambda: other.copy_(big)) / 1e9
    return {"matmul_tflops": matmul, "read_gbs": read, "copy_gbs": copy}
