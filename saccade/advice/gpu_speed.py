"""Speed on a GPU: its roofline, and how far whole models stayed below it in a record.

Captured steps cost what reading weights and keys costs, and some microseconds a layer.  Whatever
Python launches layer by layer, small chunks and steps that are not captured, waits for the host.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from saccade.advice.speed import INNER_MOVED, STATES_MOVED, Speed, kept_keys, visible
from saccade.runtime.budgets import budget_in_keys
from saccade.runtime.layers import without_own_dtype
from saccade.runtime.memory import chunks, layers_bytes
from saccade.runtime.params import QUANTIZED, ContextParams
from saccade.runtime.plan_blueprint import Blueprint
from saccade.runtime.step import captures

HOST_READ: Final = 25e9
"""Bytes a second that reach a GPU from host memory: PCIe of 16 lanes, in no record."""
_HALF_ROWS: Final = 160
"""Rows of a chunk with which products reach half of their rate, in no record."""
FILE: Final = Path(__file__).with_name("gpu_shares.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What a GPU can do at best: FLOP/s of large products, bytes a second of large copies."""

    device: str
    flops: float
    read: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What a model took in a record; `scripts.publish_pages` works it out.

    Attributes:
        products, attention: of a chunk, as a multiple of the time at the roofline's FLOP/s.
        step, quantized_step: seconds of a layer in a captured step beside reading.
        host_layer: seconds in which Python launches a layer.
        quantizing: seconds for each number that a quantized cache stores.
        observing: seconds for each token, layer and head that a kv_policy observes and compresses.
    """

    products: float
    attention: float
    step: float
    quantized_step: float
    host_layer: float
    quantizing: float
    observing: float


def _recorded() -> tuple[Roofline, Shares]:
    values = json.loads(FILE.read_text())
    return Roofline(**values["roofline"]), Shares(**values["shares"])


_ROOFLINE, SHARES = _recorded()
RECORDED: Final = {_ROOFLINE.device: _ROOFLINE}


def gpu_speed(
    blueprint: Blueprint,
    params: ContextParams,
    tokens: int,
    roof: Roofline,
    shares: Shares = SHARES,
) -> Speed:
    """Speed of a prompt of `tokens` tokens and of the tokens behind it."""
    params = without_own_dtype(params, blueprint.facts.dtype)
    params = budget_in_keys(params, blueprint.facts)
    reading = sum(
        _chunk(blueprint, params, start, min(params.n_batch, tokens - start), roof, shares)
        for start in range(0, tokens, params.n_batch)
    )
    step = step_seconds(blueprint, params, tokens, roof, shares)
    return Speed(first_token=reading, tokens_per_second=1 / step)


def _chunk(
    blueprint: Blueprint,
    params: ContextParams,
    before: int,
    rows: int,
    roof: Roofline,
    shares: Shares,
) -> float:
    """Seconds of a chunk of `rows` tokens behind `before` others."""
    facts = blueprint.facts
    rate = roof.flops * rows / (rows + _HALF_ROWS)
    moved = (STATES_MOVED * blueprint.hidden + INNER_MOVED * blueprint.inner) * rows
    layer = 2 * rows * blueprint.layers / facts.num_layers / rate * shares.products
    layer += moved * facts.dtype.itemsize / roof.read
    seconds = 0.0
    for each, count in facts.alike():
        reach = visible(params, each.windows[0])
        keys = (before if reach is None else min(before, reach)) + rows / 2
        width = each.head_dim + (each.value_dim or each.head_dim)
        flops = 2 * each.num_heads * width * rows * max(1.0, 128 / each.head_dim)
        stored = each.num_kv_heads * width
        work = layer + flops * keys / roof.flops * shares.attention
        if reach is None:  # rings are neither quantized nor compressed
            work += rows * stored * shares.quantizing * (params.type_k in QUANTIZED)
            work += rows * each.num_heads * shares.observing * (params.kv_policy is not None)
        fetched = before * stored * each.dtype.itemsize / HOST_READ * (not params.offload_kqv)
        seconds += count * max(shares.host_layer, work, fetched)
    return seconds


def step_seconds(
    blueprint: Blueprint, params: ContextParams, tokens: int, roof: Roofline, shares: Shares
) -> float:
    """Seconds of a step behind `tokens` tokens: the device's, or the host's if it is slower."""
    facts = blueprint.facts
    weights = (blueprint.layers + blueprint.head) * facts.dtype.itemsize
    stored = layers_bytes(facts, params, chunks(tokens, params.n_batch))
    keys = 0.0
    for (layer, count), (_, nbytes) in zip(facts.alike(), stored, strict=True):
        own = layer.windows[0]
        there = min(tokens, visible(params, own) or tokens)
        keys += count * nbytes * kept_keys(params, own, tokens) / there
    quantized = params.type_k in QUANTIZED
    layer = shares.quantized_step if quantized else shares.step
    device = (weights + keys) / roof.read + facts.num_layers * layer
    if not params.offload_kqv:  # copies run beside the computation
        device = max(device, keys / HOST_READ)
    return device if _captured(params) else max(device, facts.num_layers * shares.host_layer)


def _captured(params: ContextParams) -> bool:
    """Whether a Context replays its steps: the kernels allow it, and every cache can be stepped."""
    steps = params.page_size is None and params.kv_policy is None
    return steps and captures(params)


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
