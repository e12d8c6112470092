"""What the benchmarks of a whole model run: random weights of a shape, by saccade and by sdpa."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

import saccade
from saccade.bench.gpu import on_gpu, synchronize
from saccade.report.files import write_whole
from saccade.report.record import as_text
from saccade.runtime import DecodeStep

SCHEMA = "saccade.model/1"
LONG, CHUNK, STEPS = 131072, 8192, 64
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
DEVICE = "cuda" if on_gpu() else "cpu"


def random_model(config: PreTrainedConfig, how: str) -> Any:
    """Random bf16 weights, made on the GPU; norms 1, rotary tables as the config says."""
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


def timed(run: Callable[[], Any]) -> float:
    """Seconds of wall time until the GPU is done."""
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begin


def peak() -> float:
    """Most GiB allocated since the last call."""
    if not on_gpu():
        return 0.0
    gib = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return gib


class Sdpa:
    """transformers' own way: sdpa and a cache that grows by concatenation."""

    def __init__(self, config: PreTrainedConfig) -> None:
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
        """Begin again, memory freed."""
        self.cache = DynamicCache(config=self.config)


class Ours:
    """saccade.Context: chunks into reserved caches, decoding by DecodeStep."""

    def __init__(self, config: PreTrainedConfig, room: int, **params: Any) -> None:
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
        """Begin again in the same memory."""
        for layer in self.ctx.cache.stores:
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


def relative(ours: Tensor, truth: Tensor) -> float:
    """||ours - truth|| / ||truth||."""
    return ((ours.float() - truth.float()).norm() / truth.float().norm()).item()


def put(path: Path | None, record: dict[str, Any]) -> None:
    """Write what has been measured so far, and print the newest part."""
    newest = list(record)[-1]
    print(newest, json.dumps(record[newest]), flush=True)
    if path is not None:
        write_whole(path, as_text(record))
