"""Attention problems as data, and the calls that they describe.

A problem is run by `saccade.attend`.  Beside
its calls it has a probe: the last queries of one group of heads, in float64, for the reference.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from saccade.bench.gate import stored
from saccade.bench.gpu import random
from saccade.bench.inputs import GROUP, KINDS, quantized_view
from saccade.bench.tune_work import paged
from saccade.core import (
    BlockSelection,
    DenseKV,
    KVView,
    Mask,
    PerHeadFP8,
    PerHeadFP8KV,
    quantize_fp8_per_head,
)
from saccade.core.kv import Span
from saccade.ops import attend, make_call
from saccade.ops.attention import dispatch
from saccade.ops.attention.call import AttentionCall

BLOCK, STEP = 128, 16  # tokens of a selected block; queries up to which a call is a decoding step
COLD = 400_000_000  # bytes that the caches of a step exceed together, so that L2 holds none
ROPE = 64  # channels of a latent key that only rotate
PROBE = 64  # queries that are compared with the reference
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One attention problem; the queries end where the keys end.

    Attributes:
        storage: "dense", "pageN" (pages of N tokens), a name of bench.inputs.KINDS (a quantized
            cache; a prompt's own keys are in full precision), "ring" (sinks, two runs of one
            window and the chunk), "e4m3" (q, k and v in fp8 with a scale a head), or "latent"
            (absorbed MLA: values are all channels of keys but the last ROPE), with a number
            behind it in pages of so many tokens.
        kv_lens: keys of each row of the batch, where rows differ; sequences: lengths of sequences
            packed into one row.
        density: share of the blocks of keys that are selected.
        training: gradients of q, k and v are computed.
        softcap: of scores; alibi: with the slopes of ALiBi.
    """

    queries: int
    keys: int
    batch: int = 1
    head_dim: int = 128
    causal: bool = True
    window: int | None = None
    sinks: int = 0
    storage: str = "dense"
    kv_lens: tuple[int, ...] = ()
    sequences: tuple[int, ...] = ()
    density: float | None = None
    dtype: str = "bf16"
    training: bool = False
    softcap: float | None = None
    alibi: bool = False
    heads: int = 32
    kv_heads: int = 8

    @property
    def mask(self) -> Mask:
        return Mask(causal=self.causal, window=self.window, sinks=self.sinks)

    @property
    def groups(self) -> int:
        """Query heads of one key head."""
        return self.heads // self.kv_heads

    @property
    def is_step(self) -> bool:
        """Whether it is one of decoding, timed in a CUDA graph over several caches."""
        return self.queries <= STEP and not self.sequences

    def facts(self) -> dict[str, Any]:
        """What is not the default, for a record."""
        always = ("queries", "keys", "head_dim")
        defaults = {field.name: field.default for field in fields(self)}
        found = asdict(self).items()
        return {name: x for name, x in found if name in always or x != defaults[name]}

    def score_options(self, device: torch.device, heads: int | None = None) -> dict[str, Any]:
        """What changes the scores, as `make_call` takes it, for the first `heads` heads."""
        found: dict[str, Any] = {} if self.softcap is None else {"softcap": self.softcap}
        if self.alibi:
            powers = torch.arange(1, self.heads + 1, device=device) * (-8 / self.heads)
            found["alibi_slopes"] = torch.exp2(powers)[: heads or self.heads]
        return found

    def tiny(self) -> Problem:
        """The same kind of problem, small enough for a CPU."""
        keys = 3 * BLOCK if self.density else 160
        small = replace(
            self, queries=min(self.queries, keys), keys=keys, batch=min(self.batch, 2), heads=4,
            kv_heads=2, head_dim=min(self.head_dim, 64), window=self.window and 40,
        )  # fmt: skip
        if self.storage.startswith("latent"):
            return replace(small, kv_heads=1, head_dim=self.head_dim)
        if self.sequences:
            return replace(small, sequences=(40, 120), queries=160)
        if self.kv_lens:
            return replace(small, kv_lens=(160, 90), batch=2, queries=40)
        history = self.storage in KINDS or self.storage == "ring"
        return replace(small, queries=32) if history and not self.is_step else small


@dataclass(frozen=True, slots=True)
class Built:
    """A problem with its tensors.

    Attributes:
        calls: equal ones over different memory; tensors: q, k, v in plain storage behind each.
        probe: what is compared, in float64.
        tflop: of visible pairs; gbytes: of keys and values that a step must read.
    """

    calls: tuple[AttentionCall, ...]
    probe: AttentionCall
    tensors: tuple[tuple[Tensor, Tensor, Tensor], ...]
    tflop: float
    gbytes: float

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the first call, to differentiate."""
        return self.tensors[0]


def run(call: AttentionCall, backend: str) -> Tensor:
    """The output of a call by the named backend."""
    return attend(call, backend=backend).out


def refusal(call: AttentionCall, backend: str) -> str | None:
    """Why the backend cannot run the call, or None."""
    if backend not in dispatch.BACKENDS:
        return "no such backend"
    return dispatch.load(backend).refusal(call)


def build(problem: Problem) -> Built:
    """Random tensors and the calls over them."""
    size = 4 * problem.batch * problem.kv_heads * problem.keys * problem.head_dim
    copies = max(2, min(8, COLD // size + 1)) if problem.is_step else 1
    made = tuple(_tensors(problem) for _ in range(copies))
    blocks = _blocks(problem)
    views = [_view(problem, k, v) for _, k, v in made]
    calls = tuple(
        _call(problem, q, view, blocks) for (q, _, _), view in zip(made, views, strict=True)
    )
    pairs = _pairs(problem, blocks)
    channels = problem.head_dim + made[0][2].shape[3]
    work = 2 * problem.heads * channels * pairs * (2.5 if problem.training else 1)
    probe = _probe(problem, *made[0], views[0], blocks)
    return Built(calls, probe, made, work / 1e12, _bytes(problem, views[0]) / 1e9)


def probed(problem: Problem, out: Tensor) -> Tensor:
    """The part of an output that the probe computes."""
    rows = min(PROBE, problem.sequences[-1] if problem.sequences else problem.queries)
    return out[:1, : problem.groups, -rows:]


def _tensors(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    dim, dtype = problem.head_dim, DTYPES[problem.dtype]
    q = random(problem.batch, problem.heads, problem.queries, dim, dtype=dtype)
    k, v = (random(problem.batch, problem.kv_heads, problem.keys, dim, dtype=dtype) for _ in "kv")
    if problem.storage.startswith("latent"):
        v = k[..., :-ROPE]
    for x in (q, k, v):
        x.requires_grad_(problem.training)
    return q, k, v


def _view(problem: Problem, k: Tensor, v: Tensor) -> KVView:
    storage = problem.storage
    if storage.startswith("page"):
        return paged(k, v, int(storage.removeprefix("page")))
    if storage.startswith("latent") and storage != "latent":
        pages = paged(k, v, int(storage.removeprefix("latent")))
        return replace(pages, v=pages.k[..., :-ROPE])
    if storage in KINDS:
        return quantized_view(
            k, v, storage, k.shape[2] % GROUP if problem.is_step else problem.queries
        )
    if storage == "ring":
        return _ring(problem, k, v)
    if storage == "e4m3":
        keys, values = (quantize_fp8_per_head(x) for x in (k, v))
        return PerHeadFP8KV(DenseKV(keys.qdata, values.qdata), keys.scale, values.scale)
    return DenseKV(k, v)


def _ring(problem: Problem, k: Tensor, v: Tensor) -> DenseKV:
    """The view of a ring for a chunk: its sinks, an older and a newer run, the chunk itself."""
    assert problem.window is not None
    start, sinks = problem.keys - problem.queries, problem.sinks
    first = max(sinks, start - problem.window)
    middle = first + (start - first) // 3
    ends = [(0, sinks), (first, middle), (middle, start), (start, problem.keys)]
    runs = [(begin, end) for begin, end in ends if begin < end]
    spans, slot = [], 0
    for begin, end in runs:
        spans.append(Span(slot, begin, end - begin))
        slot += end - begin
    k, v = (torch.cat([x[:, :, begin:end] for begin, end in runs], 2) for x in (k, v))
    return DenseKV(k, v, tuple(spans))


def _call(
    problem: Problem, q: Tensor, view: KVView, blocks: BlockSelection | None
) -> AttentionCall:
    queries: Tensor | PerHeadFP8 = q
    options: dict[str, Any] = {"mask": problem.mask, "blocks": blocks, "wants_lse": False}
    options |= problem.score_options(q.device)
    if problem.storage == "e4m3":
        queries = quantize_fp8_per_head(q)
    if problem.kv_lens:
        options["kv_lens"] = torch.tensor(problem.kv_lens, device=q.device)
    if problem.sequences:
        ends = torch.tensor([0, *problem.sequences], device=q.device).cumsum(0).int()
        options["cu_seqlens"] = (ends, ends)
    return make_call(queries, view, **options)


def _blocks(problem: Problem) -> BlockSelection | None:
    """A random share of the blocks, and always that of the query itself."""
    if problem.density is None:
        return None
    count = problem.keys // BLOCK
    allowed = random(1, problem.kv_heads, count, count, dtype=torch.float32).sigmoid()
    chosen = allowed < torch.quantile(allowed.flatten()[:100_000], problem.density)
    chosen |= torch.eye(count, dtype=torch.bool, device=allowed.device)
    return BlockSelection(allowed=chosen, q_block=BLOCK, k_block=BLOCK)


def _pairs(problem: Problem, blocks: BlockSelection | None) -> float:
    """Visible (query, key) pairs of one head, summed over the batch, on average over heads."""
    if blocks is not None:
        below = blocks.allowed.tril(-1).sum().item() / problem.kv_heads
        return BLOCK * BLOCK * below + problem.keys * (BLOCK + 1) / 2
    if problem.sequences:
        return sum(problem.mask.num_pairs(n, n) for n in problem.sequences)
    lengths = problem.kv_lens or (problem.keys,) * problem.batch
    return sum(problem.mask.num_pairs(problem.queries, n) for n in lengths)


def _bytes(problem: Problem, view: Any) -> float:
    """Bytes of keys and values as they are stored, without those outside a window."""
    share = min(1.0, (problem.window or problem.keys) / problem.keys)
    if problem.storage in KINDS:
        return sum(part.nbytes for x in (view.k, view.v) for part in x)
    width = 1 if problem.storage == "e4m3" else 2
    tokens = sum(problem.kv_lens) or problem.batch * problem.keys
    if problem.storage.startswith("latent"):
        return 2 * problem.head_dim * tokens
    return share * 2 * width * problem.kv_heads * problem.head_dim * tokens


def _probe(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: Any,
    blocks: BlockSelection | None,
) -> AttentionCall:
    """The last queries of the first key head, over what the storage holds, in float64."""
    rows = probed(problem, q.detach())
    keys, values, spans = k.detach(), v.detach(), ()
    if problem.storage in KINDS:
        keys, values = stored(view)
    if problem.storage == "e4m3":
        rows, keys, values = (
            x.qdata.float() * x.scale[..., None, None]
            for x in map(quantize_fp8_per_head, (q, k, v))
        )
        rows = probed(problem, rows)
    if problem.storage == "ring":
        keys, values, spans = view.k, view.v, view.spans
    start = problem.keys - problem.sequences[-1] if problem.sequences else 0
    stop = problem.kv_lens[0] if problem.kv_lens else None
    keys, values = (x[:1, :1, start:stop].double() for x in (keys, values))
    if blocks is not None:
        last = blocks.allowed[:, :1, -1:].contiguous()
        blocks = BlockSelection(allowed=last, q_block=BLOCK, k_block=BLOCK)
    options = problem.score_options(rows.device, problem.groups)
    return make_call(
        rows.double(), DenseKV(keys, values, spans), mask=problem.mask, blocks=blocks, **options
    )
