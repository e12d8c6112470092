"""What sparse patterns cost: predictions beside the dense ones, by the share of pairs that is read.

    python -m benchmarks.sparse_quality --model smollm2 --lengths 4096,8192 --json out/quality.json
    python -m benchmarks.sparse_quality --model smollm2 --steps 512 --json out/steps.json

The model reads a text in chunks of 512 under each pattern; the predictions in the last chunks are
compared with those of dense attention over the same text: how often both predict the same token,
and the mean KL divergence.  The density is that of the selections that were made, counted over the
causal pairs of all chunks and layers, layers that are dense included.  Every pattern reads the
same chunks, so all differences are those of the pattern.

With --steps the text before the last tokens is read densely, and those one by one under each
pattern, as in decoding.  Kascade is calibrated on the text behind the one that is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.core import BlockSelection, KVView
from saccade.evals.text import default_text
from saccade.hf.kascade import calibrate_kascade
from saccade.hf.load import load_model
from saccade.hf.model import HFModel
from saccade.report.environment import cpu_name
from saccade.report.files import write_whole
from saccade.report.record import as_text, origin
from saccade.runtime import ContextParams
from saccade.sparse import (
    BlockTopK,
    BlockTopP,
    Kascade,
    Pattern,
    Quest,
    Strided,
    TriangleMix,
    VerticalSlash,
    XAttention,
    followed_by,
)
from saccade.sparse.pattern import of_layers, selected

CHUNK, SCORED = 512, 1024
Row = dict[str, Any]

PATTERNS: tuple[Pattern, ...] = (
    Strided(stride=4),
    Strided(stride=2),
    *(BlockTopK(top=top) for top in (8, 16, 32)),
    *(BlockTopP(p=p) for p in (0.9, 0.97)),
    *(XAttention(p=p) for p in (0.8, 0.9, 0.95, 0.98, 0.99)),
    XAttention(stride=8, p=0.9),
    *(VerticalSlash(columns=n, diagonals=n // 2) for n in (4, 12, 24)),
    TriangleMix(),
    TriangleMix(dense_layers=0.25),
)


@dataclass(slots=True)
class Counted:
    """A pattern whose selections are counted: it is asked by the layers of a model in turn."""

    pattern: Pattern | None
    num_layers: int
    calls: int = 0
    read: float = 0.0
    pairs: float = 0.0
    _own: Sequence[Pattern | None] = ()
    _causal: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._own = of_layers(self.pattern, self.num_layers)

    def select(self, q: Tensor, kv: KVView, q_offset: int) -> BlockSelection:
        """See Pattern."""
        layer, self.calls = self.calls % self.num_layers, self.calls + 1
        own = self._own[layer]
        found = None if own is None else selected(own, q, kv, q_offset)
        if found is None:
            whole = torch.ones(1, 1, 1, 1, dtype=torch.bool)
            found = BlockSelection(allowed=whole, q_block=q.shape[2], k_block=kv.shape[2])
        pairs = self._pairs(q.shape[2], kv.shape[2], q_offset, found)
        self.read += float((found.allowed * pairs).mean((0, 1)).sum())
        self.pairs += float(pairs.sum())
        return found

    def _pairs(self, q_len: int, end: int, q_offset: int, found: BlockSelection) -> Tensor:
        """Causal pairs in each square of the grid."""
        key = q_len, end, q_offset, found.q_block, found.k_block
        if key not in self._causal:
            seen = torch.arange(end) <= torch.arange(q_offset, q_offset + q_len)[:, None]
            rows, columns = found.allowed.shape[2:]
            room = rows * found.q_block - q_len, columns * found.k_block - end
            seen = torch.nn.functional.pad(seen.float(), (0, room[1], 0, room[0]))
            squares = seen.unflatten(1, (columns, -1)).unflatten(0, (rows, -1))
            self._causal[key] = squares.sum((1, 3))
        return self._causal[key]


def predictions(model: HFModel, text: Tensor, pattern: Pattern | None) -> Tensor:
    """Log-probabilities `[SCORED, vocab]` behind the last tokens of a text, read in chunks."""
    params = ContextParams(sparse=pattern, n_batch=CHUNK)
    found: list[Tensor] = []
    with torch.inference_mode(), model.attached(params) as attached:
        cache = attached.new_cache(params, reserve=len(text))
        for chunk in text.split(CHUNK):
            behind = len(text) - cache.seen - len(chunk)
            states = followed_by(behind, attached.hidden, chunk[None], cache)[0]
            if behind < SCORED:
                found.append(attached.logits(states).float().log_softmax(-1))
    return torch.cat(found)[-SCORED:]


@dataclass(slots=True)
class Switched:
    """A pattern that can be exchanged between two calls; prompts are read densely."""

    num_layers: int
    counted: Counted | None = None

    def select(self, q: Tensor, kv: KVView, q_offset: int) -> BlockSelection:
        """See Pattern."""
        if self.counted is None or q.shape[2] > 1:
            return Counted(None, 1).select(q, kv, q_offset)
        return self.counted.select(q, kv, q_offset)


def step_rows(model: HFModel, text: Tensor, steps: int, patterns: Sequence[Pattern]) -> list[Row]:
    """One row a pattern, of the predictions of single steps at the end of the text."""
    switched, rows = Switched(model.facts.num_layers), list[Row]()
    params = ContextParams(sparse=switched, n_batch=CHUNK)
    with torch.inference_mode(), model.attached(params) as attached:
        cache, start = attached.new_cache(params, reserve=len(text)), len(text) - steps
        for chunk in text[:start].split(CHUNK):
            attached.hidden(chunk[None], cache)

        def read(pattern: Pattern | None) -> tuple[Tensor, Counted]:
            counted = switched.counted = Counted(pattern, switched.num_layers)
            states = [attached.hidden(token[None, None], cache)[0] for token in text[start:]]
            cache.crop(-steps)
            return attached.logits(torch.cat(states)).float().log_softmax(-1), counted

        dense, _ = read(None)
        for pattern in patterns:
            rows.append(_row(pattern, len(text), dense, *read(pattern)))
    return rows


def patterns_of_steps(model: HFModel, text: Tensor, block: int = 64) -> list[Pattern]:
    """Patterns that read equally many keys a step, calibrated on another text."""
    plan = calibrate_kascade(model, text)
    found: list[Pattern] = []
    for top in (8, 16, 32):
        more = block // 32
        found += [
            BlockTopK(block=block, top=top, window_blocks=2),
            Quest(block=32, top=top * more, window_blocks=2 * more, sink_blocks=more),
            Kascade(block=block, top=top, plan=plan),
            Kascade(block=block, top=top),
        ]
    return found


def rows_of(model: HFModel, text: Tensor, words: str) -> list[Row]:
    """One row a pattern whose name has `words` in it."""
    dense, rows = predictions(model, text, None), list[Row]()
    for pattern in PATTERNS:
        if words not in repr(pattern):
            continue
        counted = Counted(pattern, model.facts.num_layers)
        found = predictions(model, text, counted)
        rows.append(_row(pattern, len(text), dense, found, counted))
    return rows


def _row(pattern: Pattern, length: int, dense: Tensor, found: Tensor, counted: Counted) -> Row:
    """What a pattern changed, printed."""
    parts = zip(dense.split(128), found.split(128), strict=True)
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in parts])
    same = (dense.argmax(-1) == found.argmax(-1)).float()
    row: Row = {
        "name": repr(pattern), "length": length, "density": counted.read / counted.pairs,
        "same_top": float(same.mean()), "kl": float(kl.mean()),
    }  # fmt: skip
    said = f"same top {row['same_top']:.3f}, KL {row['kl']:.4f}"
    print(f"{length:6,} {row['density']:.3f} of the pairs, {said}  {row['name']}", flush=True)
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", default="4096,8192", help="tokens of the text")
    parser.add_argument("--only", default="", help="patterns whose names have this in them")
    parser.add_argument("--steps", type=int, default=0, help="read so many tokens one by one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the record")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loaded = load_model(given.model)
    model, rows = HFModel(loaded.model), list[Row]()
    scored = given.steps or SCORED
    print(f"{cpu_name()}, {given.model}, the last {scored:,} predictions, chunks of {CHUNK}")
    for length in map(int, given.lengths.split(",")):
        ids = loaded.tokenizer(default_text()[: length * 8])["input_ids"]
        text = torch.tensor(ids[:length])
        if given.steps:
            other = torch.tensor(ids[length : 2 * length])
            rows += step_rows(model, text, given.steps, patterns_of_steps(model, other))
        else:
            rows += rows_of(model, text, given.only)
    if given.json:
        record = {"model": loaded.name, "scored": scored, "chunk": CHUNK}
        write_whole(given.json, as_text({**origin(), **record, "rows": rows}))


if __name__ == "__main__":
    main()
