"""Text beyond the trained length: perplexity by position with YaRN, and with a window and sinks.

    python -m benchmarks.far --times 3 --out benchmarks/results/far-smollm2.json

Each way reads the same text from its first token; the last `--scored` tokens are scored inside the
trained length (at its end) and at `--times` that length.  A way that keeps text together has a
ratio near 1.  The texts at both places differ: the last window of each, read from its own start by
fresh caches, says how hard they are.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.evals.quality import perplexity
from saccade.evals.text import default_text
from saccade.hf.load import LoadedModel, load_model
from saccade.hf.model import HFModel
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin
from saccade.runtime import Context, ContextParams
from saccade.runtime.auto_scaling import reaching


@torch.inference_mode()
def scored(model: HFModel, params: ContextParams, tokens: Tensor, last: int) -> Tensor:
    """Negative log-likelihoods `[last]` of the last tokens, each behind all tokens before it."""
    with Context(model, params) as ctx:
        ctx.append(tokens[: -last - 1])
        found: list[Tensor] = []
        for part in tokens[-last - 1 : -1].split(256):
            logits = ctx.logits(ctx.append(part, wanted=len(part)))
            at = len(tokens) - last + sum(map(len, found))
            found.append(F.cross_entropy(logits, tokens[at : at + len(part)], reduction="none"))
    return torch.cat(found)


def row(name: str, place: str, params: ContextParams, nll: Tensor) -> dict[str, Any]:
    """One line of the record."""
    value, error = perplexity(nll)
    given = {k: v for k, v in asdict(params).items() if v != asdict(ContextParams())[k]}
    blocks = [round(perplexity(part)[0], 3) for part in nll.split(256)]
    print(f"{name:24} {place:8} {value:8.3f} +- {error:.3f}  {blocks}", flush=True)
    return {
        "name": name,
        "place": place,
        "params": given,
        "perplexity": value,
        "perplexity_se": error,
        "blocks": blocks,
    }


def measure(
    loaded: LoadedModel, tokens: Tensor, times: int, last: int, names: list[str]
) -> list[dict[str, Any]]:
    """All ways at both places."""
    model = HFModel(loaded.model, loaded.name, loaded.n_ctx_train)
    inside, far = loaded.n_ctx_train, times * loaded.n_ctx_train
    yarn, _ = reaching(ContextParams(), model.facts, far)
    window = ContextParams(n_swa=1024, n_sinks=4)
    ways = {
        "all keys": (ContextParams(), None),
        "YaRN": (yarn, yarn),
        "window and sinks": (window, window),
        "unscaled": (None, ContextParams(n_ctx=far)),
        "the last window alone": (ContextParams(n_swa=1024), ContextParams(n_swa=1024)),
    }
    rows: list[dict[str, Any]] = []
    for name in names:
        for place, end, params in zip(("inside", "far"), (inside, far), ways[name], strict=True):
            if params is not None:
                text = tokens[:end] if name != "the last window alone" else tokens[:end][-3072:]
                rows.append(row(name, place, params, scored(model, params, text, last)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--scored", type=int, default=1024)
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["the last window alone", "window and sinks", "all keys", "YaRN"],
    )
    parser.add_argument("--out", type=Path, help="where the record goes")
    args = parser.parse_args()
    facts = origin()
    loaded = load_model(args.model)
    assert loaded.tokenizer is not None
    tokens = torch.tensor(loaded.tokenizer(default_text()).input_ids)
    rows = measure(loaded, tokens, args.times, args.scored, args.ways)
    record = {**facts, "schema": "far/1", "model": loaded.name, "rows": rows}
    if args.out is not None:
        write_whole(args.out, as_text(record))


if __name__ == "__main__":
    main()
