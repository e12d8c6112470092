"""What a kernel is tried on: one small odd problem for checking, larger ones for timing.

Every problem goes through `attend(backend="triton")`, so that Triton's own kernel is tried as it
is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saccade.bench.gate import Expected, limits, stored
from saccade.bench.inputs import quantized_view
from saccade.core import BlockSelection, DenseKV, KVView, Mask, PagedKV
from saccade.ops.attention.api import attend, make_call

GROUP, PAGE, BLOCK = 64, 16, 128
ROPE = 64  # channels of latent keys behind those that are the values too
DENSITY = 0.25
Result = tuple[Tensor, ...]
Run = Callable[[], Result]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the problems are.

    Attributes:
        heads, kv_heads: of every problem.
        check: queries and keys of the problem that is compared with the reference.
        prefill, narrow, blocks, training: tokens to time; window: keys of a window.
        decode: (batch, keys) of each step to time, judged by the geometric mean.
        cold: bytes that the caches of a step exceed together, so that none is found in the L2.
    """

    heads: int = 32
    kv_heads: int = 8
    check: tuple[int, int] = (333, 700)
    prefill: int = 8192
    narrow: int = 16384
    window: int = 1024
    blocks: int = 16384
    training: int = 4096
    decode: tuple[tuple[int, int], ...] = ((1, 32768), (16, 8192))
    cold: int = 400_000_000


FULL = Sizes()
QUICK = Sizes(prefill=4096, narrow=8192, blocks=8192, training=2048, decode=((1, 16384), (8, 4096)))


@dataclass(frozen=True, slots=True)
class Problem:
    """Calls that compute the same, over different memory where that matters.

    Attributes:
        runs: each gives the outputs or gradients.
        expected: what they have to be, None for problems that are only timed.
    """

    runs: tuple[Callable[[], Result], ...]
    expected: tuple[Expected, ...] | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """A small problem with its expected result, and what makes each problem to time."""

    small: Problem
    large: tuple[Callable[[], Problem], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One attention problem; `kind` says how keys are stored.

    Attributes:
        heads: query heads over one head of latent keys, 0 for the heads of Sizes.
    """

    batch: int = 1
    q_len: int
    k_len: int
    window: int | None = None
    blocks: bool = False
    gradients: bool = False
    kind: str = "dense"
    heads: int = 0


Shapes = Callable[[Sizes], tuple[Sequence[Shape], Sequence[Shape]]]
"""The problems to check and those to time."""


def work(kernel: str, dim: int, sizes: Sizes, device: str, dtype: torch.dtype) -> Work:
    """The problems of a kernel for heads of `dim`."""
    checked, timed = SHAPES[kernel](sizes)
    small = _problem(checked[0], dim, sizes, device, dtype, judged=True)
    for shape in checked[1:]:
        more = _problem(shape, dim, sizes, device, dtype, judged=True)
        assert small.expected is not None and more.expected is not None
        small = Problem((*small.runs, *more.runs), (*small.expected, *more.expected))
    large = tuple(
        lambda shape=shape: _problem(shape, dim, sizes, device, dtype, judged=False)
        for shape in timed
    )
    return Work(small, large)


def _square(length: str, *, blocks: bool = False, gradients: bool = False) -> Shapes:
    """A small odd problem to check, and a square one of the `length` in Sizes to time."""

    def shapes(sizes: Sizes) -> tuple[Sequence[Shape], Sequence[Shape]]:
        (few, many), timed = sizes.check, getattr(sizes, length)
        shape = partial(Shape, blocks=blocks, gradients=gradients)
        return [shape(q_len=few, k_len=many)], [shape(q_len=timed, k_len=timed)]

    return shapes


def _window(sizes: Sizes) -> tuple[Sequence[Shape], Sequence[Shape]]:
    few, many = sizes.check
    checked = [Shape(q_len=few, k_len=many, window=max(1, many // 7))]
    return checked, [Shape(q_len=sizes.narrow, k_len=sizes.narrow, window=sizes.window)]


def _decode(*kinds: str, heads: int = 0) -> Shapes:
    def shapes(sizes: Sizes) -> tuple[Sequence[Shape], Sequence[Shape]]:
        many = sizes.check[1]
        checked = [Shape(q_len=1, k_len=many, kind=kind, heads=heads) for kind in kinds]
        timed = [
            Shape(batch=batch, q_len=1, k_len=keys, kind=kind, heads=heads)
            for kind in kinds
            for batch, keys in sizes.decode
        ]
        return checked, timed

    return shapes


SHAPES: dict[str, Shapes] = {
    "forward": _square("prefill"),
    "forward_window": _window,
    "forward_block_sparse": _square("blocks", blocks=True),
    "backward_kv": _square("training", gradients=True),
    "backward_q": _square("training", gradients=True),
    "decode": _decode("dense"),
    "decode_paged": _decode("pages"),
    "decode_quantized": _decode("int8", "int4"),
    "decode_latent": _decode("latent", heads=16),
    "decode_latent_rows": _decode("latent", heads=128),
}


def _problem(
    shape: Shape, dim: int, sizes: Sizes, device: str, dtype: torch.dtype, *, judged: bool
) -> Problem:
    """The calls of a shape, with what they have to give where they will be judged."""
    heads, kv_heads = (shape.heads, 1) if shape.heads else (sizes.heads, sizes.kv_heads)
    width = dim + ROPE if shape.kind == "latent" else dim

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(shape.batch, heads, length, width, device=device, dtype=dtype)

    size = 2 * shape.batch * kv_heads * shape.k_len * dim * dtype.itemsize
    cold = not judged and shape.q_len == 1
    copies = max(2, min(8, sizes.cold // size + 1)) if cold else 1
    mask, blocks = Mask(window=shape.window), _blocks(shape, sizes, device)
    runs: list[Callable[[], Result]] = []
    expected: tuple[Expected, ...] | None = None
    for _ in range(copies):
        q = normal(heads, shape.q_len)
        k, v = (normal(kv_heads, shape.k_len) for _ in range(2))
        v = k[..., :dim] if shape.kind == "latent" else v
        view = _view(shape.kind, k, v)
        if shape.gradients:
            runs.append(_backward(q, k, v, mask))
            expected = _expected_gradients(q, k, v, mask) if judged else None
            continue
        runs.append(
            lambda q=q, view=view: (
                attend(
                    make_call(q, view, mask=mask, blocks=blocks, wants_lse=False), backend="triton"
                ).out,
            )
        )
        expected = _expected_output(q, view, mask, blocks) if judged else None
    return Problem(tuple(runs), expected)


def _backward(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Callable[[], Result]:
    """The backward pass alone; the graph is kept."""
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dout = _gradient_of(q)
    out = attend(make_call(q, DenseKV(k, v), mask=mask, wants_lse=False), backend="triton").out
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _gradient_of(q: Tensor) -> Tensor:
    """Some gradient of the output, the same for the same queries."""
    return q.detach().roll(1, 2)


def _expected_output(
    q: Tensor, view: KVView, mask: Mask, blocks: BlockSelection | None
) -> tuple[Expected, ...]:
    keys, values = stored(view)  # dequantized
    rows = torch.arange(q.shape[2], device=q.device)

    def reference(kind: torch.dtype) -> Tensor:
        kv = DenseKV(keys.to(kind), values.to(kind))
        return attend(make_call(q.to(kind), kv, mask=mask, blocks=blocks), backend="reference").out

    return (limits("out", rows, reference(torch.float64), reference(q.dtype), q.dtype),)


def _expected_gradients(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Expected, ...]:
    """Gradients in float64, and how far off an eager run in the type of q is."""

    def reference(kind: torch.dtype) -> Result:
        leaves = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        queries = leaves[0].unflatten(1, (k.shape[1], -1))
        scores = queries @ leaves[1][:, :, None].mT * q.shape[3] ** -0.5
        at = torch.arange(k.shape[2], device=q.device)
        seen = mask.allows(at[-q.shape[2] :, None], at)
        wide = torch.promote_types(kind, torch.float32)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=wide).to(kind)
        out = (weights @ leaves[2][:, :, None]).flatten(1, 2)
        with warnings.catch_warnings():  # cuBLAS in a thread of autograd that is new to the GPU
            warnings.simplefilter("ignore", UserWarning)
            return torch.autograd.grad(out, leaves, _gradient_of(q).to(kind))

    pairs = zip(reference(torch.float64), reference(q.dtype), strict=True)
    return tuple(
        limits(name, torch.arange(x.shape[2], device=q.device), x, eager, q.dtype, least_share=1.0)
        for name, (x, eager) in zip(("dq", "dk", "dv"), pairs, strict=True)
    )


def _blocks(shape: Shape, sizes: Sizes, device: str) -> BlockSelection | None:
    """A random share of the blocks, and always the one of the query itself."""
    if not shape.blocks:
        return None
    rows, columns = -(-shape.q_len // BLOCK), -(-shape.k_len // BLOCK)
    allowed = torch.rand(1, sizes.kv_heads, rows, columns, device=device) < DENSITY
    own = torch.arange(rows, device=device)[:, None] + columns - rows
    at = torch.arange(columns, device=device)
    return BlockSelection(allowed=allowed | ((at - own).abs() <= 1), q_block=BLOCK, k_block=BLOCK)


def _view(kind: str, k: Tensor, v: Tensor) -> KVView:
    """Keys and values stored in that way."""
    if kind in ("dense", "latent"):
        return DenseKV(k, v)
    if kind == "pages":
        return paged(k, v, PAGE)
    return quantized_view(k, v, kind, k.shape[2] % GROUP, min(GROUP, k.shape[3]))


def paged(k: Tensor, v: Tensor, page: int) -> PagedKV:
    """The same keys in shuffled pages; the last one may be part empty."""
    batch, heads, length, _ = k.shape
    count = -(-length // page)
    order = torch.randperm(batch * count, device=k.device)

    def pool(x: Tensor) -> Tensor:
        full = torch.nn.functional.pad(x, (0, 0, 0, count * page - length))
        pages = full.reshape(batch, heads, count, page, -1).transpose(1, 2).flatten(0, 1)
        return torch.empty_like(pages).index_copy_(0, order, pages)

    table = order.view(batch, count).to(torch.int32)
    kv_lens = torch.full((batch,), length, dtype=torch.int32, device=k.device)
    return PagedKV(pool(k), pool(v), table, kv_lens, length)
