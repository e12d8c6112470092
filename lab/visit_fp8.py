"""The fp8 kernel on a card: `check` against float64, `sums` by length, `speed` of its variants.

python lab/visit_fp8.py check sums speed
"""

import sys
import time
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_attention import seconds
from saccade.core import DenseKV, Mask
from saccade.ops import attention
from saccade.ops.attend.api import make_call
from saccade.ops.attend import gluon_fp8_launch as launching
from saccade.ops.attend.gluon_fp8_launch import LAUNCHES, Fp8Launch, forward, transposed
from saccade.ops.attend.triton_problem import dense_problem

FP8 = torch.float8_e4m3fn


def quantize(x):
    scale = x.float().abs().amax((2, 3)) / 448
    return (x.float() / scale[..., None, None]).to(FP8), scale


def inputs(heads, lengths, dim, batch=1):
    q, k, v = (
        torch.randn(batch, h, n, dim, device="cuda")
        for h, n in zip((*heads, heads[1]), (*lengths, lengths[1]), strict=True)
    )
    return [quantize(x) for x in (q, k, v)]


def ours(scaled, launch=None, **options):
    mask = Mask(**{n: options.pop(n) for n in ("causal", "window", "sinks") if n in options})
    q, k, v = (codes for codes, _ in scaled)
    problem = dense_problem(make_call(q, DenseKV(k, v), mask=mask, **options))
    return forward(problem, tuple(scale for _, scale in scaled), launch)


def truth_and_emulation(scaled, rows=None, causal=True, window=None, sinks=0):
    """Float64 on dequantised inputs, and the same with weights rounded to e4m3."""
    q, k, v = (codes.double() * scale.double()[..., None, None] for codes, scale in scaled)
    if rows:
        q = q[:, :, -rows:]
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    s = q @ k.mT * q.shape[3] ** -0.5
    at = torch.arange(q.shape[2], device="cuda")[:, None] + k.shape[2] - q.shape[2]
    key = torch.arange(k.shape[2], device="cuda")[None]
    see = torch.ones_like(s[0, 0], dtype=torch.bool)
    if causal:
        see &= key <= at
    if window:
        see &= (at - key < window) | (key < sinks)
    s = s.masked_fill(~see, -torch.inf)
    p = (s - s.amax(-1, keepdim=True)).exp()
    total = p.sum(-1, keepdim=True)
    rounded = (p.float() * 256).to(FP8).double() / 256
    return p @ v / total, (rounded @ v / total).bfloat16(), s.logsumexp(-1)


def relative(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


def check():
    cases = [
        ((2, 1), (128, 128), 128, {}), ((4, 2), (300, 300), 128, {}), ((4, 1), (65, 700), 128, {}),
        ((2, 2), (1, 333), 128, {}), ((4, 2), (1000, 1000), 128, {"causal": False}),
        ((4, 2), (1000, 1500), 128, {"window": 200}),
        ((4, 2), (1000, 1500), 128, {"window": 130, "sinks": 140}),
        ((6, 2), (2048, 2048), 128, {}), ((4, 2), (1000, 1500), 64, {}),
        ((4, 2), (513, 1500), 64, {"window": 200, "sinks": 3}), ((4, 2), (700, 900), 256, {}),
        ((4, 2), (700, 900), 256, {"causal": False}), ((4, 2), (700, 900), 256, {"window": 1}),
    ]  # fmt: skip
    for heads, lengths, dim, options in cases:
        try:
            scaled = inputs(heads, lengths, dim, batch=2)
            truth, emulated, lse = truth_and_emulation(scaled, **options)
            found = ours(scaled, **options)
            errors = relative(found.out, truth), relative(emulated, truth)
            lse_error = (found.lse - lse).abs().max().item()
            verdict = "ok" if errors[0] < 3 * errors[1] and lse_error < 1e-3 else "WRONG"
            print(verdict, heads, lengths, dim, options,
                  "error %.4f, emulation %.4f, lse %.1e" % (*errors, lse_error))  # fmt: skip
        except Exception as error:
            print("FAILED", heads, lengths, dim, options, type(error).__name__, str(error)[:300])


def sums():
    for dim in (128, 64):
        for length in (4096, 16384, 65536):
            scaled = inputs((4, 1), (256, length), dim)
            truth, emulated, _ = truth_and_emulation(scaled)
            line = [f"emulation {relative(emulated, truth):.4f}"]
            for two in (True, False):
                found = ours(scaled, replace(LAUNCHES[dim], two_sums=two))
                slope = ((found.out.double() * truth).sum() / truth.square().sum()).item()
                line.append(f"two_sums={two} {relative(found.out, truth):.4f} slope {slope:.4f}")
            print(f"sums D {dim} {length}:", *line)
        # All values alike: sums grow, so what a sum loses shows.
        scaled = inputs((4, 1), (256, 65536), dim)
        scaled[2] = quantize(torch.randn(1, 1, 65536, dim, device="cuda") * 0.1 + 1)
        truth, emulated, _ = truth_and_emulation(scaled)
        for two in (True, False):
            found = ours(scaled, replace(LAUNCHES[dim], two_sums=two))
            error = relative(found.out, truth)
            print(
                f"sums D {dim} of ones: two_sums={two} {error:.5f} {relative(emulated, truth):.5f}"
            )


def variants(dim):
    base = LAUNCHES[dim]
    if dim == 256:
        return {"forward": (base, "forward"), "free": (base, "free")}
    found = {f"by hand {n}": (replace(base, by_hand=n), "forward") for n in (0, 1, 2)}
    found |= {f"free {n}": (replace(base, by_hand=n), "free") for n in (0, 1)}
    found["by hand 1, 4 stages"] = replace(base, by_hand=1, stages=4), "forward"
    return found


def use(module):
    import importlib

    launching.forward_kernel = importlib.import_module(
        f"saccade.ops.attend.gluon_fp8_{module}"
    ).forward_kernel


def warm(part, parts=10):
    every = [(dim, *pair) for dim in (128, 64, 256) for pair in variants(dim).values()]
    for dim, launch, module in every[part::parts]:
        use(module)
        ours(inputs((4, 1), (512, 512), dim), launch)
    torch.cuda.synchronize()


def quick():
    for dim in (128, 64, 256):
        for name, (launch, module) in variants(dim).items():
            try:
                use(module)
                errors = []
                for lengths in ((700, 900), (2048, 2048)):
                    scaled = inputs((4, 2), lengths, dim, batch=2)
                    truth, emulated, lse = truth_and_emulation(scaled)
                    found = ours(scaled, launch)
                    errors += [relative(found.out, truth), relative(emulated, truth)]
                    errors.append((found.lse - lse).abs().max().item())
                verdict = (
                    "ok" if errors[0] < 1.5 * errors[1] and errors[3] < 1.5 * errors[4] else "WRONG"
                )
                print(verdict, dim, name, " ".join(f"{e:.4f}" for e in errors))
            except Exception as error:
                print("FAILED", dim, name, type(error).__name__, str(error)[:200])


def power():
    import subprocess

    scaled = inputs((32, 8), (16384, 16384), 128)
    for launch in (LAUNCHES[128],):
        use("forward")
        for _ in range(500):
            ours(scaled, launch)
        query = "clocks.sm,clocks.max.sm,power.draw,power.limit,clocks_throttle_reasons.active"
        print(subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                             capture_output=True, text=True).stdout)  # fmt: skip
        torch.cuda.synchronize()


def speed():
    for length, dim, causal in (
        (16384, 128, True), (4096, 128, True), (16384, 64, True), (16384, 256, True),
    ):  # fmt: skip
        q, k, v = (torch.randn(1, h, length, dim, device="cuda").bfloat16() for h in (32, 8, 8))
        scaled = [quantize(x) for x in (q, k, v)]
        work = 4 * 32 * dim * Mask(causal=causal).num_pairs(length, length) / 1e12
        line = [f"{length} D {dim} {causal}:"]
        for name, (launch, module) in variants(dim).items():
            try:
                use(module)
                took = seconds(lambda: ours(scaled, launch, causal=causal), 9, 3)
                line.append(f"| {name} {work / took:.0f}")
            except Exception as error:
                line.append(f"| {name} {type(error).__name__} {str(error)[:100]}")
        took = seconds(lambda: attention(q, k, v, causal=causal, backend="gluon"), 9, 3)
        line.append(f"| bf16 {work / took:.0f}")
        if dim == 128:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                took = seconds(
                    lambda: torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=causal, enable_gqa=True
                    ), 9, 3,
                )  # fmt: skip
            line.append(f"| cudnn bf16 {work / took:.0f}")
        print(*line)


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        warm(int(sys.argv[1]))
        raise SystemExit
    print(torch.cuda.get_device_name())
    for name in sys.argv[1:]:
        start = time.time()
        globals()[name]()
        print(f"{name}: {time.time() - start:.0f} s")
