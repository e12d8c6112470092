"""Products with packed weights beside PyTorch's dense products of the same sizes.

    python -m benchmarks.linear

Each is compared with float64 before it is timed.  All run in turns, and the least processor seconds
count: of one thread, since a thread that waits for another one spins.  PyTorch's own packed int4
product is among them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.linear import PackedWeight, dequantize, linear, quantized
from saccade.ops.linear.packed import unpack
from saccade.report.environment import cpu_name

SHAPES = [(1536, 1536), (8960, 1536), (1536, 8960)]
ROWS = [1, 8, 64, 512]
_MOST_FLOPS = 3e9
Product = Callable[[Tensor], Tensor]


def products(out: int, width: int) -> tuple[dict[str, Product], Tensor]:
    """What is timed, by name, for x in float32; and the matrix that all stand for."""
    four = quantized(torch.randn(out, width) / width**0.5, 4)
    wide, half = dequantize(four, torch.float32), dequantize(four, torch.bfloat16)
    eight = quantized(wide, 8)
    found: dict[str, Product] = {
        "float32": lambda x: F.linear(x, wide),
        "bfloat16": lambda x: F.linear(x.bfloat16(), half),
        "4 bits": lambda x: linear(x, four),
        "8 bits": lambda x: linear(x, eight),
        "torch int4": int4pack(four),
    }
    return found, wide.double()


def int4pack(weight: PackedWeight) -> Product:
    """The same numbers in PyTorch's form, (q - 8) * scale + zero."""
    q, scale, low = unpack(weight)
    assert low is not None, "rounding to int4 gives a minimum"
    shifted = torch.stack((scale.float(), low.float() + 8 * scale.float()), -1)
    groups = shifted.transpose(0, 1).contiguous().bfloat16()
    data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: multiply(x.bfloat16(), data, weight.group, groups)


def check(name: str, found: Tensor, x: Tensor, exact: Tensor) -> None:
    """Fail where a product is not the matrix times x, up to bfloat16 or the steps of 8 bits."""
    expected = x.double() @ exact.T
    error = float((found.double() - expected).norm() / expected.norm())
    most = 1e-5 if name == "float32" else 0.01
    assert error < most, f"{name} is off by {error:.2g} of the result, allowed {most}"


@torch.inference_mode()
def measured(out: int, width: int, rows: int, rounds: int) -> dict[str, float]:
    """Least processor seconds of each product."""
    calls, exact = products(out, width)
    x = torch.randn(rows, width)
    for name, product in calls.items():
        check(name, product(x), x, exact)
    repeats = max(1, int(_MOST_FLOPS / (2 * rows * out * width) / 10))
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, product in calls.items():
            begin = time.process_time()
            for _ in range(repeats):
                product(x)
            best[name] = min(best[name], (time.process_time() - begin) / repeats)
    return best


def main() -> None:
    """Print a table: processor milliseconds, and their ratio to the dense bfloat16 product."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}; x is float32")
    for out, width in SHAPES:
        for rows in ROWS:
            best = measured(out, width, rows, args.rounds)
            cells = [f"{n} {s * 1e3:.3g} ms ({s / best['bfloat16']:.2f}x)" for n, s in best.items()]
            print(f"[{out}, {width}], {rows} rows: " + ", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
