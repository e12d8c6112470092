"""`saccade convert` as one run: convert, train, judge, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from saccade.evals.conversion import Judge, other_text, parts_of, spread_rows
from saccade.hf.convert import check_conversion, converted_heads
from saccade.hf.convert_distill import distill, rows_needed
from saccade.hf.convert_save import save_folder
from saccade.hf.load import LoadedModel
from saccade.hf.model import HFModel
from saccade.hf.text_tokens import all_tokens
from saccade.report.record import Record, origin
from saccade.runtime.model import ModelFacts

CALIBRATION: Final = (8, 512)
"""Rows and tokens of a row that "aligned" reads."""
LEARNED: Final = 256
"""Tokens of a row that a distillation reads."""
SCORED: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to do: as the options of the command."""

    kv_heads: int
    method: str = "aligned"
    distill: int = 0
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class Converted(Record):
    """What a conversion did.

    Attributes:
        kv_heads, cache_bytes: of a layer, and of one token in all layers; before and after.
        quality: by stage, then by text: perplexity, its error, divergence from the original.
        training: steps of each layer, layers, relative errors of their outputs before and after.
        complete: False where training was interrupted.
    """

    model: str
    method: str
    kv_heads: tuple[int, int]
    cache_bytes: tuple[int, int]
    quality: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    bytes_on_disk: int = 0
    notes: list[str] = field(default_factory=list)
    complete: bool = True


def convert(
    loaded: LoadedModel,
    text: str,
    folder: Path,
    options: Options,
    *,
    on_progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Converted:
    """Convert a loaded model, judge it, and save it to a new folder; the model is as it was after.

    Ctrl-C while layers are trained ends the training, and what there is then is judged and saved;
    at any other moment nothing is written.

    Args:
        text: the first nine tenths are learned from, the end is judged by.
        on_progress: called with (steps done, all steps, what is done now).

    Raises:
        As `converted_heads` and `save_folder`; BadInput for a text that is too short.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    planned = check_conversion(model, options.kv_heads, options.method)
    learned, held = parts_of(_tokens(tokenizer, text))
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    total = layers * (options.distill > 0) + 4
    on_progress(0, total, "original model")
    other = _tokens(tokenizer, other_text())[:SCORED]
    texts = {"held-out": held} | ({"package descriptions": other} if len(other) > 64 else {})
    judge = Judge(model, texts)
    record = Converted(
        **origin(),
        schema="conversion/1",
        model=loaded.name,
        method=options.method,
        kv_heads=(planned.before, planned.after),
        cache_bytes=(token_bytes(HFModel(model).facts), 0),
    )
    _note(record, "original", judge)
    on_progress(1, total, "heads are converted")
    calibration = spread_rows(learned, *CALIBRATION)
    with converted_heads(
        model, options.kv_heads, method=planned.method, calibration=calibration
    ) as done:
        record.notes += done.notes
        record.cache_bytes = (record.cache_bytes[0], token_bytes(HFModel(model).facts))
        on_progress(2, total, "quality of the converted model")
        _note(record, options.method if done.after < done.before else "copied", judge)
        if options.distill and done.after < done.before:
            rows = spread_rows(learned, rows_needed(options.distill), LEARNED)

            def show(layer: int, _: int, error: float) -> None:
                on_progress(2 + layer, total, f"layer {layer} trained, error {error:.3f}")

            trained = distill(
                model, done.swaps, rows, steps=options.distill, seed=options.seed, on_progress=show
            )
            record.training = asdict(trained) | {"tokens": rows.numel()}
            record.complete = trained.complete
            on_progress(total - 2, total, "quality after training")
            _note(record, f"{options.method}, {options.distill} steps", judge)
        on_progress(total - 1, total, f"writing {folder.name}")
        record.bytes_on_disk = save_folder(model, tokenizer, folder)
    on_progress(total, total, "done")
    return record


def token_bytes(facts: ModelFacts) -> int:
    """Bytes of the keys and values of one token in all layers, in the dtype of the model."""
    own = (facts.num_kv_heads, facts.head_dim, facts.value_dim or facts.head_dim)
    shapes: Sequence[tuple[int, int, int]] = facts.kv_shapes or (own,) * facts.num_layers
    return sum(heads * (key + value) for heads, key, value in shapes) * facts.dtype.itemsize


def _note(record: Converted, stage: str, judge: Judge) -> None:
    record.quality[stage] = {name: asdict(found) for name, found in judge.judge().items()}


def _tokens(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(all_tokens(tokenizer, text, special=False), dtype=torch.int64)
