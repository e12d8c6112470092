"""Sessions: a context saved to a file and restored exactly.

Saved are the caches of all layers, their tokens, the token chosen but not yet read, the sampler
with the state of its random generator, and what cached keys depend on: a fingerprint of the
weights, the config, the rotary positions, and the options.  A session is restored only where all of
that is the same.  Everything is built beside the context and takes its place at once: a session
that is refused leaves the context as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from saccade.cache import LayerCache, snapshot
from saccade.cache.base import CacheState
from saccade.cache.make import STORAGE
from saccade.compress import ObservedQueries
from saccade.core import BadInput, Unsupported
from saccade.runtime.cached_text import CachedText
from saccade.runtime.context import Context
from saccade.runtime.held import Held, NextToken, Observed
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
_CONTRADICTIONS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What building a context from contents that contradict each other may raise."""


def save_session(
    path: str | Path,
    ctx: Context,
    sampler: Sampler | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a context to a file, which replaces an older session atomically.

    Args:
        path: the file; if the process is killed, the old file is unchanged.
        ctx: between two tokens; after an interrupt it is what `ctx.tokens` says.
        sampler: the one in use; default greedy.
        extra: JSON that travels with it; `SessionFile(path).record["extra"]` reads it.

    Raises:
        BadInput: other code interrupted in the middle of a step of its own, so that layers have
            read different tokens.
        Unsupported: a cache that cannot be saved.
        OSError: the file cannot be written.
    """
    held, layers = ctx.text.held, ctx.cache.stores
    if {layer.seen for layer in layers} != {held.length}:
        raise BadInput(
            "this context was interrupted in the middle of a step and cannot be saved: its layers "
            "have read different tokens. The session on disk is as it was."
        )
    sampler = sampler or Sampler()
    tokens = torch.tensor(ctx.tokens, dtype=torch.int64)
    tensors: dict[str, Tensor] = {"tokens": tokens, "sampler": sampler.state()}
    logits = None if held.next_token is not None else ctx.text.next_logits()
    if logits is not None and len(logits) == ctx.model.facts.vocab_size:
        tensors["logits"] = logits
    described: list[dict[str, Any]] = []
    for index, layer in enumerate(layers):
        state = layer.state()
        kind = snapshot.kind_of(layer)
        described.append({"kind": kind, "settings": state.settings, "progress": state.progress})
        tensors |= {f"layer.{index}.{name}": x for name, x in state.tensors.items()}
    observed = held.observed
    for index, queries in (observed or {}).items():
        tensors |= {f"observed.{index}.{name}": x for name, x in _parts(queries, Tensor).items()}
    identity, key = _identity(ctx)
    record = {
        **identity,
        "reaches": ctx.cache.reaches,
        "sampler": _options(sampler),
        "extra": dict(extra or {}),
        "next": None if held.next_token is None else held.next_token._asdict(),
        "compressed_at": held.compressed_at,
        "layers": described,
        "observed": observed and {str(i): _parts(q, float | int) for i, q in observed.items()},
    }
    write(_path(path), tensors, record, key=key)


def load_session(path: str | Path, ctx: Context) -> Sampler:
    """Restore a session into a context of the same model and options; what it held is removed.

    Returns:
        The sampler of the session, with the state of its random generator.

    Raises:
        BadInput: a file that is truncated, damaged, of another version or no session, another model
            or other options.  The context is then as it was.
        OSError: the file cannot be read.
    """
    path = _path(path)
    file = SessionFile(path)
    identity, key = _identity(ctx)
    _check_identity(path, file.record, identity, ctx.params)
    like = _Like(ctx)
    try:
        text, sampler = _built(file, ctx, like)
    except (BadInput, Unsupported):
        raise
    except _CONTRADICTIONS as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise BadInput(
                f"{path} needs more memory than is free. Free some, or start a new session."
            ) from error
        raise BadInput(
            f"{path} has checksums that fit, but its contents contradict each other, so it was not "
            "written by saccade. Delete it to start anew."
        ) from error
    file.check_seal(key)
    ctx.text = text
    return sampler


def _path(path: str | Path) -> Path:
    if "\0" in str(path):
        raise BadInput(f"a file name cannot contain NUL, got {str(path)!r}. Give another name.")
    return Path(path)


class _Like:
    """What a context of these options holds after one token: shapes and dtypes, without memory."""

    def __init__(self, ctx: Context) -> None:
        probe = CachedText(ctx.model, ctx.params)
        probe.read(torch.zeros(1, dtype=torch.int64), wanted=1)
        self.layers = [_without_memory(layer.state()) for layer in probe.cache.stores]
        self.observed = probe.held.observed or {}


def _without_memory(state: CacheState) -> CacheState:
    return state._replace(tensors={name: x.to("meta") for name, x in state.tensors.items()})


def _built(file: SessionFile, ctx: Context, like: _Like) -> tuple[CachedText, Sampler]:
    """The caches and the sampler of a session, beside those of the context."""
    record, unread = file.record, set(file.names)
    vocab_size = ctx.model.facts.vocab_size
    sampler = Sampler(**record["sampler"])
    sampler.restore(file.tensor("sampler"))
    tokens = _checked(file.tensor("tokens"), vocab_size)
    text, saved = ctx.new_text(), record["layers"]
    room = max(ctx.n_ctx, 2 * len(tokens), ctx.reserve) + 4096
    for index, (layer, part, model) in enumerate(
        zip(text.cache.stores, saved, like.layers, strict=True)
    ):
        prefix = f"layer.{index}."
        settings = _settings(part["settings"], ctx.model.facts.dtype)
        state = CacheState(settings, part["progress"], {})
        snapshot.check(layer, part["kind"], state, len(tokens))
        state = state._replace(tensors=file.tensors(prefix))
        snapshot.check_tensors(part["kind"], state, model)
        snapshot.restore(layer, part["kind"], snapshot.bounded(state, room), ctx.model.device)
        unread -= {prefix + name for name in state.tensors}
    # Behind the loop: recurrent layers count no tokens, and say what the others have seen.
    if any(layer.seen != len(tokens) for layer in text.cache.stores):
        raise ValueError("a layer has seen other tokens")
    observed = _observed(file, record["observed"], like, ctx.model.device)
    _check_received(observed, text.cache.stores)
    following = _next_token(record["next"], vocab_size)
    logits = _logits(file, vocab_size, ctx.model.device)
    unread -= {"sampler", "tokens", "logits", *_names_of(observed)}
    at = record["compressed_at"]
    if unread or type(at) is not int or not 0 <= at <= len(tokens):
        raise ValueError(f"tensors that belong to nothing: {sorted(unread)}, or compressed at {at}")
    text.cache.reaches = _reaches(record["reaches"])
    text.restore(Held(tokens, len(tokens), following, None, logits, at, observed))
    return text, sampler


def _settings(saved: Mapping[str, Any], own: torch.dtype) -> dict[str, Any]:
    """Settings of a cache, where storage in the model's own dtype is None, as in a Context."""
    unsaid = saved.get("dtype") == str(own).removeprefix("torch.")
    return {**saved, "dtype": None} if unsaid else {**saved}


def _reaches(saved: Any) -> int | None:
    """Length of the text whose rotary tables the keys have."""
    if saved is not None and (type(saved) is not int or saved < 1):
        raise ValueError("the length of a text is a number of tokens")
    return saved


def _checked(tokens: Tensor, vocab_size: int) -> list[int]:
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        raise ValueError("tokens are int64 [n]")
    known = (tokens >= 0) & (tokens < vocab_size)
    if not known.all():
        raise ValueError("tokens outside the vocabulary")
    return tokens.tolist()


def _next_token(saved: Any, vocab_size: int) -> NextToken | None:
    if saved is None:
        return None
    following = NextToken(**saved)
    known = type(following.token) is int and 0 <= following.token < vocab_size
    if not known or type(following.shown) is not bool:
        raise ValueError("the next token is outside the vocabulary")
    return following


def _logits(file: SessionFile, vocab_size: int, device: torch.device) -> Tensor | None:
    if "logits" not in file.names:
        return None
    logits = file.tensor("logits")
    if logits.shape != (vocab_size,) or logits.dtype != torch.float32:
        raise ValueError("logits are float32 [vocab]")
    return logits.to(device)


def _observed(
    file: SessionFile, saved: Mapping[str, Any] | None, like: _Like, device: torch.device
) -> Observed | None:
    """The observation window, where a kv_policy was observing."""
    if saved is None:
        return None
    found: Observed = {}
    for name, numbers in saved.items():
        tensors = file.tensors(f"observed.{name}.")
        _check_queries(tensors, numbers, like.observed[int(name)])
        copied = {part: x.to(device, copy=True) for part, x in tensors.items()}
        found[int(name)] = ObservedQueries(**copied, **numbers)
    if found and set(found) != set(like.observed):
        raise ValueError("queries of other layers than are observed")
    return found


def _names_of(observed: Observed | None) -> list[str]:
    """Names in the file of the tensors of the observation window."""
    return [
        f"observed.{index}.{name}"
        for index, queries in (observed or {}).items()
        for name in _parts(queries, Tensor)
    ]


def _check_queries(
    tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], like: ObservedQueries
) -> None:
    """Raise ValueError unless these are the parts of queries that this layer can have observed."""
    if dict(numbers) != _parts(like, float | int) or tensors.keys() != _parts(like, Tensor).keys():
        raise ValueError("queries that were observed of another layer")
    for name, expected in _parts(like, Tensor).items():
        found = tensors[name]
        free = {"q": (2,), "blocks": (2, 3), "received": (2,)}.get(name, ())
        shape = [n if i in free else m for i, (n, m) in enumerate(
            zip(found.shape, expected.shape, strict=True)
        )]  # fmt: skip
        if list(found.shape) != shape or found.dtype != expected.dtype or not found.numel():
            raise ValueError("observed queries of another shape")
        if found.is_floating_point() and not found.isfinite().all():
            raise ValueError("observed queries that are no numbers")


def _check_received(observed: Observed | None, layers: Sequence[LayerCache]) -> None:
    """Raise ValueError unless each key of a layer has received something, and nothing else has."""
    for index, queries in (observed or {}).items():
        layer = layers[index]
        keys = getattr(layer, "num_slots", layer.seen)
        if queries.received is not None and queries.received.shape[2] != keys:
            raise ValueError("weights of other keys than are stored")


def _parts(queries: ObservedQueries, kind: Any) -> dict[str, Any]:
    """The fields of observed queries that are of this type."""
    return {name: x for name, x in queries._asdict().items() if isinstance(x, kind)}


def _identity(ctx: Context) -> tuple[dict[str, Any], bytes]:
    """What cached keys depend on, as JSON, and the key of the seal.

    The key is the fingerprint of the weights, of which the file only has a hash: a program without
    the weights cannot seal what it has changed.
    """
    model = dict(ctx.model.identity())
    key = model.get("weights", "").encode()
    if key:
        model["weights"] = hashlib.sha256(key).hexdigest()
    return {"model": {**_facts(ctx.model.facts), **model}, "params": _params(ctx.params)}, key


def _facts(facts: ModelFacts) -> dict[str, Any]:
    """The facts that caches depend on; weights have a fingerprint of their own."""
    values = {f.name: getattr(facts, f.name) for f in fields(facts)}
    for name in _OTHERWISE_KNOWN:
        del values[name]
    return {**values, "dtype": str(facts.dtype), "windows": list(facts.windows)}


_OTHERWISE_KNOWN: Final = (
    *("name", "n_ctx_train", "softcap", "learned_sinks"),
    *("kv_shapes", "state_bytes", "positions"),
)
"""Facts that follow from the tensors of the caches, from the weights or from `Model.identity`."""


def _params(params: ContextParams) -> dict[str, Any]:
    values = {f.name: getattr(params, f.name) for f in fields(params)}
    pattern = params.sparse
    return {**values, "sparse": None if pattern is None else str(pattern)}


def _without_own_dtype(params: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Saved options like those of a Context, where storage in the model's own dtype is None."""
    stored = STORAGE.get(str(params.get("type_k")))
    return {**params, "type_k": None, "type_v": None} if str(stored) == dtype else params


def _options(sampler: Sampler) -> dict[str, Any]:
    return {f.name: getattr(sampler, f.name) for f in fields(sampler) if f.init}


def _check_identity(
    path: Path, record: dict[str, Any], here: dict[str, Any], params: ContextParams
) -> None:
    """Raise BadInput where the session belongs to another model or to other options."""
    saved = [record.get("model"), record.get("params")]
    if not all(isinstance(part, dict) for part in saved):
        raise BadInput(
            f"{path} does not say which model and options it belongs to, so it was not written by "
            "saccade. Delete it to start anew."
        )
    theirs = _without_own_dtype(record["params"], here["model"]["dtype"])
    scaled = params.rope_scaling_type is not None  # the scaling factor may follow n_ctx
    changeable = _CHANGEABLE if scaled else (*_CHANGEABLE, "n_ctx")
    for name in (*here["params"], *theirs):
        there, value = theirs.get(name), here["params"].get(name)
        if name not in changeable and there != value:
            raise BadInput(
                f"{path} was saved with {name}={there!r}, this context has {name}={value!r}. "
                f"Give {name} as it was, or start a new session."
            )
    for name in (*here["model"], *record["model"]):
        there, value = record["model"].get(name), here["model"].get(name)
        if there != value:
            raise BadInput(
                f"{path} was saved with another model: its {name} is {there}, this model has "
                f"{value}. Load the model it was saved with."
            )
