"""What quantized keys cost by format and group size, on the real model: bytes and KL divergence.

    python benchmarks/kv_groups.py --context 2048 --out benchmarks/results/kv-groups.json

Every setting reads the same context in chunks of 512 and scores the same continuation in chunks of
16, teacher-forced; the divergence is relative to caches in the model's own precision.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.cache import DenseCache, LayerCache, QuantizedCache
from saccade.evals.text import default_text
from saccade.hf import SaccadeCache, attach
from saccade.hf.load import load_model
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"bits_k": 8, "bits_v": 8},
    "fp8": {"bits_k": 8, "bits_v": 8, "fp8": True},
    "int8 keys, int4 values": {"bits_k": 8, "bits_v": 4},
    "int4": {"bits_k": 4, "bits_v": 4},
}


@torch.inference_mode()
def log_probs(
    model: Any, tokens: Tensor, context: int, make: Callable[[], LayerCache]
) -> tuple[Tensor, int]:
    """(log-probabilities after the context `[m, vocab]`, bytes of all caches at its end)."""
    with attach(model):
        cache = SaccadeCache(model.config, lambda layer, window: make())
        for part in tokens[:, :context].split(512, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
        size, outs = cache.nbytes, []
        for part in tokens[:, context:].split(16, 1):
            outs.append(model(part, past_key_values=cache).logits[0].float())
    return torch.cat(outs).log_softmax(-1), size


def compare(ours: Tensor, exact: Tensor) -> dict[str, float]:
    """Mean KL divergence with its standard error, and the share of equal most likely tokens."""
    divergence = (exact.exp() * (exact - ours)).sum(-1)
    return {
        "kl": float(divergence.mean()),
        "kl_se": float(divergence.std() / len(divergence) ** 0.5),
        "same_top": float((ours.argmax(-1) == exact.argmax(-1)).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument(
        "--no-hadamard", action="store_true", help="also without the Hadamard transform"
    )
    parser.add_argument("--out", type=Path, help="where the record goes")
    args = parser.parse_args()
    loaded = load_model(args.model)
    ids = loaded.tokenizer(default_text()).input_ids[: args.context + args.scored]
    tokens = torch.tensor(ids)[None]
    exact, size = log_probs(loaded.model, tokens, args.context, DenseCache)
    rows: list[dict[str, Any]] = [{"format": "dense", "bytes": size}]
    ways = (True, False) if args.no_hadamard else (True,)
    for name, group, hadamard in itertools.product(args.formats, args.groups, ways):
        options = {**FORMATS[name], "group": group, "hadamard": hadamard}

        def make(options: dict[str, Any] = options) -> LayerCache:
            return QuantizedCache(**options)

        ours, size = log_probs(loaded.model, tokens, args.context, make)
        setting = {"format": name, "group": group, "hadamard": hadamard, "bytes": size}
        rows.append({**setting, **compare(ours, exact)})
        print(rows[-1], flush=True)
    settings = {"model": loaded.name, "context": args.context, "scored": args.scored}
    if args.out is not None:
        record = {"schema": "saccade.kv_groups/1", **origin(), "settings": settings, "rows": rows}
        write_whole(args.out, as_text(record))


if __name__ == "__main__":
    main()
