"""Where the time of a decoding step and of a prefill chunk goes: kernels by name, on one GPU.

python lab/profile_step.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import torch
from gpu_subjects import CHUNK, SHAPE, Ours, tokens
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig


def table(what: str, run, rows: int = 14) -> None:
    """Kernels of one call, longest first."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    events = [e for e in prof.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in events) / 1e3
    print(f"{what}: {total:.2f} ms in {sum(e.count for e in events)} kernels")
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:rows]:
        print(f"  {e.self_device_time_total / 1e3:8.3f} ms {e.count:5d} x {e.key[:90]}")


def main() -> None:
    """bf16 at 4k and the chunk behind 32k; int8 at 32k."""
    config = LlamaConfig(**SHAPE)
    ids = tokens(32768 + 2 * CHUNK, config.vocab_size)
    ours = Ours(config, 60000)
    ours.read(ids[:4096], CHUNK)
    table("bf16 step at 4k", lambda: ours.step(5))
    ours.forget()
    ours.read(ids[:32768], CHUNK)
    table("chunk of 8k behind 32k", lambda: ours.read(ids[:CHUNK], CHUNK))
    ours.ctx.close()
    ours.params = {"type_k": "int8", "type_v": "int8"}
    ours.context(CHUNK)
    ours.read(ids[:CHUNK], CHUNK)
    table("int8 step at 8k", lambda: ours.step(5))


if __name__ == "__main__":
    main()
