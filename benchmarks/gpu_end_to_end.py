"""Llama-3.1-8B's shape with random weights on one GPU: prefill and decoding, ours against sdpa.

    python benchmarks/gpu_end_to_end.py --out benchmarks/results/h200_llama_end_to_end.json

Each part is a process of its own, so that peaks of memory are its own and one that fails costs
nothing else.  Before anything is timed, the logits of both are compared on a short text.
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
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

import saccade
from saccade.runtime import DecodeStep

LONG, CHUNK, STEPS = 131072, 8192, 64
LENGTHS = (4096, 32768, LONG - 256)
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": LONG,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TINY = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_model(config: LlamaConfig, how: str) -> Any:
    """Random bf16 weights, made on the card; norms 1, rotary tables as the config says."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=how
        )
    model.to_empty(device=DEVICE)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(DEVICE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1) if "norm" in name else weight.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


def tokens(count: int, vocab: int) -> Tensor:
    """Random tokens, the same in every process."""
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(1))


def synchronize() -> None:
    """Wait for the card."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> float:
    """Seconds of wall time until the card is done."""
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begin


def peak() -> float:
    """Most GiB allocated since the last call."""
    if DEVICE != "cuda":
        return 0.0
    gib = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return gib


class Sdpa:
    """transformers' own way: sdpa and a cache that grows by concatenation."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config, self.model = config, random_model(config, "sdpa")
        self.cache = DynamicCache(config=config)

    @torch.inference_mode()
    def read(self, ids: Tensor, batch: int) -> Tensor:
        """Logits behind the last token."""
        for part in ids.split(batch):
            logits = self.model(
                part[None].to(DEVICE), past_key_values=self.cache, logits_to_keep=1
            ).logits
        return logits[0, -1]

    def step(self, token: int) -> Tensor:
        """Logits behind one token more."""
        return self.read(torch.tensor([token]), 1)

    def forget(self) -> None:
        """Start anew, memory freed."""
        self.cache = DynamicCache(config=self.config)


class Ours:
    """saccade.Context: chunks into reserved caches, decoding by DecodeStep."""

    def __init__(self, config: LlamaConfig, room: int, **params: Any) -> None:
        self.model, self.room = random_model(config, "sdpa"), room
        self.params = params
        self.context(CHUNK)

    def context(self, batch: int) -> None:
        """A fresh context with that n_batch."""
        self.ctx: Any = None
        params = saccade.ContextParams(n_ctx=self.room, n_batch=batch, **self.params)
        self.ctx = saccade.Context(self.model, params, reserve=self.room)
        self.decode: Any = None

    def read(self, ids: Tensor, batch: int) -> Tensor:
        """Logits behind the last token."""
        if batch != self.ctx.params.n_batch:
            self.ctx.close()
            self.context(batch)
        return self.ctx.logits(self.ctx.append(ids)[-1])

    def step(self, token: int) -> Tensor:
        """Logits behind one token more."""
        if self.decode is None:
            self.decode = DecodeStep(self.ctx.model, self.ctx.cache)
        return self.decode(token)[0]

    def forget(self) -> None:
        """Start anew in the same memory."""
        for layer in self.ctx.cache.layers:
            layer.reset()


def rate(subject: Any, steps: int = STEPS) -> dict[str, float]:
    """Tokens/s and milliseconds of greedy steps, each waiting for its token as a user would."""
    token = 5
    for _ in range(4):
        token = int(subject.step(token).argmax())

    def go() -> None:
        nonlocal token
        for _ in range(steps):
            token = int(subject.step(token).argmax())

    ms = timed(go) / steps * 1e3
    return {"ms_per_token": ms, "tokens_per_s": 1e3 / ms, "peak_gib": peak()}


def floor_ms(config: LlamaConfig, length: int, kv_bytes: float, read_gbs: float) -> float:
    """Milliseconds to read all weights (but the embedding) and all keys and values once."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    weights = 2 * (config.num_hidden_layers * layer + config.vocab_size * hidden)
    return (weights + config.num_hidden_layers * 2 * kv * length * kv_bytes) / read_gbs / 1e6


def relative(ours: Tensor, truth: Tensor) -> float:
    """||ours - truth|| / ||truth||."""
    return ((ours.float() - truth.float()).norm() / truth.float().norm()).item()


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
    """Decoding at each length and over codes, prefill of the longest text in chunks and whole."""
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
    found["chunks_s"] = found["decode"][lengths[-1]]["first_token_s"]
    found["chunks_peak_gib"] = found["decode"][lengths[-1]]["prefill_peak_gib"]
    for layer in subject.ctx.cache.layers:
        layer.truncate(len(ids) + 1)
    for kind in ("int8", "fp8", "int4"):
        found[kind] = over_codes(subject, kind, exact)
        print(json.dumps(found), flush=True)
    subject.forget()
    for kind, length in (("int8", lengths[1]), ("int4", lengths[1]), ("int8", lengths[2])):
        found[kind][f"first_token_s {length}"] = reading_into_codes(subject, kind, ids[:length])
        print(json.dumps(found), flush=True)
    subject.ctx.close()
    subject.context(lengths[-1])
    peak()
    found["one_piece_s"] = timed(lambda: subject.read(ids, lengths[-1]))
    found["one_piece_peak_gib"] = peak()
    return found


def reading_into_codes(dense: Ours, kind: str, ids: Tensor) -> float:
    """Seconds to read a text in chunks into a quantised cache, keys of earlier chunks as codes."""
    params = saccade.ContextParams(n_ctx=dense.room, n_batch=CHUNK, type_k=kind, type_v=kind)
    ctx = saccade.Context(dense.model, params, reserve=dense.room)
    ctx.append(ids[: CHUNK + 512])  # compile
    for layer in ctx.cache.layers:
        layer.reset()
    took = timed(lambda: ctx.logits(ctx.append(ids)[-1]))
    ctx.close()
    return took


def over_codes(dense: Ours, kind: str, exact: Tensor) -> dict:
    """Decoding over a quantised copy of the caches of `dense`; `exact` is its answer to token 7."""
    length = dense.ctx.seen - 1
    params = saccade.ContextParams(n_ctx=dense.room, type_k=kind, type_v=kind)
    ctx = saccade.Context(dense.model, params, reserve=dense.room)
    with torch.inference_mode():
        for ours, theirs in zip(ctx.cache.layers, dense.ctx.cache.layers, strict=True):
            view = theirs.view()
            ours.append(view.k[:, :, :length], view.v[:, :, :length])
    kept, dense.ctx, dense.decode = (dense.ctx, dense.decode), ctx, None
    error = relative(dense.step(7), exact)
    found = {"error": error, "cache_gib": ctx.cache_bytes / 2**30} | rate(dense)
    ctx.close()
    dense.ctx, dense.decode = kept
    return found


def part_sdpa(config: LlamaConfig, lengths: tuple[int, ...]) -> dict:
    """The peer: the same, with transformers' own cache."""
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
    """torch.compile'd sdpa over a static cache of each length, as transformers recommends."""
    model = random_model(config, "sdpa")
    ids = tokens(lengths[-1], config.vocab_size)
    step = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
    found: dict[Any, Any] = {}
    for length in (lengths[1], lengths[2], lengths[0]):
        cache = StaticCache(config=config, max_cache_len=length + 128)
        for part in ids[:length].split(CHUNK):
            model(part[None].to(DEVICE), past_key_values=cache, logits_to_keep=1)
        token = torch.tensor([[5]], device=DEVICE)
        position = torch.tensor([[length]], device=DEVICE)
        compiling, begin = 0.0, time.perf_counter()
        for i in range(STEPS + 4):
            if i == 4:
                compiling, begin = time.perf_counter() - begin, time.perf_counter()
            logits = step(token, position_ids=position, past_key_values=cache).logits
            token = torch.tensor([[int(logits[0, -1].argmax())]], device=DEVICE)
            position = position + 1
        synchronize()
        ms = (time.perf_counter() - begin) / STEPS * 1e3
        found[length] = {"ms_per_token": ms, "tokens_per_s": 1e3 / ms, "compile_s": compiling}
        print(json.dumps(found), flush=True)
        del cache
    return found


def read_gbs() -> float:
    """GB/s of reading memory."""
    big = torch.randn(2**30, device="cuda")
    big.sum()
    return 10 * big.nbytes / timed(lambda: [big.sum() for _ in range(10)]) / 1e9


PARTS: dict[str, Callable[..., dict]] = {
    "check": part_check, "ours": part_ours, "sdpa": part_sdpa, "compiled": part_compiled,
}  # fmt: skip
LIMITS = {"check": 90, "ours": 180, "sdpa": 110, "compiled": 110}


def run_part(name: str, tiny: bool) -> None:
    """One part in this process; its record is the last line."""
    config = LlamaConfig(**(SHAPE | (TINY if tiny else {})))
    lengths = (96, 160, 300) if tiny else LENGTHS
    begin = time.perf_counter()
    record = PARTS[name](config, lengths)
    print(json.dumps(record | {"part_s": time.perf_counter() - begin}), flush=True)


def main() -> None:
    """Run parts in processes of their own and write one record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the script on a CPU")
    parser.add_argument("--part", help="run one part in this process")
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments.part, arguments.tiny)
        return
    record: dict[str, Any] = {
        "what": "Llama-3.1-8B's shape, random bf16 weights, batch 1; seconds, ms, GiB",
        "torch": torch.__version__, "saccade": saccade.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if DEVICE == "cuda":
        record |= {"gpu": torch.cuda.get_device_name(), "read_gbs": read_gbs()}
        torch.cuda.empty_cache()
        config = LlamaConfig(**SHAPE)
        record["floor_ms"] = {
            f"{name} {n}": floor_ms(config, n, size, record["read_gbs"])
            for n in LENGTHS
            for name, size in (("bf16", 2), ("int8", 1.0625), ("fp8", 1.0625), ("int4", 0.5625))
        }
    for name in arguments.parts:
        command = [sys.executable, __file__, "--part", name, *(["--tiny"] * arguments.tiny)]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=LIMITS[name]
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            failed = {"failed": done.stderr[-1500:]} if done.returncode else {}
        except subprocess.TimeoutExpired as error:
            text = (error.stdout or b"").decode()
            lines = [line for line in text.splitlines() if line.startswith("{")]
            failed = {"failed": f"more than {LIMITS[name]} s"}
        record[name] = (json.loads(lines[-1]) if lines else {}) | failed
        print(name, json.dumps(record[name], indent=1), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
