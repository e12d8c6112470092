"""Peak memory of reading a prompt: weights, caches, and what a chunk of it needs on its way.

Caches are counted to the byte by running them without memory.  What one decoder layer holds at a
time follows from its sizes: norm, attention, norm, gated MLP, as transformers computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from saccade.cache.staging import TAIL
from saccade.compress import POLICIES
from saccade.compress.observation import Observes
from saccade.compress.rkv import ROWS
from saccade.core import DenseKV, Mask
from saccade.core.formats import FP8
from saccade.ops import make_call
from saccade.ops.attention.cpu.binding import BUILT, workspace_bytes
from saccade.ops.linear import native
from saccade.ops.linear.forward import (
    multiplies_bfloat16,
    plain_at_once,
    plain_bytes,
    product_bytes,
)
from saccade.ops.linear.packed import BLOCK_ROWS
from saccade.runtime.layers import LARGEST_RING, backend_of, narrowed_window
from saccade.runtime.memory import AttentionPeak, chunks, layers_bytes
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.plan_blueprint import Blueprint

_DEQUANTIZED = 128 * 2**20
"""Bytes of a quantized history that exist in full precision at once on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a run.

    Attributes:
        weights: all parameters.
        caches: allocated by all caches when the prompt has been read, exactly.
        reading: the same before a kv_policy removes keys.
        activations: most that a chunk needs beside them: hidden states, queries, MLP, attention's
            workspace, logits, and the copy that a growing cache makes of one layer.
        host: how much of the caches lies in host memory beside a GPU.
    """

    weights: int
    caches: int
    reading: int
    activations: int
    host: int = 0

    @property
    def peak(self) -> int:
        """The most that is allocated at once on the device."""
        return self.weights + max(self.reading, self.caches) - self.host + self.activations


def memory_of(
    blueprint: Blueprint,
    params: ContextParams,
    tokens: int,
    device: str,
    *,
    exact: bool = True,
) -> Memory:
    """Memory of reading a prompt of `tokens` tokens on "cpu" or "cuda", caches growing.

    Args:
        exact: False for searches with many calls: caches as if they were allocated at once.

    Raises:
        BadInput: more bytes than can be counted.
    """
    facts = blueprint.facts
    read = chunks(tokens, params.n_batch) if exact else [(tokens, 1)]
    layers = layers_bytes(facts, params, read)
    after = layers if params.kv_budget is None else layers_bytes(facts, params, read, [(1, 0)])
    reading, caches = (
        facts.state_bytes + sum(count * nbytes for count, nbytes in each)
        for each in (layers, after)
    )
    largest = max((nbytes for _, nbytes in layers), default=0)
    on_host = device == "cuda" and not params.offload_kqv
    staged = 2 * largest + _newest_bytes(facts) if on_host else 0
    return Memory(
        weights=blueprint.weights_bytes,
        caches=caches,
        reading=reading,
        activations=staged + activations(blueprint, params, tokens, device, largest),
        host=max(reading, caches) if on_host else 0,
    )


def _newest_bytes(facts: ModelFacts) -> int:
    """Bytes of the newest tokens of every layer, which wait on a GPU for the host's memory."""
    widths = (
        each.num_kv_heads * (each.head_dim + (each.value_dim or each.head_dim)) * count
        for each, count in facts.alike()
    )
    return TAIL * facts.dtype.itemsize * sum(widths)


def activations(
    blueprint: Blueprint, params: ContextParams, tokens: int, device: str, layer_bytes: int
) -> int:
    """Most bytes beside weights and caches while a prompt is read.

    Args:
        layer_bytes: of the largest cache of a layer, which is copied where it grows.
    """
    facts, chunk = blueprint.facts, min(params.n_batch, tokens)
    size = facts.dtype.itemsize
    states = chunk * blueprint.hidden * size
    queries = chunk * facts.num_heads * facts.head_dim * size
    keys = (
        chunk * facts.num_kv_heads * (facts.head_dim + (facts.value_dim or facts.head_dim)) * size
    )
    # Embeddings, the input of the layer, and the last states of the chunk before.
    carried = (3 if tokens > chunk else 2) * states
    mlp = carried + 2 * states + 3 * chunk * blueprint.inner * size
    rotating = carried + states + 4 * queries + 2 * keys
    grown = layer_bytes if tokens > chunk and params.n_swa is None else 0
    work, workspace = attention_workspace(facts, params, tokens, device)
    attending = carried + states + queries + keys + max(grown, work)
    packed = _packed_products(blueprint, chunk, device)
    logits = facts.vocab_size * (size + 4) + packed.head
    observed, scoring = _compression(facts, params, tokens)
    most = max(mlp, rotating, attending, carried + packed.layers, logits, states + scoring)
    # Panels of weights lie where tiles of attention do; plain tiles of weights are PyTorch's.
    kept = max(workspace, packed.kept) if multiplies_bfloat16() else workspace + packed.kept
    return observed + kept + most


@dataclass(slots=True)
class _Packed:
    """Most bytes of products with packed weights.

    Attributes:
        layers: of one of the layers with a chunk, its input and outputs included (two of one
            input: gate and up, or q and k), or of looking its tokens up.
        head: of the output matrix with one row, without them.
        kept: workspaces and buffers, which stay for the next product.
    """

    layers: int = 0
    head: int = 0
    kept: int = 0


def _packed_products(blueprint: Blueprint, chunk: int, device: str) -> _Packed:
    dtype, most = blueprint.facts.dtype, _Packed()
    for each in blueprint.matrices:
        if isinstance(blueprint.stored(each), torch.dtype):
            continue
        width, kept = each.width, 0
        if each.is_head:
            head, kept = product_bytes(1, (each.rows, width), dtype, device)
            most.head = max(most.head, head)
        elif each.is_read:
            beside, kept = product_bytes(chunk, (each.rows, width), dtype, device)
            known = chunk * (width + 2 * each.rows) * dtype.itemsize
            most.layers = max(most.layers, known + beside)
        if not each.is_read and not (native.BUILT and device == "cpu"):
            looked_up = min(chunk * BLOCK_ROWS, plain_at_once(width))
            most.layers = max(most.layers, plain_bytes(looked_up, width))
        most.kept = max(most.kept, kept)
    return most


def _compression(facts: ModelFacts, params: ContextParams, tokens: int) -> tuple[int, int]:
    """Bytes of the queries that a kv_policy keeps of all layers, and of compressing one layer."""
    if params.kv_policy is None:
        return 0, 0
    queries = min(tokens, max(1, _observes(params).queries)) * facts.num_heads
    kept = len(facts.windows) * queries * facts.head_dim * facts.dtype.itemsize
    key, value = facts.head_dim, facts.value_dim or facts.head_dim
    moved = 2 * tokens * facts.num_kv_heads * (key + value) * facts.dtype.itemsize
    if params.kv_policy == "rkv":  # cosines to all keys, which are alike, where, and copies
        moved += 29 * min(ROWS, tokens) * facts.num_kv_heads * tokens
    return kept, moved


def _observes(params: ContextParams) -> Observes:
    return Observes() if params.kv_policy is None else POLICIES[params.kv_policy]().observes


def attention_workspace(
    facts: ModelFacts, params: ContextParams, tokens: int, device: str
) -> tuple[int, int]:
    """Bytes of one layer's attention for the last chunk (output, lse, copies), and those that the
    C++ kernels keep for themselves."""
    by_kernels = (
        backend_of(params) in ("auto", "cpu") and params.type_k != FP8 and params.sparse is None
    )
    if device == "cpu" and not (by_kernels and BUILT):
        return AttentionPeak(facts, params).at(tokens), 0
    if backend_of(params) == "reference":
        return AttentionPeak(facts, params).at(tokens), 0
    every = [_workspace(layer, params, tokens, device) for layer, _ in facts.alike()]
    return max(work for work, _ in every), max(kept for _, kept in every)


def _workspace(
    facts: ModelFacts, params: ContextParams, tokens: int, device: str
) -> tuple[int, int]:
    chunk, own = min(params.n_batch, tokens), facts.windows[0]
    narrowed, sinks = narrowed_window(own, params)
    window = narrowed or own
    kept = tokens if window is None else min(tokens, window + sinks + chunk)
    key, value = facts.head_dim, facts.value_dim or facts.head_dim
    width = facts.num_kv_heads * (key + value) * facts.dtype.itemsize
    out = chunk * facts.num_heads * (value * facts.dtype.itemsize + 4)
    quantized = params.type_k in ("int8", "int4", "fp8")
    copies = chunk * width * 13 // 4 if quantized else 0
    ring = 0
    if window is not None and (narrowed or window <= LARGEST_RING):
        before = min(tokens - chunk, window + sinks)  # read together with the chunk, then kept
        ring, copies = (2 * before + chunk) * width, (before + chunk) * width
    if device == "cuda":
        parts = 3 * out if quantized or ring else 0
        copies += min(_DEQUANTIZED, kept * width) if quantized else 0
        return max(ring, out + parts + copies), 0
    meta: dict[str, Any] = {"device": "meta", "dtype": facts.dtype}
    k = torch.empty(1, facts.num_kv_heads, kept, key, **meta)
    v = torch.empty(1, facts.num_kv_heads, kept, value, **meta)
    q = torch.empty(1, facts.num_heads, chunk, key, **meta)
    call = make_call(q, DenseKV(k, v), mask=Mask(window=window, sinks=sinks), q_offset=kept - chunk)
    observes = _observes(params)
    workspace = workspace_bytes(call, receives=observes.received)
    if params.kv_policy is not None and observes.queries > 1:
        newest = q[:, :, : observes.queries]
        scored = make_call(newest, DenseKV(k, v), mask=Mask(), q_offset=kept - newest.shape[2])
        workspace = max(workspace, workspace_bytes(scored, receives=True))
    return max(ring, out + copies), workspace
