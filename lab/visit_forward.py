"""The Gluon forward over packed documents, rows of their own lengths and pages: right, then fast.

python lab/visit_forward.py packed 128     # also lengths, pages; then `time`
"""

import statistics
import sys
from functools import partial

import torch

from saccade.core import Mask, PagedKV
from saccade.ops import attend, attention

BF16 = torch.bfloat16
MASKS = ({}, {"causal": False}, {"window": 200, "sinks": 3})
torch.manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, device="cuda", dtype=BF16)


def compare(name, ours, truth, lse, true_lse):
    error = (ours.double() - truth).abs().max().item()
    same = torch.equal(lse.isneginf(), true_lse.isneginf())
    off = (lse.nan_to_num(neginf=0) - true_lse.nan_to_num(neginf=0)).abs().max().item()
    good = error < 2.5e-2 and same and off < 1e-3
    print("ok  " if good else "BAD ", name, f"{error:.1e} lse {off:.1e} {same}", flush=True)


def packed(dim):
    q_lens, k_lens = [300, 0, 1, 77, 513, 20, 128, 30], [300, 3, 70, 77, 700, 0, 128, 5]
    cu = [torch.tensor([0, *x]).cumsum(0).cuda() for x in (q_lens, k_lens)]
    q, k, v = (
        rand(1, h, n, dim) for h, n in ((6, sum(q_lens)), (2, sum(k_lens)), (2, sum(k_lens)))
    )
    for mask in MASKS:
        options = {**mask, "cu_seqlens": tuple(cu), "return_lse": True}
        truth = attention(q.double(), k.double(), v.double(), **options, backend="reference")
        ours = attention(q, k, v, **options, backend="gluon")
        compare(f"packed {dim} {mask}", ours.out, truth.out, ours.lse, truth.lse)


def kv_lens(dim):
    ends = torch.tensor([700, 200, 333], device="cuda")
    q, k, v = (rand(3, h, n, dim) for h, n in ((6, 200), (2, 720), (2, 720)))
    past = torch.arange(720, device="cuda")[None] >= ends[:, None]
    for x in (k, v):
        x.masked_fill_(past[:, None, :, None], torch.nan)
    for mask in MASKS:
        options = {**mask, "lengths": ends, "return_lse": True}
        truth = attention(q.double(), k.double(), v.double(), **options, backend="reference")
        ours = attention(q, k, v, **options, backend="gluon")
        compare(f"lengths {dim} {mask}", ours.out, truth.out, ours.lse, truth.lse)


def view_of(k, v, ends, page, junk=torch.nan):
    batch, heads, length, dim = k.shape
    count = -(-length // page)
    order = torch.randperm(batch * count, device="cuda").view(batch, count)
    pools = []
    for x in (k, v):
        pool = torch.full((batch * count, heads, page, dim), junk, device="cuda", dtype=x.dtype)
        padded = torch.nn.functional.pad(x, (0, 0, 0, count * page - length), value=junk)
        pool[order.flatten()] = (
            padded.view(batch, heads, count, page, dim).transpose(1, 2).flatten(0, 1)
        )
        pools.append(pool)
    table = order.to(torch.int32)
    table[torch.arange(count, device="cuda")[None] * page >= ends[:, None]] = 1_000_000
    return PagedKV(*pools, table, ends.to(torch.int32), int(ends.max()))


def pages(dim):
    ends = torch.tensor([700, 200, 333], device="cuda")
    q, k, v = (rand(3, h, n, dim) for h, n in ((6, 200), (2, 700), (2, 700)))
    past = torch.arange(700, device="cuda")[None] >= ends[:, None]
    for x in (k, v):
        x.masked_fill_(past[:, None, :, None], torch.nan)
    for page in (16, 64, 256):
        for mask in (Mask(), Mask(window=200, sinks=3)) if page != 64 else (Mask(causal=False),):
            view = view_of(k, v, ends, page)
            truth = attention(
                q.double(), k.nan_to_num().double(), v.nan_to_num().double(), kv_lens=ends,
                causal=mask.causal, window=mask.window, sinks=mask.sinks, return_lse=True,
                backend="reference",
            )  # fmt: skip
            ours = attend(q, view, mask=mask, backend="gluon")
            compare(f"pages {page} {dim} {mask}", ours.out, truth.out, ours.lse, truth.lse)


def seconds(run, repeats=7):
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def line(name, pairs, runs, dim=128):
    row = []
    for who, run in runs.items():
        try:
            row.append(f"{who} {4 * 32 * dim * pairs / seconds(run) / 1e12:.0f}")
        except Exception as error:
            row.append(f"{who} {type(error).__name__} {str(error)[:80]}")
    print(f"{name:34}", "  ".join(row), flush=True)


def time():
    print(torch.cuda.get_device_name(), flush=True)
    a = rand(8192, 8192)
    print("matmul", f"{2 * 8192**3 / seconds(partial(torch.mm, a, a)) / 1e12:.0f}", flush=True)
    q, k, v = (rand(1, h, 32768, 128) for h in (32, 8, 8))
    both = ("gluon", "triton")
    for lens in ([4096] * 8, [512] * 64, [16384, 8000, 4000, 2000, 1000, 700, 500, 184]):
        cu = torch.tensor([0, *lens], device="cuda").cumsum(0)
        work = sum(n * (n + 1) / 2 for n in lens)
        run = partial(attention, q, k, v, cu_seqlens=(cu, cu))
        line(f"packed {lens[:3]}", work, {who: partial(run, backend=who) for who in both})
    ends = torch.tensor([32768], device="cuda")
    for rows in (512, 2048, 8192):
        part = q[:, :, -rows:]
        work = rows * (32768 - rows) + rows * (rows + 1) / 2
        runs = {who: partial(attention, part, k, v, backend=who) for who in both}
        for page in (16, 128):
            view = view_of(k, v, ends, page)
            for who in both:
                run = partial(attend, part, view, mask=Mask(), backend=who)
                runs[f"{who}-page{page}"] = run
        line(f"chunk of {rows} over 32k", work, runs)


if __name__ == "__main__":
    if sys.argv[1] == "time":
        time()
    else:
        globals()[sys.argv[1]](int(sys.argv[2]))
