"""Speed on a GPU: its roofline and the shares of it that whole models reached in a record.

Steps are captured CUDA graphs, so they cost what reading weights and keys costs, and a few
microseconds a layer.  Prompts are launched layer by layer: small chunks wait for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from saccade.advice.speed import INNER_MOVED, STATES_MOVED, Speed, kept_keys, visible
from saccade.runtime.memory import chunks, layers_bytes
from saccade.runtime.params import ContextParams
from saccade.runtime.plan_blueprint import Blueprint

ATTENTION_SHARE: Final = 0.69
"""FLOP/s of causal prefill attention with 128 numbers a head, over those of large products."""
PRODUCT_SHARE: Final = 0.92
"""The same of a layer's products with a chunk of thousands of rows."""
STEP_LAYER, STEP_QUANTIZED = 27e-6, 45e-6
"""Seconds of a layer in a captured step beside reading its weights and keys."""
HOST_LAYER: Final = 0.65e-3
"""Seconds in which the host launches a layer of transformers."""
HOST_READ: Final = 25e9
"""Bytes a second that reach a GPU from host memory (PCIe of 16 lanes)."""
_HALF_ROWS: Final = 160
"""Rows of a chunk with which products reach half of their rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What a GPU can do at best: FLOP/s of large products, bytes a second of large copies."""

    device: str
    flops: float
    read: float
    source: str


RECORDED: Final = {
    "NVIDIA H200": Roofline(
        device="NVIDIA H200",
        flops=783.8e12,
        read=4391.7e9,
        source="the record benchmarks/results/h200_llama.json",
    ),
}


def gpu_speed(blueprint: Blueprint, params: ContextParams, tokens: int, roof: Roofline) -> Speed:
    """Speed of a prompt of `tokens` tokens and of the tokens behind it."""
    reading = sum(
        _chunk(blueprint, params, start, min(params.n_batch, tokens - start), roof)
        for start in range(0, tokens, params.n_batch)
    )
    return Speed(first_token=reading, tokens_per_second=1 / _step(blueprint, params, tokens, roof))


def _chunk(
    blueprint: Blueprint, params: ContextParams, before: int, rows: int, roof: Roofline
) -> float:
    """Seconds of a chunk of `rows` tokens behind `before` others."""
    facts = blueprint.facts
    rate = roof.flops * PRODUCT_SHARE * rows / (rows + _HALF_ROWS)
    moved = (STATES_MOVED * blueprint.hidden + INNER_MOVED * blueprint.inner) * rows
    layer = 2 * rows * blueprint.layers / facts.num_layers / rate
    layer += moved * facts.dtype.itemsize / roof.read
    seconds = 0.0
    for each, count in facts.alike():
        reach = visible(params, each.windows[0])
        keys = (before if reach is None else min(before, reach)) + rows / 2
        flops = 2 * each.num_heads * (each.head_dim + (each.value_dim or each.head_dim)) * rows
        attention = flops * keys / (roof.flops * ATTENTION_SHARE * min(1.0, each.head_dim / 128))
        width = each.num_kv_heads * (each.head_dim + (each.value_dim or each.head_dim))
        fetched = before * width * each.dtype.itemsize / HOST_READ * (not params.offload_kqv)
        seconds += count * max(HOST_LAYER, layer + attention, fetched)
    return seconds


def _step(blueprint: Blueprint, params: ContextParams, tokens: int, roof: Roofline) -> float:
    facts = blueprint.facts
    weights = (blueprint.layers + blueprint.head) * facts.dtype.itemsize
    stored = layers_bytes(facts, params, chunks(tokens, params.n_batch))
    keys = 0.0
    for (layer, count), (_, nbytes) in zip(facts.alike(), stored, strict=True):
        own = layer.windows[0]
        there = min(tokens, visible(params, own) or tokens)
        keys += count * nbytes * kept_keys(params, own, tokens) / there
    quantized = params.type_k in ("int8", "int4", "fp8")
    overhead = facts.num_layers * (STEP_QUANTIZED if quantized else STEP_LAYER)
    bandwidth = roof.read if params.offload_kqv else HOST_READ
    return weights / roof.read + keys / bandwidth + overhead


def measured_roofline(dtype: torch.dtype) -> Roofline:
    """The roofline of this machine's GPU, measured in less than a second."""
    device = torch.cuda.get_device_name()

    def best(call: Callable[[], object]) -> float:
        taken: list[float] = []
        for _ in range(8):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
        return min(taken)

    n = 4096 if dtype is torch.float32 else 8192
    a = torch.full((n, n), 0.01, dtype=dtype, device="cuda")
    big = torch.full((256 << 20,), 1, dtype=torch.int32, device="cuda")
    there = torch.empty_like(big)
    return Roofline(
        device=device,
        flops=2 * n**3 / best(lambda: a @ a),
        read=2 * big.nbytes / best(lambda: there.copy_(big)),
        source="measured here",
    )
