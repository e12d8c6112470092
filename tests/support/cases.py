"""Random attention problems that every backend has to solve like the reference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from saccade.core import BlockSelection
from saccade.ops import explain
from tests.support.random_inputs import generator

# Backends that run on this machine's CPU; those for GPUs have tests of their own.
HERE = sorted(
    name
    for name, verdict in explain(*(torch.zeros(1, 1, 1, 16) for _ in range(3)))
    if not verdict.startswith("cannot")
)
HEADS = [(4, 4), (6, 2), (5, 1), (8, 1)]
LENGTHS = [(33, 33), (1, 70), (7, 50), (65, 130), (5, 3)]
MASKS = [
    {"causal": False},
    {},
    {"window": 9},
    {"window": 9, "sinks": 3},
    {"window": 1},
    {"window": 500, "sinks": 2},
]
EXTRAS = ["plain", "padding", "lengths", "softcap", "sink_logits", "alibi", "blocks", "packed"]


@dataclass(frozen=True)
class Case:
    heads: tuple[int, int]
    kv_lens: tuple[int, int]
    mask: dict[str, Any]
    extra: str
    dtype: torch.dtype = torch.float32
    head_dim: int = 16
    batch: int = 2
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        mask = "-".join(f"{k}{v}" for k, v in self.mask.items()) or "causal"
        heads = "x".join(map(str, self.heads))
        return f"{heads}-{'x'.join(map(str, self.kv_lens))}-{mask}-{self.extra}"

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """(q, k, v, options of saccade.attention); padded keys are poisoned with NaN."""
        source = generator(self.seed)
        (heads, kv_heads), (q_len, k_len) = self.heads, self.kv_lens
        batch = 1 if self.extra == "packed" else self.batch
        shapes = ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
        q, k, v = (
            torch.randn(batch, *shape, self.head_dim, dtype=torch.float64, generator=source)
            for shape in shapes
        )
        options: dict[str, Any] = {**self.mask, **self.options}
        if self.extra == "padding":
            options["key_padding"] = torch.rand(batch, k_len, generator=source) > 0.3
            poison(k, v, ~options["key_padding"])
        elif self.extra == "lengths":
            options["kv_lens"] = torch.randint(1, k_len + 1, (batch,), generator=source)
            poison(k, v, torch.arange(k_len)[None] >= options["kv_lens"][:, None])
        elif self.extra == "softcap":
            options["softcap"] = 2.0
        elif self.extra == "sink_logits":
            options["sink_logits"] = torch.randn(heads, generator=source)
        elif self.extra == "alibi":
            options["alibi_slopes"] = torch.rand(batch, heads, generator=source)
        elif self.extra == "blocks":
            shape = (batch, kv_heads, -(-q_len // 8), -(-k_len // 16))
            allowed = torch.rand(shape, generator=source) > 0.4
            options["blocks"] = BlockSelection(allowed=allowed, q_block=8, k_block=16)
        elif self.extra == "packed":
            options["cu_seqlens"] = (
                torch.tensor([0, q_len // 3, q_len // 3, q_len]),
                torch.tensor([0, k_len // 2, k_len // 2 + 1, k_len]),
            )
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), options


def poison(k: torch.Tensor, v: torch.Tensor, where: torch.Tensor) -> None:
    """Fill the keys and values that must never be read with NaN."""
    k.masked_fill_(where[:, None, :, None], torch.nan)
    v.masked_fill_(where[:, None, :, None], torch.nan)


def on(device: str, *values: Any) -> Any:
    """Tensors, or a dictionary of options, on a device."""

    def move(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: move(value) for name, value in x.items()}
        if isinstance(x, tuple):
            return tuple(move(part) for part in x)
        if isinstance(x, BlockSelection):
            return replace(x, allowed=x.allowed.to(device))
        return x.to(device) if isinstance(x, torch.Tensor) else x

    return move(values[0]) if len(values) == 1 else [move(x) for x in values]


def all_cases() -> list[Case]:
    """Every extra with every mask; heads and lengths vary along."""
    cases = []
    for i, extra in enumerate(EXTRAS):
        for j, mask in enumerate(MASKS):
            for n in range(len(LENGTHS)):
                heads = HEADS[(i + j + n) % len(HEADS)]
                cases.append(Case(heads, LENGTHS[n], mask, extra, seed=i + j + n))
    return cases
