"""Which keys kvpress keeps of a tiny model: the fixture that tests/compress/test_kvpress.py reads.

Run in an environment of its own, with `pip install kvpress "transformers<5.3"`:

    python scripts/kvpress_kept.py tests/compress/kvpress_kept.json

Both sides build the model by `tiny`, whose weights follow from the names of its parameters, so that
they are the same under every version of transformers.
"""

from __future__ import annotations

import json
import sys
import zlib
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
LENGTH = 300
TOKENS = torch.arange(LENGTH) * 37 % 509 + 3
"""No token twice, so that no two keys of the first layer are alike."""
WINDOW, BETA = 16, 3
KEPT = (100, 180)
"""Keys kept of each head, on average."""
NEEDS_WEIGHTS = ("h2o",)
"""Presses that read the weights of eager attention."""


def tiny(family: str) -> Any:
    """A random float32 model, with attention strong enough to matter."""
    model = AutoModelForCausalLM.from_config(
        CONFIGS[family](**SIZES), attn_implementation="sdpa", dtype=torch.float32
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            strong = any(part in name for part in ("q_proj", "k_proj", "q_norm", "k_norm"))
            size = 0.3 if strong else 0.1
            noise = torch.randn(weight.shape, generator=generator) * size
            weight.copy_(1 + noise if weight.dim() == 1 else noise)
    return model.eval()


def presses(whole: int) -> dict[str, Any]:
    """Our name of a policy -> the press of kvpress that keeps so many keys."""
    import kvpress

    share = (whole + 0.5) / LENGTH  # kvpress rounds down

    def snapkv() -> Any:
        return kvpress.SnapKVPress(1 - share, window_size=WINDOW)

    expected = kvpress.ExpectedAttentionPress
    return {
        "streaming_llm": kvpress.StreamingLLMPress(1 - share),
        "knorm": kvpress.KnormPress(1 - share),
        "keydiff": kvpress.KeyDiffPress(1 - share),
        "tova": kvpress.TOVAPress(1 - share),
        "snapkv": snapkv(),
        "ada_snapkv": kvpress.AdaKVPress(snapkv()),
        "critical_snapkv": kvpress.CriticalKVPress(snapkv()),
        "critical_ada_snapkv": kvpress.CriticalAdaKVPress(snapkv()),
        "pyramidkv": kvpress.PyramidKVPress(1 - whole / LENGTH, window_size=WINDOW, beta=BETA),
        "expected_attention": expected(1 - share),
        "ada_expected_attention": kvpress.AdaKVPress(expected(1 - share, epsilon=1e-2)),
        "kvzip": kvpress.KVzipPress(1 - whole / LENGTH + 1e-9),  # of all keys, rounded up
        "h2o": kvpress.ObservedAttentionPress(1 - share),
    }


class NoWords:
    """A tokenizer for which every instruction is empty: the context alone is repeated."""

    chat_template = None

    def encode(self, text: str, **_: Any) -> Tensor:
        """No tokens."""
        return torch.empty(1, 0, dtype=torch.int64)


def rows_in(kept: Tensor, every: Tensor) -> Tensor:
    """Whether each row of `every` `[H, L, D]` is among those of `kept` `[H, n, D]`: `[H, L]`."""
    same = (kept[:, :, None] == every[:, None]).all(-1)
    assert (same.sum(-1) == 1).all(), "keys that occur twice"
    return same.any(1)


def as_text(kept: Tensor) -> list[str]:
    """Bits `[H, L]`, the first key the highest, as a hexadecimal number for each head."""
    return [f"{int(''.join(map(str, row)), 2):x}" for row in kept.int().tolist()]


@torch.no_grad()
def kept_by(model: Any, press: Any, every: list[Tensor]) -> list[list[str]]:
    """For each layer and KV head, which keys a press keeps."""
    cache = DynamicCache()
    with press(model):
        model(TOKENS[None], past_key_values=cache, use_cache=True)
    found: list[list[str]] = []
    for layer, whole, stored in zip(model.model.layers, every, cache.layers, strict=True):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is None:
            found.append(as_text(rows_in(stored.keys[0], whole)))
            continue
        kept = torch.ones(whole.shape[:2], dtype=torch.bool)
        kept[masked[1], masked[2]] = False
        found.append(as_text(kept))
        layer.self_attn.masked_key_indices = None
    return found


def main(path: str) -> None:
    """Write the fixture."""
    from kvpress.presses import kvzip_press

    kvzip_press.AutoTokenizer.from_pretrained = lambda name: NoWords()
    kept: dict[str, Any] = {}
    for family in CONFIGS:
        model = tiny(family)
        for count, implementation in product(KEPT, ("sdpa", "eager")):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                cache = model(TOKENS[None], use_cache=True).past_key_values
            every = [layer.keys[0] for layer in cache.layers]
            for name, press in presses(count).items():
                if (name in NEEDS_WEIGHTS) == (implementation == "eager"):
                    kept[f"{family} {name} {count}"] = kept_by(model, press, every)
    record = {
        "made_by": "scripts/kvpress_kept.py",
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
        "kept": kept,
    }
    Path(path).write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
