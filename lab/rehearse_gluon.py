"""The Gluon kernel's schedule, rehearsed on a CPU: Gluon has no interpreter.

    python lab/rehearse_gluon.py

The functions that decide what is done when (pieces of work, rows of a tile, lists of key tiles,
page numbers) and the whole of the fetching warp run as plain Python over numbers that count; the
copy engine is a copy with zeros past the end, a stage of a ring is never used twice.  What the
consumers do is written here once more, in float64, so registers, layouts, barriers and matrix
units are not rehearsed.  Compared with the reference; unused slots hold NaN.
"""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from saccade.ops import attention
from saccade.ops.attention.nvidia.gluon.prefill import producer as gluon_fetch
from saccade.ops.attention.nvidia.gluon.prefill import seqlen_info as gluon_extents
from saccade.ops.attention.nvidia.gluon.prefill import tile_scheduler as gluon_schedule
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.gpu import triton_lang as tiles

MASKS = ({}, {"causal": False}, {"window": 200, "sinks": 3}, {"window": 40}, {"window": 1})
RUN = {"program": 0, "programs": 5}


class Number(int):
    """An integer that stays one under arithmetic and converts like a scalar of a kernel."""

    def to(self, _dtype: Any) -> Number:
        return self


def _kept(name: str) -> Any:
    plain = getattr(int, name)

    def operator(self: Number, *others: Any) -> Any:
        found = plain(self, *(int(other) for other in others))
        return found if found is NotImplemented else Number(found)

    return operator


for _name in "add sub mul floordiv mod and or xor radd rsub rmul rfloordiv rmod neg".split():
    setattr(Number, f"__{_name}__", _kept(f"__{_name}__"))


class Pointer:
    """A place in a flat tensor; reading outside of it is an error."""

    def __init__(self, tensor: Tensor, at: int = 0) -> None:
        self.tensor, self.at = tensor.flatten(), at

    def __add__(self, step: int) -> Pointer:
        return Pointer(self.tensor, self.at + int(step))


def _load(pointer: Pointer, mask: bool = True, other: int = 0) -> Number:
    if not mask:
        return Number(other)
    assert 0 <= pointer.at < len(pointer.tensor)
    return Number(int(pointer.tensor[pointer.at]))


class Stages:
    """Stages `[count, 1, 1, rows, dim]` in shared memory."""

    def __init__(self, count: int, rows: int, dim: int) -> None:
        self.data = torch.full((count, rows, dim), torch.nan, dtype=torch.float64)
        self.shape = (count, 1, 1, rows, dim)

    def index(self, at: int) -> SimpleNamespace:
        part = self.data[int(at)]

        def rows(first: int, count: int, dim: int) -> SimpleNamespace:
            assert dim == 2
            return SimpleNamespace(data=part[first : first + count])

        return SimpleNamespace(data=part, slice=rows)


class Barrier:
    """Never waits: the rings are longer than the work."""

    def index(self, _at: int) -> Barrier:
        return self


def _copy(desc: Any, at: list[int], _bar: Any, target: Any) -> None:
    page, head, row = (int(number) for number in at[:3])
    rows = desc.block_type.shape[2]
    assert 0 <= page < desc.x.shape[0] and 0 <= head < desc.x.shape[1]
    first, stop = max(row, 0), min(row + rows, desc.x.shape[2])
    target.data.zero_()
    if stop > first:
        target.data[first - row : stop - row] = desc.x[page, head, first:stop]


def _described(x: Tensor, rows: int) -> SimpleNamespace:
    block = SimpleNamespace(shape=[1, 1, rows, x.shape[3]], nbytes=0)
    return SimpleNamespace(x=x, block_type=block)


def prepare() -> None:
    """Let the kernel's functions run as Python."""
    language = SimpleNamespace(
        minimum=lambda a, b: Number(min(a, b)),
        maximum=lambda a, b: Number(max(a, b)),
        where=lambda condition, a, b: Number(a if condition else b),
        cdiv=lambda a, b: Number(-(-a // b)),
        cast=lambda a, _dtype: Number(a),
        load=_load,
        static_range=range,
        num_programs=lambda _axis: Number(RUN["programs"]),
        program_id=lambda _axis: Number(RUN["program"]),
        int32=None,
        int64=None,
        constexpr=int,
    )
    modules: tuple[Any, ...] = (tiles, gluon_extents, gluon_schedule, gluon_fetch)
    for module in modules:
        for name in ("gl", "tl"):
            if hasattr(module, name):
                setattr(module, name, language)
        for name, found in list(vars(module).items()):
            if hasattr(found, "fn"):
                setattr(module, name, found.fn)
    silent = SimpleNamespace(wait=lambda *_: None, expect=lambda *_: None)
    gluon_fetch.mbarrier, gluon_fetch.tma = (
        silent,
        SimpleNamespace(  # type: ignore[assignment]
            async_copy_global_to_shared=_copy
        ),
    )


def scores(problem: Problem, s: Tensor, q_pos: Tensor, k_pos: Tensor, keys: int) -> Tensor:
    """The scores of an edge tile, hidden where a query does not see a key."""
    see = (k_pos < keys)[None].expand_as(s)
    if problem.causal:
        see = see & (k_pos[None] <= q_pos[:, None])
    if problem.window is not None:
        near = q_pos[:, None] - k_pos[None] < problem.window
        see = see & (near | (k_pos < problem.sinks)[None])
    return s.masked_fill(~see, -torch.inf)


def extents_of(problem: Problem, documents: Tensor | None, table: Tensor | None) -> Any:
    """What the kernel would be given, with places that can be read here."""
    tensors = (problem.offsets, problem.kv_lens, documents, table)
    offsets, kv_lens, packed, pages = (None if x is None else Pointer(x) for x in tensors)
    row = None if table is None else table.stride(0)
    return gluon_extents.RowExtents(offsets, kv_lens, 1, packed, pages, row)


def forward(problem: Problem, table: Tensor | None, tile_keys: int, consumers: int = 2) -> Any:
    """(out, lse) as the kernel's schedule has them computed."""
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, q_len, dim = q.shape
    groups, block = heads // k.shape[1], 64 * consumers
    documents = None if problem.cu_q is None else gluon_extents.documents_of(problem, block)
    count = -(-q_len // block) if documents is None else len(documents)
    row_extents = extents_of(problem, documents, table)
    page = None if table is None else k.shape[2]
    box = tile_keys if page is None else min(page, tile_keys)
    numbers = (q_len, problem.num_keys, problem.q_offset, heads, groups, count, groups)
    sizes = tuple(Number(n) for n in (*numbers, count * batch * heads))
    mask_args, block_lists = (
        tiles.MaskArgs(problem.window, problem.sinks or None),
        tiles.BlockLists(),
    )
    out = torch.full(q.shape, torch.nan, dtype=torch.float64)
    lse = out[..., 0].clone()
    RUN["programs"] = min(5, int(sizes[-1]))
    for program in range(RUN["programs"]):
        RUN["program"] = program
        rings = Stages(400 * consumers, 64, dim), *(Stages(3000, tile_keys, dim) for _ in range(2))
        asked = (_described(q, 64), _described(k, box), _described(v, box),
                 (*rings, (Barrier(),) * 7), sizes, mask_args, block_lists, row_extents)  # fmt: skip
        gluon_fetch.produce(asked, problem.causal, block, tile_keys, 64, consumers, page)
        read = 0
        for w in range(gluon_schedule.amount_of_work(sizes[-1])):
            at, tile = gluon_schedule.piece_of_work(Number(w), *sizes[5:])
            b, h = at // heads, at % heads
            first, _, rows, keys, offset, tile = gluon_extents.rows_of_tile(
                row_extents, b, tile, *sizes[:3]
            )
            where, right, full, total, keys = gluon_schedule.plan(
                tile, rows, keys, offset, mask_args, block_lists, b, h // groups, problem.causal, block,
                tile_keys,
            )  # fmt: skip
            for who in range(consumers):
                row = int(tile * block + who * 64)
                q_pos = int(offset) + row + torch.arange(64)
                parts, values = [], []
                for j in range(total):
                    start = int(gluon_schedule.key_tile(Number(j), where, block_lists)) * tile_keys
                    s = rings[0].data[w * consumers + who] @ rings[1].data[read + j].mT
                    kept = rings[2].data[read + j].clone()
                    if j == 0 and (documents is not None or problem.kv_lens is not None):
                        kept[max(int(keys) - start, 0) :] = 0
                    if j == 0 or j < right or j >= full:
                        k_pos = start + torch.arange(tile_keys)
                        s = scores(problem, s * problem.scale, q_pos, k_pos, int(keys))
                    else:
                        s = s * problem.scale
                    parts.append(s)
                    values.append(kept)
                s = torch.cat(parts, 1)
                top = s.max(1).values.clamp(min=-1e30)
                weights = (s - top[:, None]).exp()
                total_weight = weights.sum(1)
                n, place = max(0, min(64, int(rows) - row)), int(first) + row
                result = weights @ torch.cat(values) / total_weight.clamp(min=1e-300)[:, None]
                assert out[b, h, place : place + n].isnan().all(), "a row was written twice"
                out[b, h, place : place + n] = result[:n]
                lse[b, h, place : place + n] = (top + total_weight.log())[:n]
            read += total
    return out, lse


def report(what: str, found: Any, truth: Any) -> None:
    """One line; an output that is wrong ends the rehearsal."""
    out, lse = found
    assert torch.allclose(out, truth.out, atol=1e-9), what
    finite = lse.nan_to_num(neginf=-9), truth.lse.double().nan_to_num(neginf=-9)
    assert torch.allclose(*finite, atol=1e-4), what
    print("right:", what, flush=True)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def paged(x: Tensor, order: Tensor, page: int) -> Tensor:
    """Rows `[B, H, length, D]` as a pool of pages in that order."""
    batch, count = order.shape
    x = torch.nn.functional.pad(x, (0, 0, 0, count * page - x.shape[2]), value=torch.nan)
    pool = torch.empty(batch * count, x.shape[1], page, x.shape[3], dtype=x.dtype)
    pool[order.flatten()] = x.unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1)
    return pool


def main() -> None:
    """Packed documents, rows of their own lengths, pages: every mask, every shape of tile."""
    prepare()
    torch.manual_seed(0)
    empty: dict[str, Any] = dict.fromkeys(field.name for field in fields(Problem))
    base = Problem(**empty | {"sinks": 0, "scale": 0.25, "q_offset": 0, "causal": True})
    for mask in MASKS:
        lens = [300, 0, 1, 77, 213, 20, 128, 30], [300, 3, 70, 77, 300, 0, 128, 5]
        cu = [torch.tensor([0, *n]).cumsum(0) for n in lens]
        q, k, v = (random(1, h, sum(n), 16) for h, n in ((4, lens[0]), (2, lens[1]), (2, lens[1])))
        options = {**mask, "scale": 0.25, "return_lse": True, "backend": "reference"}
        truth = attention(q, k, v, cu_seqlens=(cu[0], cu[1]), **options)
        parts = {"q": q, "k": k, "v": v, "cu_q": cu[0], "cu_k": cu[1], "num_keys": k.shape[2]}
        for shape in ((128, 2), (64, 2), (128, 3)):
            found = forward(replace(base, **parts | mask), None, *shape)
            report(f"packed, {shape}, {mask}", found, truth)
        ends = torch.tensor([600, 150, 333])
        q, k, v = random(3, 4, 150, 16), random(3, 2, 620, 16), random(3, 2, 620, 16)
        past = torch.arange(620)[None] >= ends[:, None]
        k, v = (x.masked_fill(past[:, None, :, None], torch.nan) for x in (k, v))
        truth = attention(q, k, v, kv_lens=ends, **options)
        rows = {"q": q, "lengths": ends, "offsets": ends - 150, "num_keys": 620}
        found = forward(replace(base, **rows | {"k": k, "v": v} | mask), None, 128)
        report(f"lengths, {mask}", found, truth)
        for page in (16, 64, 128, 256):
            count = -(-620 // page)
            order = torch.randperm(3 * count).view(3, count)
            pools = {"k": paged(k, order, page), "v": paged(v, order, page)}
            table = torch.where(torch.arange(count) * page < ends[:, None], order, 10**6).int()
            for tile_keys in (128, 64):
                found = forward(replace(base, **rows | pools | mask), table, tile_keys)
                report(f"pages of {page}, tiles of {tile_keys}, {mask}", found, truth)


if __name__ == "__main__":
    main()
