"""The Gluon gradients on a card: right first, then beside the Triton pair, cuDNN and FA2.

python lab/backward_card.py check | rows | small | eager | parts | splits
"""

import dataclasses
import sys
import time
import traceback

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.core import Mask
from saccade.ops import attention
from saccade.ops.attention.nvidia import autograd as triton_autograd
from saccade.ops.attention.nvidia import training as gluon_training
from saccade.ops.attention.nvidia.gluon.backward import launch as gluon
from saccade.ops.attention.nvidia.gluon.prefill import launch as gluon_launch
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton import launch as triton_launch

torch.manual_seed(0)
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
WAYS = {
    "gluon": (gluon_launch.forward, gluon.backward),
    "mixed": (triton_launch.forward, gluon.backward),
    "triton": (triton_launch.forward, triton_launch.backward),
}
BEGAN = time.time()


def problem_of(q, k, v, causal=True, window=None, sinks=0):
    empty = {f.name: None for f in dataclasses.fields(Problem)}
    return Problem(**empty | {
        "q": q, "k": k, "v": v, "causal": causal, "window": window, "sinks": sinks,
        "scale": q.shape[-1] ** -0.5, "q_offset": k.shape[2] - q.shape[2], "q_block": 1,
        "k_block": 1, "num_keys": k.shape[2],
    })  # fmt: skip


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def plain(p, dout, dtype):
    """Gradients in a precision, written out."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (p.q, p.k, p.v))
    g = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(g, 1).mT * p.scale
    q_pos = p.q_offset + torch.arange(q.shape[2], device="cuda")[:, None]
    k_pos = torch.arange(k.shape[2], device="cuda")[None]
    see = torch.ones_like(s[0, 0], dtype=torch.bool)
    if p.causal:
        see &= k_pos <= q_pos
    if p.window is not None:
        see &= (q_pos - k_pos < p.window) | (k_pos < p.sinks)
    s = s.masked_fill(~see, float("-inf"))
    out = s.softmax(-1) @ v.repeat_interleave(g, 1)
    return torch.autograd.grad(out, (q, k, v), dout.to(dtype))


def check(heads, kv_lens, dim=128, dtype=torch.bfloat16, batch=1, splits=None, **mask):
    q, dout = (random(batch, heads[0], kv_lens[0], dim, dtype=dtype) for _ in range(2))
    k, v = (random(batch, heads[1], kv_lens[1], dim, dtype=dtype) for _ in range(2))
    p = problem_of(q, k, v, **mask)
    out, lse = triton_launch.forward(p)
    found = gluon.backward(p, out, lse, dout, torch.zeros_like(lse), splits=splits)
    truth, eager = plain(p, dout, torch.float64), plain(p, dout, dtype)
    text, verdict = [], "ok"
    for name, a, b, c in zip("qkv", found, truth, eager, strict=False):
        ours, theirs = ((x.double() - b).norm() / b.norm() for x in (a, c))
        verdict = verdict if ours <= 2 * theirs + 1e-4 else "BAD"
        text.append(f"d{name} {ours:.1e}/{theirs:.1e}")
    print(verdict, heads, kv_lens, dim, str(dtype)[6:], splits, mask, *text, flush=True)


def checks(dim):
    check((1, 1), (64, 128), dim, causal=False)
    check((4, 1), (300, 300), dim)
    check((4, 4), (200, 1000), dim, batch=2)
    check((8, 1), (333, 77), dim, causal=False)
    check((8, 2), (2048, 2048), dim)
    check((16, 4), (3000, 3000), dim, splits=2)
    check((8, 2), (513, 700), dim, torch.float16, splits=4, window=200)
    check((4, 1), (1000, 1100), dim, torch.float16, window=200, sinks=3)
    check((4, 2), (100, 900), dim, window=50)


def seconds(call, times=10, ahead=1_000_000):
    for _ in range(2):
        call()
    spans = []
    for _ in range(times):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(ahead)  # the host runs ahead, as in training
        a.record()
        call()
        b.record()
        torch.cuda.synchronize()
        spans.append(a.elapsed_time(b) / 1e3)
    return sorted(spans)[times // 2]


def case(length, dim, batch, mask):
    q, dout = (random(batch, 32, length, dim) for _ in range(2))
    k, v = (random(batch, 8, length, dim) for _ in range(2))
    p = problem_of(q, k, v, **mask)
    work = 10 * batch * 32 * dim * Mask(**mask).num_pairs(length, length) / 1e12
    return p, dout, work


def race(length, dim, batch=1, peers=True, splits=(None,), **mask):
    """TFLOP/s, counted as 2.5 forward passes, of everybody in turn."""
    p, dout, work = case(length, dim, batch, mask)
    out, lse = gluon_launch.forward(p)
    rest = (p, out, lse, dout, torch.zeros_like(lse))
    times = 5 if length > 16000 else 10
    row = {}
    for n in splits:
        call = lambda n=n: gluon.backward(*rest, splits=n)  # noqa: E731
        row["gluon" + (f"/{n}" if n else "")] = seconds(call, times)
    row["pair"] = seconds(lambda: triton_launch.backward(*rest), times)
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    for name, kernel in PEERS.items() if peers and p.window is None else ():
        with sdpa_kernel(kernel):
            peer = F.scaled_dot_product_attention(*leaves, is_causal=p.causal, enable_gqa=True)

            def call(peer=peer):
                torch.autograd.grad(peer, leaves, dout, retain_graph=True)

            row[name] = seconds(call, times)
    text = "  ".join(f"{name} {work / span:.0f}" for name, span in row.items())
    print(f"{batch}x{length} D{dim} {mask}: {text}  ({time.time() - BEGAN:.0f} s)", flush=True)


def eager(length, dim, batch=1, **mask):
    """Microseconds of forward and backward as a program runs them, the host's time included."""
    p, dout, _ = case(length, dim, batch, mask)
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    row = {}
    usual = gluon_training.forward, gluon_training.backward
    watched = triton_autograd.is_watched
    for name, way in WAYS.items():
        gluon_training.forward, gluon_training.backward = way

        def step():
            out = attention(*leaves, **mask, backend="triton")
            torch.autograd.grad(out, leaves, dout)

        row[name] = loop(step)
        if name == "gluon":
            triton_autograd.is_watched = lambda _: True
            row["operator"] = loop(step)
            triton_autograd.is_watched = watched
    gluon_training.forward, gluon_training.backward = usual
    for name, kernel in PEERS.items() if p.window is None else ():

        def step(kernel=kernel):
            with sdpa_kernel(kernel):
                out = F.scaled_dot_product_attention(*leaves, is_causal=p.causal, enable_gqa=True)
            torch.autograd.grad(out, leaves, dout)

        row[name] = loop(step)
    text = "  ".join(f"{name} {span * 1e6:.0f}" for name, span in row.items())
    print(f"eager {batch}x{length} D{dim} {mask}: {text} us", flush=True)


def loop(step, times=20):
    for _ in range(3):
        step()
    spans = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            step()
        torch.cuda.synchronize()
        spans.append((time.perf_counter() - began) / times)
    return sorted(spans)[1]


def parts(length, dim, **mask):
    """Microseconds of every kernel of a backward pass."""
    p, dout, _ = case(length, dim, 1, mask)
    out, lse = gluon_launch.forward(p)
    dlse = torch.zeros_like(lse)
    gluon.backward(p, out, lse, dout, dlse)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            gluon.backward(p, out, lse, dout, dlse)
        torch.cuda.synchronize()
    text = [
        f"{e.key[:24]} {e.device_time_total / 5:.0f}"
        for e in found.key_averages()
        if e.device_time_total > 1
    ]
    print(f"parts {length} D{dim}:", *text, flush=True)


SMALL = ((1, 512), (8, 512), (1, 1024), (4, 1024), (1, 2048), (2, 2048), (1, 4096))


def rows():
    for length, mask in (
        (8192, {}), (8192, {"causal": False}), (8192, {"window": 1024}), (8192, {"window": 4096}),
        (4096, {}), (16384, {}),
    ):  # fmt: skip
        for dim in (128, 64):
            race(length, dim, **mask)


def long():
    for mask in ({}, {"window": 1024}, {"window": 4096}, {"causal": False}):
        for dim in (128, 64):
            race(32768, dim, peers=mask == {}, **mask)


def small():
    for batch, length in SMALL:
        for dim in (128, 64):
            race(length, dim, batch, splits=(1, 2, 4), peers=dim == 128)
    for batch, length, window in ((1, 2048, 512), (1, 4096, 1024)):
        for dim in (128, 64):
            race(length, dim, batch, splits=(1, 2, 4), window=window)


def eagers():
    for batch, length in SMALL:
        for dim in (128, 64):
            eager(length, dim, batch)
    eager(2048, 128, window=512)
    eager(4096, 128, window=1024)


def warm(dim):
    """Compile what the timings run."""
    for mask in ({}, {"causal": False}, {"window": 512}):
        race(1024, dim, peers=False, splits=(1, 2), **mask)
        eager(1024, dim, **mask)


def host():
    """Where the host's time goes."""
    import cProfile
    import io
    import pstats

    p, dout, _ = case(512, 128, 1, {})
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]

    def step():
        torch.autograd.grad(attention(*leaves, backend="triton"), leaves, dout)

    took = loop(step)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(100):
        step()
    profile.disable()
    torch.cuda.synchronize()
    for order in ("tottime", "cumtime"):
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats(order).print_stats(22)
        rows = [r.split(None, 5) for r in text.getvalue().splitlines() if "(" in r and r[:1] == " "]
        print(f"host, {took * 1e6:.0f} us a step; by {order}, us:")
        for r in rows:
            if len(r) == 6:
                print(f"  {float(r[1]) * 1e4:6.0f} {float(r[3]) * 1e4:6.0f} {r[0]:>7} {r[5][-60:]}")


def part():
    parts(8192, 128)
    parts(8192, 64)
    parts(2048, 128)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), flush=True)
    what = {"check128": lambda: checks(128), "check64": lambda: checks(64),
            "warm128": lambda: warm(128), "warm64": lambda: warm(64), "rows": rows, "long": long,
            "small": small, "eager": eagers, "host": host, "parts": part}  # fmt: skip
    for name in sys.argv[1:]:
        try:
            what[name]()
        except Exception:
            print("FAILED", name, traceback.format_exc()[-700:], flush=True)
        print(f"# {name} {time.time() - BEGAN:.0f} s", flush=True)
