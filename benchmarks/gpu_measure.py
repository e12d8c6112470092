"""Check and time one problem by every backend that can run it, and by PyTorch's own kernels.

A speed of a wrong result means nothing: what differs from the reference is not timed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_flex
from benchmarks.gpu_problems import Built, Problem, build, probed, refusal, run
from saccade.bench.gpu import graph_seconds, on_gpu, random, seconds, synchronize
from saccade.bench.inputs import KINDS
from saccade.core import DenseKV, Mask
from saccade.ops import attention
from saccade.ops.attention import dispatch
from saccade.ops.attention.api import make_call
from saccade.ops.attention.call import AttentionCall

CALLS = 12  # of a step in one graph: where a graph starts is no part of a step
LIMIT, GRADIENT_LIMIT = 1e-2, 2e-2  # relative errors in 16 bits
ABSENT = "is not installed"  # packages that nobody expects: backends of dispatch.PEERS
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
LATENT_PEERS = ("sdpa_rows", "products")  # all heads as queries of the one head of keys
Timed = tuple[float, dict[str, Any]]


class WrongResult(RuntimeError):
    """A result that is not timed."""


def relative(ours: Tensor, truth: Tensor) -> float:
    """||ours - truth|| / ||truth||."""
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def demand(ours: Tensor, truth: Tensor, limit: float) -> float:
    """The error, or WrongResult."""
    error = relative(ours, truth)
    if not error < limit:
        raise WrongResult(f"relative error {error:.2e} exceeds {limit:.0e}")
    return error


def measure(problem: Problem, backends: Sequence[str], peers: Sequence[str] = ()) -> dict[str, Any]:
    """One row of a record: errors, milliseconds and why others could not, by backend.

    For gradients "ms" is the backward pass and "forward_ms" the forward pass before it.
    """
    made = build(problem)
    row: dict[str, Any] = {**problem.facts(), "tflop": made.tflop, "gbytes": made.gbytes}
    row |= {"ms": {}, "error": {}}
    way: Any = _gradients if problem.training else _forward
    truth: Any = _truth(problem, made)
    for name in backends:
        reason = refusal(made.calls[0], name)
        if reason is not None:
            if not reason.endswith(ABSENT):
                row.setdefault("cannot", {})[name] = reason
            continue
        _enter(row, name, lambda name=name: way(problem, made, name, truth))
        if name == "sdpa":
            row["sdpa_kernel"] = _sdpa_kernel(made.calls[0])
    for name in peers:
        peer: Any = _flex if name == "flex" else _peer_gradients if problem.training else _peer
        peer = _latent_peer if name in LATENT_PEERS else peer
        _enter(row, name, lambda name=name, peer=peer: peer(problem, made, name, truth))
    return row


def _sdpa_kernel(call: AttentionCall) -> str | None:
    """Which of PyTorch's kernels the sdpa backend runs, where it says so."""
    kernel_of = getattr(dispatch.load("sdpa"), "kernel_of", None)
    return None if kernel_of is None else kernel_of(call)


def _truth(problem: Problem, made: Built) -> Tensor | tuple[Tensor, ...]:
    """What the reference makes of the probe, or of the gradients of a small problem."""
    if problem.training:
        return _small_gradients(problem, "reference")
    return run(made.probe, "reference")


def warm(problem: Problem, backends: Sequence[str]) -> None:
    """Compile what `measure` runs, so that it is found in Triton's cache."""
    made = build(problem)
    for name in backends:
        if name in dispatch.PEERS or refusal(made.calls[0], name) is not None:
            continue
        if problem.training:
            _small_gradients(problem, name)
        out = run(made.calls[0], name)
        if problem.training:
            out.backward(torch.ones_like(out))


def _enter(row: dict[str, Any], name: str, timed: Callable[[], Timed]) -> None:
    """Milliseconds into a row, or what went wrong: one failure must not cost the others."""
    try:
        took, more = timed()
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        row.setdefault("failed", {})[name] = f"{type(error).__name__}: {text}"
        return
    row["ms"][name] = 1e3 * took
    for key, value in more.items():
        row.setdefault(key, {})[name] = value


def _limit(problem: Problem, made: Built, truth: Tensor) -> float:
    """The error that is allowed; fp8 may err half as much again as rounded weights must."""
    if problem.storage != "e4m3":
        return LIMIT
    return 1.5 * relative(_with_rounded_weights(made.probe), truth)


def _with_rounded_weights(call: AttentionCall) -> Tensor:
    """Attention in float64 but for weights of 2^8 at most in fp8: what no kernel can undercut."""
    kv: Any = call.kv
    q, k, v = call.q, kv.k, kv.v
    scores = q @ k.mT * q.shape[3] ** -0.5
    if call.mask.causal:
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        scores = scores.masked_fill(later, -torch.inf)
    weights = 256 * (scores - scores.amax(-1, keepdim=True)).exp()
    return weights.float().to(torch.float8_e4m3fn).double() @ v / weights.sum(-1, keepdim=True)


def _forward(problem: Problem, made: Built, name: str, truth: Tensor) -> Timed:
    limit = _limit(problem, made, truth)
    if problem.storage in KINDS and KINDS[problem.storage] != (8, 8, False):
        limit = 2 * LIMIT  # weights are rounded together with the scales
    error = demand(probed(problem, run(made.calls[0], name)), truth, limit)
    runs = [lambda call=call: run(call, name) for call in made.calls]
    return _seconds(problem, runs), {"error": error}


def _seconds(problem: Problem, runs: Sequence[Callable[[], Any]]) -> float:
    if problem.is_step:
        return graph_seconds(runs, max(1, CALLS // len(runs)), 11)
    return seconds(runs[0], 9, 3)


def _small_gradients(problem: Problem, name: str) -> tuple[Tensor, ...]:
    """Gradients of a small problem of the same kind, from the same numbers for every backend."""
    keys = min(1024, problem.keys)
    window = problem.window and min(problem.window, keys // 3)
    small = replace(
        problem, queries=keys, keys=keys, batch=1, heads=4, kv_heads=1, window=window
    )  # fmt: skip
    torch.manual_seed(0)
    made = build(small)
    wide = torch.float64 if name == "reference" else made.leaves[0].dtype
    q, k, v = (x.detach().to(wide).requires_grad_() for x in made.leaves)
    options = small.score_options(q.device)
    out = run(make_call(q, DenseKV(k, v), mask=small.mask, wants_lse=False, **options), name)
    return torch.autograd.grad(out, (q, k, v), q.detach().roll(1, 2))


def _gradients(problem: Problem, made: Built, name: str, truth: tuple[Tensor, ...]) -> Timed:
    found = _small_gradients(problem, name)
    error = max(demand(a, b, GRADIENT_LIMIT) for a, b in zip(found, truth, strict=True))
    call = made.calls[0]
    took, forward = _forward_and_backward(lambda: run(call, name), made.leaves)
    return took, {"error": error, "forward_ms": 1e3 * forward}


def _forward_and_backward(
    forward: Callable[[], Tensor], leaves: tuple[Tensor, ...]
) -> tuple[float, float]:
    """Seconds of the backward and of the forward pass."""
    out = forward()
    dout = random(*out.shape, dtype=out.dtype)

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return seconds(backward, 9, 3), seconds(forward, 9, 3)


def _peer_call(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    causal = problem.causal and problem.queries > 1
    assert problem.window is None and (not causal or problem.queries == problem.keys)
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _asked_for(name: str) -> Any:
    return sdpa_kernel(PEERS[name]) if on_gpu() else nullcontext()


def _peer(problem: Problem, made: Built, name: str, truth: Tensor) -> Timed:
    """PyTorch's kernel on dense bfloat16 tensors of the same shape."""
    with _asked_for(name), torch.no_grad():
        return _seconds(problem, [_peer_call(problem, *tensors) for tensors in made.tensors]), {}


def _latent_peer(problem: Problem, made: Built, name: str, truth: Tensor) -> Timed:
    """PyTorch's operators over keys that all heads read, for one query."""
    scale = problem.head_dim**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.transpose(1, 2)
        if name == "products":
            return ((rows @ k.mT * scale).softmax(-1) @ v).transpose(1, 2)
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).transpose(1, 2)

    with torch.no_grad():
        error = demand(probed(problem, attend(*made.tensors[0])), truth, LIMIT)
        runs = [lambda tensors=tensors: attend(*tensors) for tensors in made.tensors]
        return _seconds(problem, runs), {"error": error}


def _peer_gradients(problem: Problem, made: Built, name: str, truth: Any) -> Timed:
    with _asked_for(name):
        took, forward = _forward_and_backward(_peer_call(problem, *made.leaves), made.leaves)
    return took, {"forward_ms": 1e3 * forward}


def _flex(problem: Problem, made: Built, name: str, truth: Tensor) -> Timed:
    """FlexAttention with the best of its options."""
    if not on_gpu():
        raise RuntimeError("FlexAttention takes minutes to compile for a CPU")
    blocks = made.calls[0].blocks
    if blocks is not None:
        mask = gpu_flex.selection_mask(blocks.allowed, problem.groups)
    else:
        mask = gpu_flex.window_mask(problem.window, problem.keys)
    found = gpu_flex.fastest(*made.leaves, mask, lambda x: demand(probed(problem, x), truth, LIMIT))
    took, options, _ = found
    if took == float("inf"):
        raise RuntimeError("; ".join(found[2]))
    return took, {"options": options}


def measure_plan(problem: Problem, backends: Sequence[str], peers: Sequence[str]) -> dict[str, Any]:
    """Milliseconds of the host that the first call of a shape costs cuDNN more than the second."""
    extra = []
    for add in range(0, 8 * 72, 72):
        length = min(1000, problem.keys) + add
        made = build(replace(problem, queries=length, keys=length))
        forward = _peer_call(replace(problem, queries=length, keys=length), *made.leaves)
        first, second = (_host_seconds(problem, forward, made.leaves) for _ in range(2))
        extra.append(1e3 * (first - second))
    return {**problem.facts(), "plan_ms": statistics.median(extra), "most_ms": max(extra)}


def _host_seconds(problem: Problem, forward: Callable[[], Tensor], leaves: Any) -> float:
    synchronize()
    begin = time.perf_counter()
    with _asked_for("cudnn"):
        out = forward()
        if problem.training:
            torch.autograd.grad(out, leaves, out.detach())
    synchronize()
    return time.perf_counter() - begin


def measure_host(problem: Problem, backends: Sequence[str], peers: Sequence[str]) -> dict[str, Any]:
    """Microseconds that one short call costs the host, by backend and for SDPA."""
    q, k, v = build(replace(problem, queries=problem.keys)).leaves
    q = q[:, :, -problem.queries :]
    found: dict[str, float] = {}
    for name in backends:
        call = make_call(q, DenseKV(k, v), mask=Mask())
        if name == "auto" or refusal(call, name) is None:
            found[name] = 1e6 * _queued(lambda name=name: attention(q, k, v, backend=name))
    causal = problem.queries > 1
    found["sdpa_direct"] = 1e6 * _queued(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    )
    return {**problem.facts(), "host_us": found}


def _queued(call: Callable[[], Any], repeats: int = 200) -> float:
    """Seconds of the host for one call of many in a row."""
    for _ in itertools.repeat(None, 5):
        call()
    synchronize()
    begin = time.perf_counter()
    for _ in itertools.repeat(None, repeats):
        call()
    took = (time.perf_counter() - begin) / repeats
    synchronize()
    return took
