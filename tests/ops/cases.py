"""Random attention problems that every backend has to solve like the reference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from saccade.core import BlockSelection, Span
from saccade.ops import explain

# Backends that run on this machine's CPU; the others have tests of their own.
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
        torch.manual_seed(self.seed)
        (heads, kv_heads), (q_len, k_len) = self.heads, self.kv_lens
        batch = 1 if self.extra == "packed" else self.batch
        q = torch.randn(batch, heads, q_len, self.head_dim, dtype=torch.float64)
        k = torch.randn(batch, kv_heads, k_len, self.head_dim, dtype=torch.float64)
        v = torch.randn(batch, kv_heads, k_len, self.head_dim, dtype=torch.float64)
        options: dict[str, Any] = {**self.mask, **self.options}
        if self.extra == "padding":
            options["key_padding"] = torch.rand(batch, k_len) > 0.3
            poison(k, v, ~options["key_padding"])
        elif self.extra == "lengths":
            options["kv_lens"] = torch.randint(1, k_len + 1, (batch,))
            poison(k, v, torch.arange(k_len)[None] >= options["kv_lens"][:, None])
        elif self.extra == "softcap":
            options["softcap"] = 2.0
        elif self.extra == "sink_logits":
            options["sink_logits"] = torch.randn(heads)
        elif self.extra == "alibi":
            options["alibi_slopes"] = torch.rand(batch, heads)
        elif self.extra == "blocks":
            shape = (batch, kv_heads, -(-q_len // 8), -(-k_len // 16))
            options["blocks"] = BlockSelection(
                allowed=torch.rand(shape) > 0.4, q_block=8, k_block=16
            )
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


def nothing_matters(
    k: torch.Tensor, v: torch.Tensor, spans: tuple[Span, ...], slots: int
) -> list[torch.Tensor]:
    """Keys and values laid out in a ring by `spans`, NaN in every slot that is in none."""
    rings = []
    for x in (k, v):
        ring = torch.full((*x.shape[:2], slots, x.shape[3]), torch.nan)
        for slot, position, length in spans:
            ring[:, :, slot : slot + length] = x[:, :, position : position + length]
        rings.append(ring)
    return rings


def all_cases() -> list[Case]:
    """Every extra with every mask; heads and lengths vary along."""
    cases = []
    for i, extra in enumerate(EXTRAS):
        for j, mask in enumerate(MASKS):
            for n in range(len(LENGTHS)):
                heads = HEADS[(i + j + n) % len(HEADS)]
                cases.append(Case(heads, LENGTHS[n], mask, extra, seed=i + j + n))
    return cases
