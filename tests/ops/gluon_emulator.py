"""The schedule of the Gluon prefill kernel, emulated on a CPU: Gluon has no interpreter.

The tile scheduler, the sequence lengths and the whole producer warp are the kernel's own functions,
run as plain Python over integers.  TMA is a copy with zeros past the end, and a pipeline stage is
never used twice.  What the consumers compute is written here once more, in float64; so layouts,
registers, mbarriers and tensor cores are not tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops.attention.nvidia.gluon.prefill import producer, seqlen_info, tile_scheduler
from saccade.ops.attention.nvidia.gluon.prefill.launch import PrefillLaunch, varlen_info
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.gpu import triton_lang
from saccade.ops.gpu.kernel_args import BlockLists, MaskArgs

ALL_TILES = BlockLists()
ROWS = 64  # rows of a consumer: its queries of each head that a tile holds


class Integer(int):
    """An integer that stays one under arithmetic and has the methods of a kernel's scalar."""

    def to(self, _dtype: Any) -> Integer:
        return self


def _operator(name: str) -> Any:
    plain = getattr(int, name)

    def operator(self: Integer, *others: Any) -> Any:
        result = plain(self, *(int(other) for other in others))
        return result if result is NotImplemented else Integer(result)

    return operator


for _name in "add sub mul floordiv mod and or xor radd rsub rmul rfloordiv rmod neg".split():
    setattr(Integer, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """An element of a flat tensor."""

    def __init__(self, tensor: Tensor, at: int = 0) -> None:
        self.tensor, self.at = tensor.flatten(), at

    def __add__(self, step: int) -> Pointer:
        return Pointer(self.tensor, self.at + int(step))


def _load(pointer: Pointer, mask: bool = True, other: int = 0) -> Integer:
    if not mask:
        return Integer(other)
    assert 0 <= pointer.at < len(pointer.tensor), "a load out of bounds"
    return Integer(int(pointer.tensor[pointer.at]))


def pointer_to(tensor: Tensor | None) -> Pointer | None:
    return None if tensor is None else Pointer(tensor)


class Stages:
    """Pipeline stages `[count, 1, 1, rows, dim]` in shared memory, made when first loaded."""

    def __init__(self, rows: int, dim: int) -> None:
        self.shape = (10**6, 1, 1, rows, dim)  # more than there are tiles
        self.stages: dict[int, Tensor] = {}

    def __getitem__(self, at: int) -> Tensor:
        if at not in self.stages:
            self.stages[at] = torch.full(self.shape[3:], torch.nan, dtype=torch.float64)
        return self.stages[at]

    def index(self, at: int) -> SimpleNamespace:
        stage = self[int(at)]

        def rows(first: int, count: int, dim: int) -> SimpleNamespace:
            assert dim == 2
            return SimpleNamespace(data=stage[first : first + count])

        return SimpleNamespace(data=stage, slice=rows)


class Barriers:
    """They never wait: there are more stages than tiles."""

    def index(self, _stage: int) -> Barriers:
        return self


def _tma_load(desc: Any, at: list[int], _full: Any, target: Any) -> None:
    page, head, row = (int(coordinate) for coordinate in at[:3])
    _, heads, rows, _ = desc.block_type.shape
    assert 0 <= page < desc.x.shape[0] and 0 <= head <= desc.x.shape[1] - heads
    first, stop = max(row, 0), min(row + rows, desc.x.shape[2])
    target.data.zero_()
    if stop > first:
        box = target.data.unflatten(0, (heads, rows))
        box[:, first - row : stop - row] = desc.x[page, head : head + heads, first:stop]


def _descriptor(x: Tensor, rows: int, heads: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        x=x, block_type=SimpleNamespace(shape=[1, heads, rows, x.shape[3]], nbytes=0)
    )


class Cta:
    """The kernel's own functions as plain Python, in CTA `index` of `count`."""

    def __init__(self, index: int, count: int) -> None:
        language = SimpleNamespace(
            minimum=lambda a, b: Integer(min(a, b)),
            maximum=lambda a, b: Integer(max(a, b)),
            where=lambda condition, a, b: Integer(a if condition else b),
            cdiv=lambda a, b: Integer(-(-a // b)),
            cast=lambda a, _dtype: Integer(a),
            load=_load,
            static_range=range,
            num_programs=lambda _axis: Integer(count),
            program_id=lambda _axis: Integer(index),
            int32=None,
            int64=None,
        )
        silent = SimpleNamespace(wait=lambda *_: None, expect=lambda *_: None)
        tma = SimpleNamespace(async_copy_global_to_shared=_tma_load)
        names = {"gl": language, "tl": language, "mbarrier": silent, "tma": tma}
        modules = as_python((triton_lang, seqlen_info, tile_scheduler, producer), names)
        _, self.seqlen_info, self.tile_scheduler, self.producer = modules


def as_python(modules: tuple[ModuleType, ...], names: dict[str, Any]) -> list[SimpleNamespace]:
    """Copies of modules in which jit functions are plain ones that look up `names` first."""
    spaces = {module.__name__: vars(module) | names for module in modules}
    for space in spaces.values():
        for name, value in list(space.items()):
            function = getattr(value, "fn", None)
            if isinstance(function, FunctionType) and function.__module__ in spaces:
                space[name] = FunctionType(function.__code__, spaces[function.__module__])
    return [SimpleNamespace(**space) for space in spaces.values()]


class Smem(NamedTuple):
    """Stages that the producer of one CTA has filled."""

    q: Stages
    k: Stages
    v: Stages


class WorkTile(NamedTuple):
    """A tile of queries, and the tiles of keys that it reads.

    Attributes:
        q_start, q_len: first query and number of queries of its sequence; q_offset: their position.
        tile: index within the sequence; num_keys: keys of the sequence.
        k_starts: first keys of the parts of each tile of keys; masked: whether it needs a mask.
        split: of the keys.
    """

    b: int
    h: int
    q_start: int
    q_len: int
    q_offset: int
    tile: int
    num_keys: int
    k_starts: list[tuple[int, ...]]
    masked: list[bool]
    split: int


@dataclass(frozen=True)
class Emulation:
    """One launch of the kernel; `out` and `lse` are those of every split."""

    problem: Problem
    launch: PrefillLaunch
    varlen: seqlen_info.VarlenInfo
    sizes: tuple[Integer, ...]  # as the kernel passes them to producer and consumers
    page_size: int | None
    lists: BlockLists
    out: Tensor
    lse: Tensor

    @property
    def mask_args(self) -> MaskArgs:
        return MaskArgs(self.problem.mask.window, self.problem.mask.sinks or None)

    def run(self, cta: Cta) -> None:
        """Let the producer load everything, then compute every work tile as its consumers would."""
        smem, loaded, consumers = self._produce(cta), 0, self.launch.consumers
        for i in range(cta.tile_scheduler.work_tile_count(self.sizes[-2])):
            work = self._work_tile(cta, i)
            for consumer in range(consumers):
                q_tile = smem.q[i * consumers + consumer]
                self._consume(work, consumer, q_tile, smem, loaded)
            loaded += len(work.k_starts)

    def _produce(self, cta: Cta) -> Smem:
        problem, launch, consumers = self.problem, self.launch, self.launch.consumers
        dim, block_n = problem.q.shape[3], launch.block_n
        k_smem, v_smem = (Stages(block_n, dim) for _ in range(2))
        smem = Smem(Stages(ROWS, dim), k_smem, v_smem)
        box = block_n // launch.parts if self.page_size is None else min(self.page_size, block_n)
        queries = ROWS // launch.pack
        q_desc = _descriptor(problem.q, queries, launch.pack)
        k_desc, v_desc = (_descriptor(x, box) for x in (problem.k, problem.v))
        bars = (Barriers(),) * 7
        args = (q_desc, k_desc, v_desc, (*smem, bars), self.sizes, self.mask_args, self.lists,
                self.varlen)  # fmt: skip
        tile = (launch.block_m, block_n, queries, consumers)
        shared = (launch.pack, launch.splits > 1, launch.parts)
        cta.producer.produce(args, problem.mask.causal, *tile, self.page_size, *shared)
        return smem

    def _work_tile(self, cta: Cta, i: int) -> WorkTile:
        q_len, k_len, q_offset, _, groups, *_ = self.sizes
        scheduler, lists, block_n = cta.tile_scheduler, self.lists, self.launch.block_n
        splits, parts = self.launch.splits, self.launch.parts
        b, h, tile, split = scheduler.work_of(
            Integer(i), self.sizes, Integer(self.launch.pack), splits > 1
        )
        q_start, _, q_len, k_len, q_offset, tile = cta.seqlen_info.seqlens_of_tile(
            self.varlen, b, tile, q_len, k_len, q_offset
        )
        found = scheduler.kv_tile_plan(
            tile, q_len, k_len, q_offset, self.mask_args, lists, b, h // groups,
            self.problem.mask.causal, self.launch.block_m, block_n, parts,
        )  # fmt: skip
        if splits > 1:
            found = scheduler.split_of_plan(found, split, Integer(splits))
        plan, right_end, full_end, count, num_keys = found
        found = [scheduler.kv_starts(Integer(j), plan, lists, block_n, parts) for j in range(count)]
        k_starts = [tuple(map(int, starts)) for starts in found]
        masked = [j == 0 or j < right_end or j >= full_end for j in range(count)]
        numbers = map(int, (b, h, q_start, q_len, q_offset, tile, num_keys))
        return WorkTile(*numbers, k_starts, masked, int(split))

    def _consume(
        self, work: WorkTile, consumer: int, q_tile: Tensor, smem: Smem, first_stage: int
    ) -> None:
        """Output and lse of one consumer's rows of a work tile."""
        pack, queries = self.launch.pack, ROWS // self.launch.pack
        row = work.tile * self.launch.block_m + consumer * queries
        q_pos = (work.q_offset + row + torch.arange(queries)).repeat(pack)
        scores, values = [], []
        for j, starts in enumerate(work.k_starts):
            k, v = smem.k[first_stage + j], smem.v[first_stage + j].clone()
            if j == 0 and (self.varlen.q_tiles is not None or self.varlen.kv_lens is not None):
                v[max(work.num_keys - starts[0], 0) :] = 0
            s = q_tile @ k.mT * self.problem.call.scale
            if work.masked[j]:
                index = torch.arange(len(k) // len(starts))
                k_pos = torch.cat([start + index for start in starts])
                s = s.masked_fill(~self._visible(q_pos, k_pos, work.num_keys), -torch.inf)
            scores.append(s)
            values.append(v)
        s = torch.cat(scores, 1)
        row_max = s.max(1).values.clamp(min=-1e30)
        p = (s - row_max[:, None]).exp()
        row_sum = p.sum(1)
        out = p @ torch.cat(values) / row_sum.clamp(min=1e-300)[:, None]
        n, at = max(0, min(queries, work.q_len - row)), work.q_start + row
        place = work.split, work.b, slice(work.h, work.h + pack), slice(at, at + n)
        assert self.out[place].isnan().all(), "a row was written twice"
        lse = row_max + row_sum.log()
        self.out[place] = out.unflatten(0, (pack, queries))[:, :n]
        self.lse[place] = lse.unflatten(0, (pack, queries))[:, :n]

    def _visible(self, q_pos: Tensor, k_pos: Tensor, num_keys: int) -> Tensor:
        """Which keys are visible to which queries, `[queries, keys]`."""
        visible = (k_pos < num_keys)[None].expand(len(q_pos), -1)
        if self.problem.mask.causal:
            visible = visible & (k_pos[None] <= q_pos[:, None])
        if self.problem.mask.window is not None:
            near = q_pos[:, None] - k_pos[None] < self.problem.mask.window
            visible = visible & (near | (k_pos < self.problem.mask.sinks)[None])
        return visible


def forward(
    problem: Problem,
    launch: PrefillLaunch,
    page_table: Tensor | None = None,
    *,
    lists: BlockLists = ALL_TILES,
    num_ctas: int = 5,
) -> AttentionOutput:
    """(out, lse) in float64 by the schedule of the kernel on `num_ctas` multiprocessors."""
    batch, heads, q_len, _ = problem.q.shape
    varlen, num_q_tiles = varlen_info(problem, launch, page_table)
    tensors = {n: Pointer(x) for n, x in varlen._asdict().items() if isinstance(x, Tensor)}
    groups, pack, splits = heads // problem.k.shape[1], launch.pack, launch.splits
    num_work_tiles = num_q_tiles * splits * batch * heads // pack
    sizes = (q_len, problem.num_keys, problem.q_offset, heads, groups, num_q_tiles * splits,
             groups // pack, num_work_tiles, splits)  # fmt: skip
    out = torch.full((splits, *problem.q.shape), torch.nan, dtype=torch.float64)
    emulation = Emulation(
        problem,
        launch,
        varlen._replace(**tensors),
        tuple(map(Integer, sizes)),
        None if page_table is None else problem.k.shape[2],
        lists._replace(tiles=pointer_to(lists.tiles), counts=pointer_to(lists.counts)),
        out,
        out[..., 0].clone(),
    )
    num_ctas = min(num_ctas, num_work_tiles)
    for index in range(num_ctas):
        emulation.run(Cta(index, num_ctas))
    weights = emulation.lse.softmax(0).nan_to_num()[..., None]  # a row without keys is zeros
    return AttentionOutput((weights * emulation.out).sum(0), emulation.lse.logsumexp(0))
