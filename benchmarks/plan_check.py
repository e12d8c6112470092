"""Plans against measurements: bytes of caches, peak, time to the first token, tokens/s.

    python -m benchmarks.plan_check --tokens 2048 --out benchmarks/results/plan-cpu.json
    python -m benchmarks.plan_check --shape llama-8b --tokens 8192 32768 65536 \\
        --out benchmarks/results/plan-h200.json

Six settings for each length.  The plan is made first, from sizes alone; then the same prompt is
read and a few tokens are written.  Peaks are what PyTorch's allocator had given out at once,
weights counted: a GPU counts by itself, on a CPU the profiler does, in a run apart from the timed.

Plans for a GPU take their shares of the roofline from records (`saccade.advice.gpu_fit`), one of
them the record that this script writes at 8,192 tokens.  A row of that length and shape is a fit
and marked so; the other lengths are left out there, and are the test.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.advice import gpu_fit
from saccade.advice.calls import measured_calls
from saccade.advice.gpu_speed import RECORDED
from saccade.advice.machine import Machine, machine
from saccade.advice.peak import Memory, memory_of
from saccade.advice.speed import Speed
from saccade.hf.packed_layers import weights_bytes
from saccade.ops.allocated import AllocatedPeak
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin
from saccade.runtime import ContextParams, Sampler
from saccade.runtime.located import located
from saccade.runtime.plan_blueprint import Blueprint
from saccade.runtime.plan_files import blueprint_of, from_config

SCHEMA = "saccade.plan_check/1"
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "bf16": {"type_k": "bf16", "type_v": "bf16"},
    "int8": {"type_k": "int8", "type_v": "int8"},
    "int4": {"type_k": "int4", "type_v": "int4"},
    "window 1024 + 4 sinks": {"n_swa": 1024, "n_sinks": 4},
    "SnapKV 25 %": {"kv_policy": "snapkv", "kv_budget": 0.25},
}
BARS = {"caches": 0.0, "peak": 0.05, "first_token": 0.25, "tokens_per_second": 0.25}
SHAPED = "llama-8b"
RESULTS = Path(__file__).parent / "results"
TINY = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2}  # fmt: skip


def blueprint_of_shape(*, tiny: bool) -> Blueprint:
    """The blueprint of Llama-3.1-8B's shape."""
    from benchmarks.gpu_models import SHAPE

    options = {"model_type": "llama", **SHAPE, **(TINY if tiny else {}), "dtype": "bfloat16"}
    found = from_config(options, SHAPED, None)
    assert found is not None, "a Llama is a family that plan_files reads"
    return found


def shaped(tiny: bool) -> tuple[Any, Blueprint]:
    """Llama-3.1-8B's shape with random weights, and its blueprint."""
    from transformers import LlamaConfig

    from benchmarks.gpu_models import SHAPE, random_model

    options: dict[str, Any] = SHAPE | (TINY if tiny else {})
    return random_model(LlamaConfig(**options), "sdpa"), blueprint_of_shape(tiny=tiny)


def loaded(name: str) -> tuple[Any, Blueprint]:
    """A model by name or path on the CPU, and its blueprint."""
    from saccade.hf.load import load_model
    from saccade.hf.plan import blueprint

    path = located(name)
    found = blueprint_of(path, None, torch.float32) or blueprint(path)
    return load_model(name).model, found.holding("file")  # a GGUF, on the CPU


def measured(model: Any, params: ContextParams, ids: Tensor, written: int) -> dict[str, float]:
    """What a run really takes; its peak by a run of its own, which counting slows down."""
    import saccade

    weights = weights_bytes(model)
    begin, found = time.perf_counter(), {}
    for counted in (False, True):
        gc.collect()
        with saccade.Context(model, params) as ctx:
            if counted:
                with AllocatedPeak(ctx.model.device) as allocated:
                    next(iter(ctx.stream(ids, n_predict=1, sampler=Sampler())))
                found["peak"] = weights + allocated.bytes
                found["caches"] = ctx.cache_bytes
                continue
            stream, moments = ctx.stream(ids, n_predict=written + 1), []
            begin = time.perf_counter()
            for _ in stream:
                moments.append(time.perf_counter())
        found["first_token"] = moments[0] - begin
        warm = moments[len(moments) // 4 :]  # the first step is captured, which takes its time
        found["tokens_per_second"] = (len(warm) - 1) / (warm[-1] - warm[0])
    return found


def planned(memory: Memory, speed: Speed) -> dict[str, float]:
    """The same as `measured`, from the plan."""
    return {
        "caches": memory.caches,
        "peak": memory.peak,
        "first_token": speed.first_token,
        "tokens_per_second": speed.tokens_per_second,
    }


def row_of(
    name: str, blueprint: Blueprint, model: Any, where: Machine, tokens: int, options: Any
) -> dict[str, Any]:
    """One setting at one length: plan, measurement, and how far apart they are."""
    params = ContextParams(**options)
    plan = planned(
        memory_of(blueprint, params, tokens, where.kind), where.speed(blueprint, params, tokens)
    )
    ids = torch.randint(
        0, blueprint.facts.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)
    )
    # Kernels are compiled and a model is checked once: no part of a user's second run.
    measured(model, params, ids[: 2 * params.n_batch + 64 if where.kind == "cuda" else 64], 4)
    try:
        real = measured(model, params, ids, 64 if where.kind == "cuda" else 16)
    except Exception as error:
        return {"name": name, "tokens": tokens, "failed": f"{type(error).__name__}: {error}"[:300]}
    off = {key: plan[key] / real[key] - 1 for key in plan}
    within = all(abs(off[key]) <= BARS[key] for key in off)
    return {"name": name, "tokens": tokens, "options": options, "plan": plan, "measured": real,
            "off": off, "within": within, "fitted": _is_fit(where, blueprint, tokens)}  # fmt: skip


def _is_fit(where: Machine, blueprint: Blueprint, tokens: int) -> bool:
    """Whether the plan's constants come from a measurement of just this."""
    known = where.name in RECORDED and blueprint.facts.name == SHAPED
    return known and tokens in (gpu_fit.FITTED, *gpu_fit.PROMPTS)


def shown(row: dict[str, Any]) -> str:
    """One line."""
    if "failed" in row:
        return f"{row['name']:<22} {row['tokens']:>7,}  failed: {row['failed']}"
    cells = [
        f"{key} {row['plan'][key]:.5g}/{row['measured'][key]:.5g} ({row['off'][key]:+.1%})"
        for key in row["off"]
    ]
    fit = "  a fit, no test" if row["fitted"] else ""
    return f"{row['name']:<22} {row['tokens']:>7,}  {'; '.join(cells)}{fit}"


def main() -> None:
    """Measure and write one record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shape", choices=(SHAPED,), help="random weights instead of --model")
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the script on a CPU")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048])
    parser.add_argument("--batch", type=int, default=512, help="tokens read at once")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after that time")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.seconds
    model, blueprint = shaped(arguments.tiny) if arguments.shape else loaded(arguments.model)
    where = machine("cuda" if next(model.parameters()).is_cuda else "cpu", None)
    where = where if where.kind == "cuda" else replace(where, calls=measured_calls())
    record = {"schema": SCHEMA, **origin(), "model": blueprint.facts.name, "bars": BARS,
              "calls": asdict(where.calls), "rows": []}  # fmt: skip
    for tokens in arguments.tokens:
        for name in arguments.settings:
            if time.perf_counter() > deadline:
                break
            options = SETTINGS[name] | {"n_batch": arguments.batch}
            row = row_of(name, blueprint, model, where, tokens, options)
            record["rows"].append(row)
            print(shown(row), flush=True)
            if arguments.out is not None:
                write_whole(arguments.out, as_text(json.loads(json.dumps(record))))


if __name__ == "__main__":
    main()
