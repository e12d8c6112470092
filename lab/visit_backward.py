"""One visit to a Hopper card: are the Gluon gradients right, and how fast beside the peers?"""

import sys
import time
import traceback
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.core import Mask
from saccade.ops.attend import gluon_launch, triton_launch
from saccade.ops.attend import gluon_squares_launch as launcher
from saccade.ops.attend.triton_problem import Problem

PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


def problem(q, k, v, causal=True, window=None, sinks=0, logits=None):
    dim = q.shape[-1]
    return Problem(
        q, k, v, logits, *[None] * 8, causal, window, sinks, dim**-0.5, None,
        k.shape[2] - q.shape[2], 1, 1, k.shape[2],
    )  # fmt: skip


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def plainly(p, dout, dtype):
    """Output, lse and gradients by plain products in a precision."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (p.q, p.k, p.v))
    groups = q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(groups, 1) for x in (k, v)]
    s = q @ wide[0].mT * p.scale
    q_pos = p.q_offset + torch.arange(q.shape[2], device="cuda")[:, None]
    k_pos = torch.arange(k.shape[2], device="cuda")[None]
    see = torch.ones_like(s[0, 0], dtype=torch.bool)
    if p.causal:
        see &= k_pos <= q_pos
    if p.window is not None:
        see &= (q_pos - k_pos < p.window) | (k_pos < p.sinks)
    s = s.masked_fill(~see, float("-inf"))
    out = s.softmax(-1) @ wide[1]
    out.backward(dout.to(dtype))
    return out.detach(), s.detach().logsumexp(-1).float(), (q.grad, k.grad, v.grad)


def check(name, b, heads, kv_heads, q_len, k_len, dim, splits=None, dtype=torch.bfloat16, **mask):
    try:
        shapes = ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
        q, k, v = (random(b, h, n, dim, dtype=dtype) for h, n in shapes)
        p, dout = problem(q, k, v, **mask), random(b, heads, q_len, dim, dtype=dtype)
        out, lse, right = plainly(p, dout, torch.float64)
        eager = plainly(p, dout, dtype)[2]
        print("asked", name, flush=True)
        ours = launcher.backward(p, out.to(dtype), lse, dout, torch.zeros_like(lse), None, splits)
        torch.cuda.synchronize()
        say = [
            f"{(a - t).norm() / t.norm():.2e}/{(c - t).norm() / t.norm():.2e}"
            for a, c, t in zip(ours, eager, right, strict=False)
        ]
        print("check", name, "dq dk dv (gluon/eager):", *say, flush=True)
    except Exception:
        print("FAILED", name, traceback.format_exc()[-800:], flush=True)


def milliseconds(function, repeats=12):
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def race(length, dim, causal=True, splits=(1,), peers=True, batch=1):
    try:
        q, k, v = (random(batch, h, length, dim).requires_grad_() for h in (32, 8, 8))
        dout = random(batch, 32, length, dim)
        work = 10 * batch * 32 * dim * Mask(causal=causal).num_pairs(length, length) / 1e9
        row = {}
        p = problem(q.detach(), k.detach(), v.detach(), causal=causal)
        out, lse = gluon_launch.forward(p)
        zero = torch.zeros_like(lse)
        usual = launcher.LAUNCHES[dim]
        for n in splits:
            for early in (False, True) if length == 8192 else (usual.early,):
                launch = replace(usual, early=early)
                row[f"gluon/{n}{' early' * early}"] = work / milliseconds(
                    lambda n=n, launch=launch: launcher.backward(p, out, lse, dout, zero, launch, n)
                )
        if peers:
            if length == 8192 and causal:
                row["triton"] = work / milliseconds(
                    lambda: triton_launch.backward(p, out, lse, dout, zero)
                )
            for name, kernel in PEERS.items():
                with sdpa_kernel(kernel):
                    peer = F.scaled_dot_product_attention(
                        q, k, v, is_causal=causal, enable_gqa=True
                    )
                    row[name] = work / milliseconds(
                        lambda peer=peer: torch.autograd.grad(
                            peer, (q, k, v), dout, retain_graph=True
                        )
                    )
        print(f"race {batch}x{length} D{dim} causal={causal}", end=": ")
        print("  ".join(f"{name} {value:.0f}" for name, value in row.items()), flush=True)
    except Exception:
        print("FAILED race", length, dim, traceback.format_exc()[-600:], flush=True)


def checks(dim):
    check(f"D{dim} all", 1, 2, 1, 256, 256, dim, 1, causal=False)
    check(f"D{dim} causal", 1, 8, 2, 1000, 1000, dim, 1)
    check(f"D{dim} offset", 2, 4, 4, 300, 777, dim)
    check(f"D{dim} many", 1, 16, 4, 3000, 3000, dim, 1)
    check(f"D{dim} shares", 1, 16, 2, 513, 513, dim, 4)
    check(f"D{dim} window+sinks fp16", 1, 4, 1, 1000, 1100, dim, window=200, sinks=3,
          dtype=torch.float16)  # fmt: skip


def parts():
    """Where the time of 8k goes."""
    from torch.profiler import ProfilerActivity, profile

    q, k, v = (random(1, h, 8192, 128) for h in (32, 8, 8))
    dout = random(1, 32, 8192, 128)
    p = problem(q, k, v)
    out, lse = gluon_launch.forward(p)
    zero = torch.zeros_like(lse)
    launcher.backward(p, out, lse, dout, zero)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(5):
            launcher.backward(p, out, lse, dout, zero)
        torch.cuda.synchronize()
    for event in seen.key_averages():
        print(f"part {event.key[:40]} {event.device_time / 1e3:.3f} ms x{event.count}")


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    began = time.time()
    for what in sys.argv[1:]:
        if what.startswith("checks"):
            checks(int(what[6:]))
        elif what == "parts":
            parts()
        else:
            length, dim, splits, *more = what.split(",")
            race(
                int(length),
                int(dim),
                "all" not in more,
                [int(n) for n in splits.split("/")],
                "alone" not in more,
            )
        print(f"# {what}: {time.time() - began:.1f} s", flush=True)
