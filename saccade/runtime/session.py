"""Sessions: a context saved to a file and restored exactly.

Saved are the caches of all layers, their tokens, the token chosen but not yet read, the sampler
with the state of its random generator, and what cached keys depend on: a fingerprint of the
weights, the rotary positions, and the options.  A session is restored only where all of that is the
same; anything else is refused with a sentence, before the context changes.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from saccade.cache import snapshot
from saccade.cache.base import CacheState
from saccade.compress import ObservedQueries
from saccade.core import BadInput
from saccade.runtime.context import Context, NextToken
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.sampling import Sampler
from saccade.runtime.session_file import SessionFile, write

_CHANGEABLE: Final = (
    "n_batch",
    "flash_attn",
    "backend",
    "fused_layers",
    "n_keep",
    "ctx_checkpoints",
)
"""Options that cached keys do not depend on: they may differ when a session is restored."""


def save_session(path: str | Path, ctx: Context, sampler: Sampler | None = None) -> None:
    """Write a context to a file, which replaces an older session atomically.

    Args:
        path: the file; if the process is killed, the old file is unchanged.
        ctx: between two tokens, not in the middle of a step.
        sampler: the one in use; default greedy.

    Raises:
        BadInput: a step was interrupted, so that layers have read different tokens.
        Unsupported: a cache that cannot be saved.
        OSError: the file cannot be written.
    """
    layers = ctx.cache.stores
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
        kind = snapshot.kind_of(layer)
        described.append({"kind": kind, "settings": state.settings, "progress": state.progress})
        tensors |= {f"layer.{index}.{name}": x for name, x in state.tensors.items()}
    window = ctx.observation_window
    observed = None if window is None else window.state()
    for index, queries in (observed or {}).items():
        tensors |= {f"observed.{index}.{name}": x for name, x in _parts(queries, Tensor).items()}
    record = {
        **_identity(ctx),
        "sampler": _options(sampler),
        "next": None if ctx.next_token is None else asdict(ctx.next_token),
        "layers": described,
        "observed": observed and {str(i): _parts(q, float | int) for i, q in observed.items()},
    }
    write(Path(path), tensors, record)


def load_session(path: str | Path, ctx: Context) -> Sampler:
    """Restore a session into a context of the same model and options; what it held is removed.

    Returns:
        The sampler of the session, with the state of its random generator.

    Raises:
        BadInput: a file that is truncated, damaged, of another version or no session, another model
            or other options.  The context is then as it was, or empty.
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
    _check_identity(path, record, ctx)
    layers, saved = ctx.cache.stores, record["layers"]
    states = [CacheState(part["settings"], part["progress"], {}) for part in saved]
    for layer, part, state in zip(layers, saved, states, strict=True):
        snapshot.check(layer, part["kind"], state)
    sampler = Sampler(**record["sampler"])
    sampler.restore(file.tensors("sampler")[""].clone())
    tokens = file.tensors("tokens")[""].tolist()
    observed: dict[int, ObservedQueries] | None = None
    if record["observed"] is not None:
        observed = {int(i): _queries(file, i, x, ctx) for i, x in record["observed"].items()}
    unread = record["next"]
    try:
        for index, (layer, part) in enumerate(zip(layers, saved, strict=True)):
            state = states[index]._replace(tensors=file.tensors(f"layer.{index}."))
            snapshot.restore(layer, part["kind"], state, ctx.model.device)
    except BadInput:
        ctx.reset()
        raise
    ctx.resume(tokens, unread and NextToken(**unread), observed)
    return sampler


def _parts(queries: ObservedQueries, kind: Any) -> dict[str, Any]:
    """The fields of observed queries that are of this type."""
    return {name: x for name, x in queries._asdict().items() if isinstance(x, kind)}


def _queries(file: SessionFile, i: str, numbers: dict[str, Any], ctx: Context) -> ObservedQueries:
    """Observed queries of layer i, copied, because tensors of the file are memory-mapped."""
    tensors = file.tensors(f"observed.{i}.")
    copied = {name: x.to(ctx.model.device, copy=True) for name, x in tensors.items()}
    return ObservedQueries(**copied, **numbers)


def _identity(ctx: Context) -> dict[str, Any]:
    """What cached keys depend on, as JSON."""
    return {
        "model": {**_facts(ctx.model.facts), **ctx.model.identity()},
        "params": _params(ctx.params),
    }


def _facts(facts: ModelFacts) -> dict[str, Any]:
    """The facts that caches depend on; weights have a fingerprint of their own."""
    values = {f.name: getattr(facts, f.name) for f in fields(facts)}
    for name in ("name", "n_ctx_train", "softcap", "learned_sinks"):
        del values[name]
    return {**values, "dtype": str(facts.dtype), "windows": list(facts.windows)}


def _params(params: ContextParams) -> dict[str, Any]:
    values = {f.name: getattr(params, f.name) for f in fields(params)}
    pattern = params.sparse
    return {**values, "sparse": None if pattern is None else str(pattern)}


def _options(sampler: Sampler) -> dict[str, Any]:
    return {f.name: getattr(sampler, f.name) for f in fields(sampler) if f.init}


def _check_identity(path: Path, record: dict[str, Any], ctx: Context) -> None:
    """Raise BadInput where the session belongs to another model or to other options."""
    here = _identity(ctx)
    for name, value in here["model"].items():
        there = record["model"].get(name)
        if there != value:
            raise BadInput(
                f"{path} was saved with another model: its {name} is {there}, this model has "
                f"{value}. Load the model it was saved with."
            )
    scaled = ctx.params.rope_scaling_type is not None  # the scaling factor may follow n_ctx
    changeable = _CHANGEABLE if scaled else (*_CHANGEABLE, "n_ctx")
    for name, value in here["params"].items():
        there = record["params"].get(name)
        if name not in changeable and there != value:
            raise BadInput(
                f"{path} was saved with {name}={there!r}, this context has {value!r}. "
                f"Give {name} as it was, or start a new session."
            )
