"""Llama-3.1-8B's shape with random weights on one GPU: prefill and decoding, ours against sdpa.

    python -m benchmarks.gpu_llama --out benchmarks/results/h200_llama.json
    python -m benchmarks.gpu_llama --short --seconds 240 --out benchmarks/results/h200_llama.json

Each part is a process of its own, so that peaks of memory are its own and one that fails costs
nothing else.  Before anything is timed, the logits of both are compared on a short text.  The short
form leaves out compiled SDPA, SDPA over the longest text, and reading into quantized caches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, StaticCache

import saccade
from benchmarks.gpu_models import (
    CHUNK,
    DEVICE,
    LONG,
    SCHEMA,
    SHAPE,
    STEPS,
    TINY,
    Ours,
    Sdpa,
    peak,
    put,
    random_model,
    rate,
    relative,
    timed,
    tokens,
)
from saccade.bench import gpu
from saccade.report.record import origin

LENGTHS = (4096, 32768, LONG - 256)


def floor_ms(config: LlamaConfig, length: int, kv_bytes: float, read_gbs: float) -> float:
    """Milliseconds to read all weights (but the embedding) and all keys and values once."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    weights = 2 * (config.num_hidden_layers * layer + config.vocab_size * hidden)
    return (weights + config.num_hidden_layers * 2 * kv * length * kv_bytes) / read_gbs / 1e6


def part_check(config: LlamaConfig, lengths: tuple[int, ...]) -> dict:
    """Logits of ours, in chunks and stepped, and of sdpa, against sdpa in float32.

    Raises:
        RuntimeError: an error above twice that of sdpa in bf16 (int8: four times, int4: reported).
    """
    count = min(3000, lengths[0])
    ids = tokens(count + 8, config.vocab_size)

    def logits_of(subject: Any, batch: int) -> list[Tensor]:
        found = [subject.read(ids[:count], batch)]
        return found + [subject.step(int(t)).clone() for t in ids[count:]]

    exact = Sdpa(config)
    peer = logits_of(exact, count)
    exact.model.float()
    exact.forget()
    truth = logits_of(exact, count)
    del exact
    found = {"sdpa": _errors(peer, truth)}
    for name, factor in (("bf16", 2), ("int8", 4), ("int4", None)):
        kind = {} if name == "bf16" else {"type_k": name, "type_v": name}
        ours = Ours(config, 2 * count, **kind)
        found[name] = _errors(logits_of(ours, 1024), truth)
        ours.ctx.close()
        del ours
        if factor and not found[name]["step"] < factor * found["sdpa"]["step"]:
            raise RuntimeError(f"{name}: relative errors of logits {found}; nothing is timed.")
    return found


def _errors(logits: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    errors = [relative(a, b) for a, b in zip(logits, truth, strict=True)]
    return {"prefill": errors[0], "step": max(errors[1:])}


def part_ours(config: LlamaConfig, lengths: tuple[int, ...]) -> dict:
    """Reading each text in chunks and decoding behind it; decoding over quantized caches."""
    subject = Ours(config, lengths[-1] + 256)
    ids = tokens(lengths[-1], config.vocab_size)
    subject.read(ids[:CHUNK], CHUNK)  # compile
    found: dict[str, Any] = {"decode": {}}
    for length in lengths:
        subject.forget()
        peak()
        first = timed(lambda n=length: subject.read(ids[:n], CHUNK))
        found["decode"][length] = {"first_token_s": first, "prefill_peak_gib": peak()}
        exact = subject.step(7).clone()
        found["decode"][length] |= rate(subject)
        print(json.dumps(found), flush=True)
    for layer in subject.ctx.cache.stores:
        layer.truncate(len(ids) + 1)
    for kind in ("int8", "fp8", "int4"):
        found[kind] = over_quantized(subject, kind, exact)
        print(json.dumps(found), flush=True)
    subject.ctx.close()
    return found


def part_reading(config: LlamaConfig, lengths: tuple[int, ...]) -> dict:
    """Reading texts into quantized caches, and the longest one as a single chunk."""
    subject = Ours(config, lengths[-1] + 256)
    ids = tokens(lengths[-1], config.vocab_size)
    found: dict[str, Any] = {}
    for kind, length in (("int8", lengths[1]), ("int4", lengths[1]), ("int8", lengths[2])):
        name = f"{kind} {length}"
        found[name] = {"first_token_s": reading_into_quantized(subject, kind, ids[:length])}
        print(json.dumps(found), flush=True)
    subject.ctx.close()
    subject.context(lengths[-1])
    peak()
    took = timed(lambda: subject.read(ids, lengths[-1]))
    return found | {"one_chunk": {"first_token_s": took, "prefill_peak_gib": peak()}}


def reading_into_quantized(dense: Ours, kind: str, ids: Tensor) -> float:
    """Seconds to read a text in chunks into a quantized cache, earlier chunks are quantized."""
    params = saccade.ContextParams(n_ctx=dense.room, n_batch=CHUNK, type_k=kind, type_v=kind)
    ctx = saccade.Context(dense.model, params, reserve=dense.room)
    ctx.append(ids[: CHUNK + 512])  # compile
    for layer in ctx.cache.stores:
        layer.reset()
    took = timed(lambda: ctx.logits(ctx.append(ids)[-1]))
    ctx.close()
    return took


def over_quantized(dense: Ours, kind: str, exact: Tensor) -> dict:
    """Decoding over a quantized copy of the caches of `dense`; `exact` is its answer to token 7."""
    length = dense.ctx.seen - 1
    params = saccade.ContextParams(n_ctx=dense.room, type_k=kind, type_v=kind)
    ctx = saccade.Context(dense.model, params, reserve=dense.room)
    with torch.inference_mode():
        for ours, theirs in zip(ctx.cache.stores, dense.ctx.cache.stores, strict=True):
            view = theirs.view()
            ours.append(view.k[:, :, :length], view.v[:, :, :length])
    kept, dense.ctx, dense.decode = (dense.ctx, dense.decode), ctx, None
    error = relative(dense.step(7), exact)
    found = {"error": error, "cache_gib": ctx.cache_bytes / 2**30} | rate(dense)
    ctx.close()
    dense.ctx, dense.decode = kept
    return found


def part_sdpa(config: LlamaConfig, lengths: tuple[int, ...]) -> dict:
    """The peer: the same with transformers' own cache, texts in one chunk and in several."""
    subject = Sdpa(config)
    ids = tokens(lengths[-1], config.vocab_size)
    subject.read(ids[:2048], 1024)
    subject.forget()
    found: dict[str, Any] = {"decode": {}}
    for length in lengths:
        peak()
        found["decode"][length] = {
            "first_token_s": timed(lambda n=length: subject.read(ids[:n], n)),
            "prefill_peak_gib": peak(),
        }
        found["decode"][length] |= rate(subject, 16)
        subject.forget()
        print(json.dumps(found), flush=True)
    peak()
    found["chunks_s"] = timed(lambda: subject.read(ids, CHUNK))
    found["chunks_peak_gib"] = peak()
    return found


@torch.inference_mode()
def part_compiled(config: LlamaConfig, lengths: tuple[int, ...]) -> dict:
    """torch.compile'd sdpa over a static cache, as transformers recommends; one length a process.

    Compiling takes most of a minute; every length has shapes of its own and would compile anew.
    Only steps are timed, so the cache is filled with random numbers instead of a text.
    """
    model = random_model(config, "sdpa")
    ids = tokens(16, config.vocab_size)
    step = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
    found: dict[Any, Any] = {}
    for length in lengths:
        cache = StaticCache(config=config, max_cache_len=length + 128)
        model(ids[None].to(DEVICE), past_key_values=cache, logits_to_keep=1)
        for layer in cache.stores:
            for stored in (layer.keys, layer.values):
                stored.normal_()
            layer.cumulative_length.fill_(length)
        token = torch.tensor([[5]], device=DEVICE)
        position = torch.tensor([[length]], device=DEVICE)
        compiling, begin = 0.0, time.perf_counter()
        for i in range(STEPS + 4):
            if i == 4:
                compiling, begin = time.perf_counter() - begin, time.perf_counter()
            logits = step(token, position_ids=position, past_key_values=cache).logits
            token = torch.tensor([[int(logits[0, -1].argmax())]], device=DEVICE)
            position = position + 1
        gpu.synchronize()
        ms = (time.perf_counter() - begin) / STEPS * 1e3
        found[length] = {"ms_per_token": ms, "tokens_per_s": 1e3 / ms, "compile_s": compiling}
        print(json.dumps(found), flush=True)
        del cache
    return found


PARTS: dict[str, Callable[..., dict]] = {
    "check": part_check, "ours": part_ours, "sdpa": part_sdpa, "reading": part_reading,
    "compiled": part_compiled,
}  # fmt: skip
SHORT = ("check", "ours", "sdpa")
LIMITS = {"check": 90, "ours": 180, "sdpa": 110, "reading": 120, "compiled": 240}


def run_part(name: str, tiny: bool, lengths: tuple[int, ...]) -> None:
    """One part in this process; its record is the last line."""
    options: dict[str, Any] = SHAPE | (TINY if tiny else {})
    config = LlamaConfig(**options)
    begin = time.perf_counter()
    record = PARTS[name](config, lengths)
    print(json.dumps(record | {"part_s": time.perf_counter() - begin}), flush=True)


def process_of(name: str, tiny: bool, lengths: tuple[int, ...], limit: float) -> dict:
    """The record of a part that ran in a process of its own, or what became of it."""
    command = [sys.executable, "-m", "benchmarks.gpu_llama", "--part", name, *(["--tiny"] * tiny)]
    command += ["--lengths", *map(str, lengths)]
    limit = min(limit, LIMITS[name])
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit)
        text, failed = done.stdout, {"failed": done.stderr[-1500:]} if done.returncode else {}
    except subprocess.TimeoutExpired as error:
        text, failed = (error.stdout or b"").decode(), {"failed": f"more than {limit:.0f} s"}
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return (json.loads(lines[-1]) if lines else {}) | failed


def record_of(name: str, tiny: bool, lengths: tuple[int, ...], limit: float) -> dict:
    """The record of a part; compiled sdpa has one process a length."""
    if name != "compiled":
        return process_of(name, tiny, lengths, limit)
    found = {n: process_of(name, tiny, (n,), limit) for n in lengths}
    return {str(n): record.pop(str(n), {}) | record for n, record in found.items()}


def floors() -> dict[str, Any]:
    """Bandwidth of this GPU, and the milliseconds that reading alone takes for each length."""
    found = gpu.ceilings()
    torch.cuda.empty_cache()
    config = LlamaConfig(**SHAPE)
    sizes = (("bf16", 2), ("int8", 1.0625), ("fp8", 1.0625), ("int4", 0.5625))
    floor = {
        f"{name} {n}": floor_ms(config, n, size, found["read_gbs"])
        for n in LENGTHS
        for name, size in sizes
    }
    return {"ceilings": found, "floor_ms": floor}


def main() -> None:
    """Run parts in processes of their own and write one record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop parts after that time")
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the script on a CPU")
    parser.add_argument("--part", help="run one part in this process")
    parser.add_argument("--lengths", nargs="*", type=int, help="of one part")
    arguments = parser.parse_args()
    lengths = tuple(arguments.lengths or ((96, 160, 300) if arguments.tiny else LENGTHS))
    if arguments.part:
        run_part(arguments.part, arguments.tiny, lengths)
        return
    deadline = time.perf_counter() + arguments.seconds
    what = "Llama-3.1-8B's shape, random bf16 weights, batch 1; seconds, ms, GiB"
    record = {"schema": SCHEMA, **origin(), "what": what} | (floors() if gpu.on_gpu() else {})
    for name in SHORT if arguments.short else arguments.parts:
        some = lengths[:2] if arguments.short and name == "sdpa" else lengths
        left = max(1.0, deadline - time.perf_counter())
        record[name] = record_of(name, arguments.tiny, some, left)
        put(arguments.out, record)


if __name__ == "__main__":
    main()
