"""Decoding over codes on Hopper: right first, then beside bf16.  python lab/visit_codes2.py"""

import sys

import torch

from benchmarks.gpu_attention import graph_seconds
from saccade.core import DenseKV, GrowingKV, Mask, QuantizedKV
from saccade.core.formats import (
    Codes,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from saccade.ops.attend import gluon_codes_launch as launches
from saccade.ops.attend import triton_views
from saccade.ops.attend.api import attend

torch.manual_seed(0)


def packed(k, v, kind_k, kind_v, v_group):
    def bits(kind):
        return 4 if kind == "int4" else 8

    coded = (
        quantize_keys(k, bits=bits(kind_k), group=64, fp8=kind_k == "fp8"),
        quantize_values(v, bits=bits(kind_v), group=v_group, fp8=kind_v == "fp8"),
    )
    return coded, bits(kind_k), bits(kind_v)


def check(
    kind_k,
    kind_v,
    *,
    batch=2,
    heads=8,
    kv_heads=2,
    queries=1,
    dim=128,
    keys=1024,
    recent=9,
    v_group=None,
    mask=None,
    dtype=torch.bfloat16,
    sink=False,
):
    q = torch.randn(batch, heads, queries, dim, device="cuda").to(dtype)
    channel = torch.exp(torch.randn(1, kv_heads, 1, dim, device="cuda"))
    k = torch.randn(batch, kv_heads, keys, dim, device="cuda") * channel + torch.randn(
        1, kv_heads, 1, dim, device="cuda"
    )
    v = torch.randn(batch, kv_heads, keys, dim, device="cuda") + 0.5
    coded, bk, bv = packed(k.to(dtype), v.to(dtype), kind_k, kind_v, v_group or min(64, dim))
    parts = [torch.randn(batch, kv_heads, recent, dim, device="cuda").to(dtype) for _ in range(2)]
    view = QuantizedKV(*coded, *parts, bk, bv, 64)
    full_k = torch.cat(
        (dequantize_keys(coded[0], bits=bk, group=64, dtype=torch.float64), parts[0].double()), 2
    )
    full_v = torch.cat(
        (dequantize_values(coded[1], bits=bv, dtype=torch.float64), parts[1].double()), 2
    )
    mask = mask or Mask()
    more = {"sink_logits": torch.randn(heads, device="cuda")} if sink else {}
    truth = attend(
        q.double(),
        DenseKV(full_k, full_v),
        mask=mask,
        backend="reference",
        **({"sink_logits": more["sink_logits"].double()} if sink else {}),
    )
    eager = attend(
        q, DenseKV(full_k.to(dtype), full_v.to(dtype)), mask=mask, backend="reference", **more
    )
    ours = attend(q, view, mask=mask, backend="triton", **more)
    error = (ours.out.double() - truth.out).abs().max().item()
    lse = (ours.lse.double() - truth.lse).abs().max().item()
    base = (eager.out.double() - truth.out).abs().max().item()
    print(
        "ok " if error < 2 * base + 1e-3 else "BAD",
        kind_k,
        kind_v,
        q.shape[2],
        dim,
        v_group,
        dtype,
        mask,
        f"error {error:.2e} eager {base:.2e} lse {lse:.1e}",
        flush=True,
    )


def step_times(batch, length, configurations, kinds):
    heads, kv_heads, dim = 32, 8, 128
    size = batch * kv_heads * length * dim * 4
    sets = max(2, min(8, 400_000_000 // size + 1))
    loops = 4 if size < 2**28 else 1
    queries = [torch.randn(batch, heads, 1, dim, device="cuda").bfloat16() for _ in range(sets)]
    stores = [
        [torch.randn(batch, kv_heads, length, dim, device="cuda").bfloat16() for _ in range(2)]
        for _ in range(sets)
    ]
    runs = [
        lambda q=q, s=s: attend(q, DenseKV(*s), mask=Mask(), backend="triton").out
        for q, s in zip(queries, stores)
    ]
    base = graph_seconds(runs, loops)
    print(f"B{batch} {length} bf16 {base * 1e6:.1f} us {size / base / 1e9:.0f} GB/s", flush=True)
    for kind in kinds:
        views, read = [], 0
        for k, v in stores:
            coded, bk, bv = packed(k, v, kind, kind, 64)
            views.append(QuantizedKV(*coded, k[:, :, :0], v[:, :, :0], bk, bv, 64))
            read = sum(x.numel() * x.element_size() for part in coded for x in part)
        for per_sm, registers, few in configurations:
            triton_views.FEW = few
            launches.LAUNCH = launches.CodesLaunch(per_sm, registers)
            try:
                runs = [
                    lambda q=q, kv=kv: attend(q, kv, mask=Mask(), backend="triton").out
                    for q, kv in zip(queries, views)
                ]
                took = graph_seconds(runs, loops)
                print(
                    f"B{batch} {length} {kind} {per_sm} programs, {registers} registers, joined by {few}: {took * 1e6:.1f} us "
                    f"{read / took / 1e9:.0f} GB/s = {base / took:.2f}x",
                    flush=True,
                )
            except Exception as error:
                print(kind, per_sm, registers, type(error).__name__, str(error)[-300:], flush=True)
        del views


def check_growing(kind):
    """A device-side count of codes, what lies behind being nan."""
    q = torch.randn(2, 8, 2, 128, device="cuda").bfloat16()
    k, v = (torch.randn(2, 2, 512, 128, device="cuda").bfloat16() for _ in range(2))
    coded, bk, bv = packed(k, v, kind, kind, 64)
    for part in coded:
        for x in part[1:]:
            x[:, :, 320 // (512 // x.shape[2]) :] = torch.nan
    parts = [torch.randn(2, 2, 48, 128, device="cuda").bfloat16() for _ in range(2)]
    filled = QuantizedKV(
        Codes(coded[0].codes[:, :, :320], *(x[:, :, :5] for x in coded[0][1:])),
        Codes(*(x[:, :, :320] for x in coded[1])),
        *(x[:, :, :33] for x in parts),
        bk,
        bv,
        64,
    )
    truth = attend(q, filled, mask=Mask(), backend="reference")
    view = GrowingKV(QuantizedKV(*coded, *parts, bk, bv, 64), torch.tensor([320], device="cuda"))
    stop = torch.tensor([353], device="cuda")
    ours = attend(
        q,
        view,
        mask=Mask(),
        lengths=stop.expand(2),
        q_offset=(stop - 2).expand(2),
        backend="triton",
    )
    print(
        "growing",
        kind,
        (ours.out - truth.out).abs().max().item(),
        (ours.lse - truth.lse).abs().max().item(),
        flush=True,
    )


def profile(batch, length, kind):
    """Microseconds of each kernel of one step."""
    k, v = (torch.randn(batch, 8, length, 128, device="cuda").bfloat16() for _ in range(2))
    q = torch.randn(batch, 32, 1, 128, device="cuda").bfloat16()
    coded, bk, bv = packed(k, v, kind, kind, 64)
    view = QuantizedKV(*coded, k[:, :, :0], v[:, :, :0], bk, bv, 64)
    flush = torch.empty(2**27, device="cuda")
    for _ in range(3):
        attend(q, view, mask=Mask(), backend="triton")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            flush.zero_()
            attend(q, view, mask=Mask(), backend="triton")
    for row in found.key_averages():
        print("  profile", kind, row.key[:40], row.count, f"{row.device_time:.1f} us", flush=True)


def main():
    what = sys.argv[1]
    if what == "check":
        cases = [
            {"kind_k": "int4", "kind_v": "int4", "dtype": torch.float16, "recent": 0, "sink": True},
            {"kind_k": "int8", "kind_v": "int8", "dtype": torch.float16, "queries": 5},
            {"kind_k": "fp8", "kind_v": "int4", "recent": 100, "mask": Mask(window=64)},
        ]
        for kind in ("int8", "int4", "fp8"):
            try:
                check_growing(kind)
            except Exception as error:
                print("FAILED growing", kind, str(error)[-600:], flush=True)
        for case in cases:
            try:
                check(**case)
            except Exception as error:
                print("FAILED", case, type(error).__name__, str(error)[-600:], flush=True)
    else:
        x = torch.randn(2**28, device="cuda")
        total = graph_seconds([lambda: x.sum()], 1)
        print(torch.cuda.get_device_name(), f"reads {x.numel() * 4 / total / 1e9:.0f} GB/s")
        kinds = sys.argv[2].split(",")
        configurations = [tuple(map(int, c.split("x"))) for c in sys.argv[3].split(",")]
        for case in sys.argv[4].split(","):
            batch, length = map(int, case.split("x"))
            step_times(batch, length, configurations, kinds)
            torch.cuda.empty_cache()
        profile(1, 131072, kinds[-1])


if __name__ == "__main__":
    main()
