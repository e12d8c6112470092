"""Few queries on one Hopper card: the Gluon kernel beside Triton and cuDNN, some 500 cells in 20 s.

python lab/visit_decode.py touch 0 1      # compile and check every cell (or every i-th of n)
python lab/visit_decode.py time 50        # then microseconds, in at most so many seconds
python lab/visit_decode.py time 50 headline layer joins rule windows lengths rows
"""

import sys
import time as clock
from functools import partial
from itertools import count, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from gpu_attention import _view, relative
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from saccade.bench import gpu
from saccade.bench.gpu import random
from saccade.core import DenseKV, Mask, PagedKV
from saccade.ops import attend, attention
from saccade.ops.attention.nvidia.gluon.decode import launch as launcher
from saccade.ops.attention.nvidia.gluon.decode.launch import DecodeLaunch
from saccade.ops.attention.nvidia.triton import split_kv as triton_views
from saccade.ops.kv_write.append import KVSlots, append

TOUCH = sys.argv[1] == "touch"
PART, PARTS = (int(x) for x in sys.argv[2:4]) if TOUCH else (0, 1)
BEGIN, LIMIT = clock.time(), float(sys.argv[2]) if not TOUCH else 1e9
NAMES = sys.argv[4:] if TOUCH else sys.argv[3:]
gpu.WARM_SECONDS = 0.003
COLD = 160_000_000  # bytes of caches in turn, more than the L2 cache holds
launch_of, options = launcher.launch_of, launcher.options
merge_blocks = triton_views.merge_blocks
cells, REPEATS = count(), 11


def use(launch=None, free=False, blocks=None):
    """Another launch than the table's (`free`: not cut down to its registers), another merge."""
    launcher.launch_of = launch_of if launch is None else lambda *_: DecodeLaunch(*launch)
    launcher.options = (lambda x: {"num_warps": x.warps, "maxnreg": 240}) if free else options
    triton_views.merge_blocks = merge_blocks if blocks is None else lambda *_: (*blocks, 1)[:3]


def calls(kind, batch, keys, heads, queries, dim, window, most=64, ragged=False, whole=0):
    """[(q, view, options)] over several caches in turn, and the dense keys of the first."""
    sets = 1 if TOUCH else max(2, min(most, COLD // (batch * 8 * keys * dim * 4) + 1))
    found, keep, mask = [], [], Mask(window=window)
    for _ in range(sets):
        k, v = (random(batch, 8, whole or keys, dim) for _ in range(2))
        q, more = random(batch, heads, queries, dim), {}
        view = _view(kind, k, v)[0]
        kv_lens = torch.full((batch,), keys, device="cuda")
        if ragged:
            kv_lens = torch.linspace(keys // 8, keys, batch, device="cuda").long()
        if whole:
            more = {"lengths": kv_lens, "q_offset": kv_lens - queries}
        elif ragged and kind == "dense":
            more = {"lengths": kv_lens}
        elif ragged:
            view = PagedKV(view.k, view.v, view.table, kv_lens.int(), keys)
        found.append((q, view, {"mask": mask} | more))
        keep.append((k, v, kv_lens))
    return found, keep[0]


def check(name, run, case, first):
    q, _, options = case
    k, v, kv_lens = first
    n, groups = int(kv_lens[0]), q.shape[1] // 8
    wide = [x.double() for x in (q[:1, :groups], k[:1, :1, :n], v[:1, :1, :n])]
    truth = attention(*wide, window=options["mask"].window, backend="reference")
    error = relative(run(*case)[:1, :groups], truth)
    if not error < 1e-2:
        print("WRONG", name, error, flush=True)


def ours(backend, q, view, options):
    return attend(q, view, **options, backend=backend, wants_lse=False).out


def cudnn(q, view, options):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, view.k, view.v, enable_gqa=True)


def measure(name, case, whos, most=64):
    """One line: microseconds of each of `whos` = {name: (run, variant)}."""
    row = []
    if clock.time() - BEGIN > LIMIT:
        return ["late"]
    found = first = None
    for who, (run, variant) in whos.items():
        if TOUCH and next(cells) % PARTS != PART:
            continue
        if found is None:
            found, first = calls(*case[:7], most=most, **(case[7] if len(case) > 7 else {}))
        use(**variant)
        try:
            if TOUCH:
                if run is not cudnn:
                    check(f"{name} {who}", run, found[0], first)
                continue
            took = gpu.graph_seconds([partial(run, *x) for x in found], 1, REPEATS)
            row.append(f"{who} {took * 1e6:.1f}")
        except Exception as error:
            row.append(f"{who} {type(error).__name__}: {str(error)[:90]}")
    use()
    return row


def line(name, *rows):
    if not TOUCH:
        print(name, " | ".join(" ".join(row) for row in rows), f"[{clock.time() - BEGIN:.0f}s]",
              flush=True)  # fmt: skip


G, T = partial(ours, "gluon"), partial(ours, "triton")
NOW = {"g": (G, {}), "t": (T, {})}


def named(shapes, **more):
    return {"x".join(map(str, x)): (G, {"launch": x} | more) for x in shapes}


def headline():
    """What the project's table shows."""
    for kind in ("dense", "page16", "page64"):
        whos = NOW | ({"c": (cudnn, {})} if kind == "dense" else {})
        for batch, keys, heads in ((1, 4096, 32), (1, 8192, 32), (1, 32768, 32), (1, 131072, 32),
                                   (16, 8192, 32), (1, 32768, 64)):  # fmt: skip
            case = (kind, batch, keys, heads, 1, 128, None)
            line(f"{kind} B{batch} {keys} {heads}/8", measure("head", case, whos, 24))
    for keys in (4096, 8192, 32768):
        case = ("dense", 1, keys, 32, 1, 128, None, {"whole": 60032})
        line(f"of 60k {keys}", measure("model", case, NOW, 12))


def joins():
    """The merge alone: channels and splits of a program."""
    for rows, splits in ((32, 33), (32, 32), (32, 66), (64, 16), (256, 4), (512, 6), (4096, 2)):
        row, most = [], 1 << (splits - 1).bit_length()
        for blocks in (None, (32, most), (64, most), (128, most)):
            use(blocks=blocks)
            parts = triton_views.Parts.__new__(triton_views.Parts)
            parts.shape, parts.splits = (1, rows, 1, 128), splits
            parts.out = torch.randn(splits, *parts.shape, device="cuda")
            parts.lse = torch.randn(splits, *parts.shape[:3], device="cuda")
            if not TOUCH:
                took = gpu.graph_seconds([partial(parts.joined, torch.bfloat16)] * 20, 1, 9)
                row.append(f"{blocks} {took * 1e6:.2f}")
            elif PART == 1:
                got = parts.joined(torch.float32)
                weights = parts.lse.softmax(0)[..., None]
                error = relative(got.out, (weights * parts.out).sum(0))
                if not error < 1e-4:
                    print("WRONG join", rows, splits, error)
        use()
        line(f"join {rows} x {splits}", row)


def layer():
    """The call between the products of a layer, as a model's captured step has it."""
    sets, keys = 1 if TOUCH else 8, 4096
    weights = [(random(6144, 4096) / 64, random(4096, 4096) / 64) for _ in range(sets)]
    stores = [[random(1, 8, 60032, 128) for _ in range(2)] for _ in range(sets)]
    start = torch.full((1,), keys, device="cuda")
    stop, x = start + 1, random(1, 4096)

    def run(i, backend):
        (into, back), (k, v) = weights[i], stores[i]
        found = torch.nn.functional.linear(x, into).view(1, 1, 48, 128).transpose(1, 2)
        out = q = found[:, :32]
        append(KVSlots(k, v, start), found[:, 32:40], found[:, 40:], None)
        if backend:
            options = {"mask": Mask(), "lengths": stop, "q_offset": start}
            out = attend(q, DenseKV(k, v), **options, backend=backend, wants_lse=False).out
        out = out.transpose(1, 2).contiguous().view(1, 4096)
        return torch.nn.functional.linear(out, back)

    row = []
    for backend in (None, "triton", "gluon"):
        runs = [partial(run, i, backend) for i in range(sets)]
        if not TOUCH:
            row.append(f"{backend} {gpu.graph_seconds(runs, 2, 15) * 1e6:.1f}")
        elif PART == 0:
            runs[0]()
    line("layer at 4k", row)


def rule():
    """Where it wins."""
    for dim in (128, 64):
        for kind in ("dense", "page16", "page64"):
            whos = NOW | ({"c": (cudnn, {})} if kind == "dense" else {})
            for batch in (1, 4, 16, 64):
                rows = []
                for keys in (64, 256, 512, 1024, 2048, 4096, 8192):
                    row = measure(kind, (kind, batch, keys, 32, 1, dim, None), whos, 24)
                    rows.append([str(keys), *row])
                line(f"D{dim} {kind} B{batch}:", *rows)


def windows():
    for dim, kind in product((128, 64), ("dense", "page16")):
        rows = []
        for window, batch in product((1024, 4096), (1, 4, 16)):
            case = (kind, batch, 32768, 32, 1, dim, window)
            rows.append([f"{window} B{batch}", *measure("window", case, NOW, 4)])
        line(f"D{dim} window {kind}:", *rows)


def kv_lens():
    """Rows of one length and of lengths from an eighth of it on; other launches for them."""
    shapes = [(8, 1, 2), (4, 2, 3), (4, 4, 3), (4, 6, 3), (8, 2, 2), (8, 3, 2)]
    for ragged, kind, batch in product((False, True), ("dense", "page16"), (4, 16, 64)):
        case = (kind, batch, 8192, 32, 1, 128, None, {"ragged": ragged})
        name = f"{'ragged' if ragged else 'equal'} {kind} B{batch}"
        line(name, measure("ragged", case, NOW | named(shapes, free=True), 4))


def rows():
    """Heads of a group times queries."""
    few, many = ((1, 1), (2, 1), (4, 2)), ((4, 3), (4, 4), (8, 2))
    for dim, (groups, queries) in product((64, 128), (*many, *few)):
        for kind in ("dense", "page16", "page64"):
            found = []
            for batch, keys in product((1, 4, 16), (2048, 8192)):
                case = (kind, batch, keys, 8 * groups, queries, dim, None)
                found.append([f"B{batch} {keys}", *measure("rows", case, NOW, 12)])
            line(f"D{dim} rows {groups} x {queries} {kind}:", *found)


print(torch.cuda.get_device_name(), sys.argv[1:], flush=True)
torch.manual_seed(0)
for part in (headline, layer, joins, rule, windows, kv_lens, rows):
    if NAMES and part.__name__ not in NAMES:
        continue
    try:
        part()
    except Exception as error:
        print(part.__name__, type(error).__name__, str(error)[:200], flush=True)
print(f"{clock.time() - BEGIN:.0f}s", flush=True)
