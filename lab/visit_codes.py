"""Decoding over codes on a card: correct first, then microseconds beside bf16.

python lab/visit_codes.py check
python lab/visit_codes.py growing      # counts on the device, poison behind them
python lab/visit_codes.py time
python lab/visit_codes.py rows         # more queries, other heads, beside Triton's kernel
"""

import sys
import time

import torch

from benchmarks.gpu_attention import ceilings, graph_seconds, random
from saccade.bench.inputs import KINDS, coded
from saccade.core import DenseKV, GrowingKV, Mask, QuantizedKV
from saccade.core.formats import QuantizedTensor
from saccade.core.kv import dense
from saccade.ops import attend
from saccade.ops.attention.nvidia.gluon.quantized_decode import launch as gluon_codes_launch
from saccade.ops.attention.nvidia.gluon.quantized_decode.launch import CodesLaunch


def check_one(kind, dtype, dim, v_group, heads, batch, keys, recent, queries, window, backend):
    torch.manual_seed(0)
    k, v = (
        torch.randn(batch, heads[1], keys + recent, dim, device="cuda", dtype=dtype)
        for _ in range(2)
    )
    k += 3 * torch.randn(1, heads[1], 1, dim, device="cuda", dtype=dtype)
    q = torch.randn(batch, heads[0], queries, dim, device="cuda", dtype=dtype)
    view = coded(k, v, kind, recent, v_group)
    wide = QuantizedKV(view.k, view.v, view.recent_k.double(), view.recent_v.double(),
                       view.bits_k, view.bits_v, 64)  # fmt: skip
    whole, low = dense(wide), dense(view)
    mask = Mask(window=window)
    truth = attend(q.double(), DenseKV(whole.k, whole.v), mask=mask, backend="reference")
    eager = attend(q, DenseKV(low.k, low.v), mask=mask, backend="reference")
    ours = attend(q, view, mask=mask, backend=backend)
    return (
        (ours.out - truth.out).abs().max().item(), (eager.out - truth.out).abs().max().item(),
        (ours.lse - truth.lse).abs().max().item(), (eager.lse - truth.lse).abs().max().item(),
    )  # fmt: skip


def check():
    half, bfloat = torch.float16, torch.bfloat16
    cases = [
        ("int4", bfloat, 128, 64, (32, 8), 2, 2048, 0, 1, None),
        ("int8", half, 64, 64, (9, 3), 2, 1088, 70, 5, None),
        ("int4", half, 128, 128, (8, 2), 3, 1088, 70, 3, None),
        ("fp8", half, 64, 64, (6, 1), 2, 1088, 1, 16, 777),
        ("int8", half, 64, 32, (6, 1), 2, 1088, 1, 16, 777),
        ("k8v4", half, 64, 64, (4, 2), 2, 320, 0, 10, 90),
        ("int4", half, 64, 64, (9, 3), 2, 1088, 70, 1, 100),
        ("fp8", bfloat, 128, 64, (6, 1), 2, 4096, 64, 2, 300),
        ("int8", half, 128, 64, (8, 2), 1, 64, 0, 1, None),
        ("k8v4", half, 128, 64, (4, 4), 2, 4096, 64, 1, None),
        ("int8", bfloat, 128, 64, (32, 8), 1, 32768, 0, 1, None),
        ("int4", half, 128, 64, (32, 8), 1, 32768, 0, 1, None),
        ("int8", half, 128, 64, (64, 2), 1, 1024, 0, 2, None),
    ]
    for case in cases:
        for backend in ("gluon",):
            try:
                a, b, c, d = check_one(*case, backend)
                fine = a <= 2 * b + 2e-3 and c <= max(2 * d, 1e-3)
                print("ok  " if fine else "BAD ", backend, *case, f"{a:.1e} eager {b:.1e}",
                      f"lse {c:.1e} eager {d:.1e}", flush=True)  # fmt: skip
            except Exception as error:
                print("FAIL", backend, *case, type(error).__name__, str(error)[:300], flush=True)


def first_of(view, packed, recent):
    """The first keys of a view alone."""
    return QuantizedKV(
        QuantizedTensor(view.k.qdata[:, :, :packed], *(x[:, :, : packed // 64] for x in view.k[1:])),
        QuantizedTensor(*(x[:, :, :packed] for x in view.v)),
        view.recent_k[:, :, :recent], view.recent_v[:, :, :recent], view.bits_k, view.bits_v, 64,
    )  # fmt: skip


def growing():
    """Counts on the device, poison behind them, and per-row lengths."""
    k, v = (torch.randn(2, 2, 512, 128, device="cuda", dtype=torch.float16) for _ in range(2))
    q = torch.randn(2, 8, 2, 128, device="cuda", dtype=torch.float16)
    for kind in KINDS:
        for packed in (0, 64, 320, 448):
            view = coded(k, v, kind, 64)
            truth = attend(q, first_of(view, packed, 33), mask=Mask(), backend="tiled")
            for x in view.v[1:]:
                x[:, :, packed:] = torch.nan
            for x in view.k[1:]:
                x[:, :, packed // 64 :] = torch.nan
            grown = GrowingKV(view, torch.tensor([packed], device="cuda"))
            stop = torch.tensor([packed + 33] * 2, device="cuda")
            ours = attend(q, grown, mask=Mask(), kv_lens=stop, q_offset=stop - 2, backend="gluon")
            error = (ours.out - truth.out).abs().max().item()
            print("ok  " if error < 4e-3 else "BAD ", "growing", kind, packed, error, flush=True)
    for kind in KINDS:
        view = coded(k, v, kind)
        kv_lens = torch.tensor([300, 77], device="cuda")
        where = {"kv_lens": kv_lens, "q_offset": kv_lens - 2, "mask": Mask()}
        truth = attend(q, view, **where, backend="tiled")
        for x in view.v[1:]:
            x[0, :, 300:], x[1, :, 77:] = torch.nan, torch.nan
        if kind == "fp8":
            view.v.qdata.view(torch.uint8)[0, :, 300:] = 0x7F
        error = (attend(q, view, **where, backend="gluon").out - truth.out).abs().max().item()
        print("ok  " if error < 4e-3 else "BAD ", "lengths", kind, error, flush=True)


def measure(batch, length, plans, queries=1, loops=None):
    """One line a kind: microseconds and times bf16, by programs of a multiprocessor."""
    heads, kv_heads, dim = 32, 8, 128
    size = batch * kv_heads * length * dim * 4
    sets = max(2, min(20, 1_200_000_000 // size + 1))
    qs = [random(batch, heads, queries, dim) for _ in range(sets)]
    stores = [[random(batch, kv_heads, length, dim) for _ in range(2)] for _ in range(sets)]
    loops = loops or max(1, 40 // sets if size < 2**28 else 1)
    base = graph_seconds(
        [lambda q=q, k=k, v=v: attend(q, DenseKV(k, v), mask=Mask(), backend="triton").out
         for q, (k, v) in zip(qs, stores, strict=True)], loops,
    )  # fmt: skip
    print(f"B{batch} {length} bf16 {base * 1e6:.1f} us {size / base / 1e9:.0f} GB/s", flush=True)
    for kind, programs in plans.items():
        views = [coded(k, v, kind) for k, v in stores]
        held = sum(x.numel() * x.element_size() for part in (views[0].k, views[0].v) for x in part)
        line = f"  {kind}"
        for per_sm in programs:
            gluon_codes_launch.LAUNCH = CodesLaunch(per_sm, 192)
            took = graph_seconds(
                [lambda q=q, view=view: attend(q, view, mask=Mask(), backend="gluon").out
                 for q, view in zip(qs, views, strict=True)], loops,
            )  # fmt: skip
            line += f" | {per_sm}: {took * 1e6:.1f} us {base / took:.2f}x {held / took / 1e9:.0f}"
        print(line, flush=True)
        del views


PLANS = {"int4": [8, 6], "int8": [8, 4], "fp8": [8], "k8v4": [8]}


def warm():
    """Compile everything that is timed: kinds named on the command line."""
    measure(1, 8192, {kind: PLANS[kind] for kind in sys.argv[2].split(",")}, loops=1)


def rows():
    """More rows than eight, and other heads, beside Triton's kernel for codes and for bf16."""
    for dim, queries in ((64, 1), (64, 2), (64, 8), (128, 16), (128, 32)):
        for batch, length in ((1, 32768), (16, 8192)):
            k, v = (random(batch, 8, length, dim) for _ in range(2))
            qs = [random(batch, 32, queries, dim) for _ in range(2)]
            views = {kind: coded(k, v, kind) for kind in ("int4", "int8")}
            pairs = [("bf16", DenseKV(k, v), "triton")]
            pairs += [(kind, view, b) for kind, view in views.items() for b in ("gluon", "triton")]
            line = f"rows {4 * queries} D{dim} B{batch} {length}"
            for kind, view, backend in pairs:
                took = graph_seconds(
                    [lambda q=q, kv=view, b=backend: attend(q, kv, mask=Mask(), backend=b).out
                     for q in qs], 1,
                )  # fmt: skip
                line += f" | {kind} {backend} {took * 1e6:.1f}"
            print(line, flush=True)


def profile(batch, length, kind):
    """Microseconds of each kernel of one call, caches cold."""
    k, v = (random(batch, 8, length, 128) for _ in range(2))
    q, view = random(batch, 32, 1, 128), coded(k, v, kind)
    flush = torch.empty(2**27, device="cuda")
    for _ in range(2):
        attend(q, view, mask=Mask(), backend="gluon")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            flush.zero_()
            attend(q, view, mask=Mask(), backend="gluon")
    took = {e.key[:12]: f"{e.device_time:.1f}" for e in found.key_averages() if "kernel" in e.key}
    print(f"profile B{batch} {length} {kind}", took, flush=True)


def timing():
    print(torch.cuda.get_device_name(), ceilings(), flush=True)
    for batch, length in ((1, 131072), (16, 8192), (1, 8192), (1, 32768)):
        measure(batch, length, PLANS)
        torch.cuda.empty_cache()
    gluon_codes_launch.LAUNCH = CodesLaunch(8, 192)
    for batch, length in ((1, 131072), (16, 8192), (1, 8192)):
        profile(batch, length, "int4")


if __name__ == "__main__":
    begin = time.time()
    {"check": check, "growing": growing, "warm": warm, "rows": rows, "time": timing}[sys.argv[1]]()
    print(f"{time.time() - begin:.0f} s")
