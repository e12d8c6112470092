"""Rotary tables that follow the length of the text, in direct calls of an attached model.

`generate()` reads token after token, so a text may pass the length at which its tables change in
the middle.  transformers' Phi-3 family then reads all tokens again with an empty cache; here every
model whose tables change does, and with the cache that the caller or the run brought.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor

from saccade.core import Unsupported
from saccade.hf.changes import override
from saccade.hf.rope import table_key
from saccade.hf.rope_tables import reached, reaching
from saccade.hf.runs import ModelRuns, Undo


def refit_generate(undo: Undo, runs: ModelRuns) -> None:
    """`generate` reads all tokens again where the tables of those in its cache change."""
    original: Any = getattr(runs.model, "prepare_inputs_for_generation", None)
    if original is None:
        return

    @wraps(original)
    def prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("past_key_values")
        if given is not None and _outgrown(runs, given, input_ids, kwargs):
            given = _emptied(given)
            kwargs |= {"past_key_values": given, "next_sequence_length": None}
        inputs = original(input_ids, *args, **kwargs)
        if inputs.get("past_key_values") is None and hasattr(given, "reaches"):
            inputs["past_key_values"] = _emptied(given)  # Phi-3 takes an empty one away as well
        return inputs

    override(undo, runs.model, "prepare_inputs_for_generation", prepare)


def read_chunks_of_one_text(undo: Undo, runs: ModelRuns) -> None:
    """`generate(prefill_chunk_size=...)` reads all chunks under the tables of the whole prompt."""
    original: Any = getattr(runs.model, "_prefill", None)
    if original is None:
        return

    @wraps(original)
    def prefill(
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        chunked = getattr(generation_config, "prefill_chunk_size", None) is not None
        mask = model_kwargs.get("attention_mask")
        length = _longest(input_ids, mask) if chunked and runs.rotary() else None
        return reaching(
            length, original, input_ids, generation_config, model_kwargs, *args, **kwargs
        )

    override(undo, runs.model, "_prefill", prefill)


def _outgrown(runs: ModelRuns, cache: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the text that is generated needs other tables than the keys in its cache."""
    rotary, seen = runs.rotary().values(), cache.get_seq_length()
    if not seen or reached() is not None:
        return False
    mask = kwargs.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    before = getattr(cache, "reaches", None) or _longest(input_ids[:, :seen], _cut(mask, seen))
    if table_key(rotary, _longest(input_ids, mask)) == table_key(rotary, before):
        return False
    if mask is not None and mask.shape[1] != input_ids.shape[1]:
        raise Unsupported(
            f"the rotary tables of this model change within this text of {mask.shape[1]} tokens, "
            f"so all of them have to be read again, but generate() was given {input_ids.shape[1]}. "
            "Give it the whole text, without past_key_values."
        )
    return True


def _longest(input_ids: Tensor, mask: Tensor | None) -> int:
    """Tokens in the longest row, padding apart."""
    return int(input_ids.shape[1] if mask is None else mask.sum(-1).max())


def _cut(mask: Tensor | None, length: int) -> Tensor | None:
    return None if mask is None else mask[:, :length]


def _emptied(cache: Any) -> Any:
    """Our cache without tokens; None for one of transformers, whose model makes a new one."""
    if not hasattr(cache, "reaches"):
        return None
    cache.reset()
    return cache
