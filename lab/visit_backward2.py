"""The Gluon gradients on a card: right first, then beside the Triton pair, cuDNN and FA2."""

import dataclasses
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.ops.attend import gluon_backward_launch as gluon
from saccade.ops.attend import triton_launch
from saccade.ops.attend.triton_problem import Problem

torch.manual_seed(0)


def problem_of(q, k, v, causal=True):
    empty = {f.name: None for f in dataclasses.fields(Problem)}
    return Problem(**empty | {
        "q": q, "k": k, "v": v, "causal": causal, "sinks": 0, "scale": q.shape[-1] ** -0.5,
        "q_offset": k.shape[2] - q.shape[2], "q_block": 1, "k_block": 1, "num_keys": k.shape[2],
    })  # fmt: skip


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def plain(q, k, v, dout, causal):
    """Gradients in the precision of the arguments, written out."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    g = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(g, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        m, n = s.shape[2:]
        see = torch.ones(m, n, dtype=torch.bool, device="cuda").tril(n - m)
        s = s.masked_fill(~see, float("-inf"))
    out = s.softmax(-1) @ v.repeat_interleave(g, 1)
    out.backward(dout)
    return q.grad, k.grad, v.grad


def check(heads, lengths, causal, dtype=torch.bfloat16, dim=128, batch=1):
    q, dout = (random(batch, heads[0], lengths[0], dim, dtype=dtype) for _ in range(2))
    k, v = (random(batch, heads[1], lengths[1], dim, dtype=dtype) for _ in range(2))
    p = problem_of(q, k, v, causal)
    out, lse = triton_launch.forward(p)
    found = gluon.backward(p, out, lse, dout, torch.zeros_like(lse))
    truth = plain(*(x.double() for x in (q, k, v, dout)), causal)
    eager = plain(q, k, v, dout, causal)
    text = []
    for name, a, b, c in zip("qkv", found, truth, eager, strict=False):
        ours, theirs = ((x.double() - b).abs().max().item() for x in (a, c))
        verdict = "" if ours <= 2 * theirs + 2e-3 else " BAD"
        text.append(f"d{name} {ours:.2e}/{theirs:.2e}{verdict}")
    print(heads, lengths, causal, dtype, dim, *text, flush=True)


def seconds(call, times=12):
    for _ in range(3):
        call()
    spans = []
    for _ in range(times):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # the host runs ahead, as in training
        a.record()
        call()
        b.record()
        torch.cuda.synchronize()
        spans.append(a.elapsed_time(b) / 1e3)
    return sorted(spans)[times // 2]


PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


def race(length, dim=128, causal=True, others=()):
    """TFLOP/s, counted as 2.5 forward passes, of everybody in turn."""
    q, dout = (random(1, 32, length, dim) for _ in range(2))
    k, v = (random(1, 8, length, dim) for _ in range(2))
    pairs = length * (length + 1) / 2 if causal else length**2
    work = 10 * 32 * dim * pairs / 1e12
    p = problem_of(q, k, v, causal)
    out, lse = triton_launch.forward(p)
    rest = (p, out, lse, dout, torch.zeros_like(lse))
    row = [
        f"{length} D{dim} causal={causal} gluon {work / seconds(lambda: gluon.backward(*rest)):.0f}"
    ]
    row += [f"pair {work / seconds(lambda: triton_launch.backward(*rest)):.0f}"]
    for module in others:
        kept, gluon.backward_kernel = gluon.backward_kernel, module.backward_kernel
        row.append(f"{module.__name__[-2:]} {work / seconds(lambda: gluon.backward(*rest)):.0f}")
        gluon.backward_kernel = kept
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for name, kernel in PEERS.items():
        with sdpa_kernel(kernel):
            peer = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)

            def call(peer=peer):
                torch.autograd.grad(peer, leaves, dout, retain_graph=True)

            row.append(f"{name} {work / seconds(call):.0f}")
    print(*row, flush=True)


def kernels(length):
    """Microseconds of every kernel of a backward pass."""
    q, dout = (random(1, 32, length, 128) for _ in range(2))
    k, v = (random(1, 8, length, 128) for _ in range(2))
    p = problem_of(q, k, v)
    out, lse = triton_launch.forward(p)
    dlse = torch.zeros_like(lse)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            gluon.backward(p, out, lse, dout, dlse)
        torch.cuda.synchronize()
    for event in found.key_averages():
        if event.device_time_total:
            print(event.key, event.count, f"{event.device_time_total / event.count:.0f} us")


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    if "check" in sys.argv:
        for heads, lengths, causal in (
            ((1, 1), (64, 128), False), ((1, 1), (128, 128), True), ((4, 1), (300, 300), True),
            ((4, 4), (200, 1000), True), ((8, 2), (513, 700), True), ((8, 1), (333, 77), False),
            ((8, 2), (2048, 2048), True),
        ):  # fmt: skip
            check(heads, lengths, causal)
        check((4, 1), (1000, 1000), True, torch.float16, batch=2)
    if "race" in sys.argv:
        kernels(8192)
        for length, causal in (
            (8192, True),
            (8192, False),
            (2048, True),
            (4096, True),
            (32768, True),
        ):
            race(length, causal=causal)
