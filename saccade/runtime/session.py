"""Sessions: a context on disk, to go on from later as if it had never stopped.

Saved are the caches of all layers, the tokens they have read, the token chosen but not yet read,
the sampler with its random numbers, and everything that gives the cached keys their meaning: a
fingerprint of the weights, the rotary positions in force, and the options.  A session is restored
only where all of that is the same; anything else is refused with a sentence, before anything in
the context changes.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from saccade.cache import snapshot
from saccade.cache.base import CacheState
from saccade.core import BadInput
from saccade.runtime.context import Context, NextToken
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.sampling import Sampler
from saccade.runtime.session_file import SessionFile, write

_FREE: Final = ("n_batch", "flash_attn", "backend", "fused_layers", "n_keep", "ctx_checkpoints")
"""Options that say how to compute, not what cached keys mean: they may change between runs."""


def save_session(path: str | Path, ctx: Context, sampler: Sampler | None = None) -> None:
    """Write a context to a file, replacing an older session at once or not at all.

    Args:
        path: the file; a kill at any moment leaves what was there before.
        ctx: between two tokens, not in the middle of a step.
        sampler: the one in use; default greedy.

    Raises:
        BadInput: a step was interrupted, so that layers have read different tokens.
        Unsupported: a cache that cannot be saved.
        OSError: the file cannot be written.
    """
    layers = ctx.cache.layers
    if {layer.seen for layer in layers} != {len(ctx.tokens)}:
        raise BadInput(
            "this context was interrupted in the middle of a step and cannot be saved: its layers "
            "have read different tokens. The session on disk is as it was."
        )
    sampler = sampler or Sampler()
    tensors: dict[str, Tensor] = {
        "tokens": torch.tensor(ctx.tokens, dtype=torch.int64),
        "sampler": sampler.state(),
    }
    described: list[dict[str, Any]] = []
    for index, layer in enumerate(layers):
        state = layer.state()
        described.append(
            {
                "kind": snapshot.kind_of(layer),
                "settings": state.settings,
                "progress": state.progress,
            }
        )
        tensors |= {f"layer.{index}.{name}": x for name, x in state.tensors.items()}
    tail = None if ctx.tail is None else ctx.tail.state()
    tensors |= {f"tail.{index}": q for index, (q, _) in (tail or {}).items()}
    record = {
        **_meaning(ctx),
        "sampler": _options(sampler),
        "next": None if ctx.next_token is None else asdict(ctx.next_token),
        "layers": described,
        "tail": None if tail is None else {str(i): scale for i, (_, scale) in tail.items()},
    }
    write(Path(path), tensors, record)


def load_session(path: str | Path, ctx: Context) -> Sampler:
    """Put a saved session into a context; what the context held before is forgotten.

    Args:
        path: a file of `save_session`.
        ctx: of the same model and the same options.

    Returns:
        The sampler of the session, where it was.

    Raises:
        BadInput: a file that is truncated, foreign, newer or damaged, or another model or other
            options.  The context is then as it was, or empty.
        OSError: the file cannot be read.
    """
    path = Path(path)
    file = SessionFile(path)
    try:
        return _restore(path, file, ctx)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        ctx.reset()
        raise BadInput(
            f"{path} has checksums that fit, but its contents contradict each other, so it was not "
            "written by saccade. Delete it to start anew."
        ) from error


def _restore(path: Path, file: SessionFile, ctx: Context) -> Sampler:
    record = file.record
    _check_meaning(path, record, ctx)
    layers, saved = ctx.cache.layers, record["layers"]
    states = [CacheState(part["settings"], part["progress"], {}) for part in saved]
    for layer, part, state in zip(layers, saved, states, strict=True):
        snapshot.check(layer, part["kind"], state)
    sampler = Sampler(**record["sampler"])
    sampler.restore(file.tensors("sampler")[""].clone())
    tokens = file.tensors("tokens")[""].tolist()
    tail = record["tail"]
    if tail is not None:  # copied: tensors of the file stay mapped to it
        queries = file.tensors("tail.")
        tail = {int(i): (queries[i].to(ctx.model.device, copy=True), s) for i, s in tail.items()}
    waiting = record["next"]
    try:
        for index, (layer, part) in enumerate(zip(layers, saved, strict=True)):
            state = states[index]._replace(tensors=file.tensors(f"layer.{index}."))
            snapshot.restore(layer, part["kind"], state, ctx.model.device)
    except BadInput:
        ctx.reset()
        raise
    ctx.resume(tokens, waiting and NextToken(**waiting), tail)
    return sampler


def _meaning(ctx: Context) -> dict[str, Any]:
    """What gives cached keys their meaning, as JSON."""
    return {
        "model": {**_facts(ctx.model.facts), **ctx.model.identity()},
        "params": _params(ctx.params),
    }


def _facts(facts: ModelFacts) -> dict[str, Any]:
    """The facts that caches depend on; the name of a file may change, weights have their own."""
    told = {f.name: getattr(facts, f.name) for f in fields(facts)}
    for name in ("name", "n_ctx_train", "softcap", "learned_sinks"):
        del told[name]
    return {**told, "dtype": str(facts.dtype), "windows": list(facts.windows)}


def _params(params: ContextParams) -> dict[str, Any]:
    told = {f.name: getattr(params, f.name) for f in fields(params)}
    pattern = params.sparse
    return {**told, "sparse": None if pattern is None else str(pattern)}


def _options(sampler: Sampler) -> dict[str, Any]:
    return {f.name: getattr(sampler, f.name) for f in fields(sampler) if f.init}


def _check_meaning(path: Path, record: dict[str, Any], ctx: Context) -> None:
    """Raise BadInput where the session belongs to another model or to other options."""
    here = _meaning(ctx)
    for name, value in here["model"].items():
        there = record["model"].get(name)
        if there != value:
            raise BadInput(
                f"{path} was saved with another model: its {name} is {there}, this model has "
                f"{value}. Load the model it was saved with."
            )
    stretched = ctx.params.rope_scaling_type is not None  # n_ctx may then say how far
    free = _FREE if stretched else (*_FREE, "n_ctx")
    for name, value in here["params"].items():
        there = record["params"].get(name)
        if name not in free and there != value:
            raise BadInput(
                f"{path} was saved with {name}={there!r}, this context has {value!r}. "
                f"Give {name} as it was, or start a new session."
            )
