"""Times of the Gluon forward on a card: dense, packed, pages, with cuDNN and Triton beside it.

python lab/visit_rows.py time      # also: compile, doors, power
"""

import subprocess
import sys
import time as clock
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, "lab")
from visit_forward import view_of

from saccade.bench.gpu import seconds
from saccade.core import DenseKV, Mask
from saccade.ops import attend, attention
from saccade.ops.attention.api import make_call
from saccade.ops.attention.dispatch import explain

BF16 = torch.bfloat16
torch.manual_seed(0)
BEGIN = clock.time()


def rand(*shape):
    return torch.randn(*shape, device="cuda", dtype=BF16)


def cudnn(q, k, v, causal=True):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def line(name, flops, runs, repeats=7):
    row = []
    for who, run in runs.items():
        try:
            row.append(f"{who} {flops / seconds(run, repeats) / 1e12:.0f}")
        except Exception as error:
            row.append(f"{who} {type(error).__name__} {str(error)[:60]}")
    print(f"{name:30}", "  ".join(row), f" [{clock.time() - BEGIN:.0f}s]", flush=True)


def pairs_of(length, causal=True, window=None):
    if not causal:
        return length * length
    if window is None:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window


DENSE = (
    (64, 16384, {}), (128, 16384, {}), (256, 16384, {}), (128, 16384, {"causal": False}),
    (128, 4096, {}), (128, 8192, {}), (256, 16384, {"causal": False}),
    (128, 32768, {}), (128, 16384, {"window": 1024}), (128, 16384, {"window": 4096}),
)  # fmt: skip


def dense(compile_only=False):
    for dim, whole, options in DENSE:
        length = 1024 if compile_only else whole
        q, k, v = (rand(1, h, length, dim) for h in (32, 8, 8))
        runs = {"gluon": partial(attention, q, k, v, **options, backend="gluon")}
        if compile_only:
            runs["gluon"]()
            continue
        if "window" not in options:
            runs["cudnn"] = partial(cudnn, q, k, v, **options)
        line(f"D{dim} {length} {options}", 4 * 32 * dim * pairs_of(length, **options), runs)


PACKED = ([4096] * 8, [512] * 64, [1024] * 32, [2048] * 16,
          [16384, 8000, 4000, 2000, 1000, 700, 500, 184])  # fmt: skip


def packed(dim, every=PACKED, scale=1):
    for whole in every:
        lens = [n // scale for n in whole]
        q, k, v = (rand(1, h, sum(lens), dim) for h in (32, 8, 8))
        cu = torch.tensor([0, *lens], device="cuda", dtype=torch.int32).cumsum(0)
        work = 4 * 32 * dim * sum(map(pairs_of, lens))
        run = partial(attention, q, k, v, cu_seqlens=(cu, cu))
        runs = {who: partial(run, backend=who) for who in ("gluon", "triton")}
        line(f"packed D{dim} {len(lens)} x {lens[0]}..", work, runs)


def chunks(dim, rows, total, pages, whos=("gluon", "triton"), repeats=5):
    ends = torch.tensor([total], device="cuda")
    q, k, v = (rand(1, h, total, dim) for h in (32, 8, 8))
    for count in rows:
        part = q[:, :, -count:]
        work = 4 * 32 * dim * (count * (total - count) + pairs_of(count))
        runs = {who: partial(attention, part, k, v, backend=who) for who in whos}
        for page in pages:
            view = view_of(k, v, ends, page)
            for who in whos:
                runs[f"{who}-p{page}"] = partial(
                    attend, part, view, mask=Mask(), wants_lse=False, backend=who
                )
        line(f"D{dim} chunk {count} of {total}", work, runs, repeats)


def kv_lens(dim):
    ends = torch.tensor([8192, 6000, 4096, 7777], device="cuda")
    q, k, v = (rand(4, h, n, dim) for h, n in ((32, 2048), (8, 8192), (8, 8192)))
    work = 4 * 32 * dim * sum(2048 * (n - 2048) + pairs_of(2048) for n in ends.tolist())
    run = partial(attention, q, k, v, kv_lens=ends)
    runs = {who: partial(run, backend=who) for who in ("gluon", "triton")}
    line(f"D{dim} 4 rows of own lengths", work, runs)


def doors():
    """What auto takes, and that a second call with the same documents does not wait."""
    q, k, v = (rand(1, h, 8192, 128) for h in (32, 8, 8))
    cu = torch.arange(0, 8193, 4096, device="cuda", dtype=torch.int32)
    view = view_of(k, v, torch.tensor([8192], device="cuda"), 16)
    calls = {
        "packed": make_call(q, DenseKV(k, v), mask=Mask(), cu_seqlens=(cu, cu)),
        "pages": make_call(q, view, mask=Mask()),
        "pages, few": make_call(q[:, :, -16:], view, mask=Mask()),
    }
    for name, call in calls.items():
        print(name, next(pair for pair in explain(call) if pair[1].startswith("chosen")))
    for who in ("gluon", "triton"):
        attention(q, k, v, cu_seqlens=cu, backend=who)
        attend(q, view, mask=Mask(), backend=who)
        torch.cuda.set_sync_debug_mode("error")
        attention(q, k, v, cu_seqlens=cu, backend=who)
        attend(q, view, mask=Mask(), backend=who)
        torch.cuda.set_sync_debug_mode("default")
    once = attention(q, k, v, cu_seqlens=cu, backend="gluon")
    for capture in ("known", "unknown"):
        given = cu if capture == "known" else cu.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = attention(q, k, v, cu_seqlens=given, backend="gluon")
        graph.replay()
        print("graph", capture, torch.equal(once, again))
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    ours = attention(turned, k, v, backend="gluon")
    print("as queries", ours.stride() == turned.stride(),
          torch.equal(ours, attention(q, k, v, backend="gluon")))  # fmt: skip


def power():
    """Whether 32k is slow because the card is hot: alone after a pause, and many in a row."""
    from saccade.ops.attention.nvidia.gluon.prefill import launch as gluon_launch

    watch = subprocess.Popen(
        ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits",
         "-lms", "100"], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for batch, length in ((1, 32768), (2, 16384), (4, 16384)):
        q, k, v = (rand(batch, h, length, 128) for h in (32, 8, 8))
        work = 4 * 32 * 128 * batch * pairs_of(length)
        for who, run in (
            ("gluon", partial(attention, q, k, v, backend="gluon")),
            ("cudnn", partial(cudnn, q, k, v)),
        ):
            run()
            alone = []
            for _ in range(2):
                torch.cuda.synchronize()
                clock.sleep(0.5)
                alone.append(work / seconds_once(run) / 1e12)
            row = [work / seconds_once(run) / 1e12 for _ in range(16)]
            print(f"{batch} x {length} {who} alone", *(f"{x:.0f}" for x in alone), "in a row",
                  *(f"{x:.0f}" for x in row), flush=True)  # fmt: skip
    q, k, v = (rand(1, h, 32768, 128) for h in (32, 8, 8))
    work = 4 * 32 * 128 * pairs_of(32768)
    for share in (8, 16, 24, 32, 48, 64, 128):
        gluon_launch.L2_SHARE = share * 2**20
        run = partial(attention, q, k, v, backend="gluon")
        line(f"32k, sections of {share} MiB", work, {"gluon": run}, 9)
    gluon_launch.L2_SHARE = 32 * 2**20
    watch.terminate()
    seen = [row.strip() for row in watch.stdout.read().splitlines()]
    print("clock MHz, W:", " | ".join(seen[:: max(1, len(seen) // 40)]))


def seconds_once(run):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def host():
    """What a call costs the host."""
    q, k, v = (rand(1, h, 256, 128) for h in (32, 8, 8))
    cu = torch.arange(0, 257, 128, device="cuda", dtype=torch.int32)
    view = view_of(k, v, torch.tensor([256], device="cuda"), 16)
    for name, run in {
        "dense": partial(attention, q, k, v, backend="gluon"),
        "packed": partial(attention, q, k, v, cu_seqlens=cu, backend="gluon"),
        "packed, Triton": partial(attention, q, k, v, cu_seqlens=cu, backend="triton"),
        "pages": partial(attend, q, view, mask=Mask(), backend="gluon"),
        "pages, auto": partial(attend, q, view, mask=Mask()),
        "SDPA": partial(cudnn, q, k, v),
    }.items():
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        begin = clock.perf_counter()
        for _ in range(100):
            run()
        print("host", name, f"{(clock.perf_counter() - begin) / 100 * 1e6:.0f} us")


def time():
    print(torch.cuda.get_device_name(), flush=True)
    a = rand(8192, 8192)
    print("matmul", f"{2 * 8192**3 / seconds(partial(torch.mm, a, a)) / 1e12:.0f}", flush=True)
    dense()
    for dim in (128, 64, 256):
        packed(dim, PACKED if dim == 128 else PACKED[:3])
        kv_lens(dim)
    chunks(128, (32, 64, 128, 256, 512, 2048), 8192, (16,))
    chunks(128, (64, 512, 2048), 32768, (16, 128), repeats=3)
    chunks(64, (128, 512, 2048), 8192, (16, 128))
    chunks(256, (128, 512, 2048), 8192, (16, 64))
    host()
    power()


def compile():
    """What time() runs, small."""
    dense(compile_only=True)
    for dim in (64, 128, 256):
        kv_lens(dim)
        packed(dim, PACKED[:1], 8)
        for page in (16, 64, 128):
            chunks(dim, (32, 128), 2048, (page,), repeats=1)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
